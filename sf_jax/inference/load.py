"""Loads pipelines from weight files: the embedded moving digits, and Wan2.1 with models distilled from it."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import quantization, sentencepiece
from sf_jax.inference.decoders import VaeDecoder, VaeEncoder
from sf_jax.inference.layers import Videos, device_memory, layers_apart, separated
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.sampling import Sampling
from sf_jax.inference.text_encoder import Umt5TextEncoder
from sf_jax.models import eight_bit
from sf_jax.models.kv_cache import DTYPES as CACHE_DTYPES
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.text import WordEmbedding
from sf_jax.models.tiny_vae import TinyVaeDecoder
from sf_jax.models.vae import WanVae
from sf_jax.models.wan import WanConfig, WanTransformer
from sf_jax.parallel.mesh import check_mesh, make_mesh, mesh_sizes
from sf_jax.parallel.params import GENERATION, tree_shardings
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import adapters, hub
from sf_jax.weights.adapter_list import Lora, as_loras
from sf_jax.weights.eight_bit import quantize_params, quantizer_for
from sf_jax.weights.folders import ModelFiles, find_model, find_tokenizer, find_weights, read_solver
from sf_jax.weights.networks import check_network, load_network, network_kind, read_sizes
from sf_jax.weights.package import SHIPPED, Package, check_told_sizes, load_package, read_header, shipped_path

VAES = {"wan": "vae", "tiny": "tiny_vae", "none": None}
NAMED_PARTS = ("transformer", "text_encoder", "tokenizer")  # options can name these, with or without a folder
# NVlabs/rcm's `net.` files lack their sampling settings; source: its Causal_rCM.md and inference scripts.
RCM = (
    "{} is of NVlabs/rcm and does not say how it generates: give {}. Of Causal-rCM's files c3-3 means chunks of 3 and "
    "c1-1 of 1, with the steps 1000,750,500,250; those of 2 steps have them in the first chunk, then 1000,500. "
    "Bidirectional rCM students cannot be sampled in few steps"
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
DIGITS_FRAMES, MANY_STEPS = 48, 24


@dataclasses.dataclass(frozen=True)
class WanOptions:
    """Options of `load_pipeline` for a model folder.

    Attributes:
      checkpoint: weights of a causal transformer, .pt or .safetensors; None is the folder's own bidirectional one.
      part: which network of a checkpoint with several; None is the averaged generator.
      vae: decoder: "wan", "tiny" (fast), or "none" to stop at the latents; or the file of a VAE of either kind.
      dtype: type of parameters and computation, "bfloat16" or "float32"; None is bfloat16, or float32 on a CPU.
      rollout: chunks, window and steps of a causal network; None reads them from the header of a file of sf_jax.train,
        and is chunks of 3 and the official steps for other files.
      encoder: whether to load the VAE's encoder, to continue an image or a video.
      keep_text_encoder: whether the text encoder (11 GB) stays in memory between prompts.
      scan_layers: whether a causal transformer scans over stacked layers (`WanConfig.scan_layers`). None is False if
        cuDNN's or Splash attention is used and the videos fit in memory that way, which is faster, and else True.
      videos: the videos that a device generates side by side, for which None chooses `scan_layers`.
      loras: adapters to merge into the transformer: paths, or pairs of a path and a scale (`adapter_list.as_loras`).
      devices: devices that share the videos of a batch equally; None is the default device only, or with `mesh` as many
        of this process's devices as it needs.
      mesh: how devices share a video, such as "tensor:2,context:2" or {"tensor": 2}; see docs/streaming.md.
      transformer: file of the bidirectional transformer, instead of the folder's; with a checkpoint it gives the sizes.
      text_encoder: file of the text encoder, instead of the folder's.
      tokenizer: its tokenizer.json, spiece.model or the folder of one, instead of the folder's; without either, the one
        in the text encoder's file.
      unread: whether to use zeros instead of all weights: for `sf_jax.warm`, which only compiles.
      quantize: "int8" or "fp8" for the transformer's weights (`eight_bit.LAYERS`); None keeps `dtype`.
      cache_dtype: type of a causal network's cached keys and values, one of `kv_cache.DTYPES`; None is `dtype`.
    """

    checkpoint: str | Path | None = None
    part: str | None = None
    vae: str | Path = "wan"
    dtype: str | None = None
    rollout: RolloutConfig | None = None
    encoder: bool = False
    keep_text_encoder: bool = False
    scan_layers: bool | None = None
    videos: Videos = Videos()
    loras: Sequence = ()
    devices: Sequence[jax.Device] | None = None
    mesh: str | Mapping[str, int] | None = None
    transformer: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    unread: bool = False
    quantize: str | None = None
    cache_dtype: str | None = None

    def __post_init__(self):
        """Validates the options."""
        check_eight_bit(self.quantize, self.cache_dtype)
        if self.dtype not in (None, "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}: it must be one of bfloat16, float32")
        is_file = Path(self.vae).suffix or Path(self.vae).exists() or hub.parse(str(self.vae))
        if self.vae not in VAES and not is_file:
            raise ValueError(f"vae is {self.vae!r}: it must be one of {', '.join(VAES)}, or a file")
        for name in ("checkpoint", *NAMED_PARTS):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: give a path or leave it out")
        object.__setattr__(self, "loras", as_loras(self.loras))
        if not isinstance(self.rollout, (RolloutConfig, type(None))):
            raise ValueError(f"rollout is {self.rollout!r}: it must be a RolloutConfig")
        if self.devices is not None and not (isinstance(self.devices, Sequence) and len(self.devices)):
            raise ValueError(f"devices is {self.devices!r}: give at least one, such as jax.local_devices()")
        if not isinstance(self.mesh, (str, Mapping, type(None))):
            raise ValueError(f"mesh is {self.mesh!r}: give axes with their sizes, such as 'tensor:2,context:2'")
        if not isinstance(self.videos, Videos):
            raise ValueError(f"videos is {self.videos!r}: it must be a Videos, such as Videos(frames=81)")
        self.device_mesh  # noqa: B018 (validates the sizes)
        if self.checkpoint is None:
            for name in ("part", "rollout", "scan_layers", "cache_dtype"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect without checkpoint: it is for causal networks")
            if self.encoder:
                raise ValueError("encoder has no effect without checkpoint: only causal networks go on from videos")

    @property
    def compute_dtype(self) -> str:
        """The type of parameters and computation."""
        return self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    @property
    def device_mesh(self) -> Mesh | None:
        """The mesh; None for the default device only.

        Raises:
          ValueError: if there are too few devices for `mesh`, or it has unknown axes.
        """
        if self.mesh is None and self.devices is None:
            return None
        return make_mesh({} if self.mesh is None else mesh_sizes(self.mesh), self.devices)

    @property
    def needed(self) -> tuple[str, ...]:
        """The required parts of the model folder."""
        parts = {"text_encoder", "tokenizer", VAES.get(self.vae), "vae" if self.encoder else None}
        return (*sorted(parts - {None}), *([] if self.checkpoint else ["transformer"]))


def load_pipeline(model: str | Path | None = None, checkpoint: str | Path | None = None, **options) -> VideoPipeline:
    """Loads a model.

    `load_pipeline()` is the student of moving digits that the package ships, and
    `load_pipeline("weights/Wan2.1-T2V-1.3B", checkpoint="self_forcing_dmd.pt")` is a student distilled from Wan.

    Args:
      model: a folder of Wan2.1, in the official or the diffusers layout, or its name on the Hugging Face hub; a
        .safetensors file of moving digits that training wrote; "student", "init" and "consistency" (few-step starts)
        or "teacher" for shipped ones. None is the shipped student, or no folder if `transformer` or `text_encoder` is
        given.
      checkpoint: with a folder, weights of a causal transformer; None is the folder's own bidirectional one.
      **options: with a folder, other fields of `WanOptions`; without one, only `loras` (adapters to merge), `quantize`
        and `cache_dtype`.

    Raises:
      ValueError: if a file is missing, damaged, or of another kind.
    """
    if not isinstance(model, (str, Path, type(None))) or model == "":
        raise ValueError(f"model is {model!r}: give a folder of Wan2.1 or a .safetensors file of moving digits")
    if not _is_wan(model, options):
        loras = as_loras(options.pop("loras", ()))
        narrow = {name: options.pop(name, None) for name in ("quantize", "cache_dtype")}
        for name in ({"checkpoint": checkpoint} if checkpoint is not None else {}) | options:
            raise ValueError(f"{name} is given without a model folder: it is for Wan")
        shipped_or_hub = model is None or str(model) in SHIPPED or hub.parse(str(model)) is not None
        if not shipped_or_hub and not Path(model).exists():
            raise ValueError(f"model {model} does not exist: give a folder of Wan2.1, or weights of moving digits")
        return load_digits(model, loras, **narrow)
    fields = {field.name for field in dataclasses.fields(WanOptions)}
    if set(options) - fields:
        raise ValueError(f"{sorted(set(options) - fields)[0]} is no option: options are {', '.join(sorted(fields))}")
    if checkpoint is not None:
        checkpoint = hub.local_file(checkpoint) if checkpoint != "" else ""
    return wan_pipeline(model, WanOptions(checkpoint=checkpoint, **options))


def _is_wan(model: str | Path | None, options: dict) -> bool:
    """Whether a model is one of Wan's: a folder, a repository on the hub, or named files of its parts."""
    if model is None:
        return any(name in options for name in NAMED_PARTS)
    if str(model) in SHIPPED:
        return False
    place = hub.parse(str(model))
    return Path(model).is_dir() if place is None else Path(place.path).suffix not in _WEIGHTS


def check_eight_bit(quantize: str | None, cache_dtype: str | None) -> None:
    """Validates the types of weights and caches."""
    for name, value, allowed in (("quantize", quantize, eight_bit.DTYPES), ("cache_dtype", cache_dtype, CACHE_DTYPES)):
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")
    if cache_dtype in eight_bit.DTYPES:
        eight_bit.library()


def load_digits(
    checkpoint: str | Path | None = None,
    loras: Sequence[Lora] = (),
    quantize: str | None = None,
    cache_dtype: str | None = None,
) -> VideoPipeline:
    """Loads a network of moving digits: a .safetensors file that training wrote, or a shipped one.

    Args:
      checkpoint: the file, or "student", "init", "consistency" or "teacher"; None is the shipped student.
      loras: adapters to merge into it.
      quantize: see `WanOptions`.
      cache_dtype: see `WanOptions`.

    Raises:
      ValueError: if the file is missing, damaged, or of another kind.
    """
    check_eight_bit(quantize, cache_dtype)
    checkpoint = "student" if checkpoint is None else checkpoint
    path = shipped_path(str(checkpoint)) if str(checkpoint) in SHIPPED else hub.local_file(checkpoint)
    package = load_package(path)
    package = dataclasses.replace(package, params=adapters.merge_params(package.params, package.config, loras))
    if cache_dtype is not None and package.kind == "teacher":
        raise ValueError(f"cache_dtype is {cache_dtype!r}: {checkpoint} is a bidirectional network and has no cache")
    quantizer = quantizer_for(quantize)
    package = dataclasses.replace(package, params=quantize_params(package.params, quantizer))
    pipe = digits_pipeline(package, f"checkpoint {checkpoint}")
    report = quantization.report(quantizer, package.config, pipe.params)
    return dataclasses.replace(pipe, adapters=adapters.describe(loras), quantization=report, cache_dtype=cache_dtype)


def digits_pipeline(package: Package, title: str = "package") -> VideoPipeline:
    """The pipeline of a network of moving digits, with their vocabulary and codec; `title` names it in errors.

    Raises:
      ValueError: if it is not a network of moving digits.
    """
    codec, text = PatchCodec.load(), WordEmbedding()
    config = package.config
    if config.channels != codec.channels or config.text_dim != text.dim:
        raise ValueError(
            f"{title} has {config.channels} latent channels and text_dim {config.text_dim}: "
            f"moving digits have {codec.channels} and {text.dim}"
        )
    height, width = (side * codec.spatial_factor for side in package.size)
    bidirectional, solver = package.kind == "teacher", None
    if package.kind != "student":
        solver = Solver("euler" if bidirectional else "unipc", package.shift, MANY_STEPS)
    frames = package.frames if bidirectional else DIGITS_FRAMES
    return VideoPipeline(
        text_encoder=text,
        transformer=WanTransformer(config),
        params=jax.device_put(package.params),
        rollout=None if bidirectional else package.generation_rollout,
        decoder=codec,
        encoder=codec,
        sampling=Sampling(frames, height, width, solver=solver, guidance=package.guidance),
        only_frames=package.frames if bidirectional else None,
        many_steps=package.kind != "student",
        noise_number=None,
        progress=False,
        captions=package.captions,
    )


def find_wan(folder: str | Path | None, options: WanOptions) -> ModelFiles:
    """Finds the files of a model, and checks their names and shapes before any slow work.

    Args:
      folder: the model folder, or its name on the hub; None if the options name every part.
      options: the options.

    Raises:
      ValueError: naming what is missing or does not fit.
    """
    named = _named_files(options)
    needed = [part for part in options.needed if part not in named]
    held = _held_tokenizer(folder, named)
    needed = [part for part in needed if part != "tokenizer" or held is None]
    if folder is None:
        if needed:
            flags = ", ".join(f"--{part.removeprefix('tiny_')}" for part in needed)
            hint = "; a tokenizer is in Wan-AI/Wan2.1-T2V-1.3B (google/umt5-xxl)" if "tokenizer" in needed else ""
            raise ValueError(f"model is missing, and without it so are {flags}: give --model, or these files{hint}")
        files = ModelFiles(*[None] * 6)
    else:
        files = find_model(folder, needed)
    files = dataclasses.replace(files, **{"tokenizer": files.tokenizer or held} | named, named=tuple(named))
    path, own = _transformer_path(files, options), options.checkpoint is None
    part = options.part
    if "transformer" in named:
        files = dataclasses.replace(files, config=read_sizes(files.transformer, scaled=True))
    elif folder is None:
        files = dataclasses.replace(files, config=read_sizes(path, part))
    if files.config is None:
        raise ValueError(f"model folder {folder} has no config.json of a transformer, nor transformer/config.json")
    _check_header(path, files.config)
    guess = check_network(path, "transformer", files.config, part, scaled=_reads_scaled(files, options))
    adapters.check_loras(options.loras, files.config)
    if options.device_mesh is not None:
        check_mesh(options.device_mesh, files.config)
    if options.checkpoint is None:
        _refuse_causal(files.transformer)
    if guess.naming == "rcm" and options.rollout is None:
        if not own:
            raise ValueError(RCM.format(f"checkpoint {path}", "chunk and steps, as a rollout"))
        warnings.warn(f"{path} is of NVlabs/rcm: many steps are right for its teacher alone", stacklevel=2)
    check_network(files.text_encoder, "umt5", scaled="text_encoder" in named)
    for kind in {decoder_kind(files, options), "vae" if options.encoder else None} - {None}:
        check_network(getattr(files, kind), kind)
    return files


def _reads_scaled(files: ModelFiles, options: WanOptions) -> bool:
    """Whether to accept scaled float8 weights: from a transformer that its option names, or with `quantize` "fp8"."""
    named = "transformer" in files.named and options.checkpoint is None
    return named or options.quantize == "fp8"


def _check_header(path: Path, config: WanConfig) -> None:
    """Checks the header of a network against sizes that its shapes do not determine."""
    header = read_header(path)
    if header is not None:
        check_told_sizes(path, header, config, "the config.json of the model")


def _refuse_causal(path: Path) -> None:
    """Rejects a transformer of a folder if its header says that it is not a bidirectional many-step network."""
    header = read_header(path)
    if header is not None and header.kind != "teacher":
        kind = "causal student" if header.kind == "student" else "causal network"
        raise ValueError(f"{path} is a {kind} (its header says so): give it as checkpoint too")


def _transformer_path(files: ModelFiles, options: WanOptions) -> Path:
    return files.transformer if options.checkpoint is None else Path(options.checkpoint)


def _named_files(options: WanOptions) -> dict[str, Path]:
    """The files that options name individually, by field of `ModelFiles`."""
    named = {name: getattr(options, name) for name in NAMED_PARTS if getattr(options, name) is not None}
    found = {}
    for name, value in named.items():
        if name == "tokenizer":
            found[name] = find_tokenizer(value)
        else:
            found[name] = Path(hub.local_file(value)) if name == "transformer" else find_weights(value, name)
        if not found[name].exists():
            raise ValueError(f"{name} {value} does not exist: give its file")
    if options.vae not in VAES:
        path = find_weights(options.vae, "vae")
        if not path.exists():
            raise ValueError(f"vae {path} does not exist: give one of {', '.join(VAES)}, or a file")
        found[network_kind(path, ("vae", "tiny_vae"))] = path
    return found


def _held_tokenizer(folder: str | Path | None, named: dict[str, Path]) -> Path | None:
    """The named text encoder's file if it contains a tokenizer that may be needed, as ComfyUI's files do."""
    # A repository's files are known only after fetching, and Wan's repositories have a tokenizer.
    fetched = folder is not None and hub.parse(str(folder)) is not None
    if fetched or "tokenizer" in named or "text_encoder" not in named:
        return None
    return sentencepiece.find_tensor(named["text_encoder"])


def decoder_kind(files: ModelFiles, options: WanOptions) -> str | None:
    """The field of `ModelFiles` that has the decoder; None if no pixels are wanted."""
    if options.vae in VAES:
        return VAES[options.vae]
    return "tiny_vae" if "tiny_vae" in files.named else "vae"


def causal_header(checkpoint: str | Path) -> Package | None:
    """The header of a checkpoint that sf_jax.train wrote; None for other files.

    Raises:
      ValueError: if the file is damaged, or its network is bidirectional.
    """
    header = read_header(checkpoint)
    if header is not None and header.kind == "teacher":
        raise ValueError(f"checkpoint {checkpoint} is a bidirectional network (its header says so): give a causal one")
    return header


def load_encoder(files: ModelFiles) -> VaeEncoder:
    """The VAE's encoder, in the precision of its file."""
    config, params = load_network(files.vae, "vae")
    return VaeEncoder(WanVae(config), params)


def wan_pipeline(
    folder: str | Path | None,
    options: WanOptions,
    files: ModelFiles | None = None,
    text_encoder: Umt5TextEncoder | None = None,
) -> VideoPipeline:
    """Loads the transformer and the decoder of a model, and the encoder if requested.

    Args:
      folder: the model folder; see `find_wan`.
      options: the options.
      files: the result of `find_wan`; None calls it.
      text_encoder: one that has already embedded the prompts; None creates one.

    Raises:
      ValueError: see `find_wan`.
    """
    files = files or find_wan(folder, options)
    dtype, mesh = options.compute_dtype, options.device_mesh
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    split = None if mesh is None else functools.partial(tree_shardings, mesh=mesh, rules=GENERATION)
    path = _transformer_path(files, options)
    scaled, device = _reads_scaled(files, options), None if mesh is None else mesh.devices.flat[0]
    quantizer, unread = quantizer_for(options.quantize, device), {"unread": options.unread}
    how = (options.part, split, options.loras, scaled, quantizer)
    _, params = load_network(path, "transformer", files.config, dtype, *how, **unread)
    causal, kind, decoder = options.checkpoint is not None, decoder_kind(files, options), None
    if kind is not None:
        config, vae_params = load_network(getattr(files, kind), kind, None, dtype, None, everywhere, **unread)
        module = WanVae if kind == "vae" else TinyVaeDecoder
        decoder = VaeDecoder(module(dataclasses.replace(config, dtype=dtype)), vae_params)
    network = dataclasses.replace(files.config, dtype=dtype, remat="none")
    header = causal_header(options.checkpoint) if causal else None
    trained = RolloutConfig(context_noise="none") if header is None else header.generation_rollout
    rollout = (options.rollout or trained) if causal else None
    solver, guidance = None, {}
    if not causal:
        name, shift = (files.folder and read_solver(files.folder)) or ("unipc", 8.0)
        solver = Solver(name, shift, 50)
    if header is not None and header.kind == "causal":
        solver, guidance = Solver("unipc", header.shift, 50), {"guidance": header.guidance}
    report = quantization.report(quantizer, network, params, mesh, quiet=options.unread)
    if causal:
        apart = options.scan_layers is False
        if options.scan_layers is None:
            memory = device_memory(options.keep_text_encoder)
            apart = layers_apart(network, params, rollout, memory, options.videos, solver is not None)
        if apart:
            network, params = separated(network, params, mesh)
        if mesh is not None:
            params = jax.device_put(params, split(params))
    return VideoPipeline(
        text_encoder=text_encoder or Umt5TextEncoder(files, dtype, options.keep_text_encoder, mesh, **unread),
        transformer=WanTransformer(network),
        params=params,
        rollout=rollout,
        decoder=decoder,
        mesh=mesh,
        encoder=load_encoder(files) if options.encoder else None,
        sampling=Sampling(solver=solver, **guidance),
        many_steps=None if header is None else header.kind == "causal",
        adapters=adapters.describe(options.loras),
        quantization=report,
        cache_dtype=options.cache_dtype,
    )
