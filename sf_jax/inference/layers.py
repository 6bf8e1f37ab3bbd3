"""The form of a causal transformer's parameters that generates fastest: stacked layers, or separate ones.

With separate layers (`WanConfig.scan_layers` is False) attention reads each layer's keys and values in place
(`models.slot_cache`). Compilation takes two to four times as long.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sf_jax.inference import lengths
from sf_jax.models import attention, partition
from sf_jax.models.slots import split_projections, unstack_layers
from sf_jax.models.wan import WanConfig
from sf_jax.parallel.mesh import videos_apart
from sf_jax.parallel.params import GENERATION, held_bytes, tree_shardings
from sf_jax.rollout import RolloutConfig

FACTOR = 4  # pixel frames per latent frame of Wan's VAE
TOKEN_PIXELS = 16 * 16  # Wan's VAE divides both sides by 8, its patches by 2
TEXT_ENCODER_BYTES = 11_400_000_000  # UMT5-XXL in bfloat16


@dataclasses.dataclass(frozen=True)
class Videos:
    """The videos that a device will generate side by side; their cache decides which form of the network fits.

    Attributes:
      count: number of videos.
      frames: pixel frames of each; a network with a window caches no more than that.
      height: pixel rows.
      width: pixel columns.
    """

    count: int = 1
    frames: int = 81
    height: int = 480
    width: int = 832

    def __post_init__(self):
        """Validates the numbers."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"videos.{field.name} is {value!r}: it must be a whole number, at least 1")


def separated(config: WanConfig, params: dict, mesh: Mesh | None = None) -> tuple[WanConfig, dict]:
    """A causal transformer with separate layers, from stacked ones; each stack is freed once it is copied."""
    fuse = fuses(mesh)
    return dataclasses.replace(config, scan_layers=False), unstack_layers(params, delete=True, fuse=fuse)


def fuses(mesh: Mesh | None) -> bool:
    """Whether to join the projections of queries, keys and values: on GPUs, unless a mesh splits a video's heads."""
    return partition.platform() == "gpu" and (mesh is None or videos_apart(mesh) == mesh.size)


def on_mesh(params: dict, mesh: Mesh) -> dict:
    """A network's parameters, in any form, on the devices of a mesh."""
    params = params if fuses(mesh) else split_projections(params)
    return jax.device_put(params, tree_shardings(params, mesh, GENERATION))


def generation_network(
    config: WanConfig, params: dict, rollout: RolloutConfig, videos: Videos = Videos()
) -> tuple[WanConfig, dict]:
    """A causal few-step transformer in the form in which this device generates the videos fastest.

    Args:
      config: the transformer's sizes.
      params: stacked parameters; if the layers are separated, each stack is freed.
      rollout: the rollout settings.
      videos: what the device generates side by side.
    """
    if not layers_apart(config, params, rollout, device_memory(), videos):
        return config, params
    return separated(config, params)


def device_memory(keep_text_encoder: bool = False) -> int | None:
    """Bytes available to the transformer and its videos on a device; None if the device does not tell."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit if limit is None else limit - TEXT_ENCODER_BYTES * keep_text_encoder


def layers_apart(
    config: WanConfig,
    params: dict,
    rollout: RolloutConfig,
    memory: int | None,
    videos: Videos = Videos(),
    many_steps: bool = False,
) -> bool:
    """Whether a device generates fastest with separate parameters per layer, and has the memory for it.

    Args:
      config: the transformer's sizes.
      params: arrays or shapes, of stacked layers.
      rollout: the rollout settings.
      memory: bytes available to a program; None is unlimited.
      videos: what a device generates side by side.
      many_steps: whether the network takes many guided steps, which do not read the slots: with Splash each layer would
        compile a kernel for every number of cached frames.
    """
    kernel = _kernel_in_place(config)
    if kernel is None or (many_steps and kernel == "splash"):
        return False
    # Each video has a negative prompt (many steps), or streams have some room and caches of 8 bits a copy.
    caches = videos.count * (2.0 if many_steps else 1.5)
    return memory is None or _bytes_apart(config, params, rollout, videos, caches) <= 0.75 * memory


def _kernel_in_place(config: WanConfig) -> str | None:
    """The fused kernel that takes the number of visible keys, so that it can read a layer's slots in place."""
    head = jax.ShapeDtypeStruct((1, 1, config.num_heads, config.head_dim), jnp.dtype(config.dtype))
    counted = (head, head, jax.ShapeDtypeStruct((), jnp.int32))
    chosen = attention.choose(config.attention, head, [counted])
    return chosen if chosen in ("cudnn", "splash") else None


def _bytes_apart(config, params, rollout, videos, caches) -> float:
    """Bytes of the weights and of `caches` times a video's cache on a device."""
    frames = lengths.latent_frames(videos.frames + -(videos.frames - 1) % FACTOR, FACTOR)
    tokens = min(rollout.window or frames, frames) * videos.height * videos.width // TOKEN_PIXELS
    cache = 2 * config.num_layers * tokens * config.dim * jnp.dtype(config.dtype).itemsize
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    held = held_bytes(params)
    return held + caches * cache * held / whole  # a mesh splits the cache at least as much as the weights
