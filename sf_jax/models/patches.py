"""Conversion of latent frames to tokens and back."""

import jax


def patchify(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[B, F, H, W, C] to tokens [B, F, h*w, ph*pw*C]; `patch` is (1, ph, pw), h = H / ph, w = W / pw."""
    batch, frames, height, width, channels = x.shape
    h, w = height // patch[1], width // patch[2]
    x = x.reshape(batch, frames, h, patch[1], w, patch[2], channels).transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(batch, frames, h * w, -1)


def unpatchify(x: jax.Array, grid: tuple[int, int], patch: tuple[int, int, int]) -> jax.Array:
    """Tokens [B, F, h*w, ph*pw*C] to [B, F, H, W, C]; `grid` is (h, w)."""
    batch, frames = x.shape[:2]
    (h, w), (_, ph, pw) = grid, patch
    x = x.reshape(batch, frames, h, w, ph, pw, -1).transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(batch, frames, h * ph, w * pw, -1)
