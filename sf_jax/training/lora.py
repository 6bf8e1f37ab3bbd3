"""Low-rank adapters: small matrices are trained in place of the network's (LoRA, arXiv 2106.09685)."""

import zlib

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sf_jax.config import LoraConfig


def init_adapters(params: dict, config: LoraConfig, key: jax.Array) -> dict:
    """Adapters of every matrix [layers, in, out] of the blocks: `down` [layers, in, r] random, `up` [layers, r, out] 0.

    Raises:
      ValueError: if the rank is above a matrix's smaller side.
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


def attach(params: dict, adapters: dict, config: LoraConfig) -> dict:
    """The network with its adapters beside its kernels, as `layers.Linear` takes them."""
    whole = flatten_dict(jax.lax.stop_gradient(params))
    for (*path, _, part), value in flatten_dict(adapters).items():
        whole[(*path, part)] = value * (config.alpha / config.rank) if part == "up" else value
    return unflatten_dict(whole)


def merge(params: dict, adapters: dict, config: LoraConfig) -> dict:
    """The network with its adapters in its kernels, float32: `kernel + alpha / rank down @ up`."""
    merged, flat = {path: x.astype(jnp.float32) for path, x in flatten_dict(params).items()}, flatten_dict(adapters)
    for *path, part in flat:
        if part == "down":
            product = jnp.matmul(flat[(*path, "down")], flat[(*path, "up")], precision="highest")
            merged[tuple(path)] = merged[tuple(path)] + config.alpha / config.rank * product
    return unflatten_dict(merged)
