"""Compiles full-size generation ahead of time for TPUs that are not there, and says what memory a chip needs.

libtpu's compiler runs on any machine: `pip install "sf_jax[aot]"`, no TPU is needed.
"""

import dataclasses
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax.inference import programs
from sf_jax.inference.decoders import VaeDecoder
from sf_jax.inference.lengths import WAN_FACTOR, latent_frames
from sf_jax.inference.sampling import Sampling
from sf_jax.models import wan as transformer
from sf_jax.topology import tpu_devices

PROGRAMS = ("prompt to keys and values", "one chunk of the student", "first frame to pixels", "later frame to pixels")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program compiled for one topology.

    Attributes:
      program: what it does.
      arguments: bytes of a chip's arguments, parameters and caches included.
      temporary: bytes that it needs meanwhile, results that take no argument's place included.
      seconds: how long compiling took.
    """

    program: str
    arguments: int
    temporary: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of a chip while it runs."""
        return self.arguments + self.temporary


def tpu_mesh(topology: str) -> Mesh:
    """The mesh of a TPU slice such as "v5p:2x2x1", axis `data`.

    Raises:
      ValueError: if libtpu is missing or does not know the topology.
    """
    devices = tpu_devices(topology)
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def compile_generation(
    config: transformer.WanConfig,
    rollout: ro.RolloutConfig,
    vae: nn.Module,
    vae_shapes: dict,
    sampling: Sampling,
    mesh: Mesh,
    only: Sequence[str] = PROGRAMS,
) -> list[Compiled]:
    """Compiles what `VideoPipeline.stream` runs for a few-step student, a video per chip, all numbers bfloat16.

    Args:
      config: the transformer; `attention` must name the implementation ("splash"), as there is no TPU to choose for.
      rollout: how it generates.
      vae: the decoder.
      vae_shapes: its parameters' shapes.
      sampling: size of the videos.
      mesh: from `tpu_mesh`.
      only: which of `PROGRAMS`; the decoder takes a compiler minutes.
    """
    model, batch = transformer.WanTransformer(config), mesh.size

    def on_mesh(tree, *axes):
        spread = NamedSharding(mesh, PartitionSpec(*axes))

        def leaf(a):
            dtype = jnp.bfloat16 if a.dtype == jnp.float32 else a.dtype
            return jax.ShapeDtypeStruct(a.shape, dtype, sharding=spread)

        return jax.tree.map(leaf, tree)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))

    params = on_mesh(transformer.param_shapes(config))
    prompt = shape(batch, config.text_len, config.text_dim, dtype=jnp.bfloat16)
    text = on_mesh(jax.eval_shape(lambda p, t: programs.encode_text(model, p, t), params, prompt), None, "data")
    factor, frames = vae.config.spatial_factor, latent_frames(sampling.frames, WAN_FACTOR)
    size = (rollout.chunk, sampling.height // factor, sampling.width // factor, config.channels)
    cache = jax.eval_shape(lambda: ro.empty_cache(model, rollout, batch, frames, *size[1:3]))
    k, v = on_mesh((cache.k, cache.v), None, "data")
    cache = cache.replace(k=k, v=v, frames=on_mesh(cache.frames))
    key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    examples, latents = shape(batch, dtype=jnp.int32), shape(batch, 1, *size[1:])
    decoder = VaeDecoder(vae, on_mesh(vae_shapes))
    stream = on_mesh(jax.eval_shape(lambda: decoder.init_cache(batch, *size[1:3])), "data")
    source, place = (key, examples, number), (number, number, jax.ShapeDtypeStruct((), bool))
    calls = {
        PROGRAMS[0]: (programs.encode_text, model, params, prompt),
        PROGRAMS[1]: (programs.next_chunk, model, rollout, None, size, params, text, cache, source, place),
        PROGRAMS[2]: (programs.decode, decoder, stream, latents),
        PROGRAMS[3]: (programs.decode, decoder, stream.replace(started=True), latents),
    }
    with jax.set_mesh(mesh):
        return [_compile(name, *arguments) for name, arguments in calls.items() if name in only]


def _compile(name, program, *arguments) -> Compiled:
    began = time.perf_counter()
    memory = program.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + results
    return Compiled(name, memory.argument_size_in_bytes, temporary, time.perf_counter() - began)
