"""Rotary position embedding over frames, rows and columns, as in Wan2.1.

Source: official `rope_params`, `rope_apply` and `causal_rope_apply` (wan/modules/model.py, causal_model.py).
Pairs of adjacent channels are rotated; a head's `D/2` pairs are split between the frame, row and column axes.
numpy computes the tables in float64 and stores them as float32, so large angles lose no precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import partition

# The official code has 1024 rows and truncates longer videos; `RolloutConfig.check_frames` raises on more frames.
MAX_FRAMES = 1024


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Returns how many of the `head_dim / 2` channel pairs rotate with (frame, row, column)."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@functools.lru_cache(maxsize=64)
def _angles(length: int, pairs: int) -> np.ndarray:
    """Angles [length, pairs] in radians, float64, of one axis with `pairs` rotated pairs."""
    frequencies = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    return np.outer(np.arange(length, dtype=np.float64), frequencies)


def rotation(frames: np.ndarray | jax.Array, grid: tuple[int, int], head_dim: int) -> jax.Array:
    """Rotations of the tokens of the given frames.

    Args:
      frames: int [F], frame positions (concrete or traced); each must be in [0, MAX_FRAMES).
      grid: token rows and columns (h, w) of a frame.
      head_dim: channels D of one attention head, even.

    Returns:
      float32 [2, F*h*w, D/2]: cosine and sine for each token and channel pair.
    """
    angles = _angles(MAX_FRAMES, axis_pairs(head_dim)[0])
    if isinstance(frames, np.ndarray):
        angles = angles[frames]
        by_frame = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    else:
        table = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        by_frame = jnp.take(jnp.asarray(table), frames, axis=1)
    return _of_tokens(by_frame, grid, head_dim)


def endless_rotation(frames: jax.Array, grid: tuple[int, int], head_dim: int) -> jax.Array:
    """As `rotation`, for any int32 positions; only the distances between rotated frames matter then.

    An angle is a fixed-point number of turns in 32 bits, whose overflow drops whole turns, so that angles stay exact
    forever. Between two frames they are those of `rotation`, up to 1e-9 per frame and float32 rounding.
    """
    return _of_tokens(_endless(frames, head_dim), grid, head_dim)


def shift_rotation(frames: jax.Array, head_dim: int) -> jax.Array:
    """The rotation float32 [2, 1, D/2] that moves keys by a number of frames (int32, any sign)."""
    rest = head_dim // 2 - axis_pairs(head_dim)[0]
    still = jnp.stack([jnp.ones((1, rest)), jnp.zeros((1, rest))])
    return jnp.concatenate([_endless(frames[None], head_dim), still], axis=-1)


def _endless(frames, head_dim):
    """Cosines and sines float32 [2, F, pairs] of the frame axis at int32 positions [F]."""
    turns = _angles(2, axis_pairs(head_dim)[0])[1] / (2 * np.pi)
    steps = np.round(turns * 2.0**32).astype(np.uint32)
    parts = jax.lax.bitcast_convert_type(jnp.asarray(frames, jnp.int32), jnp.uint32)[:, None] * steps
    angles = jax.lax.bitcast_convert_type(parts, jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def _of_tokens(by_frame, grid, head_dim):
    """Rotations [2, F*h*w, D/2] of the tokens of frames, from those of the frame axis [2, F, pairs]."""
    f_pairs, h_pairs, w_pairs = axis_pairs(head_dim)
    (h, w), count = grid, by_frame.shape[1]

    def axis(length, pairs):
        angles = _angles(length, pairs)
        return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)

    parts = [
        jnp.broadcast_to(by_frame[:, :, None, None], (2, count, h, w, f_pairs)),
        jnp.broadcast_to(axis(h, h_pairs)[:, None, :, None], (2, count, h, w, h_pairs)),
        jnp.broadcast_to(axis(w, w_pairs)[:, None, None], (2, count, h, w, w_pairs)),
    ]
    return jnp.concatenate(parts, axis=-1).reshape(2, count * h * w, head_dim // 2)


def rotate(x: jax.Array, rotations: jax.Array) -> jax.Array:
    """Rotates the channel pairs of `x` [B, T, N, D] by `rotations` [2, T, D/2] in float32; returns the dtype of `x`."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rotations[0][:, None], rotations[1][:, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_constant(x: jax.Array, rotations: jax.Array) -> jax.Array:
    """As `rotate`, for numbers that take no gradient: on TPUs by a product, as an axis of two rearranges `x` in memory.

    The product is with the matrix that swaps the channels of every pair, so it is exact. Its backward pass would not
    be, and rematerialization would keep it.
    """
    if partition.platform() != "tpu":
        return rotate(x, rotations)
    dim = x.shape[-1]
    swap = np.eye(dim, dtype=np.float32)[np.arange(dim) ^ 1]
    signs = np.where(np.arange(dim) % 2, 1.0, -1.0).astype(np.float32)
    cos, sin = (jnp.repeat(table, 2, axis=-1)[:, None] for table in rotations)
    partner = jnp.matmul(x, swap.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + partner * (signs * sin)).astype(x.dtype)
