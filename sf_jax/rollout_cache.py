"""Caches of a rollout: how large they are, and what the chunk being generated sees of them.

Two forms hold the same frames. A `KVCache` keeps all layers in one array, keys without rotary embedding, for networks
that scan over their layers. A `SlotCache` has an array per layer, which attention reads in place. `open_chunk` and
`close_chunk` hide the difference.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import attention, kv_cache, slot_cache
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.slot_cache import SlotCache, Span
from sf_jax.models.slots import Slots
from sf_jax.models.wan import KeysValues, Layout, WanTransformer
from sf_jax.rollout_config import RolloutConfig

MAX_PREFIXES = 16  # lengths of the cache for which attention is compiled


@flax.struct.dataclass
class Context:
    """What the network's calls for one chunk read besides their input.

    Attributes:
      text: prompt keys and values [L, B, S, N, D]; slots have their own.
      cache: keys and values of earlier frames, or every layer's slots.
      layout: positions of the chunk, and what it sees.
    """

    text: KeysValues
    cache: KVCache | tuple[Slots, ...]
    layout: Layout


def empty_cache(
    model: WanTransformer,
    config: RolloutConfig,
    batch: int,
    frames: int,
    height: int,
    width: int,
    keep_from: int | None = None,
    dtype: str | None = None,
) -> KVCache:
    """A cache for `frames` latent frames in total; with a window, a ring of the frames that the window needs.

    `keep_from` makes it large enough to hold the sink and all frames from that one on at the end. `dtype` is one of
    `kv_cache.DTYPES`; None is the model's.
    """
    grid = model.config.grid(height, width)
    capacity = kv_cache.capacity_for(frames, config.chunk, config.window)
    if keep_from is not None:
        capacity = max(capacity, min(frames, config.sink + frames - keep_from))
    dtype = dtype or model.config.dtype
    heads, head_dim = model.config.num_heads, model.config.head_dim
    # A full cache never evicts, so it needs no sink of its own; the visibility mask still applies it.
    sink = min(config.sink, capacity)
    return kv_cache.init_cache(
        model.config.num_layers, batch, capacity, grid[0] * grid[1], heads, head_dim, dtype, sink
    )


def empty_slots(
    model: WanTransformer,
    config: RolloutConfig,
    batch: int,
    frames: int,
    height: int,
    width: int,
    streams: bool = False,
) -> SlotCache:
    """A cache that a network with separate layers reads in place, for a video of `frames` latent frames in all.

    In `streams`, the sink can move even with absolute positions, a chunk can begin at any slot, and what paused ones
    write goes behind the slots.
    """
    network, tokens = model.config, int(np.prod(model.config.grid(height, width)))
    capacity = frames if config.window is None else min(frames, config.window)
    sink, relative, heads = min(config.sink, capacity), config.positions == "relative", network.num_heads
    rows = (capacity + config.chunk * streams) * tokens
    multiple = attention.key_multiple(network.attention, network.dtype, network.head_dim)
    rows, heads_first = rows + -rows % multiple, multiple > 1
    slots = (heads, rows) if heads_first else (rows, heads)
    aligned = not (streams or config.first_frame_alone or (capacity - sink) % config.chunk or sink % config.chunk)

    def zeros(*rows_and_heads):
        shape = (batch, *rows_and_heads, network.head_dim)
        return tuple(jnp.zeros(shape, network.dtype) for _ in range(network.num_layers))

    return SlotCache(
        k=zeros(*slots),
        v=zeros(*slots),
        sink_k=zeros(sink * tokens, heads) if sink and (relative or streams) else (),
        sink_shift=jnp.int32(0),
        tokens_per_frame=tokens,
        capacity=capacity,
        sink=sink,
        write_frames=config.chunk if aligned else 1,
        relative_window=config.window if relative else None,
        heads_first=heads_first,
    )


def by_axes(function: Callable, cache: KVCache | SlotCache) -> KVCache | SlotCache:
    """Maps `function(array, *names)` over a cache's arrays; `names` are their axes' names for `partition`."""

    def mapped(tree, *names):
        return jax.tree.map(lambda a: function(a, *names), tree)

    if not isinstance(cache, SlotCache):
        k, v = mapped((cache.k, cache.v), None, *slot_cache.axes_of())
        return cache.replace(k=k, v=v, frames=function(cache.frames, None))
    k, v = mapped((cache.k, cache.v), *slot_cache.axes_of(cache.heads_first))
    sink_k = mapped(cache.sink_k, *slot_cache.axes_of())
    return cache.replace(k=k, v=v, sink_k=sink_k, sink_shift=function(cache.sink_shift))


def open_chunk(config: RolloutConfig, cache: KVCache | SlotCache, text: KeysValues, span: Span) -> Context:
    """The context of the frames of `span`, which come right after those in the cache.

    With `span.active`, one program serves streams of any age: attention ends at `span.frames_before`, and the positions
    of all frames but the sink's are moved by `span.shift`.

    Raises:
      ValueError: if the chunk does not fit into a cache without window (checked only if `start` is a Python int).
    """
    if isinstance(span.start, int):
        kv_cache.check_capacity(cache, span.start + span.size, config.window)
    if isinstance(cache, SlotCache):
        return Context(text, slot_cache.open_slots(cache, text, span), slot_cache.layout(cache, span))
    seen = seen_cache(config, cache, span.start)
    layout = chunk_layout(seen, config, span.start, span.size)
    if span.active is not None:
        layout = layout.replace(prefixes=(), prefixes_masked=False)
        if seen.capacity:
            most = jnp.minimum(span.frames_before, seen.capacity) + span.size
            layout = layout.replace(most=most * seen.tokens_per_frame)
        if config.positions == "absolute":
            frames, past = layout.frames + span.shift, layout.context_frames
            past = jnp.where(past < config.sink, past, past + span.shift)
            layout = layout.replace(frames=frames, context_frames=past)
    return Context(text, seen, layout)


def close_chunk(cache: KVCache | SlotCache, written: KeysValues | tuple[Slots, ...], span: Span) -> KVCache | SlotCache:
    """The cache with the keys and values of the frames of `span`: the last call's, or the slots with them."""
    if isinstance(cache, SlotCache):
        return slot_cache.close_slots(cache, written, span)
    keep = span.active is not None and ~span.active
    return kv_cache.write(cache, written.k, written.v, span.start, keep=keep)


def chunk_layout(cache: KVCache, config: RolloutConfig, start: jax.Array | int, size: int) -> Layout:
    """Positions and visible cache slots of the chunk [start, start + size)."""
    prefixes, masked = context_lengths(config, cache.capacity, start)
    frames, context_frames = jnp.asarray(start, jnp.int32) + jnp.arange(size, dtype=jnp.int32), cache.frames
    if config.positions == "relative":
        moved = jnp.maximum(start + size - config.window, 0)
        frames = frames - moved
        context_frames = jnp.where(context_frames < config.sink, context_frames, context_frames - moved)
    return Layout(
        frames=frames,
        context_frames=jnp.maximum(context_frames, 0),
        context_mask=kv_cache.visible(cache, start, start + size, config.window),
        pattern=attention.cached(size, cache.capacity),
        # Ring slots fill in order and never leave the window, so a key count suffices; a larger cache needs a mask.
        mask_is_prefix=config.window is None or cache.capacity <= config.window - config.chunk,
        prefixes=prefixes,
        prefixes_masked=masked,
    )


def seen_cache(config: RolloutConfig, cache: KVCache, start: jax.Array | int) -> KVCache:
    """The part of the cache that the chunk at `start` sees: its window, if the cache holds more frames than that."""
    return cache if config.window is None else kv_cache.within(cache, start, config.window - config.chunk)


def with_moved_sink(config: RolloutConfig, layout: Layout) -> Layout:
    """Moves the sink right before every chunk's window in the layout of a whole video (numpy positions).

    The other frames keep their numbers as positions, since only distances matter.
    """
    if config.positions != "relative" or not config.sink:
        return layout
    ends = [int(layout.frames[group.queries[1] - 1]) + 1 for group in layout.pattern]
    shifts = tuple(max(0, end - config.window) for end in ends)
    return layout.replace(sink=config.sink, sink_shifts=shifts) if any(shifts) else layout


def context_lengths(config: RolloutConfig, capacity: int, start: jax.Array | int) -> tuple[tuple[int, ...], bool]:
    """Possible numbers of cached frames before the chunk at `start`, for a cache of `capacity` frames, ascending.

    A traced `start` can be any chunk. Each length adds a copy of the attention to the compiled program, so only some
    of many lengths are kept, always including the longest.

    Returns:
      The lengths, and whether some were dropped (`Layout.prefixes`, `Layout.prefixes_masked`).
    """
    if isinstance(start, int):
        return (min(start, capacity),), False
    first = 1 if config.first_frame_alone else config.chunk
    lengths = [*range(first, capacity, config.chunk), *([] if config.window is None else [capacity])]
    every = max(1, -(-len(lengths) // (MAX_PREFIXES - 1)))
    return tuple(sorted({0, *lengths[::-every]})), every > 1
