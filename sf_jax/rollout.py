"""Self Forcing's rollout: the student generates a video chunk by chunk with the cache it will use at inference.

Source: paper, Algorithm 1 (training) and 2 (inference); official `SelfForcingTrainingPipeline` and
`CausalInferencePipeline`. `generate_chunk` is the one piece of code that both use; `rollout` scans it over the chunks,
without gradient. The gradient is `replay`'s.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import TRAIN_STEPS
from sf_jax.models import attention, kv_cache, rope
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.partition import constrain
from sf_jax.models.slots import Slots, take_apart
from sf_jax.models.wan import KeysValues, Layout, WanTransformer
from sf_jax.rollout_config import RolloutConfig

# draw(kind, chunk, step, shape) -> standard normal noise; kind is "renoise" or "context".
Draw = Callable[[str, Any, Any, tuple[int, ...]], jax.Array]

MAX_PREFIXES = 16


@flax.struct.dataclass
class Rollout:
    """What a rollout leaves for the replay.

    Attributes:
      video: [B, F, H, W, C] clean latents, initial frames included.
      exit_inputs: [B, F_new, H, W, C] noisy input of each chunk at its exit step.
      exits: int32 [chunks], exit step of each new chunk.
      cache: keys and values of the sink and of the frames that were to be kept (without `keep_from`, those that a
        window needs), as a ring; those of the last chunk, which nothing reads, are its exit step's.
      context_inputs: [B, F_new, H, W, C] what the clean passes read; None where they read the video itself.
      initial_frames: number of given frames at the start (static).
    """

    video: jax.Array
    exit_inputs: jax.Array
    exits: jax.Array
    cache: KVCache
    context_inputs: jax.Array | None = None
    initial_frames: int = flax.struct.field(pytree_node=False, default=0)


def key_draw(key: jax.Array, examples: jax.Array) -> Draw:
    """Noise that depends on the key, the example's global index, the chunk and the step, and on nothing else.

    Args:
      key: PRNG key of this rollout.
      examples: int32 [B], global indices of the examples, so that numbers do not depend on how the batch is split.
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
) -> KVCache:
    """A cache for `frames` latent frames in all; with a window, a ring of what the window needs.

    With `keep_from`, a larger one: in the end it holds the sink and all frames from that one on.
    """
    grid = model.config.grid(height, width)
    capacity = kv_cache.capacity_for(frames, config.chunk, config.window)
    if keep_from is not None:
        capacity = max(capacity, min(frames, config.sink + frames - keep_from))
    dtype = jnp.dtype(model.config.dtype)
    heads, head_dim = model.config.num_heads, model.config.head_dim
    # A full cache never evicts, so it needs no sink of its own; visibility still honours it.
    sink = min(config.sink, capacity)
    return kv_cache.init_cache(
        model.config.num_layers, batch, capacity, grid[0] * grid[1], heads, head_dim, dtype, sink
    )


def chunk_layout(cache: KVCache, config: RolloutConfig, start: jax.Array | int, size: int) -> Layout:
    """Positions and visible cache slots of the chunk [start, start + size).

    Raises:
      ValueError: if the chunk does not fit into a cache without window (told only where `start` is a Python number).
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
        # a ring's slots fill in order and are then all in the window; a larger cache has old frames to hide
        mask_is_prefix=config.window is None or cache.capacity <= config.window - config.chunk,
        prefixes=prefixes,
        prefixes_masked=masked,
    )


def seen_cache(config: RolloutConfig, cache: KVCache, start: jax.Array | int) -> KVCache:
    """The part of a cache that the chunk at `start` sees: of one with more frames, its window."""
    return cache if config.window is None else kv_cache.within(cache, start, config.window - config.chunk)


def with_moved_sink(config: RolloutConfig, layout: Layout) -> Layout:
    """The layout of a whole video (numpy positions) with the sink right before every chunk's window.

    The other frames keep their numbers as positions: only distances count.
    """
    if config.positions != "relative" or not config.sink:
        return layout
    ends = [int(layout.frames[group.queries[1] - 1]) + 1 for group in layout.pattern]
    shifts = tuple(max(0, end - config.window) for end in ends)
    return layout.replace(sink=config.sink, sink_shifts=shifts) if any(shifts) else layout


def context_lengths(config: RolloutConfig, capacity: int, start: jax.Array | int) -> tuple[tuple[int, ...], bool]:
    """Numbers of cached frames that the chunk at `start` can meet in a cache of `capacity` frames, ascending.

    A traced start can be any. Each length is a copy of the attention in the compiled program, so that of many lengths
    only some are kept, the longest among them.

    Returns:
      The lengths, and whether some were left out (`Layout.prefixes`, `Layout.prefixes_masked`).
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
    """Clean prediction of one chunk `x` [B, n, H, W, C] at timestep `t` (scalar), and its own keys and values.

    Slots are returned with the own keys and values in them; the prompt's are theirs, not those of `text`.
    """
    t = jnp.full((x.shape[0], 1), t, jnp.float32)
    flow, kv = model.apply({"params": params}, x, t, text, layout, cache, return_kv=True)
    return config.schedule.to_clean(flow, x, t), kv


def write_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache,
    clean: jax.Array,
    start: jax.Array | int,
    t: float = 0.0,
) -> tuple[KVCache, KeysValues]:
    """The clean pass: runs the network on `clean` [B, n, H, W, C] at timestep `t` and writes it to the cache."""
    seen = seen_cache(config, cache, start)
    layout = chunk_layout(seen, config, start, clean.shape[1])
    _, kv = predict(model, config, params, clean, t, text, layout, seen)
    return kv_cache.write(cache, kv.k, kv.v, start), kv


def context_input(config: RolloutConfig, clean: jax.Array, draw: Draw, chunk: jax.Array | int) -> jax.Array:
    """The finished chunk [B, n, H, W, C] as the clean pass reads it."""
    if not config.adds_context_noise:
        return clean
    sigma = config.context_sigma
    return (1 - sigma) * clean + sigma * draw("context", chunk, 0, clean.shape)


def generate_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache,
    noise: jax.Array,
    start: jax.Array | int,
    chunk: jax.Array | int,
    exit_step: jax.Array | int,
    draw: Draw,
    timesteps: jax.Array | None = None,
    last: jax.Array | bool = False,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Generates one chunk, without gradient, and writes it to the cache.

    Args:
      model: the student.
      config: how to generate.
      params: the student's parameters.
      text: prompt keys and values, from `encode_text`.
      cache: keys and values of the frames before.
      noise: [B, n, H, W, C] initial noise of the chunk.
      start: first frame of the chunk; may be traced.
      chunk: index of the chunk, for `draw`; may be traced.
      exit_step: index of the denoising step whose prediction is the result; may be traced.
      draw: source of noise.
      timesteps: float32 [S], more than `exit_step`; None is `config.timesteps`. May be traced.
      last: whether no chunk follows: nothing would read what the clean pass writes, so it is left out, and the cache
        gets the keys and values of the exit step. May be traced.

    Returns:
      The new cache, the clean chunk and its noisy input at the exit step, both [B, n, H, W, C].
    """
    params, text, cache, noise = jax.lax.stop_gradient((params, text, cache, noise))
    seen = seen_cache(config, cache, start)
    layout = chunk_layout(seen, config, start, noise.shape[1])
    timesteps = jnp.asarray(config.timesteps, jnp.float32) if timesteps is None else timesteps
    calls = exit_step + 1 + ((config.context == "clean") & ~jnp.asarray(last)).astype(jnp.int32)
    state = (text, seen, layout)
    kv, clean, x = denoise_chunk(model, config, params, state, noise, chunk, exit_step, calls, draw, timesteps)
    return kv_cache.write(cache, kv.k, kv.v, start), clean, x


def denoise_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    state: tuple[KeysValues, KVCache, Layout],
    noise: jax.Array,
    chunk: jax.Array | int,
    exit_step: jax.Array | int,
    calls: jax.Array | int,
    draw: Draw,
    timesteps: jax.Array,
    repeats: jax.Array | int = 0,
) -> tuple[KeysValues, jax.Array, jax.Array]:
    """All calls of the network for one chunk, without gradient, in one loop: one copy of the network is compiled.

    Args:
      model: see `generate_chunk`, as are `config`, `params`, `noise`, `chunk`, `exit_step` and `draw`.
      config: see `generate_chunk`.
      params: see `generate_chunk`.
      state: prompt keys and values, the cache, and the chunk's place in it.
      noise: see `generate_chunk`.
      chunk: see `generate_chunk`.
      exit_step: see `generate_chunk`.
      calls: how often to call: the denoising steps up to the exit step, then the clean pass where there is one, and
        the `repeats`.
      draw: see `generate_chunk`.
      timesteps: float32 [S], more than `exit_step`.
      repeats: how often the first step, which gives the same every time, is called again, so that videos side by side
        with different numbers of steps take equally many calls.

    Returns:
      The last call's keys and values, the clean chunk, and its noisy input at the exit step.
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

    if in_place:
        grid = model.config.grid(*noise.shape[2:4])
        rotation = rope.rotation(layout.context_frames, grid, model.config.head_dim)
        seen = layout.prefixes[-1] if layout.prefixes else cache.capacity
        empty = take_apart(cache, text, rotation, noise.shape[1] * grid[0] * grid[1], seen)
    else:
        kv = jax.eval_shape(lambda: predict(model, config, params, noise, timesteps[0], text, layout, cache)[1])
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kv)
    clean, x, kv = jax.lax.fori_loop(0, calls, call, (jnp.zeros_like(noise), noise, empty))
    if in_place:
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

    No gradient flows; `replay` takes it.

    Args:
      model: the student.
      config: how to generate.
      params: the student's parameters.
      text: prompt embeddings [B, S, text_dim], or what `encode_text` made of them.
      noise: [B, F, H, W, C] initial noise.
      exits: int, or int32 [chunks]: exit step of every chunk, in [0, len(config.steps)); may be traced.
      draw: source of noise, see `key_draw`.
      initial: [B, I, H, W, C] clean latents to continue from.
      keep_from: first frame that the cache must keep beside the sink, for `replay`, even if a window needs fewer:
        `replay.keep_from`. None keeps what the window needs.
      cache: one to go on with, which holds the keys and values of `initial`; None computes them.

    Raises:
      ValueError: if the frames are no multiple of the chunk, or more than positions allow.
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
        every output is of the noise's shape.
      cache: carried from chunk to chunk.
      noise: [B, F, H, W, C].
      chunks: sizes of the chunks; only the first may differ from the others.
      start: first frame of the first chunk.
      per_chunk: array [chunks, ...].

    Returns:
      The cache and the outputs [B, F, H, W, C] of all chunks together.
    """
    alone, done = 0, []
    if chunks[0] != chunks[-1]:  # the first frame of its own has another shape than the scanned chunks
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
    """Even-scale timesteps (from, to) between which the exit step denoises; `to` is 0 after the last step.

    Source: official `denoised_timestep_from` and `denoised_timestep_to`.
    """
    table = TRAIN_STEPS - config.schedule.index(jnp.asarray(config.timesteps))
    table = jnp.append(table, 0)
    return table[exit_step], table[jnp.asarray(exit_step) + 1]
