"""Writes adapters for other programs, with diffusers' or kohya's names (ComfyUI and musubi read kohya's, too)."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from sf_jax.models.wan import WanConfig, wan_1_3b, wan_14b
from sf_jax.weights import transformer
from sf_jax.weights.adapter_config import METADATA
from sf_jax.weights.adapter_names import layer_names
from sf_jax.weights.adapters import Adapter
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile, cast

NAMINGS = ("diffusers", "kohya")
ORIGIN = "sf_jax_lora"  # header entry that describes the base network


@dataclasses.dataclass(frozen=True)
class Base:
    """The network that adapters were trained on.

    Attributes:
      file: name of its file.
      digest: short hash of its weights, as stored in the run's checkpoints.
    """

    file: str
    digest: str


@dataclasses.dataclass(frozen=True)
class TrainedAdapters:
    """Adapters of a training run.

    Attributes:
      config: sizes of the network.
      rank: rank of all pairs.
      alpha: the product of a pair is scaled by `alpha / rank`.
      base: the network they were trained on.
      step: number of training iterations.
      params: their parameter tree (`training.lora`), numpy.
    """

    config: WanConfig
    rank: int
    alpha: float
    base: Base
    step: int
    params: dict = dataclasses.field(repr=False)

    def describe(self) -> str:
        """A short description."""
        return f"rank {self.rank}, alpha {self.alpha:g}, of {_network(self.config)}, {self.base.file}"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pair to write; it adds `scale * up @ down`.

    Attributes:
      down: float [rank, inputs] (more axes for a convolution).
      up: float [outputs, rank].
      scale: alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """Alpha, rounded to float32."""
        return float(np.float32(self.scale * self.rank))


def _network(config: WanConfig) -> str:
    sizes = (config.dim, config.ffn_dim, config.num_layers)
    for name, known in (("Wan2.1-T2V-1.3B", wan_1_3b()), ("Wan2.1-T2V-14B", wan_14b())):
        if sizes == (known.dim, known.ffn_dim, known.num_layers):
            return name
    return f"a transformer of dim {config.dim}, {config.num_layers} layers"


def write_trained(path: Path, trained: TrainedAdapters, naming: str, dtype=None) -> None:
    """Writes the adapters of a training run; the header holds the rank, alpha and base network.

    Args:
      path: the .safetensors file.
      trained: the adapters.
      naming: one of `NAMINGS`.
      dtype: type of the tensors; None is float32.

    Raises:
      ValueError: if the file cannot be written.
    """
    leaves, pairs = flatten_dict(trained.params), {}
    for entry in transformer.entries(trained.config):
        if (*entry.path, "down") in leaves:
            down, up = (np.asarray(leaves[*entry.path, part][entry.layer]) for part in ("down", "up"))
            pairs[entry.name] = Pair(down.T, up.T, trained.alpha / trained.rank)
    config = trained.config
    origin = {
        "rank": trained.rank,
        "alpha": trained.alpha,
        "step": trained.step,
        "base": {
            "network": _network(config),
            "file": trained.base.file,
            "digest": trained.base.digest,
            "dim": config.dim,
            "ffn_dim": config.ffn_dim,
            "num_layers": config.num_layers,
        },
    }
    _write(path, pairs, naming, dtype, {ORIGIN: json.dumps(origin)})


def write_adapter(path: Path, adapter: Adapter, naming: str, dtype=None) -> None:
    """Writes an adapter file with other names; the scale of its `Lora` is not applied.

    Args:
      path: the .safetensors file.
      adapter: the opened file.
      naming: one of `NAMINGS`.
      dtype: type of the tensors; None keeps the file's.

    Raises:
      ValueError: if it contains more than pairs, which this naming cannot express, or if the file cannot be written.
    """
    pairs = {}
    for name, changes in adapter.changes.items():
        if len(changes) > 1 or changes[0].rank is None:
            raise ValueError(
                f"input is {adapter.lora.path}: it adds {changes[-1].names[0]} as a whole, {naming} names are for "
                "pairs of matrices; merge it into a network with --lora"
            )
        if naming == "kohya" and not name.startswith("blocks."):
            raise ValueError(f"input is {adapter.lora.path}: kohya's files are of the blocks alone, it changes {name}")
        down, up = (np.asarray(adapter.tensors[part]) for part in changes[0].names)
        pairs[name] = Pair(down, up, changes[0].scale)
    origin = adapter.tensors.metadata.get(ORIGIN)
    _write(path, pairs, naming, dtype, {} if origin is None else {ORIGIN: origin})


def _write(path: Path, pairs: Mapping[str, Pair], naming: str, dtype, metadata: dict[str, str]) -> None:
    tensors = {}
    for name, pair in pairs.items():
        official, theirs = layer_names(name)
        if naming == "kohya":
            layer, down, up = f"lora_unet_{official.replace('.', '_')}", "lora_down", "lora_up"
            tensors[f"{layer}.alpha"] = np.asarray(pair.alpha, np.float32)
        else:
            layer, down, up = f"transformer.{theirs}", "lora_A", "lora_B"
        for side, value in ((down, pair.down), (up, pair.up)):
            tensors[f"{layer}.{side}.weight"] = np.ascontiguousarray(
                cast(value, dtype or value.dtype, f"{name}, {side}")
            )
    header = _kohya_header(pairs) if naming == "kohya" else {METADATA: json.dumps(_peft_config(pairs))}
    shapes = {name: value.shape for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    file = TensorFile(path, shapes, dtypes, tensors.__getitem__)
    write_safetensors(path, file, {"format": "pt"} | metadata | header)


def _kohya_header(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """Kohya's header entries for rank and alpha; "Dynamic" if the layers differ."""
    header = {"ss_network_module": "networks.lora_wan"}
    for field, values in (
        ("ss_network_dim", {pair.rank for pair in pairs.values()}),
        ("ss_network_alpha", {pair.alpha for pair in pairs.values()}),
    ):
        header[field] = f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
    return header


def _peft_config(pairs: Mapping[str, Pair]) -> dict:
    """Peft's config of the pairs, with the field names of diffusers' headers."""
    layers = {layer_names(name)[1]: pair for name, pair in pairs.items()}
    first = next(iter(layers.values()))
    ranks = {f"^{name}": pair.rank for name, pair in layers.items() if pair.rank != first.rank}
    alphas = {f"^{name}": _whole(pair.alpha) for name, pair in layers.items() if pair.alpha != first.alpha}
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": _whole(first.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(layers),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
    }
    return {f"transformer.{field}": value for field, value in config.items()}


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
