"""A fixed linear codec of pixel patches, which replaces the video VAE in the small models."""

import dataclasses
import functools
import importlib.resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

ASSET = "digits_codec.safetensors"


def to_float(video: jax.Array | np.ndarray) -> jax.Array:
    """Maps uint8 pixels [...] to float32 in [-1, 1]."""
    return jnp.asarray(video).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(pixels: jax.Array | np.ndarray) -> jax.Array:
    """Maps float pixels [...], nominally in [-1, 1], to uint8; clips values outside the range."""
    levels = jnp.round((jnp.asarray(pixels).astype(jnp.float32) + 1.0) * 127.5)
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "components", "scale"],
    meta_fields=["spatial_factor"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PatchCodec:
    """Patchwise PCA; over the fitted frames the latents have zero mean and, averaged over channels, unit variance.

    Encodes every frame independently, so streaming needs no cache (temporal factor 1).

    Attributes:
      mean: The mean patch, float32 [p * p], pixels in [-1, 1].
      components: Orthonormal directions, strongest first, float32 [C, p * p].
      scale: Standard deviation of each channel, float32 [C].
      spatial_factor: The patch side p in pixels.
    """

    mean: np.ndarray
    components: np.ndarray
    scale: np.ndarray
    spatial_factor: int = 6

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame."""
        return 1

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.components.shape[0]

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Encodes pixels.

        Args:
          pixels: float32 [B, F, h, w, 1] in [-1, 1]; h and w are multiples of the patch side.

        Returns:
          Latents, float32 [B, F, h / p, w / p, C].
        """
        patches = _to_patches(pixels, self.spatial_factor)
        return _matmul(patches - self.mean, jnp.asarray(self.components).T) / self.scale

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents.

        Args:
          latents: float32 [B, F, h / p, w / p, C].

        Returns:
          Pixels, float32 [B, F, h, w, 1], nominally in [-1, 1] but not clipped (see `to_uint8`).
        """
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents: got {latents.shape[-1]} channels, allowed: {self.channels}")
        patches = _matmul(latents * self.scale, jnp.asarray(self.components)) + self.mean
        return _from_patches(patches, self.spatial_factor)

    def init_cache(self, batch: int, height: int, width: int) -> tuple:
        """The decoder's cache before a video's first frame: empty, as frames are decoded independently."""
        del batch, height, width
        return ()

    def decode_chunk(self, cache: tuple, latents: jax.Array) -> tuple[tuple, jax.Array]:
        """`decode` with the interface of a streaming decoder (`inference.decoders.Decoder`)."""
        return cache, self.decode(latents)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "PatchCodec":
        """Reads a codec's constants; without a path, those of the moving digits, which come with the package."""
        if path is None:
            data = importlib.resources.files("sf_jax").joinpath("assets", ASSET).read_bytes()
        else:
            data = Path(path).read_bytes()
        tensors = safetensors.numpy.load(data)
        side = int(round(tensors["mean"].size ** 0.5))
        return cls(spatial_factor=side, **tensors)

    def save(self, path: str | Path) -> None:
        """Writes the constants as safetensors."""
        tensors = {
            name: np.ascontiguousarray(getattr(self, name), np.float32) for name in ("mean", "components", "scale")
        }
        Path(path).write_bytes(safetensors.numpy.save(tensors))


def fit(
    frames: np.ndarray, *, spatial_factor: int = 4, channels: int = 8, whitening: float = 0.5
) -> tuple[PatchCodec, float]:
    """Fits the codec by PCA of the patches.

    The latents' variance is 1 on average. With full whitening (1.0), the faintest detail would count as much in a
    diffusion loss as the coarse shape; without whitening (0.0), even the schedule's smallest noise would hide detail.

    Args:
      frames: Training frames, uint8 [N, h, w, 1].
      spatial_factor: The patch side p in pixels.
      channels: The number of components kept.
      whitening: How far the channels' variances are equalized, in [0, 1].

    Returns:
      The codec, and the share of the patches' variance that its components explain, in [0, 1].
    """
    if not 1 <= channels <= spatial_factor**2:
        raise ValueError(f"channels: got {channels}, allowed: 1 to {spatial_factor**2}")
    pixels = np.asarray(frames, np.float32) / 127.5 - 1.0
    patches = np.asarray(_to_patches(pixels[:, None], spatial_factor)).reshape(-1, spatial_factor**2)
    mean = patches.mean(axis=0, dtype=np.float64)
    moment = np.zeros((mean.size, mean.size))
    for start in range(0, len(patches), 1 << 16):
        centerd = patches[start : start + (1 << 16)].astype(np.float64) - mean
        moment += centerd.T @ centerd
    variances, vectors = np.linalg.eigh(moment / len(patches))
    variances, components = variances[::-1], vectors[:, ::-1].T[:channels]
    # The sign of an eigenvector is arbitrary: fixes it, so that refitting gives the same constants.
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(channels), largest])[:, None]
    deviations = np.sqrt(variances[:channels])
    scale = deviations**whitening
    scale *= np.sqrt(np.mean(np.square(deviations / scale)))
    codec = PatchCodec(
        mean=mean.astype(np.float32),
        components=components.astype(np.float32),
        scale=scale.astype(np.float32),
        spatial_factor=spatial_factor,
    )
    return codec, float(variances[:channels].sum() / variances.sum())


def _matmul(left, right):
    # The default matmul precision of GPUs and TPUs (TF32 or bfloat16) would blur the reconstruction.
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _to_patches(pixels, side: int):
    """[B, F, h, w, 1] -> [B, F, h / p, w / p, p * p]."""
    if pixels.ndim != 5 or pixels.shape[-1] != 1 or pixels.shape[2] % side or pixels.shape[3] % side:
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, allowed: [B, F, {side} i, {side} j, 1]")
    batch, frames, height, width, _ = pixels.shape
    grid = pixels.reshape(batch, frames, height // side, side, width // side, side)
    return grid.transpose(0, 1, 2, 4, 3, 5).reshape(batch, frames, height // side, width // side, side * side)


def _from_patches(patches, side: int):
    """[B, F, h / p, w / p, p * p] -> [B, F, h, w, 1]."""
    batch, frames, rows, columns, _ = patches.shape
    grid = patches.reshape(batch, frames, rows, columns, side, side)
    return grid.transpose(0, 1, 2, 4, 3, 5).reshape(batch, frames, rows * side, columns * side, 1)
