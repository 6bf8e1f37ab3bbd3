"""Decodes latents to pixels chunk by chunk: one interface to Wan's video VAE and the tiny decoder."""

import dataclasses
import functools
from typing import Any, Protocol

import flax.linen as nn
import jax

from sf_jax.models.partition import constrain
from sf_jax.models.streaming import StreamCache, empty_decode_cache


class Decoder(Protocol):
    """Decodes latents to pixels, causally in time; a registered pytree, so that jitted functions accept it.

    A video's first latent frame becomes one pixel frame, every later one `temporal_factor`.
    """

    temporal_factor: int
    spatial_factor: int

    def init_cache(self, batch: int, height: int, width: int) -> Any:
        """The state before a video's first frame, a pytree; `height` and `width` are those of the latents."""

    def decode_chunk(self, cache: Any, latents: jax.Array) -> tuple[Any, jax.Array]:
        """The new state, and pixels float32 [B, m, h, w, c] in [-1, 1] of latents [B, n, H, W, C]."""


class Encoder(Protocol):
    """Encodes given images and videos; a registered pytree."""

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Latents float32 [B, F, H, W, C] of pixels float32 [B, f, h, w, c] in [-1, 1]."""


def by_columns(tree: Any) -> Any:
    """Shards latents and caches [B, F, H, W, C] for decoding on a mesh: the devices of a video split its columns.

    Convolutions then exchange one column with each neighbor. If the devices do not divide the columns evenly, each
    decodes the whole video.
    """
    return jax.tree.map(lambda a: constrain(a, *column_axes(a)), tree)


def column_axes(a: jax.Array | jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
    """Axis names of an array in latents or in a decoder's cache; see `partition.constrain`."""
    return ("batch", None, None, "columns", None) if a.ndim == 5 else ("batch", *[None] * (a.ndim - 1))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["module"])
@dataclasses.dataclass(frozen=True, eq=False)
class VaeDecoder:
    """A causal decoder with its parameters; see `Decoder`.

    Attributes:
      module: `WanVae` or `TinyVaeDecoder`.
      params: its parameters.
    """

    module: nn.Module
    params: dict

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, except for a video's first, which becomes one."""
        return self.module.config.temporal_factor

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along each side."""
        return self.module.config.spatial_factor

    def init_cache(self, batch: int, height: int, width: int) -> StreamCache:
        """The cache before a video's first frame; `height` and `width` are those of the latents."""
        return empty_decode_cache(self.module, batch, height, width)

    def decode_chunk(self, cache: StreamCache, latents: jax.Array) -> tuple[StreamCache, jax.Array]:
        """Decodes the next latents [B, n, H, W, C] to pixels float32 [B, m, h, w, 3]; also returns the new cache."""
        return self.module.apply({"params": self.params}, cache, latents, method="decode_chunk")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["module"])
@dataclasses.dataclass(frozen=True, eq=False)
class VaeEncoder:
    """The encoder of Wan's video VAE; see `Encoder`.

    Attributes:
      module: `WanVae`.
      params: its parameters.
    """

    module: nn.Module
    params: dict

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Latents float32 [B, F, H, W, C] of pixels float32 [B, 4F - 3, 8H, 8W, 3] in [-1, 1]."""
        return self.module.apply({"params": self.params}, pixels, method="encode")
