"""A stream's keys and values in files: without padding, and readable by networks of either form.

A stream has a `SlotCache` or a `KVCache` (see `programs.has_slots`). A file has the form of the stream that was
written. A stream of the other form reads it up to rounding, one of the same form exactly.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.inference.stream_state import StreamSpec, StreamState
from sf_jax.models import kv_cache, rope
from sf_jax.models.wan import WanTransformer


def to_file(one: StreamState) -> StreamState:
    """A stream's arrays (numpy) as files have them: slots as [1, rows, N, D], without the rows behind them."""
    if not isinstance(one.k, tuple) or not one.k:
        return one
    rows = one.slot_rows

    def trimmed(arrays):
        return tuple(a[:, :, :rows].swapaxes(1, 2) if one.heads_first else a[:, :rows] for a in arrays)

    return one.replace(k=trimmed(one.k), v=trimmed(one.v), heads_first=False)


def file_shapes(path: Path, spec: StreamSpec, like: StreamState, slots: bool) -> StreamState:
    """Shapes of the stream in a file, which has slots or a `KVCache`; `like` are those of a stream of `spec`.

    Raises:
      ValueError: if a stream of `spec` cannot have slots.
    """
    here = isinstance(like.k, tuple)
    if slots and _with_slots(spec).slots is None:
        raise ValueError(f"path: {path} is damaged (its cache is not of the type {spec.cache_dtype!r})")
    like = jax.eval_shape(to_file, like)
    if slots == here:
        return like
    return jax.eval_shape(functools.partial(_to_slots if slots else _from_slots, _with_slots(spec)), like)


def from_file(spec: StreamSpec, one: StreamState, like: StreamState) -> StreamState:
    """A stream of `spec` from a file's; `like` are the shapes that it has in a `Stream`."""
    slots, here = isinstance(one.k, tuple), isinstance(like.k, tuple)
    if slots != here:
        one = (_from_slots if slots else _to_slots)(_with_slots(spec), one)
    if not here:
        return one

    def padded(arrays):
        out = [np.zeros(shape.shape, shape.dtype) for shape in like.k]
        for a, whole in zip(arrays, out, strict=True):
            (whole.swapaxes(1, 2) if like.heads_first else whole)[:, : a.shape[1]] = a
        return tuple(out)

    return one.replace(k=padded(one.k), v=padded(one.v), heads_first=like.heads_first)


def _with_slots(spec):
    """The same streams with separate layers."""
    config = dataclasses.replace(spec.model.config, scan_layers=False)
    return dataclasses.replace(spec, model=WanTransformer(config))


def _rotations(spec, positions):
    grid = spec.model.config.grid(*spec.size[:2])
    rotation = rope.rotation if spec.slots.relative_window is None else rope.endless_rotation
    return rotation(jnp.asarray(positions, jnp.int32), grid, spec.model.config.head_dim)


@functools.partial(jax.jit, static_argnums=0)
def _to_slots(spec, one):
    """A stream with a `KVCache` as one with slots, as files have it."""
    cache, numbers = spec.slots, one.held[0]
    positions = jnp.where(numbers < cache.sink, numbers, numbers + one.shift[0])
    rotations = _rotations(spec, jnp.maximum(positions, 0))
    places = kv_cache.slot_of(cache, numbers)[0] * cache.tokens_per_frame
    rows = cache.capacity * cache.tokens_per_frame

    def spread(a):
        """[1, frames * tokens, N, D] in the order of `held`, in the order of the slots."""
        out = jnp.zeros((1, rows + cache.tokens_per_frame, *a.shape[2:]), a.dtype)  # the last rows take what is empty
        for i in range(spec.capacity):
            frame = a[:, i * cache.tokens_per_frame : (i + 1) * cache.tokens_per_frame]
            place = jnp.where(numbers[i] < 0, rows, places[i])
            out = jax.lax.dynamic_update_slice(out, frame, (0, place, 0, 0))
        return out[:, :rows]

    dtype = cache.k[0].dtype
    k = tuple(spread(rope.rotate(a.astype(dtype), rotations)) for a in one.k)
    sink_k = tuple(a[:, : cache.sink * cache.tokens_per_frame] for a in k) if cache.sink_k else ()
    v = tuple(spread(a.astype(dtype)) for a in one.v)
    return one.replace(k=k, v=v, sink_k=sink_k, sink_shift=jnp.zeros_like(one.sink_shift), slot_rows=rows)


@functools.partial(jax.jit, static_argnums=0)
def _from_slots(spec, one):
    """A stream with slots, as files have it, as one with a `KVCache`."""
    cache, numbers = spec.slots, one.held[0]
    early = numbers < cache.sink
    positions = numbers + jnp.where(early, one.sink_shift[0], one.shift[0])
    rotations = _rotations(spec, jnp.where(numbers < 0, 0, positions)) * jnp.array([1.0, -1.0])[:, None, None]
    places = jnp.maximum(kv_cache.slot_of(cache, jnp.maximum(numbers, 0))[0], 0) * cache.tokens_per_frame

    def gathered(a, sink):
        frames = [a[:, :0]]
        for i in range(spec.capacity):
            size = (1, cache.tokens_per_frame, *a.shape[2:])
            frame = jax.lax.dynamic_slice(a, (0, places[i], 0, 0), size)
            if sink is not None:
                frame = jnp.where(early[i], jax.lax.dynamic_slice(sink, (0, places[i], 0, 0), size), frame)
            frames.append(frame)
        return jnp.concatenate(frames, axis=1)

    sinks = one.sink_k or (None,) * len(one.k)
    k = jnp.stack([rope.rotate(gathered(a, sink), rotations) for a, sink in zip(one.k, sinks, strict=True)])
    v = jnp.stack([gathered(a, None) for a in one.v])
    return one.replace(k=k, v=v, sink_k=(), sink_shift=jnp.zeros_like(one.sink_shift), slot_rows=0)
