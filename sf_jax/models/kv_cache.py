"""The key/value cache of a causal video transformer: an explicit pytree of fixed shape.

Keys are stored without rotary embedding and rotated when read. With a window the cache is a ring: the first `sink`
frames are never evicted, a new frame overwrites the oldest of the others, and nothing is ever shifted. Keys and values
may be stored in 8 bits (`eight_bit.Scaled`); readers cast them with `astype`.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sf_jax.models import eight_bit
from sf_jax.models.eight_bit import Scaled
from sf_jax.models.partition import constrain

DTYPES = ("bfloat16", "float32", *eight_bit.DTYPES)


@flax.struct.dataclass
class KeysValues:
    """Keys (without rotary embedding) and values [L, B, T, N, D] of all layers."""

    k: jax.Array | Scaled
    v: jax.Array | Scaled


@flax.struct.dataclass
class OneLayer:
    """One layer of the keys and values of all layers, sliced only where attention reads it.

    Attributes:
      stack: all layers.
      index: int32, the layer.
    """

    stack: KeysValues
    index: jax.Array

    def first(self, tokens: int) -> tuple[jax.Array | Scaled, jax.Array | Scaled]:
        """Keys and values [B, tokens, N, D] of the first tokens."""

        def part(a):
            sizes = (1, a.shape[1], tokens, *a.shape[3:])
            return jax.lax.dynamic_slice(a, (self.index, *[0] * (a.ndim - 1)), sizes)[0]

        return jax.tree.map(part, (self.stack.k, self.stack.v))


@flax.struct.dataclass
class KVCache:
    """Keys and values of past clean frames, for all layers.

    Attributes:
      k: [L, B, capacity*tokens, N, D], keys without rotary embedding.
      v: [L, B, capacity*tokens, N, D].
      frames: int32 [capacity], the frame in each slot; -1 if it is empty.
      sink: number of first frames that are never overwritten (static).
    """

    k: jax.Array | Scaled
    v: jax.Array | Scaled
    frames: jax.Array
    sink: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def capacity(self) -> int:
        """Number of frames that fit."""
        return self.frames.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one frame."""
        return self.k.shape[2] // max(self.capacity, 1)


def init_cache(
    layers: int,
    batch: int,
    capacity: int,
    tokens_per_frame: int,
    heads: int,
    head_dim: int,
    dtype: jnp.dtype | str = jnp.float32,
    sink: int = 0,
) -> KVCache:
    """An empty cache of `capacity` frames (see `KVCache` for the shapes); `dtype` may be "int8" or "fp8"."""
    if not 0 <= sink <= capacity:
        raise ValueError(f"sink is {sink} frames: it must be between 0 and the cache's capacity of {capacity} frames")
    shape = (layers, batch, capacity * tokens_per_frame, heads, head_dim)
    k, v = (eight_bit.zeros(shape, dtype) for _ in range(2))
    k, v = jax.tree.map(lambda a: constrain(a, None, "batch", None, "heads", None), (k, v))
    return KVCache(
        k=k,
        v=v,
        frames=jnp.full((capacity,), -1, jnp.int32),
        sink=sink,
    )


def capacity_for(total_frames: int, chunk: int, window: int | None) -> int:
    """Number of past frames that a rollout must cache: all of them, or the window minus the current chunk."""
    return total_frames if window is None else min(total_frames, window - chunk)


def check_capacity(cache: KVCache, frames: int, window: int | None) -> None:
    """Checks statically that a rollout without window fits into the cache, where frames would overwrite each other."""
    if window is None and frames > cache.capacity:
        raise ValueError(
            f"the cache holds {cache.capacity} frames but the rollout has {frames}: "
            f"make the cache larger (capacity >= {frames}) or set a window"
        )


def write(
    cache: KVCache, k: jax.Array, v: jax.Array, start: jax.Array | int, keep: jax.Array | bool = False
) -> KVCache:
    """Writes the frames [start, start + n) of `k`, `v` [L, B, n*tokens, N, D].

    Args:
      cache: the cache to write to.
      k: keys without rotary embedding.
      v: values.
      start: the first frame; may be traced.
      keep: whether to return the cache unchanged; may be traced.
    """
    tokens = cache.tokens_per_frame
    if not cache.capacity:
        return cache
    stored, frames = (cache.k, cache.v), cache.frames
    new = tuple(eight_bit.like(old, a) for old, a in zip(stored, (k, v), strict=True))
    for i in range(k.shape[2] // tokens):
        frame = jnp.asarray(start, jnp.int32) + i
        slot, dropped = slot_of(cache, frame)
        part, dropped = slice(i * tokens, (i + 1) * tokens), keep if dropped is None else dropped | keep

        def put(old, new, slot=slot, dropped=dropped):
            at = (0, 0, slot * tokens, 0, 0)
            if dropped is not False:
                kept = jax.lax.dynamic_slice(old, at, (*old.shape[:2], tokens, *old.shape[3:]))
                new = jnp.where(dropped, kept, new)
            return jax.lax.dynamic_update_slice(old, new, at)

        stored = jax.tree.map(lambda old, a, part=part, put=put: put(old, a[:, :, part]), stored, new)
        frames = frames.at[slot].set(frame if dropped is False else jnp.where(dropped, frames[slot], frame))
    return cache.replace(k=stored[0], v=stored[1], frames=frames)


def slot_of(cache: KVCache, frame: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The int32 slot of a frame, and whether it has none: the frame follows a sink without ring (None: it has one)."""
    ring = cache.capacity - cache.sink
    if not ring:
        return jnp.minimum(frame, cache.sink - 1), frame >= cache.sink
    return jnp.where(frame < cache.sink, frame, cache.sink + (frame - cache.sink) % ring), None


def within(cache: KVCache, start: jax.Array | int, capacity: int) -> KVCache:
    """The frames that the chunk at `start` sees in a cache larger than its window: sink and newest frames, in order.

    Returns them as a cache of `capacity` frames whose usable slots come first, so that kernels need no mask.
    """
    if capacity >= cache.capacity:
        return cache
    tokens, sink = cache.tokens_per_frame, min(cache.sink, capacity)
    oldest = jnp.maximum(jnp.asarray(start, jnp.int32) - (capacity - sink), sink)
    frames = jnp.concatenate([jnp.arange(sink), oldest + jnp.arange(capacity - sink)])
    slots = slot_of(cache, frames)[0]

    def part(x):
        by_frame = x.reshape(*x.shape[:2], cache.capacity, tokens, *x.shape[3:])
        return jnp.take(by_frame, slots, axis=2, mode="clip").reshape(*x.shape[:2], capacity * tokens, *x.shape[3:])

    k, v = jax.tree.map(part, (cache.k, cache.v))
    return KVCache(k, v, cache.frames[slots], sink)


def in_order(cache: KVCache, total: int) -> KVCache:
    """Sorts a cache after a video of `total` frames: the sink, then the newest frames in order."""
    ring = cache.capacity - cache.sink
    if total <= cache.capacity or not ring:
        return cache
    oldest = (total - ring - cache.sink) % ring  # ring slots before the one that holds its oldest frame

    def turned(x, axis, width):
        bounds = [0, cache.sink * width, (cache.sink + oldest) * width, cache.capacity * width]
        sink, newer, older = (
            jax.lax.slice_in_dim(x, *part, axis=axis) for part in zip(bounds[:-1], bounds[1:], strict=True)
        )
        return jnp.concatenate([sink, older, newer], axis)

    tokens = cache.tokens_per_frame
    frames = turned(cache.frames, 0, 1)
    k, v = jax.tree.map(lambda a: turned(a, 2, tokens), (cache.k, cache.v))
    return cache.replace(k=k, v=v, frames=frames)


def visible(cache: KVCache, start: jax.Array | int, stop: jax.Array | int, window: int | None) -> jax.Array:
    """Bool [capacity]: the slots that the chunk [start, stop) sees; the run-time form of `attention.visible_past`."""
    past = (cache.frames >= 0) & (cache.frames < start)
    if window is None:
        return past
    return past & ((cache.frames < cache.sink) | (cache.frames >= stop - (window - cache.sink)))
