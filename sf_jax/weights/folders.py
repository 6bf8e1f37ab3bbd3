"""Official and diffusers' model folders: locates the networks and reads the sizes in `config.json`."""

import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sf_jax import strict_json
from sf_jax.messages import quoted
from sf_jax.models import vae, wan
from sf_jax.weights import hub
from sf_jax.weights.foreign import refuse_foreign, refuse_gguf
from sf_jax.weights.places import PARTS, TOKENIZERS, files_of, find_part, model_files, places

_CONFIGS = ("config.json", "transformer/config.json")
# Our field -> its official and diffusers' key; absent optional ones have Wan2.1's defaults.
_KEYS = {
    "ffn_dim": ("ffn_dim", "ffn_dim"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers", "num_layers"),
    "channels": ("in_dim", "in_channels"),
    "freq_dim": ("freq_dim", "freq_dim"),
}
_OPTIONAL = {"text_dim": "text_dim", "text_len": "text_len", "eps": "eps"}
# Keys -> the only values that our network supports.
_FIXED = {
    "model_type": ("t2v",),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
    "qk_norm": (True, "rms_norm_across_heads"),
    "cross_attn_norm": (True,),
    "patch_size": ([1, 2, 2],),
    "window_size": ([-1, -1],),
}


# Files and folders that only other models have -> those models.
_OTHER_MODELS = {
    "high_noise_model": "Wan2.2-A14B, whose transformer is two experts",
    "low_noise_model": "Wan2.2-A14B, whose transformer is two experts",
    "transformer_2": "Wan2.2-A14B, whose transformer is two experts",
    "Wan2.2_VAE.pth": "Wan2.2-TI2V-5B, which has another VAE",
    "image_encoder": "an image-to-video model",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "an image-to-video model",
}
# Keys of a VAE's config -> the only values that our VAE supports.
_VAE = {
    "_class_name": ("AutoencoderKLWan",),
    "scaling_factor": (1, None),
    "shift_factor": (0, None),
    "scale_factor_spatial": (8, None),
    "scale_factor_temporal": (4, None),
    "in_channels": (3, None),
    "out_channels": (3, None),
    "patch_size": (None, 1),
    "is_residual": (False, None),
}
# Class names of other transformers, which have all of Wan2.1's tensors and more.
_OTHER_CLASSES = re.compile(r"vace|animate|s2v|i2v|camera|control|skyreels|chronoedit|humo|inpaint", re.IGNORECASE)
_ONLY = "Wan2.1's text-to-video models and what was distilled from them are supported"
_PIPELINE = "WanPipeline"  # diffusers' text-to-video pipeline
_SCHEDULERS = {  # diffusers' scheduler -> our solver, and the key of its shift
    "UniPCMultistepScheduler": ("unipc", "flow_shift"),
    "DPMSolverMultistepScheduler": ("dpm++", "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift"),
}
# Scheduler fields that change its result -> the values that our solvers implement.
_FOLLOWED = {
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "num_train_timesteps": (1000,),
    "solver_order": (2,),
    "shift_terminal": (None,),
    "algorithm_type": ("dpmsolver++",),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "thresholding": (False,),
    "euler_at_final": (False,),
    "variance_type": (None,),
    "use_dynamic_shifting": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
}
_SOLVER_TYPES = {"unipc": ("bh2",), "dpm++": ("midpoint",)}


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The files of a model; parts that are neither needed nor present are None.

    Attributes:
      config: sizes of the transformer, from the `config.json` next to it or where it would be.
      transformer: its safetensors file or index of shards.
      vae: the video VAE.
      text_encoder: the text encoder, a file or an index of shards.
      tokenizer: the folder or file of its tokenizer; the file may be the text encoder's.
      tiny_vae: the tiny decoder.
      folder: the model folder; None if every part was named separately.
      named: the parts that were named separately; these may be scaled float8.
    """

    config: wan.WanConfig | None
    transformer: Path | None
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    tiny_vae: Path | None
    folder: Path | None = None
    named: tuple[str, ...] = ()


def find_transformer(folder: Path | str) -> Path | None:
    """The transformer's weights in a model folder, or None.

    Raises:
      ValueError: if there are several variants and no plain file.
    """
    return _find(Path(folder), _names(Path(folder)), "transformer")


def find_model(
    folder: Path | str, needed: Sequence[str] = ("transformer", "vae", "text_encoder", "tokenizer")
) -> ModelFiles:
    """Finds the files of a model in a folder with the official (`Wan2.1-T2V-1.3B`) or diffusers' layout.

    Args:
      folder: the folder, or a repository on the hub (or a folder in it) to download from; see `hub`.
      needed: required fields of `ModelFiles`; only these are downloaded from a repository.

    Raises:
      ValueError: naming the missing parts and the names tried, or the invalid sizes.
    """
    repository, title = hub.parse(str(folder)), f"model folder {folder}"
    if repository is not None:
        folder = hub.fetch(repository, lambda names: _chosen(repository, names, needed, title)) / repository.path
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} {'is a file: give a folder' if folder.exists() else 'does not exist'}")
    refuse_foreign(folder)
    names = _names(folder)
    _refuse_other_models(folder)
    found = {part: _find(folder, names, part) for part in PARTS}
    missing = [f"{part} (looked for {', '.join(places(part))})" for part in needed if found[part] is None]
    if missing:
        if "transformer" in needed and found["transformer"] is None:
            refuse_gguf(folder)
        fetched = "" if repository is None else f" ({repository}; without a network, only what was fetched is there)"
        raise ValueError(f"{title} lacks: {'; '.join(missing)}{fetched}")
    if found["transformer"] is not None:
        sizes = [found["transformer"].with_name("config.json")]
    else:
        sizes = [path for place in _CONFIGS if (path := folder / place).is_file()]
    config = read_config(sizes[0]) if sizes else None
    return ModelFiles(config=config, folder=folder, **found)


def find_tokenizer(value: Path | str) -> Path:
    """The folder or file of a tokenizer that was named separately.

    Args:
      value: its tokenizer.json or spiece.model, a weight file that contains the latter, a folder that contains one of
        them, or a repository on the hub, from which only the tokenizer is downloaded.

    Raises:
      ValueError: if the repository has no tokenizer.
    """
    place = hub.parse(str(value))
    if place is None:
        return Path(value)
    if place.path.endswith((".json", ".model", ".safetensors", ".pt", ".pth", ".bin")):
        return Path(hub.local_file(value))

    def choose(names):
        folders = [place.path, *(f"{place.path}/{name}".strip("/") for name in TOKENIZERS)]
        files = (f"{name}/{file}".lstrip("/") for file in ("tokenizer.json", "spiece.model") for name in folders)
        found = [file for file in files if file in names]
        if not found:
            raise ValueError(f"tokenizer {place} of the hub has no tokenizer.json: Wan-AI/Wan2.1-T2V-1.3B has one")
        return found[:1]

    return hub.fetch(place, choose) / place.path


def find_weights(value: Path | str, part: str) -> Path:
    """The weights of a part that was named separately.

    Args:
      value: its file, a folder of shards, or a model folder that contains the part; local or on the hub.
      part: "vae" or "text_encoder".

    Raises:
      ValueError: see `hub.fetch`; or if there are several variants and no plain file.
    """
    place = hub.parse(str(value))
    if place is None:
        found = find_part(_names(Path(value)), part) if Path(value).is_dir() else None
        return Path(value) if found is None else Path(value) / found

    def choose(names):
        inside = [] if place.path in names else hub.names_inside(place, names)
        file = find_part(inside, part)
        return [] if file is None else [f"{place.path}/{name}".lstrip("/") for name in files_of(inside, file)]

    folder = hub.fetch(place, choose) / place.path
    found = find_part(_names(folder), part) if folder.is_dir() else None
    return Path(hub.local_file(value)) if found is None else folder / found


def _chosen(place: hub.Place, names: Sequence[str], needed: Sequence[str], title: str) -> list[str]:
    """The files to download from a repository, or from a folder in it."""
    if place.path in names:
        raise ValueError(f"{title} is a file of the hub: give a folder or a repository")
    names, prefix = hub.names_inside(place, names), f"{place.path}/".lstrip("/")
    _refuse_names(names, title)
    try:
        files = model_files(names, needed)
        missing = [part for part in needed if find_part(names, part) is None]
    except ValueError as error:
        raise ValueError(f"{title} {error}") from error
    if missing:
        looked = "; ".join(f"{part} (looked for {', '.join(places(part))})" for part in missing)
        weights = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".gguf"))]
        there = f"; its weight files are {', '.join(weights[:6])}" if weights else "; it has no weight files"
        raise ValueError(f"{title} of the hub lacks: {looked}{there}")
    return [prefix + name for name in files]


def _names(folder: Path) -> list[str]:
    """Paths of files that may be parts of a model, relative to its folder."""
    folders = ("", "transformer", "vae", "text_encoder", *TOKENIZERS)
    files = (path for name in folders if (folder / name).is_dir() for path in (folder / name).iterdir())
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


def _find(folder: Path, names: Sequence[str], part: str) -> Path | None:
    if part == "tokenizer":  # its reader reports missing files
        return next((folder / name for name in TOKENIZERS if (folder / name).is_dir()), None)
    try:
        name = find_part(names, part)
    except ValueError as error:
        raise ValueError(f"model folder {folder} {error}") from error
    return None if name is None else folder / name


def _refuse_names(names: Sequence[str], title: str) -> None:
    """Raises if the file names are those of a model other than Wan2.1's text-to-video."""
    tops = {top for name in names for top in (name, name.partition("/")[0])}
    for name, kind in _OTHER_MODELS.items():
        if name in tops:
            raise ValueError(f"{title} is {kind} ({name} is there): {_ONLY}")


def _refuse_other_models(folder: Path) -> None:
    """Raises for models that have all files of Wan2.1's text-to-video, and more."""
    _refuse_names([path.name for path in folder.iterdir()], f"model folder {folder}")
    index = _table(folder / "model_index.json")
    if index.get("_class_name", _PIPELINE) != _PIPELINE:
        raise ValueError(f"model folder {folder} is a {index['_class_name']} (model_index.json): {_ONLY}")
    experts = index.get("transformer_2") not in (None, [None, None])
    if experts or index.get("boundary_ratio") is not None:
        raise ValueError(f"model folder {folder} is Wan2.2-A14B, with two experts (model_index.json): {_ONLY}")
    _refuse_other_vaes(folder / "vae" / "config.json")


def _refuse_other_vaes(path: Path) -> None:
    """Raises for VAEs whose config describes latents other than Wan2.1's."""
    stored = _table(path)
    if (channels := stored.get("z_dim", 16)) != 16:
        raise ValueError(f"{path}: it is a VAE of {quoted(channels)} channels (z_dim), Wan2.2's has 48: {_ONLY}")
    for key, allowed in _VAE.items():
        if key not in stored or stored[key] in allowed:
            continue
        raise ValueError(f"{path}: {key} is {quoted(stored[key])}, allowed: {allowed[0]!r}: {_ONLY}")
    for key, ours in (("latents_mean", vae.WAN_MEAN), ("latents_std", vae.WAN_STD)):
        values = stored.get(key, ours)
        numbers = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
        if not numbers or len(values) != len(ours) or not np.allclose(values, ours, rtol=1e-3, atol=1e-6):
            raise ValueError(f"{path}: {key} is {quoted(values)}, others than Wan2.1's: {_ONLY}")


def read_solver(folder: Path | str) -> tuple[str, float] | None:
    """Name and shift of the solver in diffusers' `scheduler/scheduler_config.json`; None without that file.

    Unknown schedulers are ignored with a warning.

    Raises:
      ValueError: if the file is damaged.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    stored = _table(path)
    if not stored:
        return None
    name = stored.get("_class_name")
    if name not in _SCHEDULERS:
        warnings.warn(f"{path} asks for {name}, which is not known: give --solver and --shift", stacklevel=2)
        return None
    solver, key = _SCHEDULERS[name]
    shift = stored.get(key, 1.0)
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        raise ValueError(f"{path}: {key} is {shift!r}, it must be a number above 0")
    for field, allowed in (_FOLLOWED | {"solver_type": _SOLVER_TYPES.get(solver, ())}).items():
        if allowed and field in stored and stored[field] not in allowed:
            warnings.warn(
                f"{path}: {field} {quoted(stored[field])} is not followed, it is taken for {allowed[0]!r}", stacklevel=2
            )
    return solver, float(shift)


def _table(path: Path) -> dict:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        stored = strict_json.read(path, None, finite=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no table")
    return stored


def read_config(path: Path | str) -> wan.WanConfig:
    """Sizes of a transformer from its official or diffusers' `config.json`.

    Raises:
      ValueError: naming the key that is missing or whose value is not supported.
    """
    path = Path(path)
    try:
        stored = strict_json.read(path, None, finite=False)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: the sizes of the transformer cannot be read from it ({reason})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no table of sizes")
    if isinstance(name := stored.get("_class_name"), str) and _OTHER_CLASSES.search(name):
        raise ValueError(f"{path}: _class_name is {quoted(name)}, another network: {_ONLY}")
    for key, allowed in _FIXED.items():
        if key in stored and stored[key] not in allowed:
            kind = "; image-to-video and other variants are not supported" if allowed in (("t2v",), (None,)) else ""
            raise ValueError(f"{path}: {key} is {quoted(stored[key])}, allowed: {allowed[0]!r}{kind}")
    official = "dim" in stored
    keys = {field: names[0 if official else 1] for field, names in _KEYS.items()}
    head = "dim" if official else "attention_head_dim"
    absent = [key for key in (head, *keys.values()) if key not in stored]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: it is not the config.json of a Wan2.1 transformer")
    keys |= {field: key for field, key in _OPTIONAL.items() if key in stored}
    sizes = {field: stored[key] for field, key in keys.items()} | {"dim": stored[head]}
    for field, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, float) if field == "eps" else int) or value <= 0:
            raise ValueError(f"{path}: {keys.get(field, head)} is {quoted(value)}, it must be a number above 0")
    outputs = stored.get("out_dim" if official else "out_channels", sizes["channels"])
    if outputs not in (None, sizes["channels"]):
        raise ValueError(
            f"{path}: {sizes['channels']} channels in and {outputs} out; image-to-video and other variants are not "
            "supported"
        )
    if not official:
        sizes["dim"] *= sizes["num_heads"]
    try:
        return wan.wan_1_3b(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
