"""Low-rank adapters: small matrices, trained instead of the network's weights (LoRA, arXiv 2106.09685)."""

import dataclasses
import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sf_jax.config import LoraConfig, TrainConfig
from sf_jax.models.wan import WanConfig
from sf_jax.weights import transformer
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.adapters import Adapter, official_shapes, opened

_MERGE = "merge the file into init_weights with python -m sf_jax.convert --lora"


class Start(NamedTuple):
    """Adapters of one matrix from a file.

    Attributes:
      down: float32 [layers, in, rank].
      up: float32 [layers, rank, out].
      there: bool [layers], whether the file has adapters of the layer.
    """

    down: np.ndarray
    up: np.ndarray
    there: np.ndarray


def init_adapters(params: dict, config: LoraConfig, key: jax.Array) -> dict:
    """Adapters of all block matrices [layers, in, out]: random `down` [layers, in, r], zero `up` [layers, r, out].

    Raises:
      ValueError: if the rank exceeds a matrix's smaller side.
    """
    adapters = {}
    for path, kernel in flatten_dict(params["blocks"]).items():
        if path[-1] != "kernel":
            continue
        layers, inputs, outputs = kernel.shape
        name = "/".join(path[:-1])
        if config.rank > min(inputs, outputs):
            raise ValueError(
                f"lora.rank is {config.rank}: blocks/{name} is {inputs}x{outputs}, the rank must be smaller"
            )
        own, bound = jax.random.fold_in(key, zlib.crc32(name.encode())), inputs**-0.5
        adapters[("blocks", *path, "down")] = jax.random.uniform(
            own, (layers, inputs, config.rank), "float32", -bound, bound
        )
        adapters[("blocks", *path, "up")] = jnp.zeros((layers, config.rank, outputs))
    return unflatten_dict(adapters)


def with_start(adapters: dict, start: dict) -> dict:
    """Replaces adapters by those of a file, where the file has them.

    Args:
      adapters: from `init_adapters`.
      start: from `read_start`.
    """
    flat = flatten_dict(adapters)
    for path, (down, up, there) in start.items():
        for part, value in (("down", down), ("up", up)):
            flat[(*path, part)] = jnp.where(there[:, None, None], value, flat[(*path, part)])
    return unflatten_dict(flat)


def resolved(config: TrainConfig) -> TrainConfig:
    """Fills in the rank and alpha of the file that the adapters start from, if the config does not set them.

    Raises:
      ValueError: if the file is missing, damaged or for another network, its pairs differ in rank or alpha, or it
        contradicts the config.
    """
    init = config.lora.init
    if init is None:
        return config
    with opened([Lora(init)]) as (adapter,):
        _check_pairs(adapter)
        adapter.check(official_shapes(config.model))
        (rank,), (alpha,) = (sorted(values) for values in zip(*_ranks_and_alphas(adapter), strict=True))
    if config.lora.rank == 0:
        return dataclasses.replace(config, lora=LoraConfig(rank, alpha, init))
    for name, value in (("rank", rank), ("alpha", alpha)):
        if not math.isclose(getattr(config.lora, name), value, rel_tol=1e-5):
            raise ValueError(
                f"lora.{name} is {getattr(config.lora, name):g}: lora.init {init} has {name} {value:g}; give that, or "
                "leave lora.rank and lora.alpha out"
            )
    return config


def read_start(init: str, config: WanConfig) -> dict[tuple[str, ...], Start]:
    """Reads the adapters to start from.

    Args:
      init: the adapters' file.
      config: sizes of the network.

    Returns:
      Path of a kernel -> its adapters. Layers missing from the file are zeros.

    Raises:
      ValueError: if the file does not fit, or changes more than matrices of the blocks.
    """
    starts: dict[tuple[str, ...], Start] = {}
    with opened([Lora(init)]) as (adapter,):
        _check_pairs(adapter)
        adapter.check(official_shapes(config))
        for entry in transformer.entries(config):
            if entry.name not in adapter.changes:
                continue
            (change,) = adapter.changes[entry.name]
            down, up = (np.asarray(adapter.tensors[name]).astype(np.float32) for name in change.names)
            down, up = down.reshape(change.rank, -1).T, up.reshape(-1, change.rank).T
            layers = config.num_layers
            if entry.path not in starts:
                zeros = (np.zeros((layers, *x.shape), np.float32) for x in (down, up))
                starts[entry.path] = Start(*zeros, np.zeros(layers, bool))
            start = starts[entry.path]
            start.down[entry.layer], start.up[entry.layer], start.there[entry.layer] = down, up, True
    return starts


def _check_pairs(adapter: Adapter) -> None:
    """Checks that a file has only adapters of the blocks' matrices, all with the same rank and alpha."""
    path = adapter.lora.path
    for name, changes in adapter.changes.items():
        if len(changes) > 1 or changes[0].rank is None or not name.startswith("blocks."):
            raise ValueError(
                f"lora.init: {path} changes {name}, training has adapters of the blocks' matrices alone: {_MERGE}"
            )
    values = sorted(_ranks_and_alphas(adapter))
    if not values or not math.isclose(values[0][1], values[-1][1], rel_tol=1e-5) or values[0][0] != values[-1][0]:
        low, high = values[0], values[-1]
        raise ValueError(
            f"lora.init: {path} has pairs of rank {low[0]} and alpha {low[1]:g}, and of rank {high[0]} and alpha "
            f"{high[1]:g}, training has one of each: {_MERGE}"
        )


def _ranks_and_alphas(adapter: Adapter) -> set[tuple[int, float]]:
    """Ranks and alphas of the pairs, alphas rounded to 6 digits."""
    pairs = [change for changes in adapter.changes.values() for change in changes if change.rank is not None]
    return {(change.rank, float(f"{change.scale * change.rank:.6g}")) for change in pairs}


def attach(params: dict, adapters: dict, config: LoraConfig) -> dict:
    """Adds the adapters next to the network's kernels, where `layers.Linear` expects them."""
    whole = flatten_dict(jax.lax.stop_gradient(params))
    for (*path, _, part), value in flatten_dict(adapters).items():
        whole[(*path, part)] = value * (config.alpha / config.rank) if part == "up" else value
    return unflatten_dict(whole)


def merge(params: dict, adapters: dict, config: LoraConfig) -> dict:
    """Merges the adapters into the network's kernels in float32: `kernel + alpha / rank down @ up`."""
    merged, flat = {path: x.astype(jnp.float32) for path, x in flatten_dict(params).items()}, flatten_dict(adapters)
    for *path, part in flat:
        if part == "down":
            product = jnp.matmul(flat[(*path, "down")], flat[(*path, "up")], precision="highest")
            merged[tuple(path)] = merged[tuple(path)] + config.alpha / config.rank * product
    return unflatten_dict(merged)
