"""The form of a causal transformer's parameters that generates fastest: stacked layers, or separate ones.

With separate layers (`WanConfig.scan_layers` is False) attention reads each layer's keys and values in place
(`models.slots`). That takes more memory, and compiling takes two to three times as long.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sf_jax.models import attention
from sf_jax.models.slots import unstack_layers
from sf_jax.models.wan import WanConfig
from sf_jax.parallel.params import held_bytes
from sf_jax.rollout import RolloutConfig

DEFAULT_LATENT_FRAMES = 21
TOKEN_PIXELS = 16 * 16  # Wan's VAE divides both sides by 8, its patches by 2


def generation_network(
    config: WanConfig,
    params: dict,
    rollout: RolloutConfig,
    scan_layers: bool | None = None,
    size: tuple[int, int] = (480, 832),
) -> tuple[WanConfig, dict]:
    """Converts a causal transformer to the form that generates fastest on the device; see `WanOptions.scan_layers`.

    Args:
      config: the transformer's sizes.
      params: stacked parameters; if the layers are separated, each stack is freed.
      rollout: the rollout settings.
      scan_layers: True keeps the stacks, False separates the layers, None chooses.
      size: height and width in pixels of the videos.
    """
    if scan_layers is None:
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        scan_layers = not layers_apart(config, params, rollout, limit, size)
    if scan_layers:
        return config, params
    return dataclasses.replace(config, scan_layers=False), unstack_layers(params, delete=True)


def layers_apart(
    config: WanConfig, params: dict, rollout: RolloutConfig, memory: int | None, size: tuple[int, int]
) -> bool:
    """Whether a device generates fastest with separate parameters per layer, and has the memory for it.

    Args:
      config: the transformer's sizes.
      params: arrays or shapes.
      rollout: the rollout settings.
      memory: bytes available to a program; None is unlimited.
      size: height and width in pixels of the videos.
    """
    return _reads_in_place(config) and _window_fits_twice(config, params, rollout, memory, size)


def _reads_in_place(config: WanConfig) -> bool:
    """Whether a fused kernel takes the number of visible keys, so that it can read a layer's slots in place."""
    head = jax.ShapeDtypeStruct((1, 1, config.num_heads, config.head_dim), jnp.dtype(config.dtype))
    counted = (head, head, jax.ShapeDtypeStruct((), jnp.int32))
    return attention.choose(config.attention, head, [counted]) in ("cudnn", "splash")


def _window_fits_twice(config, params, rollout, limit, size) -> bool:
    """Whether weights, cache and slots of one video leave a quarter of the device's memory free."""
    if limit is None:
        return True
    frames, tokens = rollout.window or DEFAULT_LATENT_FRAMES, math.prod(size) // TOKEN_PIXELS
    cache = 2 * config.num_layers * frames * tokens * config.dim * jnp.dtype(config.dtype).itemsize
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    held = held_bytes(params)
    return held + 2 * cache * held / whole <= 0.75 * limit  # a mesh splits the cache at least as much as these
