"""The Wan2.1 video VAE: causal in time, so that videos of any length are encoded and decoded piece by piece.

Source: official `WanVAE_` (wan/modules/vae.py). The first pixel frame is a latent frame of its own; every later latent
frame covers four pixel frames (for the default `temporal_downsample`). Every convolution in time looks back only, at
its last input frames, which a `StreamCache` holds. Encoder and decoder process one latent frame at a time under `scan`:
memory does not grow with the video, and the result is bit-identical however the frames are split into chunks.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sf_jax.models.attention import attend
from sf_jax.models.sizes import check_sizes
from sf_jax.models.streaming import Conv, Past, StreamCache, check_latents, double_size, run_stream, split_frames

# Mean and standard deviation of the latents' channels (official `WanVAEWrapper`).
WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# Largest sizes, see `check_sizes`.
LIMITS = {"dim": 1 << 12, "z_dim": 1 << 10, "num_res_blocks": 8}
MAX_LEVELS, MAX_MULT = 6, 64


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the VAE.

    Attributes:
      dim: channels at full resolution.
      z_dim: latent channels C.
      dim_mult: channels of each level in units of `dim`; the resolution is halved between two levels.
      num_res_blocks: residual blocks of each level of the encoder; the decoder has one more.
      temporal_downsample: for each level but the last, whether the encoder also halves the frames after it.
      mean: mean of each latent channel; `encode` subtracts it, `decode` adds it.
      std: standard deviation of each latent channel; `encode` divides by it.
      dtype: compute type; norms, softmax and the latents' normalization are always float32.
    """

    dim: int = 8
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 1
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD
    dtype: str = "float32"

    def __post_init__(self):
        """Validates the sizes."""
        check_sizes(self, **LIMITS)
        if not self.dim_mult or min(self.dim_mult) < 1:
            raise ValueError(f"dim_mult is {self.dim_mult}: it must be one or more numbers >= 1")
        if len(self.dim_mult) > MAX_LEVELS or max(self.dim_mult) > MAX_MULT:
            raise ValueError(f"dim_mult is {self.dim_mult}: it must be at most {MAX_LEVELS} numbers up to {MAX_MULT}")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample is {self.temporal_downsample}: it must have one entry less than dim_mult, "
                f"which is {self.dim_mult}"
            )
        # The decoder halves the channels when it doubles the resolution.
        if any((self.dim * mult) % 2 for mult in self.dim_mult[1:]):
            raise ValueError(f"dim is {self.dim}, dim_mult {self.dim_mult}: dim * dim_mult must be even")
        if len(self.mean) != self.z_dim or len(self.std) != self.z_dim or min(self.std) <= 0:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} entries: both must have z_dim = {self.z_dim}, "
                "std > 0"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}: it must be float32 or bfloat16")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, except for the first, which is one pixel frame."""
        return 2 ** sum(self.temporal_downsample)


def wan_vae(**changes) -> VaeConfig:
    """The VAE of Wan2.1."""
    return dataclasses.replace(VaeConfig(dim=96, num_res_blocks=2), **changes)


class ChannelNorm(nn.Module):
    """Normalizes each position's channels to a root mean square of 1, then scales by `scale` (official `RMS_norm`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` [..., C] in float32; returns the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(wide).sum(-1, keepdims=True))
        return (wide / jnp.maximum(length, 1e-12) * (x.shape[-1] ** 0.5 * scale)).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal convolutions with a shortcut (official `ResidualBlock`)."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, C_in] to [B, n, H, W, features]."""
        h = x
        for number in (1, 2):
            h = nn.silu(ChannelNorm(name=f"norm{number}")(h))
            h = Conv(self.features, (3, 3, 3), self.dtype, name=f"conv{number}")(past.extend_known(h, 2))
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1, 1), self.dtype, name="shortcut")(x)
        return x + h


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame (official `AttentionBlock`)."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, n, H, W, C], shape and dtype kept."""
        batch, frames, height, width, channels = x.shape
        h = Conv(3 * channels, (1, 1), self.dtype, name="qkv")(ChannelNorm(name="norm")(x))
        q, k, v = jnp.split(h.reshape(batch * frames, height * width, 1, 3 * channels), 3, axis=-1)
        h = attend(q, [(k, v, None)], split="none").reshape(x.shape)  # with one head, only the frames can be split
        return x + Conv(channels, (1, 1), self.dtype, name="proj")(h)


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, C], shape kept."""
        x = ResidualBlock(x.shape[-1], self.dtype, name="block1")(x, past)
        x = FrameAttention(self.dtype, name="attention")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="block2")(x, past)


class Downsample(nn.Module):
    """Halves rows and columns and, with `time`, the frames (official `Resample`)."""

    time: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, C] to [B, n or n/2, H/2, W/2, C]; the video's first frame stays a single frame."""
        x = Conv(x.shape[-1], (3, 3), self.dtype, stride=2, name="conv")(x)
        if not self.time:
            return x
        extended = past.extend(x, 1)
        if past.first:
            return x
        return Conv(x.shape[-1], (3, 1, 1), self.dtype, frame_stride=2, name="time_conv")(extended)


class Upsample(nn.Module):
    """Doubles rows and columns and, with `time`, the frames; halves the channels (official `Resample`)."""

    time: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, C] to [B, n or 2n, 2H, 2W, C/2]; the video's first frame stays a single frame."""
        if self.time and past.first:
            past.skip(x, 2)  # the frames after it see zeros in its place
        elif self.time:
            x = Conv(2 * x.shape[-1], (3, 1, 1), self.dtype, name="time_conv")(past.extend_known(x, 2))
            x = split_frames(x, 2)
        return Conv(x.shape[-1] // 2, (3, 3), self.dtype, name="conv")(double_size(x))


class Level(nn.Module):
    """The blocks of one resolution, and the resampling to the next."""

    features: int
    blocks: int
    dtype: str
    resample: type[nn.Module] | None = None
    time: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """Runs the blocks on `x` [B, n, H, W, C_in], then the resampling, if any."""
        for i in range(self.blocks):
            x = ResidualBlock(self.features, self.dtype, name=f"blocks_{i}")(x, past)
        return x if self.resample is None else self.resample(self.time, self.dtype, name="resample")(x, past)


class Encoder(nn.Module):
    """Maps pixels to the latents' mean and log-variance, before normalization."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, 1 (first) or 4k, h, w, 3] to [B, 1 or k, H, W, 2C]."""
        config, last = self.config, len(self.config.dim_mult) - 1
        x = Conv(config.dim, (3, 3, 3), config.dtype, name="conv_in")(past.extend_known(x, 2))
        for i, mult in enumerate(config.dim_mult):
            way = (Downsample, config.temporal_downsample[i]) if i < last else ()
            x = Level(config.dim * mult, config.num_res_blocks, config.dtype, *way, name=f"levels_{i}")(x, past)
        x = Middle(config.dtype, name="middle")(x, past)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        x = Conv(2 * config.z_dim, (3, 3, 3), config.dtype, name="conv_out")(past.extend_known(x, 2))
        return Conv(2 * config.z_dim, (1, 1, 1), config.dtype, name="quant")(x)


class Decoder(nn.Module):
    """Maps unnormalized latents to pixels."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        """[B, n, H, W, C] to [B, 1 (first) or 4n, h, w, 3]."""
        config, last = self.config, len(self.config.dim_mult) - 1
        x = Conv(config.z_dim, (1, 1, 1), config.dtype, name="quant")(x)
        top = config.dim * config.dim_mult[-1]
        x = Conv(top, (3, 3, 3), config.dtype, name="conv_in")(past.extend_known(x, 2))
        x = Middle(config.dtype, name="middle")(x, past)
        for i, mult in enumerate(reversed(config.dim_mult)):
            way = (Upsample, config.temporal_downsample[-1 - i]) if i < last else ()
            x = Level(config.dim * mult, config.num_res_blocks + 1, config.dtype, *way, name=f"levels_{i}")(x, past)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        return Conv(3, (3, 3, 3), config.dtype, name="conv_out")(past.extend_known(x, 2))


class WanVae(nn.Module):
    """The VAE; `decode` and `decode_chunk` need only the decoder's parameters, `encode` only the encoder's."""

    config: VaeConfig

    def setup(self):
        """Declares the two halves."""
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes and decodes; shapes as in `encode`."""
        return self.decode(self.encode(pixels))

    def declare(self) -> None:
        """Creates all parameters with little tracing: runs a frame after the first, which uses every layer."""
        side, factor = self.config.spatial_factor, self.config.temporal_factor
        self.encoder(jnp.zeros((1, factor, side, side, 3)), Past(None, first=False))
        self.decoder(jnp.zeros((1, 1, 1, 1, self.config.z_dim)), Past(None, first=False))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Encodes pixels to the mean of their latents (official `encode_to_latent`).

        Args:
          pixels: float [B, F, h, w, 3] in [-1, 1]; F = 1 + a multiple of `temporal_factor` (4).

        Returns:
          Normalized latents, float32 [B, (F-1)/4 + 1, h/8, w/8, C].

        Raises:
          ValueError: if the pixels have the wrong shape.
        """
        config = self.config
        _check_pixels(config, pixels.shape)
        _, latents = run_stream(self.encoder, None, pixels.astype(config.dtype), config.temporal_factor)
        latents = latents[..., : config.z_dim].astype(jnp.float32)
        return (latents - jnp.asarray(config.mean)) * (1.0 / jnp.asarray(config.std))

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
        config = self.config
        latents = latents.astype(jnp.float32) / (1.0 / jnp.asarray(config.std)) + jnp.asarray(config.mean)
        cache, pixels = run_stream(self.decoder, cache, latents.astype(config.dtype))
        return cache, pixels.astype(jnp.float32)


def _check_pixels(config: VaeConfig, shape: tuple[int, ...]) -> None:
    """Checks that the pixels can be encoded."""
    if len(shape) != 5 or shape[-1] != 3:
        raise ValueError(f"pixels have the shape {tuple(shape)}: it must be [B, F, h, w, 3]")
    _, frames, height, width, _ = shape
    if frames < 1 or (frames - 1) % config.temporal_factor:
        raise ValueError(f"pixels have {frames} frames: it must be 1 + a multiple of {config.temporal_factor}")
    if height % config.spatial_factor or width % config.spatial_factor:
        raise ValueError(f"pixels are {height}x{width}: both sides must be multiples of {config.spatial_factor}")


def init_params(config: VaeConfig, key: jax.Array) -> dict:
    """Random parameters; they do not depend on the size of the videos."""
    side = config.spatial_factor
    return WanVae(config).init(key, jnp.zeros((1, 1 + config.temporal_factor, side, side, 3)))["params"]


def param_shapes(config: VaeConfig) -> dict:
    """Shapes and types of the parameters."""
    return jax.eval_shape(lambda: WanVae(config).init(jax.random.key(0), method="declare"))["params"]
