"""The programs of `sf_jax.generate`, described by shapes, without reading any weights."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.diffusion import solvers
from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import programs, text_encoder
from sf_jax.inference.decoders import Decoder, VaeDecoder, column_axes
from sf_jax.inference.job import Job
from sf_jax.inference.layers import Videos, fuses, layers_apart
from sf_jax.inference.lengths import latent_frames
from sf_jax.inference.load import VAES
from sf_jax.inference.sampling import Sampling
from sf_jax.models import eight_bit, partition, slot_cache, tiny_vae, umt5, vae, wan
from sf_jax.models.slots import unstack_layers
from sf_jax.parallel.mesh import check_mesh, check_tokens, make_mesh, videos_apart
from sf_jax.parallel.params import GENERATION, tree_shardings
from sf_jax.perf.chips import Chip
from sf_jax.perf.compile import Call, expected_kernel
from sf_jax.training.abstract import bytes_per_device
from sf_jax.training.programs import matmul_flops
from sf_jax.weights import hub
from sf_jax.weights.eight_bit import quantized_shapes
from sf_jax.weights.folders import find_model
from sf_jax.weights.networks import network_kind, read_sizes

SIZES = {"1.3B": wan.wan_1_3b, "14B": wan.wan_14b}  # model names that `generate --compile_only` accepts
WAN_FACTORS = (4, 8)
TEXT, PROMPT, CHUNK, STEP = "text encoder", "prompt to keys and values", "one chunk", "one step of the solver"
FIRST, LATER = "first frame to pixels", "later frame to pixels"
EXAMPLE_LAYERS = 1


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation to compile for, by default with one video per chip.

    Attributes:
      config: the transformer's sizes.
      rollout: chunks, window and denoising steps; None for a bidirectional network.
      sampling: size of the videos, and the solver if there is one.
      decoder: the decoder, with shapes in place of parameters; None to stop at the latents.
      factors: pixel frames per latent frame (except the first), and pixels per latent position along each side.
      text: sizes of the text encoder; None if prompts need no large one.
      apart: whether every layer has its own parameters; None chooses as `load_pipeline` does.
      mesh: how chips share a video, from `mesh_sizes`.
      quantize: type of the weights, one of `eight_bit.DTYPES`; None is the compute type.
      cache_dtype: type of cached keys and values, one of `kv_cache.DTYPES`; None is the compute type.
    """

    config: wan.WanConfig
    rollout: ro.RolloutConfig | None
    sampling: Sampling
    decoder: Decoder | None = None
    factors: tuple[int, int] = WAN_FACTORS
    text: umt5.Umt5Config | None = None
    apart: bool | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    quantize: str | None = None
    cache_dtype: str | None = None

    @property
    def many(self) -> tuple | None:
        """(solver, guidance) of a many-step network, else None."""
        return None if self.sampling.solver is None else (self.sampling.solver, self.sampling.guidance)

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return latent_frames(self.sampling.frames, self.factors[0])

    @property
    def size(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame."""
        height, width = (side // self.factors[1] for side in (self.sampling.height, self.sampling.width))
        return height, width, self.config.channels

    @property
    def seen(self) -> int:
        """Cached latent frames that a chunk attends to once the cache is full."""
        past = self.rollout.chunks(self.frames)[1]
        frames = sum(past[:-1])
        return frames if self.rollout.window is None else min(frames, self.rollout.window - self.rollout.chunk)

    @property
    def evaluations(self) -> int:
        """Network calls for one chunk of a few-step student, including the clean pass."""
        return len(self.rollout.steps) + (self.rollout.context == "clean")


def data_mesh(devices: list) -> Mesh:
    """A mesh of devices with one video each."""
    return make_mesh({}, devices)


def device_mesh(what: Generation, devices: list) -> Mesh:
    """A mesh of devices, each with one video or a part of one.

    Raises:
      ValueError: if the devices, the network or its frames cannot be split as requested.
    """
    mesh = make_mesh(what.mesh, devices)
    check_mesh(mesh, what.config)
    check_tokens(mesh, *what.config.grid(*what.size[:2]))
    return mesh


def calls(what: Generation, mesh: Mesh, chip: Chip) -> Iterator[Call]:
    """The calls of a generation, in order; the call of a chunk is one at a full cache."""
    shapes = _Shapes(what, mesh, chip)
    yield from shapes.text_calls()
    yield shapes.chunk_call() if what.rollout is not None else shapes.step_call()
    yield from shapes.decode_calls()


class _Shapes:
    """Shapes and shardings of a generation's arrays on a mesh."""

    def __init__(self, what: Generation, mesh: Mesh, chip: Chip):
        self.what, self.mesh, self.batch = what, mesh, videos_apart(mesh)
        self.kernel = expected_kernel(what.config, chip.platform)
        products = what.quantize is not None and eight_bit.multiplies(what.quantize, mesh.devices.flat[0])
        shapes = self._typed(wan.param_shapes(what.config))
        shapes = self._split(jax.eval_shape(functools.partial(quantized_shapes, what.quantize, products), shapes))
        config = what.config
        if what.rollout is not None:
            apart, sampling = what.apart, what.sampling
            videos = Videos(1, sampling.frames, sampling.height, sampling.width)
            if apart is None:
                with jax.set_mesh(mesh):
                    apart = layers_apart(config, shapes, what.rollout, chip.memory, videos, what.many is not None)
            if apart:
                config = dataclasses.replace(config, scan_layers=False)
                with jax.set_mesh(mesh):
                    fuse = fuses(mesh)
                shapes = self._split(jax.eval_shape(functools.partial(unstack_layers, fuse=fuse), shapes))
        self.model, self.params = wan.WanTransformer(config), shapes
        self.prompts = self.batch * (1 if what.many is None else 2)  # with guidance, a negative prompt for each
        self.prompt = self._shape(self.prompts, config.text_len, config.text_dim, dtype=jnp.dtype(config.dtype))
        text = jax.eval_shape(lambda p, t: programs.encode_text(self.model, p, t), self.params, self.prompt)
        self.text = self._named(text, None, "batch", None, "features", None)
        self.cache = self.stream = self.decoder = ()
        if what.rollout is not None:
            with jax.set_mesh(mesh):
                empty = jax.eval_shape(lambda: self._empty(self.model))
            self.cache = rollout_cache.by_axes(self._named, empty)
        if what.decoder is not None:
            self.decoder = self._put(self._typed(what.decoder))
            stream = jax.eval_shape(lambda: self.decoder.init_cache(self.batch, *what.size[:2]))
            self.stream = jax.tree.map(lambda a: self._named(a, *column_axes(a)), stream)

    def _typed(self, tree):
        """Converts float32 parameters to the compute type."""
        dtype = jnp.dtype(self.what.config.dtype)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype if a.dtype == jnp.float32 else a.dtype), tree)

    def _put(self, tree, *axes):
        spread = NamedSharding(self.mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spread), tree)

    def _split(self, shapes, mesh=None):
        """Adds the shardings that `load_pipeline` uses to parameters."""
        places = tree_shardings(shapes, mesh or self.mesh, GENERATION)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)

    def _named(self, tree, *names):
        """Adds the shardings of arrays whose axes have names in `partition.AXES`."""
        with jax.set_mesh(self.mesh):
            return jax.tree.map(lambda a: self._put(a, *partition.spec(a.shape, *names)), tree)

    def _empty(self, model):
        what = self.what
        rest = (what.frames, what.size, what.cache_dtype, what.many is not None)
        return programs.empty_cache(model, what.rollout, self.prompts, *rest)

    def _shape(self, *sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(self.mesh, PartitionSpec("data")))

    def _others(self, *own) -> int:
        """Bytes of chip memory held by arrays other than a program's arguments `own`."""
        everything = (self.params, self.text, self.cache, self.decoder, self.stream)
        return bytes_per_device([tree for tree in everything if not any(tree is mine for mine in own)])

    def text_calls(self) -> Iterator[Call]:
        """The text encoder, and the transformer's keys and values of its output."""
        config = self.what.text
        if config is not None:
            shared = self.batch < self.mesh.size
            mesh = text_encoder.encoder_mesh(list(self.mesh.devices.flat), config if shared else None)
            params = self._split(self._typed(umt5.param_shapes(config)), mesh)
            where = NamedSharding(mesh, PartitionSpec("data"))
            size = (mesh.shape["data"], self.what.config.text_len)
            ids = jax.ShapeDtypeStruct(size, jnp.int32, sharding=where)
            arguments = (config, params, ids, ids)
            flops = _flops(text_encoder.embed_tokens, arguments)
            yield Call(TEXT, text_encoder.embed_tokens, arguments, flops, mesh=mesh)
        arguments = (self.model, self.params, self.prompt)
        beside = self._others(self.params, self.text)
        yield Call(PROMPT, programs.encode_text, arguments, _flops(programs.encode_text, arguments), beside=beside)

    def _source(self) -> tuple:
        key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
        return key, self._shape(self.batch, dtype=jnp.int32), number

    def chunk_call(self) -> Call:
        """A chunk at a full cache."""
        what, number = self.what, jax.ShapeDtypeStruct((), jnp.int32)
        place = (number, number, jax.ShapeDtypeStruct((), bool))
        size = (what.rollout.chunk, *what.size)

        def arguments(model, params, cache):
            return (model, what.rollout, what.many, size, params, self.text, cache, self._source(), place)

        trips = 1.0 if what.many else float(what.evaluations)
        # At a full cache the sink has been written, and the clean pass skips most of the last layer.
        skipped = (what.rollout.context == "clean") / trips
        shares = {wan.UNLESS_KEYS_ONLY: 1.0 - skipped, slot_cache.WHILE_SINK_GROWS: 0.0}
        # FLOPs are counted with attention written as matmuls.
        plain = wan.WanTransformer(dataclasses.replace(self.model.config, attention="whole"))
        cache = jax.eval_shape(lambda: self._empty(plain))
        flops = _flops(programs.next_chunk, arguments(plain, self.params, cache), trips, shares)
        return Call(
            name=CHUNK,
            function=programs.next_chunk,
            arguments=arguments(self.model, self.params, self.cache),
            flops=flops,
            trips=trips,
            branch="largest",
            cached=self._cached(),
            shares=shares,
            kernel=self.kernel,
            beside=self._others(self.params, self.text, self.cache),
        )

    def _cached(self) -> dict[int, int]:
        """Elements and rows of arrays that hold the cached keys or values that a chunk sees, for one layer or all."""
        what, config = self.what, self.what.config
        tokens, own = math.prod(config.grid(*what.size[:2])), _shard_shape(self.cache.k)
        heads_first = getattr(self.cache, "heads_first", False)
        videos, dim = own[-4], own[-1] * (own[-3] if heads_first else own[-2])
        frames = {what.seen, self.cache.capacity}
        rows = {tokens * count for base in frames for count in (base, base + what.rollout.chunk) if count}
        rows.add(own[-2] if heads_first else own[-3])  # with the padding of slots
        return {layers * videos * count * dim: count for count in rows for layers in (1, config.num_layers)}

    def step_call(self) -> Call:
        """A guided solver step of a bidirectional network on a whole video."""
        noise = self._shape(self.batch, self.what.frames, *self.what.size)
        state = jax.eval_shape(solvers.start, noise)
        state = jax.tree.map(lambda a: self._put(a, *(("data",) if a.ndim else ())), state)
        row = tuple(column[0] for column in solvers.rows(self.what.sampling.solver))
        guidance = self.what.sampling.guidance

        def arguments(model):
            return (model, guidance, self.params, self.text, state, row)

        plain = wan.WanTransformer(dataclasses.replace(self.what.config, attention="whole"))
        flops = _flops(programs.bidirectional_step, arguments(plain))
        beside = self._others(self.params, self.text)
        return Call(STEP, programs.bidirectional_step, arguments(self.model), flops, kernel=self.kernel, beside=beside)

    def decode_calls(self) -> Iterator[Call]:
        """The decoder, for a video's first latent frame and for later ones."""
        if self.what.decoder is None:
            return
        latents = self._shape(self.batch, 1, *self.what.size)
        streams = {FIRST: self.stream}
        if hasattr(self.stream, "started"):
            streams[LATER] = self.stream.replace(started=True)
        for name, stream in streams.items():
            arguments = (self.decoder, stream, latents)
            beside = self._others(self.decoder, self.stream)
            yield Call(name, programs.decode, arguments, _flops(programs.decode, arguments), beside=beside)


def _shard_shape(keys) -> tuple[int, ...]:
    """Shape of a device's shard of cached keys, which may be `eight_bit.Scaled`."""
    numbers = jax.tree.leaves(keys)[0]
    return numbers.sharding.shard_shape(numbers.shape)


def _flops(function: Callable, arguments: tuple, trips: float = 1.0, shares: Mapping | None = None) -> float:
    """Matmul operations at a full cache; traced without a mesh, so that attention does not use a kernel."""
    return matmul_flops(function.trace(*arguments).jaxpr, trips, largest=True, shares=shares)


def wan_decoder(kind: str, dtype: str) -> VaeDecoder | None:
    """The decoder "wan", "tiny" or "none", or that of a VAE file, with shapes in place of parameters.

    Raises:
      ValueError: if the file does not hold a VAE.
    """
    if VAES.get(kind, kind) is None:
        return None
    if (VAES.get(kind) or network_kind(kind, ("vae", "tiny_vae"))) == "tiny_vae":
        config = tiny_vae.TinyVaeConfig(dtype=dtype)
        return VaeDecoder(tiny_vae.TinyVaeDecoder(config), tiny_vae.param_shapes(config))
    config = vae.wan_vae(dtype=dtype)
    return VaeDecoder(vae.WanVae(config), {"decoder": vae.param_shapes(config)["decoder"]})


def generation_of(job: Job) -> Generation:
    """The generation that `sf_jax.generate` would run for a job; reads only the sizes from weight files.

    Args:
      job: the job, with `abstract` set. Its model may be one of `SIZES`, or a folder with nothing but a config.json.

    Raises:
      ValueError: if the sizes are unknown, or the job uses options that cannot be described.
    """
    for field in ("image", "video", "schedule", *(("text_encoder", "tokenizer", "lora") if job.is_wan else ())):
        if getattr(job, field):
            raise ValueError(f"{field} is given: compile_only describes videos from prompts alone; leave it out")
    if not job.is_wan:
        pipe = job.digits_pipeline()
        decoder = jax.eval_shape(lambda: pipe.decoder)
        factors = (pipe.temporal_factor, pipe.spatial_factor)
        narrow = {"quantize": job.quantize, "cache_dtype": job.cache_dtype}
        return Generation(pipe.transformer.config, pipe.rollout, pipe.sampling, decoder, factors, **narrow)
    dtype = job.dtype or "bfloat16"  # as on every accelerator
    config = dataclasses.replace(_sizes_of(job), dtype=dtype, remat="none")
    solver = None if job.few_steps else Solver(job.solver, job.shift or 5.0, job.steps or 50)
    sampling = Sampling(**job.sampling_changes | {"frames": job.wan_frames, "solver": solver})
    text = umt5.umt5_xxl(dtype=dtype)
    return Generation(
        config=config,
        rollout=job.wan_rollout,
        sampling=sampling,
        decoder=wan_decoder("wan" if job.vae is None else job.vae, dtype),
        text=text if text.dim == config.text_dim else None,  # sizes of other encoders are only in their files
        mesh=job.mesh_sizes,
        quantize=job.quantize,
        cache_dtype=job.cache_dtype,
    )


def _sizes_of(job: Job) -> wan.WanConfig:
    """Sizes of the transformer, from the name of a published size, a folder or a file."""
    if job.transformer is not None:
        return read_sizes(Path(job.transformer), scaled=True)
    if job.model in SIZES:
        return SIZES[job.model]()
    if job.model is None and job.checkpoint is not None:
        return read_sizes(Path(job.checkpoint), job.part)
    known = f"a folder with a config.json, or one of {', '.join(SIZES)}"
    if job.model is None:
        raise ValueError(f"model is missing: give {known}")
    if hub.parse(job.model) is None and not Path(job.model).exists():
        raise ValueError(f"model {job.model} does not exist: give {known}")
    config = find_model(job.model, ()).config
    if config is None:
        raise ValueError(f"model folder {job.model} has no config.json of a transformer: give {known}")
    return config
