"""Weight files of this package: safetensors with official tensor names and a header that describes the network."""

import dataclasses
import importlib.resources
import json
import math
import pathlib

import jax
import numpy as np

from sf_jax import strict_json
from sf_jax.config import from_dict, to_dict
from sf_jax.diffusion.schedule import MAX_SHIFT
from sf_jax.messages import shortened
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.models.wan import WanConfig, param_shapes
from sf_jax.options import CAPTIONS, at_least, one_of
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import mapping, transformer
from sf_jax.weights.files import open_tensors
from sf_jax.weights.load import file_tensors
from sf_jax.weights.names import bare_names
from sf_jax.weights.safetensors_io import open_safetensors, write_safetensors
from sf_jax.weights.tensors import TensorFile

KINDS = ("student", "teacher", "causal")
MAX_SIDE = 4096  # latent rows or columns
_LONGEST_HEADER, _LONGEST_REASON = 1 << 20, 300
SHIPPED = {name: f"digits_{name}.safetensors" for name in ("teacher", "init", "consistency", "student")}


@dataclasses.dataclass(frozen=True)
class Package:
    """A network ready to use.

    Attributes:
      kind: "student" (causal, few steps), "teacher" (bidirectional, many steps) or "causal" (causal, many steps).
      config: sizes.
      rollout: rollout settings for generation.
      frames: latent frames of its training videos.
      size: latent (rows, columns).
      shift: shift of the sampling schedule.
      guidance: guidance scale for sampling a many-step network.
      params: parameters, float32 numpy.
      captions: of the digit clips that it was trained on, one of `options.CAPTIONS`; of no meaning for Wan2.1.
    """

    kind: str
    config: WanConfig
    rollout: RolloutConfig
    frames: int
    size: tuple[int, int]
    shift: float
    guidance: float
    params: dict = dataclasses.field(repr=False, default_factory=dict)
    captions: str = "full"

    def __post_init__(self):
        """Validates the fields."""
        one_of("kind", self.kind, KINDS)
        one_of("captions", self.captions, CAPTIONS)
        at_least(self, 1, "frames")
        if self.frames > MAX_FRAMES:
            raise ValueError(f"frames is {self.frames}: at most {MAX_FRAMES} latent frames have positions")
        if len(self.size) != 2 or not 1 <= min(self.size) <= max(self.size) <= MAX_SIDE:
            raise ValueError(
                f"size is {shortened(str(self.size))}: it must be latent rows and columns, 1 to {MAX_SIDE}"
            )
        if not 0 < self.shift <= MAX_SHIFT:  # also NaN
            raise ValueError(f"shift is {self.shift}: it must be above 0, and at most {MAX_SHIFT}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}: it must be a finite number")

    @property
    def generation_rollout(self) -> RolloutConfig:
        """The rollout for generation: as in training, but without the official code's noise on clean context."""
        official = self.rollout.context_noise == "official" and self.rollout.context_timestep == 0
        return dataclasses.replace(self.rollout, context_noise="none") if official else self.rollout


def save_package(path: pathlib.Path | str, package: Package, dtype: str = "float32") -> None:
    """Writes a package atomically: the file appears under its name only when it is complete.

    Its tensors have the official names, and PyTorch libraries can read it.
    """
    header = to_dict(dataclasses.replace(package, params={}))
    header.pop("params")
    tensors = file_tensors(transformer.entries(package.config), package.params).astype(dtype)
    write_safetensors(path, tensors, {"sf_jax": json.dumps(header), "format": "pt"})


def parse_header(path: pathlib.Path, header: str) -> Package:
    """Parses the `sf_jax` entry of a file's header into a package without parameters.

    Raises:
      ValueError: if it is damaged.
    """
    return _parse(path, header)


def shipped_path(name: str) -> pathlib.Path:
    """The path of a shipped network of moving digits.

    Args:
      name: "teacher"; "init" and "consistency", the few-step starts of the quickstart's and of the shipped student; or
        "student".
    """
    return pathlib.Path(str(importlib.resources.files("sf_jax") / "assets" / SHIPPED[name]))


def shipped_weights(value: str) -> pathlib.Path | None:
    """The path of the shipped network that a config names, where "shipped" is the teacher; None for a file."""
    name = "teacher" if value == "shipped" else value
    return shipped_path(name) if name in SHIPPED else None


def captions_of(path: pathlib.Path | str | None) -> str:
    """Which captions of moving digits a network knows, one of `options.CAPTIONS`, from its file's header alone.

    Args:
      path: the file; None and the names in `SHIPPED` are shipped networks. What has no header, or is a name on the hub,
        counts as "full".
    """
    header = None if path is None or str(path) in SHIPPED else read_header(path)
    return "full" if header is None else header.captions


def load_package(path: pathlib.Path | str) -> Package:
    """Reads a file that `save_package` wrote.

    Raises:
      ValueError: if the file is missing, damaged, or not such a file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give a .safetensors file that sf_jax.train wrote")
    try:
        stored = open_safetensors(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint {path} is not a readable safetensors file ({error})") from error
    with stored:
        if "sf_jax" not in stored.metadata:
            raise ValueError(f"checkpoint {path} was not written by sf_jax.train: its header does not say what it is")
        package = _parse(path, stored.metadata["sf_jax"])
        try:
            params = _read_params(stored, package.config)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
    return dataclasses.replace(package, params=params)


def read_header(path: pathlib.Path | str) -> Package | None:
    """The header of a file that sf_jax.train wrote, without its parameters; None for all other files.

    Args:
      path: the file (with any suffix), or an index or folder of shards, each of which has the header.

    Raises:
      ValueError: if the header is damaged.
    """
    path = pathlib.Path(path)
    try:
        with open_tensors(path) if path.is_dir() or path.suffix == ".json" else open_safetensors(path) as stored:
            header = stored.metadata.get("sf_jax")
    except (ValueError, OSError):  # reading the tensors reports it
        return None
    return None if header is None else _parse(path, header)


def check_told_sizes(path: pathlib.Path, header: Package, config: WanConfig, source: str) -> None:
    """Compares a header's sizes with a config, for those that do not follow from the tensors' shapes.

    Args:
      path: the file with the header.
      header: the header.
      config: the expected sizes.
      source: where they come from, for the message.

    Raises:
      ValueError: with both values, if they differ.
    """
    for name in ("num_heads", "eps", "text_len"):
        ours, theirs = getattr(header.config, name), getattr(config, name)
        if ours != theirs:
            raise ValueError(f"{path}: {name} is {ours} in its header, {theirs} in {source}: it is of another model")


def _parse(path: pathlib.Path, header: str) -> Package:
    if len(header) > _LONGEST_HEADER:
        raise _damaged(path, f"its header has {len(header)} characters, at most {_LONGEST_HEADER} are read")
    try:
        return from_dict(strict_json.parse(header), Package)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, reason: object) -> ValueError:
    return ValueError(
        f"checkpoint {path} was made by another version or is damaged: {shortened(str(reason), _LONGEST_REASON)}"
    )


def _read_params(stored: TensorFile, config: WanConfig) -> dict:
    """The parameters; checks the header's sizes against the tensors before allocating anything from them."""
    tensors = stored.renamed({bare: name for name, bare in bare_names(stored).items()})
    entries = transformer.entries(config)
    mapping.check_names(entries, tensors, "transformer")
    sizes = {
        "patch_embedding": (config.dim, config.channels, *config.patch),
        "text_embedding.0": (config.dim, config.text_dim),
        "time_embedding.0": (config.dim, config.freq_dim),
        "blocks.0.ffn.0": (config.ffn_dim, config.dim),
    }
    for name, shape in sizes.items():
        if (there := tensors.shapes[f"{name}.weight"]) != shape:
            raise ValueError(f"{name}.weight is {there}: by the sizes in the header it must be {shape}")
    params = mapping.to_params(entries, tensors, param_shapes(config), "transformer", np.float32)
    return jax.tree.map(np.asarray, params)
