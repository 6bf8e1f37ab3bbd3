"""Pipelines from weight files: the embedded moving digits, and Wan2.1 with what was distilled from it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax.diffusion.solvers import Solver
from sf_jax.inference.decoders import VaeDecoder, VaeEncoder
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.sampling import Sampling
from sf_jax.inference.text_encoder import Umt5TextEncoder
from sf_jax.models import attention
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.slots import unstack_layers
from sf_jax.models.text import WordEmbedding
from sf_jax.models.tiny_vae import TinyVaeDecoder
from sf_jax.models.vae import WanVae
from sf_jax.models.wan import WanConfig, WanTransformer
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import adapters
from sf_jax.weights.adapter_list import Lora, as_loras
from sf_jax.weights.folders import ModelFiles, find_model, read_solver
from sf_jax.weights.networks import check_network, load_network
from sf_jax.weights.package import SHIPPED, Package, load_package, read_header, shipped_path

VAES = {"wan": "vae", "tiny": "tiny_vae", "none": None}
DIGITS_FRAMES, MANY_STEPS = 48, 24
DEFAULT_LATENT_FRAMES = 21


@dataclasses.dataclass(frozen=True)
class WanOptions:
    """What `load_pipeline` makes of a model folder.

    Attributes:
      checkpoint: weights of a causal transformer, .pt or .safetensors; None is the folder's own bidirectional one.
      part: which network of a checkpoint with several; None takes the averaged generator.
      vae: decoder: "wan", "tiny" (fast), or "none" to stop at the latents.
      dtype: of parameters and computation, "bfloat16" or "float32"; None is bfloat16, on a CPU float32.
      rollout: chunks, window and steps of a causal network; None is what the header of a file of sf_jax.train says, and
        of other files chunks of 3 and the official steps.
      encoder: whether to load the VAE's encoder, for videos that go on from an image or a video.
      keep_text_encoder: whether the text encoder (11 GB) stays in memory between prompts.
      scan_layers: whether a causal transformer scans over stacked layers (`WanConfig.scan_layers`); None is no where
        cuDNN's attention is chosen and the memory allows a second copy of the window, as it is faster there.
      loras: adapters to merge into the transformer: paths, or pairs of a path and a scale (`adapter_list.as_loras`).
      devices: that share the videos of a batch, as many on each; None is the default device alone.
    """

    checkpoint: str | Path | None = None
    part: str | None = None
    vae: str = "wan"
    dtype: str | None = None
    rollout: RolloutConfig | None = None
    encoder: bool = False
    keep_text_encoder: bool = False
    scan_layers: bool | None = None
    loras: Sequence = ()
    devices: Sequence[jax.Device] | None = None

    def __post_init__(self):
        """Validates names."""
        for name, allowed in (("vae", tuple(VAES)), ("dtype", (None, "bfloat16", "float32"))):
            if getattr(self, name) not in allowed:
                names = ", ".join(str(value) for value in allowed if value)
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {names}")
        if self.checkpoint == "":
            raise ValueError("checkpoint is empty: give a path or leave it out")
        object.__setattr__(self, "loras", as_loras(self.loras))
        if not isinstance(self.rollout, (RolloutConfig, type(None))):
            raise ValueError(f"rollout is {self.rollout!r}: it must be a RolloutConfig")
        if self.devices is not None and not (isinstance(self.devices, Sequence) and len(self.devices)):
            raise ValueError(f"devices is {self.devices!r}: give at least one, such as jax.local_devices()")
        if self.checkpoint is None:
            for name in ("part", "rollout", "scan_layers"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect without checkpoint: it is for causal networks")
            if self.encoder:
                raise ValueError("encoder has no effect without checkpoint: only causal networks go on from videos")

    @property
    def compute_dtype(self) -> str:
        """The type of parameters and computation."""
        return self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    @property
    def needed(self) -> tuple[str, ...]:
        """Parts of the model folder that must be there."""
        parts = {"text_encoder", "tokenizer", VAES[self.vae], "vae" if self.encoder else None}
        return (*sorted(parts - {None}), *([] if self.checkpoint else ["transformer"]))


def load_pipeline(model: str | Path | None = None, checkpoint: str | Path | None = None, **options) -> VideoPipeline:
    """Loads a model.

    `load_pipeline()` is the student of moving digits that the package ships, and
    `load_pipeline("weights/Wan2.1-T2V-1.3B", checkpoint="self_forcing_dmd.pt")` a student of Wan's.

    Args:
      model: a folder of Wan2.1, as it was published or of diffusers; a .safetensors file of moving digits that training
        wrote; "student" or "teacher" for the shipped ones. None is the shipped student.
      checkpoint: with a folder, weights of a causal transformer; None is the folder's own bidirectional one.
      **options: with a folder, other fields of `WanOptions`; `loras`, adapters to merge, also without.

    Raises:
      ValueError: if a file is missing, damaged, or something else.
    """
    if not isinstance(model, (str, Path, type(None))) or model == "":
        raise ValueError(f"model is {model!r}: give a folder of Wan2.1 or a .safetensors file of moving digits")
    if model is None or not Path(model).is_dir():
        loras = as_loras(options.pop("loras", ()))
        for name in ({"checkpoint": checkpoint} if checkpoint is not None else {}) | options:
            raise ValueError(f"{name} is given without a model folder: it is for Wan")
        if model is not None and str(model) not in SHIPPED and Path(model).suffix != ".safetensors":
            what = "is no .safetensors file" if Path(model).exists() else "does not exist"
            raise ValueError(f"model {model} {what}: give a folder of Wan2.1, or weights of moving digits")
        return load_digits(model, loras)
    fields = {field.name for field in dataclasses.fields(WanOptions)}
    if set(options) - fields:
        raise ValueError(f"{sorted(set(options) - fields)[0]} is no option: options are {', '.join(sorted(fields))}")
    return wan_pipeline(model, WanOptions(checkpoint=checkpoint, **options))


def load_digits(checkpoint: str | Path | None = None, loras: Sequence[Lora] = ()) -> VideoPipeline:
    """Loads a network of moving digits: a .safetensors file that training wrote, "student" or "teacher" (shipped ones).

    Args:
      checkpoint: the file; None is the shipped student.
      loras: adapters to merge into it.

    Raises:
      ValueError: if the file is missing, damaged, or something else.
    """
    checkpoint = "student" if checkpoint is None else checkpoint
    path = shipped_path(str(checkpoint)) if str(checkpoint) in SHIPPED else checkpoint
    package = load_package(path)
    package = dataclasses.replace(package, params=adapters.merge_params(package.params, package.config, loras))
    pipe = digits_pipeline(package, f"checkpoint {checkpoint}")
    return dataclasses.replace(pipe, adapters=adapters.describe(loras))


def digits_pipeline(package: Package, title: str = "package") -> VideoPipeline:
    """A network of moving digits with their words and their codec; `title` names it in errors.

    Raises:
      ValueError: if it is not one of moving digits.
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
        params=jax.tree.map(jnp.asarray, package.params),
        rollout=None if bidirectional else package.rollout,
        decoder=codec,
        encoder=codec,
        sampling=Sampling(frames, height, width, solver=solver, guidance=package.guidance),
        only_frames=package.frames if bidirectional else None,
        many_steps=package.kind != "student",
        noise_number=None,
        progress=False,
    )


def find_wan(folder: str | Path, options: WanOptions) -> ModelFiles:
    """The files of a model folder, checked by names and shapes alone: nothing long begins before.

    Raises:
      ValueError: naming what is missing or does not fit.
    """
    files = find_model(folder, options.needed)
    if files.config is None:
        raise ValueError(f"model folder {folder} has no config.json of a transformer, nor transformer/config.json")
    check_network(_transformer_path(files, options), "transformer", files.config, options.part)
    adapters.check_loras(options.loras, files.config)
    check_network(files.text_encoder, "umt5")
    for kind in {VAES[options.vae], "vae" if options.encoder else None} - {None}:
        check_network(getattr(files, kind), kind)
    return files


def _transformer_path(files: ModelFiles, options: WanOptions) -> Path:
    return files.transformer if options.checkpoint is None else Path(options.checkpoint)


def causal_header(checkpoint: str | Path) -> Package | None:
    """What a checkpoint of sf_jax.train says of itself; None of other files.

    Raises:
      ValueError: if the file is damaged, or its network is bidirectional.
    """
    header = read_header(checkpoint)
    if header is not None and header.kind == "teacher":
        raise ValueError(f"checkpoint {checkpoint} is a bidirectional network (its header says so): give a causal one")
    return header


def wan_mesh(devices: Sequence[jax.Device] | None) -> Mesh | None:
    """Devices that have a video each, axis `data`; None for the default device alone."""
    return None if devices is None else Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def load_encoder(files: ModelFiles) -> VaeEncoder:
    """The VAE's encoder, in the precision of its file."""
    config, params = load_network(files.vae, "vae")
    return VaeEncoder(WanVae(config), params)


def generation_network(
    config: WanConfig, params: dict, rollout: RolloutConfig, scan_layers: bool | None = None
) -> tuple[WanConfig, dict]:
    """A causal transformer as the device generates fastest with it; see `WanOptions.scan_layers`.

    Args:
      config: of the transformer.
      params: stacked; each stack is freed where the layers are taken apart.
      rollout: how it generates.
      scan_layers: True keeps the stacks, False takes them apart, None chooses.
    """
    if scan_layers is None:
        scan_layers = not (_reads_in_place(config) and _window_fits_twice(config, params, rollout))
    if scan_layers:
        return config, params
    return dataclasses.replace(config, scan_layers=False), unstack_layers(params, delete=True)


def _reads_in_place(config: WanConfig) -> bool:
    """Whether attention is told how many keys to read: then nothing needs to be copied out of stacked layers."""
    head = jax.ShapeDtypeStruct((1, 1, config.num_heads, config.head_dim), jnp.dtype(config.dtype))
    counted = (head, head, jax.ShapeDtypeStruct((), jnp.int32))
    return attention.choose(config.attention, head, [counted]) == "cudnn"


def _window_fits_twice(config: WanConfig, params: dict, rollout: RolloutConfig) -> bool:
    """Whether weights, cache and slots of one video of 480x832 leave a quarter of the device's memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return True
    frames, tokens = rollout.window or DEFAULT_LATENT_FRAMES, 30 * 52
    cache = 2 * config.num_layers * frames * tokens * config.dim * jnp.dtype(config.dtype).itemsize
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + 2 * cache <= 0.75 * limit


def wan_pipeline(
    folder: str | Path,
    options: WanOptions,
    files: ModelFiles | None = None,
    text_encoder: Umt5TextEncoder | None = None,
) -> VideoPipeline:
    """Loads transformer and decoder of a model folder, and the encoder where it is asked for.

    Args:
      folder: the model folder.
      options: what to make of it.
      files: what `find_wan` found there; None looks.
      text_encoder: one that has embedded the prompts already; None makes one.

    Raises:
      ValueError: see `find_wan`.
    """
    files = files or find_wan(folder, options)
    dtype, mesh = options.compute_dtype, wan_mesh(options.devices)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    path = _transformer_path(files, options)
    _, params = load_network(path, "transformer", files.config, dtype, options.part, everywhere, options.loras)
    causal, kind, decoder = options.checkpoint is not None, VAES[options.vae], None
    if kind is not None:
        config, vae_params = load_network(getattr(files, kind), kind, None, dtype, None, everywhere)
        module = WanVae if kind == "vae" else TinyVaeDecoder
        decoder = VaeDecoder(module(dataclasses.replace(config, dtype=dtype)), vae_params)
    network = dataclasses.replace(files.config, dtype=dtype, remat="none")
    header = causal_header(options.checkpoint) if causal else None
    trained = RolloutConfig(context_noise="none") if header is None else header.generation_rollout
    rollout = (options.rollout or trained) if causal else None
    solver, guidance = None, {}
    if not causal:
        name, shift = read_solver(folder) or ("unipc", 8.0)
        solver = Solver(name, shift, 50)
    if header is not None and header.kind == "causal":
        solver, guidance = Solver("unipc", header.shift, 50), {"guidance": header.guidance}
    if causal:
        network, params = generation_network(network, params, rollout, options.scan_layers)
    return VideoPipeline(
        text_encoder=text_encoder or Umt5TextEncoder(files, dtype, options.keep_text_encoder),
        transformer=WanTransformer(network),
        params=params,
        rollout=rollout,
        decoder=decoder,
        mesh=mesh,
        encoder=load_encoder(files) if options.encoder else None,
        sampling=Sampling(solver=solver, **guidance),
        many_steps=None if header is None else header.kind == "causal",
        adapters=adapters.describe(options.loras),
    )
