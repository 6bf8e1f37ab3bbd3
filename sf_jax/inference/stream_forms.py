"""A stream's keys and values in files: without padding, and readable by networks of either form.

Networks with separate layers hold a `SlotCache`, the others a `KVCache` (see `WanConfig.scan_layers`). A file has the
form of the network that wrote it. A network of the other form reads it up to rounding, one of the same form exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sf_jax.inference.stream_state import StreamSpec, StreamState
from sf_jax.models import kv_cache, rope
from sf_jax.models.slots import get_rows, put_rows
from sf_jax.models.wan import WanTransformer


def stored(spec: StreamSpec, one: StreamState) -> StreamState:
    """A stream of `spec` as files have it: slots without the rows behind them."""
    if spec.slots is None:
        return one
    rows, heads_first = spec.slots.capacity * spec.slots.tokens, spec.slots.heads_first
    k, v = (tuple(get_rows(a, 0, rows, heads_first) for a in arrays) for arrays in (one.k, one.v))
    return one.replace(k=k, v=v, heads_first=False)


def as_stored(spec: StreamSpec, like: StreamState, slots: bool) -> StreamState:
    """Shapes of a file's stream, with slots or with a `KVCache`; `like` are those of a stream of `spec`."""
    if slots == (spec.slots is not None):
        return jax.eval_shape(lambda one: stored(spec, one), like)
    convert = _to_slots if slots else _from_slots
    like = jax.eval_shape(lambda one: stored(spec, one), like)
    return jax.eval_shape(lambda one: convert(_with_slots(spec), one), like)


def restored(spec: StreamSpec, one: StreamState) -> StreamState:
    """A stream of `spec` from a file's."""
    slots = isinstance(one.k, tuple)
    if spec.slots is None:
        return jax.jit(lambda one: _from_slots(_with_slots(spec), one))(one) if slots else one
    if not slots:
        one = jax.jit(lambda one: _to_slots(spec, one))(one)
    like = spec.slots.k[0]

    def padded(arrays):
        return tuple(put_rows(jnp.zeros(like.shape, a.dtype), a, 0, spec.slots.heads_first) for a in arrays)

    return one.replace(k=padded(one.k), v=padded(one.v), heads_first=spec.slots.heads_first)


def _with_slots(spec):
    """The same streams with separate layers."""
    config = dataclasses.replace(spec.model.config, scan_layers=False)
    return dataclasses.replace(spec, model=WanTransformer(config))


def _rotations(spec, positions):
    grid = spec.model.config.grid(*spec.size[:2])
    rotation = rope.rotation if spec.slots.window is None else rope.endless_rotation
    return rotation(jnp.asarray(positions, jnp.int32), grid, spec.model.config.head_dim)


def _to_slots(spec, one):
    """A stream with a `KVCache` as one with slots, as files have it."""
    cache, numbers = spec.slots, one.held[0]
    positions = jnp.where(numbers < cache.sink, numbers, numbers + one.shift[0])
    rotations = _rotations(spec, jnp.maximum(positions, 0))
    places = kv_cache.slot_of(cache, numbers)[0] * cache.tokens
    rows = cache.capacity * cache.tokens

    def spread(a):
        """[1, frames * tokens, N, D] in the order of `held`, in the order of the slots."""
        out = jnp.zeros((1, rows + cache.tokens, *a.shape[2:]), a.dtype)  # the last rows take what is empty
        for i in range(spec.capacity):
            frame = a[:, i * cache.tokens : (i + 1) * cache.tokens]
            place = jnp.where(numbers[i] < 0, rows, places[i])
            out = jax.lax.dynamic_update_slice(out, frame, (0, place, 0, 0))
        return out[:, :rows]

    dtype = cache.k[0].dtype
    k = tuple(spread(rope.rotate(a.astype(dtype), rotations)) for a in one.k)
    sink_k = tuple(a[:, : cache.sink * cache.tokens] for a in k) if cache.sink_k else ()
    v = tuple(spread(a.astype(dtype)) for a in one.v)
    return one.replace(k=k, v=v, sink_k=sink_k, sink_shift=jnp.zeros_like(one.sink_shift))


def _from_slots(spec, one):
    """A stream with slots, as files have it, as one with a `KVCache`."""
    cache, numbers = spec.slots, one.held[0]
    early = numbers < cache.sink
    positions = numbers + jnp.where(early, one.sink_shift[0], one.shift[0])
    rotations = _rotations(spec, jnp.where(numbers < 0, 0, positions)) * jnp.array([1.0, -1.0])[:, None, None]
    places = jnp.maximum(kv_cache.slot_of(cache, jnp.maximum(numbers, 0))[0], 0) * cache.tokens

    def gathered(a, sink):
        frames = []
        for i in range(spec.capacity):
            size = (1, cache.tokens, *a.shape[2:])
            frame = jax.lax.dynamic_slice(a, (0, places[i], 0, 0), size)
            if sink is not None:
                frame = jnp.where(early[i], jax.lax.dynamic_slice(sink, (0, places[i], 0, 0), size), frame)
            frames.append(frame)
        return jnp.concatenate(frames, axis=1)

    sinks = one.sink_k or (None,) * len(one.k)
    k = jnp.stack([rope.rotate(gathered(a, sink), rotations) for a, sink in zip(one.k, sinks, strict=True)])
    v = jnp.stack([gathered(a, None) for a in one.v])
    return one.replace(k=k, v=v, sink_k=(), sink_shift=jnp.zeros_like(one.sink_shift))
