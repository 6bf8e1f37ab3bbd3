"""The state of endless streams in one batch, and the programs that update it; `stream.Stream` runs them.

The numbering of a stream's frames restarts when it begins, at a cut and at a flush. A frame's number determines its
cache slot, and `shift` turns it into a position in the video. Every stream has its own age, so values that a batch of
videos shares elsewhere are arrays here: the programs are a `jax.vmap` of the rollout's code for one video.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.inference.decoders import Decoder, by_columns, column_axes
from sf_jax.inference.programs import COMPILER_OPTIONS, has_slots
from sf_jax.models import kv_cache, slot_cache
from sf_jax.models.eight_bit import Scaled
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.partition import constrain
from sf_jax.models.patch_codec import to_uint8
from sf_jax.models.slot_cache import SlotCache, Span
from sf_jax.models.wan import KeysValues, WanTransformer
from sf_jax.rng import Purpose, key_for

# Fields whose first axis is the layers and whose second is the streams, unless they are a tuple with an array per
# layer; in all others the streams are the first axis.
LAYERED = ("k", "v", "text")


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """The static settings for which a stream's programs are compiled.

    Attributes:
      model: the student.
      rollout: the rollout's settings, with a window.
      size: (H, W, C) of a latent frame.
      noise_number: see `VideoPipeline`.
      cache_dtype: see `VideoPipeline`.
    """

    model: WanTransformer
    rollout: ro.RolloutConfig
    size: tuple[int, int, int]
    noise_number: int | None
    cache_dtype: str | None = None

    @property
    def capacity(self) -> int:
        """Latent frames kept per stream, which are those that its next chunk sees."""
        return self.rollout.window - self.rollout.chunk

    @property
    def sink(self) -> int:
        """Number of first frames that are always kept."""
        return self.rollout.sink

    @property
    def slots(self) -> SlotCache | None:
        """Shapes of a `SlotCache` of one stream; None if the streams have a `KVCache`."""
        if not has_slots(self.model, self.cache_dtype):
            return None
        return jax.eval_shape(lambda: self.empty_slots(1))

    def empty_slots(self, count: int) -> SlotCache:
        """The slots of `count` streams."""
        size, window = self.size[:2], self.rollout.window
        return rollout_cache.empty_slots(self.model, self.rollout, count, window, *size, streams=True)


@flax.struct.dataclass
class StreamState:
    """The state of S streams.

    Attributes:
      k: [L, S, capacity*tokens, N, D], keys of the kept frames without rotary embedding; `Scaled` in 8 bits. With
        separate layers, a tuple as in `SlotCache`, as are `v` and `sink_k`.
      v: [L, S, capacity*tokens, N, D], values of the kept frames.
      sink_k: see `SlotCache`; () in a `KVCache`.
      sink_shift: int32 [S], see `SlotCache`.
      held: int32 [S, capacity], number of the frame in each place of `latents` (and slot of a `KVCache`); -1 if empty.
      latents: float32 [S, capacity, H, W, C], the clean latents of the same frames.
      value_scale: float32 [S, capacity], what `fade` has multiplied the values of the same frames by.
      text: prompt keys and values [L, S, T, N, D].
      decoder: the decoder's cache, with S as the first axis; () without decoder.
      fresh: bool [S], whether the next frame is the first that the decoder gets.
      first: bool [S], whether the next chunk is the first of its video.
      age: int32 [S], number of the next frame.
      shift: int32 [S], position minus number of a frame after the sink.
      chunk: int32 [S], chunks since the stream began; cuts do not reset it.
      seed: uint32 [S], seed of the noise.
      number: int32 [S], number of the video, like `first_index` of a pipeline.
      heads_first: see `SlotCache` (static).
      slot_rows: number of rows of all slots, without those behind them; 0 in a `KVCache` (static).
    """

    k: jax.Array | Scaled | tuple[jax.Array, ...]
    v: jax.Array | Scaled | tuple[jax.Array, ...]
    sink_k: tuple[jax.Array, ...]
    sink_shift: jax.Array
    held: jax.Array
    latents: jax.Array
    value_scale: jax.Array
    text: KeysValues
    decoder: Any
    fresh: jax.Array
    first: jax.Array
    age: jax.Array
    shift: jax.Array
    chunk: jax.Array
    seed: jax.Array
    number: jax.Array
    heads_first: bool = flax.struct.field(pytree_node=False, default=False)
    slot_rows: int = flax.struct.field(pytree_node=False, default=0)


def empty_state(spec: StreamSpec, decoder: Decoder | None, slots: int) -> StreamState:
    """The state of `slots` streams that have not begun."""
    config, (height, width, channels) = spec.model.config, spec.size
    if has_slots(spec.model, spec.cache_dtype):
        cache = spec.empty_slots(slots)
    else:
        window = spec.rollout.window
        cache = rollout_cache.empty_cache(
            spec.model, spec.rollout, slots, window, height, width, dtype=spec.cache_dtype
        )
    shape = (config.num_layers, slots, config.text_len, config.num_heads, config.head_dim)
    text = KeysValues(*(jnp.zeros(shape, config.dtype) for _ in range(2)))
    whole = jnp.zeros(slots, jnp.int32)
    like = () if decoder is None else _decoder_cache(decoder, slots, spec.size)
    return StreamState(
        k=cache.k,
        v=cache.v,
        sink_k=getattr(cache, "sink_k", ()),
        sink_shift=whole,
        held=jnp.full((slots, spec.capacity), -1, jnp.int32),
        latents=jnp.zeros((slots, spec.capacity, height, width, channels)),
        value_scale=jnp.ones((slots, spec.capacity)),
        text=text,
        decoder=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like),
        fresh=jnp.ones(slots, bool),
        first=jnp.ones(slots, bool),
        age=whole,
        shift=whole,
        chunk=whole,
        seed=whole.astype(jnp.uint32),
        number=whole,
        heads_first=getattr(cache, "heads_first", False),
        slot_rows=cache.capacity * cache.tokens_per_frame if isinstance(cache, SlotCache) else 0,
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def empty_on_devices(spec: StreamSpec, decoder: Decoder | None, slots: int) -> StreamState:
    """`empty_state`, created with its final sharding."""
    return _spread(empty_state(spec, decoder, slots))


def _decoder_cache(decoder: Decoder, batch: int, size: tuple[int, int, int]) -> Any:
    """Shapes of a decoder's cache after a video's first frame; later frames do not change them."""
    frame = jax.ShapeDtypeStruct((batch, 1, *size), jnp.float32)
    return jax.eval_shape(lambda x: decoder.decode_chunk(decoder.init_cache(batch, *size[:2]), x)[0], frame)


def by_axis(function: Callable, *states: StreamState) -> StreamState:
    """Maps `function(axis, *arrays)` over the arrays of states; `axis` is that of the streams."""
    layers = {}
    for name in LAYERED:
        fields = [getattr(state, name) for state in states]
        layers[name] = jax.tree.map(functools.partial(function, _axis(fields[0])), *fields)
    bare = (state.replace(**dict.fromkeys(LAYERED, ())) for state in states)
    return jax.tree.map(functools.partial(function, 0), *bare).replace(**layers)


def _axis(field) -> int:
    """The axis of the streams in a field of `LAYERED`."""
    return 0 if isinstance(field, tuple) else 1


def by_place(function: Callable, state: StreamState) -> StreamState:
    """Maps `function(array, *names)` over the arrays of a state; `names` are their axes' names for `partition`."""
    names, layered = {"k": "heads", "v": "heads", "sink_k": "heads", "text": "features"}, {}
    for field, name in names.items():
        value = getattr(state, field)
        axes = (None,) * _axis(value) + ("batch", None, name, None)
        if state.heads_first and field in ("k", "v"):
            axes = slot_cache.axes_of(heads_first=True)
        layered[field] = jax.tree.map(lambda a, axes=axes: function(a, *axes), value)
    decoder = jax.tree.map(lambda a: function(a, *column_axes(a)), state.decoder)
    bare = state.replace(**dict.fromkeys(layered, ()), decoder=())
    bare = jax.tree.map(lambda a: function(a, "batch", *[None] * (a.ndim - 1)), bare)
    return bare.replace(**layered, decoder=decoder)


def _slot(state: StreamState, slot: jax.Array | int) -> StreamState:
    """One of the streams, with a stream axis of length 1."""
    return by_axis(lambda axis, a: jax.lax.dynamic_slice_in_dim(a, slot, 1, axis), state)


def _put(state: StreamState, slot: jax.Array | int, one: StreamState) -> StreamState:
    """The state with one of the streams replaced."""

    def put(axis, a, b):
        return jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), slot, axis)

    return _spread(by_axis(put, state, one))


def _spread(state: StreamState) -> StreamState:
    """Fixes the sharding of every array on the pipeline's mesh, if there is one."""
    return by_place(constrain, state)


def _cache(spec: StreamSpec, one: StreamState) -> KVCache | SlotCache:
    """The cache of one stream, from `_slot` or inside `vmap` with its axis restored."""
    if spec.slots is not None:
        return spec.slots.replace(k=one.k, v=one.v, sink_k=one.sink_k, sink_shift=one.sink_shift[0])
    return KVCache(k=one.k, v=one.v, frames=one.held[0], sink=spec.rollout.sink)


def _span(one: StreamState, size: int, active: jax.Array | bool, oldest: jax.Array | None = None) -> Span:
    """The next `size` frames of one stream; for `oldest` see `_next_chunk`."""
    return Span(one.age[0], size, one.shift[0], jnp.asarray(active), oldest)


def _written(spec: StreamSpec, one: StreamState, kv, clean: jax.Array, active) -> StreamState:
    """Adds the next frames, with keys and values `kv` (or slots), to a stream; unchanged unless `active`."""
    age, count = one.age[0], clean.shape[1]
    latents, held, value_scale = one.latents, one.held[0], one.value_scale
    cache = rollout_cache.close_chunk(_cache(spec, one), kv, _span(one, count, active))
    if isinstance(cache, SlotCache):
        one = one.replace(sink_k=cache.sink_k, sink_shift=cache.sink_shift[None])
    for i in range(count if spec.capacity else 0):
        slot, dropped = kv_cache.slot_of(spec, age + i)
        kept = active if dropped is None else active & ~dropped
        old = jax.lax.dynamic_slice_in_dim(latents, slot, 1, 1)
        latents = jax.lax.dynamic_update_slice_in_dim(latents, jnp.where(kept, clean[:, i : i + 1], old), slot, 1)
        held = held.at[slot].set(jnp.where(kept, age + i, held[slot]))
        value_scale = value_scale.at[0, slot].set(jnp.where(kept, 1.0, value_scale[0, slot]))
    return one.replace(
        k=cache.k,
        v=cache.v,
        held=held[None],
        latents=latents,
        value_scale=value_scale,
        first=one.first & ~active,
        age=one.age + jnp.where(active, count, 0),
    )


def _next_chunk(spec: StreamSpec, params: dict, one: StreamState, active: jax.Array, count: int, oldest=None):
    """Generates one stream's next `count` latent frames [1, n, H, W, C], like `programs.next_chunk`.

    `oldest` is the largest age of the streams of a batch; None is that of this one.
    """
    config = spec.rollout
    timesteps, steps = config.timesteps_of(jnp.where(one.first[0], 0, 1))
    number = 2 * steps if spec.noise_number is None else spec.noise_number
    key = key_for(one.seed[0], 0, Purpose.SAMPLE)
    noise_key = jax.random.fold_in(jax.random.fold_in(key, number), one.chunk[0])
    noise = ro.example_noise(noise_key, one.number, (1, count, *spec.size))
    span = _span(one, count, active, oldest)
    context = rollout_cache.open_chunk(config, _cache(spec, one), one.text, span)
    # The same number of calls for every stream: a loop with different ends under `vmap` would copy its carry.
    calls, exit_call = len(timesteps) + (config.context == "clean"), len(timesteps) - 1
    chunk = ro.NoisyChunk(noise, span.start, one.chunk[0], steps - 1, ro.key_draw(key, one.number), timesteps)
    kv, clean, _ = ro.denoise_chunk(spec.model, config, params, context, chunk, calls, exit_call)
    one = _written(spec, one, kv, clean, active)
    return one.replace(chunk=one.chunk + active), clean


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3, compiler_options=COMPILER_OPTIONS)
def step(
    spec: StreamSpec, params: dict, decoder: Decoder | None, state: StreamState, active: jax.Array
) -> tuple[StreamState, jax.Array, jax.Array | None]:
    """Generates the next chunk of every active stream; a single program serves all streams at any age.

    Args:
      spec: the static settings.
      params: the student's parameters.
      decoder: decodes latents to pixels; None to stop at the latents.
      state: the streams; donated.
      active: bool [S], streams to advance; the others do not change, and their outputs are undefined.

    Returns:
      The new state, latents float32 [S, n, H, W, C], and pixels uint8 [S, n * temporal_factor, h, w, c], or None
      without decoder. If a stream's first frame is among them, its first `temporal_factor - 1` pixel frames are empty.
    """
    names = {field.name for field in dataclasses.fields(StreamState)} - {"heads_first", "slot_rows"}
    axes = state.replace(**dict.fromkeys(names, 0)).replace(**{name: _axis(getattr(state, name)) for name in LAYERED})

    def one(stream, active):
        stream = by_axis(lambda axis, a: jnp.expand_dims(a, axis), stream)
        new, clean = _next_chunk(spec, params, stream, active, spec.rollout.chunk, oldest)
        return by_axis(lambda axis, a: jnp.squeeze(a, axis), new), clean[0]

    oldest = jnp.max(jnp.where(active, state.age, 0))
    mesh = jax.sharding.get_abstract_mesh()
    spread = {} if mesh.empty else {"spmd_axis_name": "data"}
    cache = state.decoder
    state = state.replace(decoder=())
    if len(active) == 1 and isinstance(state.k, tuple):  # vmap would scatter the keys and values into the slots
        state, latents = _next_chunk(spec, params, state, active[0], spec.rollout.chunk)
    else:
        state, latents = jax.vmap(one, (axes, 0), (axes, 0), **spread)(state, active)
    state = state.replace(decoder=cache)
    pixels = None
    if decoder is not None:
        cache, pixels = _decode(decoder, state, latents, active)
        state = state.replace(decoder=cache, fresh=state.fresh & ~active)
    return _spread(state), latents, pixels


def _decode(decoder: Decoder, state: StreamState, latents: jax.Array, active: jax.Array):
    """Decodes the next latents [S, n, H, W, C] of all streams; fresh streams decode their first frame differently."""

    def chosen(mask, new, old):
        return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)

    latents = by_columns(latents)

    def later(cache, frame):
        cache, pixels = decoder.decode_chunk(cache, frame[:, None])
        return by_columns(cache), to_uint8(pixels)

    def first(operands):
        cache, pixels = operands
        empty = decoder.init_cache(latents.shape[0], *latents.shape[2:4])
        new, one = decoder.decode_chunk(empty, latents[:, :1])
        one = jnp.pad(to_uint8(one), ((0, 0), (pixels.shape[1] - 1, 0), (0, 0), (0, 0), (0, 0)))
        return chosen(state.fresh, (new, one), (cache, pixels))

    cache, pixels = later(state.decoder, latents[:, 0])
    if jax.tree.leaves(state.decoder):  # otherwise frames are decoded independently, all in the same way
        cache, pixels = jax.lax.cond(jnp.any(state.fresh & active), first, lambda x: x, (cache, pixels))
    cache, rest = jax.lax.scan(later, cache, jnp.moveaxis(latents[:, 1:], 1, 0))
    pixels = jnp.concatenate([pixels[None], rest]).swapaxes(0, 1)
    return chosen(active, cache, state.decoder), pixels.reshape(pixels.shape[0], -1, *pixels.shape[3:])


@functools.partial(jax.jit, donate_argnums=0)
def begin(state: StreamState, slot, text: KeysValues, seed, number) -> StreamState:
    """Starts a new stream in a slot; `text` is from `encode_text` of one prompt."""
    one = _slot(state, slot)
    zero = jnp.zeros_like(one.age)
    one = one.replace(held=jnp.full_like(one.held, -1), text=text)
    one = one.replace(fresh=jnp.ones_like(one.fresh), first=jnp.ones_like(one.first))
    one = one.replace(age=zero, shift=zero, chunk=zero, seed=jnp.full_like(one.seed, seed), number=zero + number)
    return _put(state, slot, one)


@functools.partial(jax.jit, donate_argnums=0)
def set_text(state: StreamState, slot, text: KeysValues) -> StreamState:
    """Sets the prompt keys and values of a stream."""
    return _put(state, slot, _slot(state, slot).replace(text=text))


@functools.partial(jax.jit, donate_argnums=0)
def set_decoder(state: StreamState, slot, cache: Any) -> StreamState:
    """Sets a stream's decoder cache to that of one video whose first frame has been decoded."""
    one = _slot(state, slot)
    return _put(state, slot, one.replace(decoder=cache, fresh=jnp.zeros_like(one.fresh)))


@functools.partial(jax.jit, donate_argnums=0)
def cut(state: StreamState, slot) -> StreamState:
    """Drops all frames of a stream, so that a new video starts in it; the noise does not restart."""
    one = _slot(state, slot)
    zero = jnp.zeros_like(one.age)
    one = one.replace(held=jnp.full_like(one.held, -1), age=zero, shift=zero)
    one = one.replace(fresh=jnp.ones_like(one.fresh), first=jnp.ones_like(one.first))
    return _put(state, slot, one)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def flush(spec: StreamSpec, state: StreamState, slot) -> StreamState:
    """Keeps only the sink and the newest latent frame of a stream (Infinity-RoPE, arXiv 2511.20649)."""
    one, sink, tokens = _slot(state, slot), spec.rollout.sink, int(np.prod(spec.model.config.grid(*spec.size[:2])))
    kept = min(sink + 1, spec.capacity)
    fewer = one.age[0] > kept
    if spec.capacity > sink:
        cache = _cache(spec, one)

        def moved(a, axis, width, ring):
            newest = kv_cache.slot_of(ring, one.age[0] - 1)[0]
            last = jax.lax.dynamic_slice_in_dim(a, newest * width, width, axis)
            return jnp.where(fewer, jax.lax.dynamic_update_slice_in_dim(a, last, sink * width, axis), a)

        axis = 2 if state.heads_first else 1 + _axis(one.k)
        k, v = jax.tree.map(lambda a: moved(a, axis, tokens, cache), (one.k, one.v))
        latents, value_scale = (moved(a, 1, 1, spec) for a in (one.latents, one.value_scale))
        one = one.replace(k=k, v=v, latents=latents, value_scale=value_scale)
    places = jnp.arange(spec.capacity)
    held = jnp.where(fewer, jnp.where(places < kept, places, -1), one.held)
    age = jnp.where(fewer, kept, one.age)
    return _put(state, slot, one.replace(held=held, age=age, shift=one.shift + one.age - age))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def fade(spec: StreamSpec, state: StreamState, slot, value_scale: jax.Array) -> StreamState:
    """Scales a stream's cached values to `value_scale` (float32 [capacity], positive) times what was written.

    Keys stay. Frames that have been scaled before are not scaled twice.
    """
    one = _slot(state, slot)
    cache, held = _cache(spec, one), one.held[0]
    scale = jnp.where(held < 0, 1.0, value_scale / one.value_scale[0])
    frames = jnp.ones(cache.capacity + 1).at[jnp.where(held < 0, cache.capacity, kv_cache.slot_of(cache, held)[0])]
    rows = jnp.repeat(frames.set(scale)[:-1], cache.tokens_per_frame)

    def scaled(v):
        if isinstance(v, Scaled):
            return v.replace(scale=scaled(v.scale))
        axis = 2 if state.heads_first else v.ndim - 3
        by_row = jnp.pad(rows, (0, v.shape[axis] - rows.size), constant_values=1.0)  # rows behind the slots
        return (v * jnp.expand_dims(by_row, [i for i in range(v.ndim) if i != axis])).astype(v.dtype)

    v = jax.tree.map(scaled, one.v, is_leaf=lambda v: isinstance(v, Scaled))
    return _put(state, slot, one.replace(v=v, value_scale=(one.value_scale[0] * scale)[None]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def recall(spec: StreamSpec, state: StreamState, slot) -> tuple[StreamState, jax.Array]:
    """Empties a stream's cache, so that `append` can write its frames again.

    Returns:
      The new state, and the kept clean latents [1, capacity, H, W, C], oldest first.
    """
    one = _slot(state, slot)
    order = jnp.argsort(jnp.where(one.held < 0, jnp.iinfo(jnp.int32).max, one.held), axis=1)[0]
    count = (one.held >= 0).sum(axis=1).astype(jnp.int32)
    latents = one.latents[:, order]
    shift = one.shift + one.age - count
    emptied = one.replace(held=jnp.full_like(one.held, -1), age=jnp.zeros_like(one.age), shift=shift)
    return _put(state, slot, emptied), latents


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def append(
    spec: StreamSpec,
    params: dict,
    state: StreamState,
    slot: jax.Array | int,
    clean: jax.Array,
    context: tuple[jax.Array, jax.Array, jax.Array],
) -> StreamState:
    """Appends clean latents [1, n, H, W, C] to a stream as its next frames.

    `context` configures the clean pass, the forward pass that computes their keys and values: its timestep (float32, in
    [0, 1000]), the noise level of its input (float32, in [0, 1]), and the number of the noise draw (int32).
    """
    one, config, (timestep, sigma, number) = _slot(state, slot), spec.rollout, context
    draw = ro.key_draw(key_for(one.seed[0], 0, Purpose.SAMPLE), one.number)
    read = (1 - sigma) * clean + sigma * draw("context", one.chunk[0], number, clean.shape)
    active = jnp.bool_(True)
    span = _span(one, clean.shape[1], active)
    context = rollout_cache.open_chunk(config, _cache(spec, one), one.text, span)
    kv = ro.clean_pass(spec.model, config, params, context, read, timestep)
    return _put(state, slot, _written(spec, one, kv, clean, active))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, compiler_options=COMPILER_OPTIONS)
def lone_frame(spec: StreamSpec, params: dict, state: StreamState, slot) -> tuple[StreamState, jax.Array]:
    """Generates a stream's first latent frame [1, 1, H, W, C] as a chunk of its own."""
    one, clean = _next_chunk(spec, params, _slot(state, slot), jnp.bool_(True), 1)
    return _put(state, slot, one), clean


@jax.jit
def take(state: StreamState, slot) -> StreamState:
    """Returns one of the streams, for saving."""
    return _slot(state, slot)


@functools.partial(jax.jit, donate_argnums=0)
def insert(state: StreamState, slot, one: StreamState) -> StreamState:
    """Puts a stream from `take` into a slot."""
    return _put(state, slot, one)
