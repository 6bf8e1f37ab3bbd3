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
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import transformer
from sf_jax.weights.load import file_tensors
from sf_jax.weights.safetensors_io import write_safetensors

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


def save_package(path: pathlib.Path | str, package: Package, dtype: str = "float32") -> None:
    """Writes a package; the file appears under its name only when it is complete.

    Its tensors have the official names, and readers of PyTorch's world take it.
    """
    header = to_dict(dataclasses.replace(package, params={}))
    header.pop("params")
    tensors = file_tensors(transformer.entries(package.config), package.params).astype(dtype)
    write_safetensors(path, tensors, {"sf_jax": json.dumps(header), "format": "pt"})


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
    try:
        header = json.loads(header)
        config = from_dict(header.pop("config"), WanConfig)
        rollout = from_dict(header.pop("rollout"), RolloutConfig)
        header["size"] = tuple(header["size"])
        package = Package(config=config, rollout=rollout, **header)
        params = transformer.from_official(tensors, config, param_shapes(config))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} was made by another version or is damaged: {error}") from error
    return dataclasses.replace(package, params=jax.tree.map(np.asarray, params))
