"""A key/value cache whose arrays attention reads where they are: nothing copies them.

For networks with separate parameters per layer (`WanConfig.scan_layers` is False). Keys are stored with their rotary
embedding, and the slots are a ring that has room for the chunk being generated: a chunk overwrites the frames that it
no longer sees, so that the visible slots are always the first ones, as fused kernels need them. Only distances between
frames matter, so cached keys never need a new rotation. The sink's keys do if the sink moves with the window: they are
also kept as they were written, and turned once per chunk.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sf_jax.models import attention, kv_cache, rope
from sf_jax.models.kv_cache import KeysValues
from sf_jax.models.layout import Layout, SlotPlace
from sf_jax.models.slots import Slots, get_rows, put_rows

# Scope of the conditional that keeps the sink's keys, by which `perf` identifies it.
WHILE_SINK_GROWS = "while_sink_grows"


@flax.struct.dataclass
class SlotCache:
    """Keys and values of past frames and of the current chunk.

    Attributes:
      k: [B, rows, N, D] per layer, keys with rotary embedding; a slot has the `tokens_per_frame` rows of a frame. With
        `heads_first` they are [B, N, rows, D].
      v: values of the same frames.
      sink_k: [B, sink * tokens_per_frame, N, D] per layer, keys of the sink as they were written; () if it never moves.
      sink_shift: int32, position minus number of the sink's frames in `sink_k`.
      tokens_per_frame: rows of a frame (static).
      capacity: number of slots (static). The rows behind them are padding, and room for writes that nothing reads.
      sink: number of first frames that are never overwritten (static).
      write_frames: number of frames that are written at once (static).
      relative_window: latent frames that a chunk sees, with itself, if positions are relative; else None (static).
      heads_first: see `slots.Slots` (static).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    sink_k: tuple[jax.Array, ...]
    sink_shift: jax.Array
    tokens_per_frame: int = flax.struct.field(pytree_node=False)
    capacity: int = flax.struct.field(pytree_node=False)
    sink: int = flax.struct.field(pytree_node=False)
    write_frames: int = flax.struct.field(pytree_node=False)
    relative_window: int | None = flax.struct.field(pytree_node=False)
    heads_first: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Span:
    """The frames [start, start + size) of one call.

    Attributes:
      start: int32, number of the first frame.
      size: number of frames (static).
      shift: int32, position minus number of the frames.
      active: bool, whether anything may be written to visible slots; None: always.
      oldest: int32, largest `start` of a batch of streams, the same for all of them; None: there is only this one.
    """

    start: jax.Array | int
    size: int = flax.struct.field(pytree_node=False)
    shift: jax.Array | int = 0
    active: jax.Array | None = None
    oldest: jax.Array | None = None

    @property
    def frames_before(self) -> jax.Array:
        """Upper bound of the frames before the span in all streams of a batch."""
        return jnp.asarray(self.start if self.oldest is None else self.oldest, jnp.int32)


def axes_of(heads_first: bool = False) -> tuple[str | None, ...]:
    """Names of the axes of keys and values, see `partition.AXES`."""
    return ("batch", "heads", None, None) if heads_first else ("batch", None, "heads", None)


def layout(cache: SlotCache, span: Span) -> Layout:
    """Positions of the frames of a call, the rows it writes, and those it sees."""
    part = cache.write_frames if span.size % cache.write_frames == 0 else 1
    first, own = jnp.asarray(span.start, jnp.int32), jnp.arange(span.size, dtype=jnp.int32)
    rows = kv_cache.slot_of(cache, first + own[::part])[0] * cache.tokens_per_frame
    frames = first + span.shift + own
    if span.active is not None:
        rows = jnp.where(span.active, rows, (cache.capacity + own[::part]) * cache.tokens_per_frame)
        frames = jnp.where(span.active, frames, own)  # theirs may be past the last position, whose rotation is NaN
    count = jnp.minimum(first + span.size, cache.capacity) * cache.tokens_per_frame
    return Layout(
        frames=frames,
        pattern=attention.cached(span.size, 0),
        place=SlotPlace(rows, count, endless=cache.relative_window is not None),
        most=jnp.minimum(span.frames_before + span.size, cache.capacity) * cache.tokens_per_frame,
    )


def open_slots(cache: SlotCache, text: KeysValues, span: Span) -> tuple[Slots, ...]:
    """The slots of every layer for a call; `text` are prompt keys and values [L, B, S, N, D]."""
    keys = cache.k
    if cache.sink_k:
        position = 0  # of the sink's first frame
        if cache.relative_window is not None:
            position = span.shift + jnp.maximum(span.start + span.size - cache.relative_window, 0)
        turn = rope.shift_rotation(jnp.asarray(position - cache.sink_shift, jnp.int32), cache.k[0].shape[-1])
        moved = (rope.rotate_constant(a, turn) for a in cache.sink_k)
        keys = [put_rows(k, a, 0, cache.heads_first) for k, a in zip(keys, moved, strict=True)]
    texts = (jax.tree.map(lambda a, i=i: a[i], text) for i in range(len(cache.k)))
    return tuple(Slots(k, v, None, t, cache.heads_first) for k, v, t in zip(keys, cache.v, texts, strict=True))


def close_slots(cache: SlotCache, layers: tuple[Slots, ...], span: Span) -> SlotCache:
    """The cache after the last call for a chunk; its keys and values stay."""
    keys, sink_k, sink_shift = tuple(layer.k for layer in layers), cache.sink_k, cache.sink_shift
    if sink_k:
        grows = jnp.asarray(span.start) < cache.sink
        if span.active is not None:
            grows = grows & span.active
        frames = jnp.arange(sink_k[0].shape[1]) // cache.tokens_per_frame
        own = ((frames >= span.start) & (frames < span.start + span.size))[:, None, None]

        def written(k, old):
            if cache.write_frames == span.size > 1:  # a chunk that begins in the sink also ends in it
                row = span.start * cache.tokens_per_frame
                return put_rows(old, get_rows(k, row, span.size * cache.tokens_per_frame, cache.heads_first), row)
            return jnp.where(own, get_rows(k, 0, old.shape[1], cache.heads_first), old)

        def all_written(old):
            return tuple(map(written, keys, old))

        with jax.named_scope(WHILE_SINK_GROWS):
            sink_k = jax.lax.cond(grows, all_written, lambda old: old, sink_k)
        sink_shift = jnp.where(grows, jnp.asarray(span.shift, jnp.int32), sink_shift)
    return cache.replace(k=keys, v=tuple(layer.v for layer in layers), sink_k=sink_k, sink_shift=sink_shift)
