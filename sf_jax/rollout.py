"""Self Forcing's rollout: the student generates a video chunk by chunk with the cache it will use at inference.

A chunk is a group of latent frames that are denoised together. A training rollout stops at the exit step, one of the
denoising steps. The clean pass is the extra forward pass that writes a finished chunk's keys and values to the cache.
Training and inference share `generate_chunk`. `rollout` scans it over the chunks without gradient; `replay` computes
the gradient.

Source: paper, Algorithm 1 (training) and 2 (inference); official `SelfForcingTrainingPipeline` and
`CausalInferencePipeline`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import TRAIN_STEPS
from sf_jax.models import attention, kv_cache, rope, slot_cache
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.partition import constrain
from sf_jax.models.slot_cache import SlotCache, Span
from sf_jax.models.slots import Slots, take_apart
from sf_jax.models.wan import KeysValues, Layout, WanTransformer
from sf_jax.rollout_config import RolloutConfig

# draw(kind, chunk, step, shape) -> standard normal noise; kind is "renoise" or "context".
Draw = Callable[[str, Any, Any, tuple[int, ...]], jax.Array]

MAX_PREFIXES = 16


@flax.struct.dataclass
class Rollout:
    """The result of a rollout, with everything that `replay` needs.

    Attributes:
      video: [B, F, H, W, C] clean latents, initial frames included.
      exit_inputs: [B, F_new, H, W, C] noisy input of each chunk at its exit step.
      exits: int32 [chunks], exit step of each new chunk.
      cache: keys and values of the sink and of the frames from `keep_from` on (without it, those that the window
        needs), as a ring. The last chunk's come from its exit step, as nothing reads them.
      context_inputs: [B, F_new, H, W, C] inputs of the clean passes; None if they read the video itself.
      initial_frames: number of given frames at the start (static).
    """

    video: jax.Array
    exit_inputs: jax.Array
    exits: jax.Array
    cache: KVCache
    context_inputs: jax.Array | None = None
    initial_frames: int = flax.struct.field(pytree_node=False, default=0)


def key_draw(key: jax.Array, examples: jax.Array) -> Draw:
    """Noise that depends only on the key, the example's global index, the chunk and the step.

    Args:
      key: PRNG key of this rollout.
      examples: int32 [B], global indices of the examples, so that the noise does not depend on how the batch is split.
    """

    def draw(kind, chunk, step, shape):
        base = jax.random.fold_in(jax.random.fold_in(key, 2 * step + (kind == "context")), chunk)
        return example_noise(base, examples, shape)

    return draw


def example_noise(key: jax.Array, examples: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 `shape` [B, ...], each example drawn from its own key."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(examples)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)
    return constrain(noise, "batch", *[None] * (len(shape) - 1))


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


def chunk_layout(cache: KVCache, config: RolloutConfig, start: jax.Array | int, size: int) -> Layout:
    """Positions and visible cache slots of the chunk [start, start + size).

    Raises:
      ValueError: if the chunk does not fit into a cache without window (checked only if `start` is a Python int).
    """
    if isinstance(start, int):
        kv_cache.check_capacity(cache, start + size, config.window)
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


def predict(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    x: jax.Array,
    t: jax.Array | float,
    text: KeysValues,
    layout: Layout,
    cache: KVCache | tuple[Slots, ...],
) -> tuple[jax.Array, KeysValues | tuple[Slots, ...]]:
    """Clean prediction of one chunk `x` [B, n, H, W, C] at timestep `t` (scalar), and the chunk's keys and values.

    Slots are returned with the chunk's keys and values. They also hold the prompt's, and `text` is ignored.
    """
    t = jnp.full((x.shape[0], 1), t, jnp.float32)
    flow, kv = model.apply({"params": params}, x, t, text, layout, cache, return_kv=True)
    return config.schedule.to_clean(flow, x, t), kv


def write_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache | SlotCache,
    clean: jax.Array,
    start: jax.Array | int,
    t: float = 0.0,
) -> tuple[KVCache | SlotCache, KeysValues | None]:
    """The clean pass: runs the network on `clean` [B, n, H, W, C] at timestep `t` and caches its keys and values.

    Returns the new cache, and the keys and values, or None with slots, which have them.
    """
    if isinstance(cache, SlotCache):
        own = _span(config, cache, start, clean.shape[1])
        place = slot_cache.layout(cache, own).replace(keys_only=jnp.bool_(True))
        _, layers = predict(model, config, params, clean, t, text, place, slot_cache.open_slots(cache, text, own))
        return slot_cache.close_slots(cache, layers, own), None
    seen = seen_cache(config, cache, start)
    layout = chunk_layout(seen, config, start, clean.shape[1])
    if not model.config.scan_layers:  # every layer would compile attention for every number of cached frames
        layout = layout.replace(prefixes=(), prefixes_masked=False)
    _, kv = predict(model, config, params, clean, t, text, layout, seen)
    return kv_cache.write(cache, kv.k, kv.v, start), kv


def _span(config, cache, start, size):
    """The frames [start, start + size) of a call with slots, checked as in `chunk_layout`."""
    if isinstance(start, int):
        kv_cache.check_capacity(cache, start + size, config.window)
    return Span(start, size)


def context_input(config: RolloutConfig, clean: jax.Array, draw: Draw, chunk: jax.Array | int) -> jax.Array:
    """The clean pass's input: the finished chunk [B, n, H, W, C], with context noise if configured."""
    if not config.adds_context_noise:
        return clean
    sigma = config.context_sigma
    return (1 - sigma) * clean + sigma * draw("context", chunk, 0, clean.shape)


def generate_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache | SlotCache,
    noise: jax.Array,
    start: jax.Array | int,
    chunk: jax.Array | int,
    exit_step: jax.Array | int,
    draw: Draw,
    timesteps: jax.Array | None = None,
    last: jax.Array | bool = False,
) -> tuple[KVCache | SlotCache, jax.Array, jax.Array]:
    """Generates one chunk, without gradient, and writes it to the cache.

    Args:
      model: the student.
      config: the rollout's settings.
      params: the student's parameters.
      text: prompt keys and values, from `encode_text`.
      cache: keys and values of the previous frames.
      noise: [B, n, H, W, C] initial noise of the chunk.
      start: first frame of the chunk; may be traced.
      chunk: index of the chunk, for `draw`; may be traced.
      exit_step: index of the denoising step whose prediction is the result; may be traced.
      draw: source of noise.
      timesteps: float32 [S] with S > `exit_step`; None is `config.timesteps`. May be traced.
      last: whether no chunk follows. The clean pass is then skipped, as nothing would read its keys and values, and
        the cache gets those of the exit step. May be traced.

    Returns:
      The new cache, the clean chunk and its noisy input at the exit step, both [B, n, H, W, C].
    """
    params, text, cache, noise = jax.lax.stop_gradient((params, text, cache, noise))
    timesteps = jnp.asarray(config.timesteps, jnp.float32) if timesteps is None else timesteps
    calls = exit_step + 1 + ((config.context == "clean") & ~jnp.asarray(last)).astype(jnp.int32)
    steps = (noise, chunk, exit_step, calls, draw, timesteps)
    if isinstance(cache, SlotCache):
        own = _span(config, cache, start, noise.shape[1])
        state = (text, slot_cache.open_slots(cache, text, own), slot_cache.layout(cache, own))
        layers, clean, x = denoise_chunk(model, config, params, state, *steps)
        return slot_cache.close_slots(cache, layers, own), clean, x
    seen = seen_cache(config, cache, start)
    state = (text, seen, chunk_layout(seen, config, start, noise.shape[1]))
    kv, clean, x = denoise_chunk(model, config, params, state, *steps)
    return kv_cache.write(cache, kv.k, kv.v, start), clean, x


def denoise_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    state: tuple[KeysValues, KVCache | tuple[Slots, ...], Layout],
    noise: jax.Array,
    chunk: jax.Array | int,
    exit_step: jax.Array | int,
    calls: jax.Array | int,
    draw: Draw,
    timesteps: jax.Array,
    repeats: jax.Array | int = 0,
) -> tuple[KeysValues | tuple[Slots, ...], jax.Array, jax.Array]:
    """All network calls for one chunk, without gradient, in one loop so that the network is compiled once.

    Args:
      model: see `generate_chunk`, as are `config`, `params`, `noise`, `chunk`, `exit_step` and `draw`.
      config: see `generate_chunk`.
      params: see `generate_chunk`.
      state: prompt keys and values, the cache or its slots, and the chunk's layout.
      noise: see `generate_chunk`.
      chunk: see `generate_chunk`.
      exit_step: see `generate_chunk`.
      calls: number of network calls: the denoising steps up to the exit step, the clean pass if there is one, and the
        `repeats`.
      draw: see `generate_chunk`.
      timesteps: float32 [S] with S > `exit_step`.
      repeats: how often to repeat the first step, whose result does not change, so that batched videos with different
        numbers of steps make the same number of calls.

    Returns:
      The last call's keys and values (or the slots with them), the clean chunk, and its noisy input at the exit step.
    """
    timesteps = jnp.append(timesteps, jnp.float32(config.context_timestep))
    text, cache, layout = state
    in_place = not model.config.scan_layers

    def call(index, carry):
        clean, x, kv = carry
        step = jnp.maximum(index - repeats, 0)
        kind = (step > 0).astype(jnp.int32) + (step > exit_step)
        inputs = (
            lambda: noise,
            lambda: config.schedule.add_noise(clean, draw("renoise", chunk, step - 1, noise.shape), timesteps[step]),
            lambda: context_input(config, clean, draw, chunk),
        )
        now = jax.lax.switch(kind, inputs)
        t = jnp.where(step > exit_step, timesteps[-1], timesteps[step])
        place = layout.replace(keys_only=step > exit_step) if in_place else layout
        predicted, kv = predict(model, config, params, now, t, text, place, kv if in_place else cache)
        return (*(jnp.where(step > exit_step, *pair) for pair in ((clean, predicted), (x, now))), kv)

    if isinstance(cache, tuple):
        empty = cache
    elif in_place:
        grid = model.config.grid(*noise.shape[2:4])
        rotation = rope.rotation(layout.context_frames, grid, model.config.head_dim)
        seen = layout.prefixes[-1] if layout.prefixes else cache.capacity
        multiple = attention.key_multiple(model.config.attention, model.config.dtype, model.config.head_dim)
        empty = take_apart(cache, text, rotation, noise.shape[1] * grid[0] * grid[1], seen, multiple)
    else:
        kv = jax.eval_shape(lambda: predict(model, config, params, noise, timesteps[0], text, layout, cache)[1])
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kv)
    clean, x, kv = jax.lax.fori_loop(0, calls, call, (jnp.zeros_like(noise), noise, empty))
    if in_place and not isinstance(cache, tuple):
        kv = model.apply({"params": params}, kv, method="own_keys_values")
    return jax.lax.stop_gradient((kv, clean, x))


def rollout(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: jax.Array | KeysValues,
    noise: jax.Array,
    exits: jax.Array | int,
    draw: Draw,
    initial: jax.Array | None = None,
    keep_from: int | None = 0,
    cache: KVCache | None = None,
) -> Rollout:
    """Generates a video chunk by chunk (paper, Algorithm 1 without its gradient; Algorithm 2 at the last exit step).

    No gradient flows; `replay` computes it.

    Args:
      model: the student.
      config: the rollout's settings.
      params: the student's parameters.
      text: prompt embeddings [B, S, text_dim], or the output of `encode_text`.
      noise: [B, F, H, W, C] initial noise.
      exits: int, or int32 [chunks]: exit step of every chunk, in [0, len(config.steps)); may be traced.
      draw: source of noise, see `key_draw`.
      initial: [B, I, H, W, C] clean latents to continue from.
      keep_from: first frame that the cache must keep, besides the sink, even if the window needs fewer. `replay` needs
        `replay.keep_from`; None keeps only what the window needs.
      cache: a cache to continue from, which holds the keys and values of `initial`; None computes them.

    Raises:
      ValueError: if the frames are not a multiple of the chunk, or more than the positions allow.
    """
    batch, frames, height, width, _ = noise.shape
    start = 0 if initial is None else initial.shape[1]
    given, chunks = config.chunks(frames, start)
    config.check_frames(start + frames)
    params, text = jax.lax.stop_gradient((params, text))
    if not isinstance(text, KeysValues):
        text = model.apply({"params": params}, text, method="encode_text")
    if cache is None:
        cache = empty_cache(model, config, batch, start + frames, height, width, keep_from)
        for first, last in attention.chunk_bounds(given) if given else ():
            cache, _ = write_chunk(model, config, params, text, cache, initial[:, first:last], first)
    kv_cache.check_capacity(cache, start + frames, config.window)
    exits = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), (len(chunks),))

    def step(cache, noise, chunk, first, exit_step):
        last = jnp.asarray(chunk) == len(chunks) - 1
        cache, clean, x = generate_chunk(
            model, config, params, text, cache, noise, first, chunk, exit_step, draw, last=last
        )
        read = (context_input(config, clean, draw, chunk),) if config.adds_context_noise else ()
        return cache, clean, x, *read

    cache, clean, exit_inputs, *read = run_chunks(step, cache, noise, chunks, start, exits)
    video = clean if initial is None else jnp.concatenate([initial, clean], axis=1)
    context_inputs = read[0] if read else None
    return Rollout(video, exit_inputs, exits, cache, context_inputs, initial_frames=start)


def run_chunks(
    step: Callable,
    cache: KVCache,
    noise: jax.Array,
    chunks: tuple[int, ...],
    start: int,
    per_chunk: jax.Array,
) -> tuple:
    """Scans `step` over the chunks of a video.

    Args:
      step: (cache, noise [B, n, H, W, C], chunk index, first frame, entry of `per_chunk`) -> (cache, *outputs), where
        every output has the noise's shape.
      cache: carried from chunk to chunk.
      noise: [B, F, H, W, C].
      chunks: sizes of the chunks; only the first may differ from the others.
      start: first frame of the first chunk.
      per_chunk: array [chunks, ...].

    Returns:
      The cache, and the outputs [B, F, H, W, C] of all chunks, concatenated.
    """
    alone, done = 0, []
    if chunks[0] != chunks[-1]:  # a single first frame has a different shape from the scanned chunks
        cache, *outputs = step(cache, noise[:, : chunks[0]], 0, start, per_chunk[0])
        done.append(outputs)
        alone = 1
    rest = noise[:, alone * chunks[0] :]
    count, size = len(chunks) - alone, chunks[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    xs = (
        jnp.moveaxis(rest.reshape(rest.shape[0], count, size, *rest.shape[2:]), 1, 0),
        index + alone,
        start + alone * chunks[0] + index * size,
        per_chunk[alone:],
    )

    def body(cache, xs):
        cache, *outputs = step(cache, *xs)
        return cache, outputs

    cache, scanned = jax.lax.scan(body, cache, xs)
    done.append([jnp.moveaxis(a, 0, 1).reshape(rest.shape) for a in scanned])
    return cache, *(jnp.concatenate(parts, axis=1) for parts in zip(*done, strict=True))


def exit_range(config: RolloutConfig, exit_step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Even-scale (unshifted) timesteps (from, to) between which the exit step denoises; `to` is 0 after the last step.

    Source: official `denoised_timestep_from` and `denoised_timestep_to`.
    """
    table = TRAIN_STEPS - config.schedule.index(jnp.asarray(config.timesteps))
    table = jnp.append(table, 0)
    return table[exit_step], table[jnp.asarray(exit_step) + 1]
