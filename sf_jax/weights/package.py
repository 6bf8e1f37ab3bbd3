"""Weight files of this package: safetensors with the official tensor names and, in the header, what they are for."""

import dataclasses
import importlib.resources
import json
import pathlib

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from sf_jax.config import from_dict, to_dict
from sf_jax.models.wan import WanConfig, param_shapes
from sf_jax.options import at_least, one_of
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import transformer
from sf_jax.weights.load import file_tensors
from sf_jax.weights.safetensors_io import write_safetensors

KINDS = ("student", "teacher", "causal")
SHIPPED = {"teacher": "digits_teacher.safetensors", "student": "digits_student.safetensors"}


@dataclasses.dataclass(frozen=True)
class Package:
    """A network ready to use.

    Attributes:
      kind: "student" (causal, few steps), "teacher" (bidirectional, many steps) or "causal" (causal, many steps).
      config: sizes.
      rollout: how the student generates.
      frames: latent frames of its training videos.
      size: latent (rows, columns).
      shift: shift of the schedule it is sampled with.
      guidance: guidance scale to sample a many-step network with.
      params: parameters, float32 numpy.
    """

    kind: str
    config: WanConfig
    rollout: RolloutConfig
    frames: int
    size: tuple[int, int]
    shift: float
    guidance: float
    params: dict = dataclasses.field(repr=False, default_factory=dict)

    def __post_init__(self):
        """Refuses what no network can be."""
        one_of("kind", self.kind, KINDS)
        at_least(self, 1, "frames")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}: it must be latent rows and columns")
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}: it must be above 0")

    @property
    def generation_rollout(self) -> RolloutConfig:
        """How the network generates: as it was trained. The official code adds no noise to clean context there."""
        official = self.rollout.context_noise == "official" and self.rollout.context_timestep == 0
        return dataclasses.replace(self.rollout, context_noise="none") if official else self.rollout


def save_package(path: pathlib.Path | str, package: Package, dtype: str = "float32") -> None:
    """Writes a package; the file appears under its name only when it is complete.

    Its tensors have the official names, and readers of PyTorch's world take it.
    """
    header = to_dict(dataclasses.replace(package, params={}))
    header.pop("params")
    tensors = file_tensors(transformer.entries(package.config), package.params).astype(dtype)
    write_safetensors(path, tensors, {"sf_jax": json.dumps(header), "format": "pt"})


def parse_header(path: pathlib.Path, header: str) -> Package:
    """What the entry `sf_jax` of a file's header says, without parameters.

    Raises:
      ValueError: if it is damaged.
    """
    return _parse(path, header)


def shipped_path(kind: str) -> pathlib.Path:
    """The file of the package's own teacher or student of moving digits."""
    return pathlib.Path(str(importlib.resources.files("sf_jax") / "assets" / SHIPPED[kind]))


def load_package(path: pathlib.Path | str) -> Package:
    """Reads a file that `save_package` wrote.

    Raises:
      ValueError: if the file is missing, damaged, or something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give a .safetensors file that sf_jax.train wrote")
    try:
        with safe_open(path, "np") as stored:
            header = (stored.metadata() or {}).get("sf_jax")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is not a readable safetensors file ({error})") from error
    if header is None:
        raise ValueError(f"checkpoint {path} was not written by sf_jax.train: its header does not say what it is")
    package = _parse(path, header)
    try:
        params = transformer.from_official(tensors, package.config, param_shapes(package.config))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} was made by another version or is damaged: {error}") from error
    return dataclasses.replace(package, params=jax.tree.map(np.asarray, params))


def read_header(path: pathlib.Path | str) -> Package | None:
    """What a file of sf_jax.train says of itself, without its parameters; None of all other files.

    Raises:
      ValueError: if the header is damaged.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "np") as stored:
            header = (stored.metadata() or {}).get("sf_jax")
    except (SafetensorError, OSError):  # whoever reads the tensors says so
        return None
    return None if header is None else _parse(path, header)


def _parse(path: pathlib.Path, header: str) -> Package:
    try:
        values = json.loads(header)
        if not isinstance(values, dict):
            raise ValueError("its header is no JSON object")
        return from_dict(values, Package)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} was made by another version or is damaged: {error}") from error
