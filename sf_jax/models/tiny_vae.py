"""The tiny video decoder: a small network of 2D convolutions that replaces the VAE's decoder for quick previews.

Source: the decoder of official `TAEHV` (demo_utils/taehv.py) with the weights `taew2_1` for Wan2.1. It has the same
interface as `WanVae` and reads the same normalized latents (the official demo passes the student's output unchanged).
Its layers look back by one frame, so chunks need no overlap. The official demo instead decodes the last three latent
frames again with every chunk, and has no memory of the frames before them.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sf_jax.models.sizes import check_sizes
from sf_jax.models.streaming import Conv, Past, StreamCache, check_latents, double_size, run_stream, split_frames

# Largest sizes, see `check_sizes`.
LIMITS = {"z_dim": 1 << 10, "blocks": 16}
MAX_WIDTH, MAX_GROW = 1 << 14, 16


@dataclasses.dataclass(frozen=True)
class TinyVaeConfig:
    """Sizes of the tiny decoder; the defaults are those of `taew2_1`.

    Attributes:
      z_dim: latent channels C.
      widths: channels of the three stages, each of which doubles the resolution, and before the last convolution.
      grow: factor by which each stage multiplies the frames.
      blocks: memory blocks per stage.
      dtype: compute type.
    """

    z_dim: int = 16
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    grow: tuple[int, int, int] = (1, 2, 2)
    blocks: int = 3
    dtype: str = "float32"

    def __post_init__(self):
        """Validates the sizes."""
        if len(self.widths) != 4 or len(self.grow) != 3 or min(self.widths + self.grow) < 1:
            raise ValueError(f"widths is {self.widths}, grow {self.grow}: they must be four and three numbers >= 1")
        if max(self.widths) > MAX_WIDTH or max(self.grow) > MAX_GROW:
            raise ValueError(f"widths is {self.widths}, grow {self.grow}: at most {MAX_WIDTH} and {MAX_GROW}")
        check_sizes(self, **LIMITS)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}: it must be float32 or bfloat16")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** len(self.grow)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, except for the first, which keeps only its last pixel frame."""
        return math.prod(self.grow)


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the previous one, with a shortcut (official `MemBlock`)."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, features], shape kept."""
        before = past.extend(x, 1)[:, :-1]
        h = jnp.concatenate([x, before], axis=-1)
        for number in (1, 2, 3):
            h = h if number == 1 else nn.relu(h)
            h = Conv(self.features, (3, 3), self.dtype, name=f"conv{number}")(h)
        return nn.relu(x + h)


class TinyStages(nn.Module):
    """The network itself."""

    config: TinyVaeConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, C] to [B, 1 (first) or 4n, 8H, 8W, 3], pixels in [0, 1]."""
        config, dtype = self.config, self.config.dtype
        x = jnp.tanh(x / 3) * 3
        x = nn.relu(Conv(config.widths[0], (3, 3), dtype, name="conv_in")(x))
        for i, count in enumerate(config.grow):
            width = config.widths[i]
            for j in range(config.blocks):
                x = MemoryBlock(width, dtype, name=f"stage{i}_block{j}")(x, past)
            # The official code doubles the resolution first: the result is the same for four times the work.
            x = split_frames(Conv(count * width, (1, 1), dtype, use_bias=False, name=f"stage{i}_grow")(x), count)
            x = Conv(config.widths[i + 1], (3, 3), dtype, use_bias=False, name=f"stage{i}_out")(double_size(x))
        if past.first:
            x = x[:, config.temporal_factor - 1 :]
        return Conv(3, (3, 3), dtype, name="conv_out")(nn.relu(x))


class TinyVaeDecoder(nn.Module):
    """The tiny decoder, with the decoding methods of `WanVae`."""

    config: TinyVaeConfig

    def setup(self):
        """Declares the network."""
        self.decoder = TinyStages(self.config)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """See `decode`."""
        return self.decode(latents)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes a whole video: float [B, F, H, W, C] to float32 [B, 4F - 3, 8H, 8W, 3].

        Args:
          latents: normalized latents.

        Returns:
          Pixels, nominally in [-1, 1] but not clipped.
        """
        check_latents(latents.shape, self.config.z_dim)
        return self.stream(None, latents)[1]

    def decode_chunk(self, cache: StreamCache, latents: jax.Array) -> tuple[StreamCache, jax.Array]:
        """Decodes the next latent frames of a video; the pixels are bit-identical to those of `decode`.

        Args:
          cache: the cache returned by the previous call, initially `empty_decode_cache`.
          latents: normalized latents, float [B, n, H, W, C].

        Returns:
          The new cache, and pixels float32 [B, 4n, 8H, 8W, 3]; for a video's first chunk [B, 4n - 3, 8H, 8W, 3].

        Raises:
          ValueError: if the latents have the wrong number of channels or do not fit the cache.
        """
        check_latents(latents.shape, self.config.z_dim, cache)
        return self.stream(cache, latents)

    def stream(self, cache: StreamCache | None, latents: jax.Array) -> tuple[StreamCache, jax.Array]:
        """`decode_chunk` without checks; pass None as the cache of a new video."""
        cache, pixels = run_stream(self.decoder, cache, latents.astype(self.config.dtype))
        return cache, pixels.astype(jnp.float32) * 2 - 1


def init_params(config: TinyVaeConfig, key: jax.Array) -> dict:
    """Random parameters; they do not depend on the size of the videos."""
    return TinyVaeDecoder(config).init(key, jnp.zeros((1, 1, 1, 1, config.z_dim)))["params"]


def param_shapes(config: TinyVaeConfig) -> dict:
    """Shapes and types of the parameters."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
