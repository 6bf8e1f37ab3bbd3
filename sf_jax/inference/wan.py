"""Video from Wan's networks: a causal one streams chunk by chunk, a bidirectional one makes it whole in many steps.

Source: official `CausalInferencePipeline`, `CausalDiffusionInferencePipeline` and `wan/text2video.py`. Every device has
a video of its own, so a video does not depend on how many there are.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sf_jax import rollout as ro
from sf_jax.diffusion import solvers
from sf_jax.diffusion.solvers import Solver, guided
from sf_jax.many_step import guided_chunk
from sf_jax.models.patch_codec import to_uint8
from sf_jax.models.streaming import empty_decode_cache
from sf_jax.models.wan import WanConfig, WanTransformer, bidirectional_layout
from sf_jax.rng import Purpose, key_for

TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a video is made.

    Attributes:
      frames: latent frames of the whole video, given ones included.
      height: latent rows.
      width: latent columns.
      seed: seed of the noise.
      solver: many guided steps; None is the few steps of a distilled student.
      guidance: scale of the many steps.
    """

    frames: int = 21
    height: int = 60
    width: int = 104
    seed: int = 0
    solver: Solver | None = None
    guidance: float = 6.0


def latent_frames(frames: int) -> int:
    """Latent frames of a video of `frames` pixel frames.

    Raises:
      ValueError: unless it is 1 + a multiple of 4.
    """
    if frames < 1 or (frames - 1) % TEMPORAL_FACTOR:
        near = max(1, (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
        raise ValueError(
            f"frames is {frames}: it must be 1 + a multiple of {TEMPORAL_FACTOR}, such as {near} or "
            f"{near + TEMPORAL_FACTOR}"
        )
    return (frames - 1) // TEMPORAL_FACTOR + 1


def check_frames(config: ro.RolloutConfig, frames: int, given: int = 0) -> None:
    """Refuses a number of latent frames that a causal network cannot make, in terms of the video's frames.

    Args:
      config: the chunks.
      frames: latent frames, the given ones included.
      given: latent frames to start from.

    Raises:
      ValueError: naming lengths that would do.
    """

    def fits(count):
        try:
            config.chunks(count - given, given)
        except ValueError:
            return False
        return given < count <= ro.MAX_FRAMES

    if fits(frames):
        return
    nearby = sorted((n for n in range(1, ro.MAX_FRAMES + 1) if fits(n)), key=lambda n: abs(n - frames))[:2]
    allowed = " or ".join(str((n - 1) * TEMPORAL_FACTOR + 1) for n in sorted(nearby)) or "nothing, with this many given"
    raise ValueError(
        f"frames is {(frames - 1) * TEMPORAL_FACTOR + 1} ({frames} latent frames, {given} of them given): with chunks "
        f"of {config.chunk} latent frames the nearest that can be made: {allowed}"
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def student_chunk(model, config, size, params, text, cache, key, examples, start, chunk):
    """The next chunk of a few-step student, of `size` (n, H, W, C); returns the new cache and the latents."""
    noise = _chunk_noise(key, examples, chunk, size)
    last, draw = len(config.steps) - 1, ro.key_draw(key, examples)
    return ro.generate_chunk(model, config, params, text, cache, noise, start, chunk, last, draw)[:2]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=7)
def _diffusion_chunk(model, config, size, solver, guidance, params, text, cache, key, examples, start, chunk):
    noise = _chunk_noise(key, examples, chunk, size)
    return guided_chunk(model, config, params, text, cache, noise, start, solver, guidance)


def _chunk_noise(key, examples, chunk, size):
    # behind the numbers that `key_draw` folds in for the steps
    key = jax.random.fold_in(jax.random.fold_in(key, ro.MAX_FRAMES), chunk)
    return ro.example_noise(key, examples, (examples.shape[0], *size))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _given_chunk(model, config, params, text, cache, clean, start):
    clean = jnp.repeat(clean, text.k.shape[1] // clean.shape[0], axis=0)
    return ro.write_chunk(model, config, params, text, cache, clean, start)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _teacher_step(model, guidance, params, text, state, row):
    layout = bidirectional_layout(state.x.shape[1])

    def flow(x, t):
        t = jnp.full((2 * x.shape[0], 1), t, jnp.float32)
        both = model.apply({"params": params}, jnp.repeat(x, 2, axis=0), t, text, layout)
        return guided(both[::2], both[1::2], guidance)

    return solvers.step(state, row, flow)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(model: WanTransformer, params: dict, text: jax.Array):
    """Cross-attention keys and values of prompt embeddings [B, S, text_dim]."""
    return model.apply({"params": params}, text, method="encode_text")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(vae, params, cache, latents):
    """The pixels, uint8, of the next latent frame [B, 1, H, W, C]; returns the decoder's new cache and the pixels."""
    cache, pixels = vae.apply({"params": params}, cache, latents, method="decode_chunk")
    return cache, to_uint8(pixels)


@functools.partial(jax.jit, static_argnums=0)
def encode_video(vae: nn.Module, params: dict, pixels: jax.Array) -> jax.Array:
    """Latents [B, F, H, W, C] of uint8 pixels [B, 4F - 3, 8H, 8W, 3]."""
    return vae.apply({"params": params}, pixels.astype(jnp.float32) / 127.5 - 1.0, method="encode")


@dataclasses.dataclass(frozen=True, eq=False)
class WanPipeline:
    """A transformer with a decoder, on the devices of a mesh.

    Attributes:
      config: sizes of the transformer.
      params: its parameters.
      rollout: chunks, window and few steps of a causal network; None for a bidirectional one.
      vae: decoder of the latents, `WanVae` or `TinyVaeDecoder`; None to stop at the latents.
      vae_params: its parameters.
      mesh: devices over which the videos of a batch are spread (axis `data`); None for the default device alone.
    """

    config: WanConfig
    params: dict
    rollout: ro.RolloutConfig | None
    vae: nn.Module | None = None
    vae_params: dict | None = None
    mesh: Mesh | None = None

    @property
    def model(self) -> WanTransformer:
        """The transformer."""
        return WanTransformer(self.config)

    def place(self, batch: jax.Array | np.ndarray) -> jax.Array:
        """Spreads an array over the devices along its first axis, that of the videos."""
        if self.mesh is None:
            return jnp.asarray(batch)
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def run(self, program, *arguments):
        """Calls a program under the mesh, which the attention kernels look for."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return program(*arguments)

    def stream(
        self,
        text: np.ndarray,
        negative: np.ndarray | None,
        examples: np.ndarray,
        sampling: Sampling,
        initial: np.ndarray | None = None,
    ) -> Iterator[tuple[jax.Array, jax.Array | None]]:
        """Makes videos, a chunk at a time; on a GPU or TPU the next is already on its way when one is given out.

        Args:
          text: [B, S, text_dim] prompt embeddings.
          negative: [1, S, text_dim] embedding of the negative prompt; None where no solver is asked for.
          examples: int32 [B], numbers of the videos: noise depends on them and the seed alone.
          sampling: how.
          initial: float32 [B, I, H, W, C] latents to go on from (causal networks).

        Yields:
          Latents [B, n, H, W, C] and uint8 pixels [B, m, 8H, 8W, 3] (None without a decoder); given frames come too.
          A bidirectional network gives all latents at once.

        Raises:
          ValueError: if the network cannot make such a video.
        """
        self._check(sampling, initial)
        latents = self._latents(text, negative, examples, sampling, initial)
        ready = collections.deque()
        for item in self._decoded(latents, len(examples), sampling):
            ready.append(item)
            # a CPU would run both at once, each at half its speed
            if jax.default_backend() == "cpu" or len(ready) > 1:
                yield ready.popleft()
        yield from ready

    def _check(self, sampling, initial):
        self.config.grid(sampling.height, sampling.width)
        if self.rollout is None:
            if initial is not None:
                raise ValueError("a bidirectional network cannot go on from given frames: give a causal checkpoint")
            if sampling.solver is None:
                raise ValueError("a bidirectional network needs many steps: choose the solver unipc, dpm++ or euler")
            return
        check_frames(self.rollout, sampling.frames, 0 if initial is None else initial.shape[1])

    def _decoded(self, latents, batch, sampling):
        """Adds the pixels to every chunk of latents."""
        cache = None
        if self.vae is not None:
            cache = empty_decode_cache(self.vae, batch, sampling.height, sampling.width)
            cache = jax.tree.map(self.place, cache)
        for chunk in latents:
            if self.vae is None:
                yield chunk, None
                continue
            # Frame by frame: chunks of all sizes share two programs, and compilers take minutes for a large decoder.
            pixels = []
            for i in range(chunk.shape[1]):
                frame = jax.lax.dynamic_slice_in_dim(chunk, i, 1, axis=1)
                cache, new = self.run(decode, self.vae, self.vae_params, cache, frame)
                pixels.append(new)
            yield chunk, jnp.concatenate(pixels, axis=1)

    def _latents(self, text, negative, examples, sampling, initial):
        key = key_for(sampling.seed, 0, Purpose.SAMPLE)
        examples = self.place(np.asarray(examples, np.int32))
        if sampling.solver is not None:
            text = np.stack([text, np.broadcast_to(negative, text.shape)], axis=1).reshape(-1, *text.shape[1:])
        kv = self.run(encode_text, self.model, self.params, self.place(text))
        if self.rollout is None:
            yield self._teacher(kv, examples, key, sampling)
            return
        cache = self._empty_cache(kv.k.shape[1], sampling)
        given = 0 if initial is None else initial.shape[1]
        first, chunks = self.rollout.chunks(sampling.frames - given, given)
        start = 0
        for size in first:
            clean = self.place(np.asarray(initial[:, start : start + size], np.float32))
            cache = self.run(_given_chunk, self.model, self.rollout, self.params, kv, cache, clean, start)
            start += size
            yield clean
        for chunk, size in enumerate(chunks):
            shape = (size, sampling.height, sampling.width, self.config.channels)
            common = (self.params, kv, cache, key, examples, start, chunk)
            if sampling.solver is None:
                cache, clean = self.run(student_chunk, self.model, self.rollout, shape, *common)
            else:
                how = (sampling.solver, sampling.guidance)
                cache, clean = self.run(_diffusion_chunk, self.model, self.rollout, shape, *how, *common)
            start += size
            yield clean

    def _empty_cache(self, batch, sampling):
        """An empty cache, made on its devices; `sampling.frames` is what it must hold."""
        make = functools.partial(
            ro.empty_cache, self.model, self.rollout, batch, sampling.frames, sampling.height, sampling.width
        )
        if self.mesh is None:
            return jax.jit(make)()
        spread, whole = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((None, "data"), ()))
        like = jax.eval_shape(make)
        return jax.jit(make, out_shardings=like.replace(k=spread, v=spread, frames=whole))()

    def _teacher(self, kv, examples, key, sampling):
        shape = (examples.shape[0], sampling.frames, sampling.height, sampling.width, self.config.channels)
        noise = jax.jit(ro.example_noise, static_argnums=2)(key, examples, shape)
        state = jax.jit(solvers.start)(noise)
        table = solvers.rows(sampling.solver)
        for i in tqdm(range(sampling.solver.steps), desc=sampling.solver.name, unit="step"):
            row = tuple(column[i] for column in table)
            state = self.run(_teacher_step, self.model, sampling.guidance, self.params, kv, state, row)
            jax.block_until_ready(state.x)  # else the bar would be that of the dispatch
        return state.x
