"""Self Forcing's rollout: the student generates a video chunk by chunk with the cache it will use at inference.

A chunk is a group of latent frames that are denoised together. A training rollout stops at the exit step, one of the
denoising steps. The clean pass is the extra forward pass that writes a finished chunk's keys and values to the cache.
Training and inference share `generate_chunk`. `rollout` scans it over the chunks without gradient; `replay` computes
the gradient.

Source: paper, Algorithm 1 (training) and 2 (inference); official `SelfForcingTrainingPipeline` and
`CausalInferencePipeline`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import TRAIN_STEPS
from sf_jax.models import attention, kv_cache, rope
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.partition import constrain
from sf_jax.models.slot_cache import SlotCache, Span
from sf_jax.models.slots import Slots, take_apart
from sf_jax.models.wan import KeysValues, WanTransformer
from sf_jax.rollout_cache import Context, close_chunk, empty_cache, open_chunk
from sf_jax.rollout_config import RolloutConfig

# draw(kind, index of the chunk, step, shape) -> standard normal noise; kind is "renoise" or "context".
Draw = Callable[[str, Any, Any, tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class NoisyChunk:
    """A chunk to denoise. It is not a pytree, so it is made inside a jitted function; all numbers may be traced.

    Attributes:
      noise: [B, n, H, W, C] initial noise.
      start: index of its first frame; `denoise_chunk`, whose context has the frames, does not use it.
      index: its index among the chunks, for `draw`.
      exit_step: index of the denoising step whose prediction is the result.
      draw: source of the noise of the later steps.
      timesteps: float32 [S] with S > `exit_step`; None for `config.timesteps`.
    """

    noise: jax.Array
    start: jax.Array | int
    index: jax.Array | int
    exit_step: jax.Array | int
    draw: Draw
    timesteps: jax.Array | None = None

    def timesteps_in(self, config: RolloutConfig) -> jax.Array:
        """float32 [S]: the timesteps of the denoising steps."""
        return jnp.asarray(config.timesteps if self.timesteps is None else self.timesteps, jnp.float32)


@flax.struct.dataclass
class Rollout:
    """The result of a rollout, with everything that `replay` needs.

    Attributes:
      video: [B, F, H, W, C] clean latents, initial frames included; zero in the last chunk without `last_exit`.
      exit_inputs: [B, F_new, H, W, C] noisy input of each chunk at its exit step.
      exits: int32 [chunks], exit step of each new chunk.
      cache: keys and values of the sink and of the frames from `keep_from` on (without it, those that the window
        needs), as a ring. The last chunk's come from its last network call, as nothing reads them.
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

    def draw(kind, index, step, shape):
        base = jax.random.fold_in(jax.random.fold_in(key, 2 * step + (kind == "context")), index)
        return example_noise(base, examples, shape)

    return draw


def example_noise(key: jax.Array, examples: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 `shape` [B, ...], each example drawn from its own key."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(examples)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)
    return constrain(noise, "batch", *[None] * (len(shape) - 1))


def predict(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    x: jax.Array,
    t: jax.Array | float,
    context: Context,
) -> tuple[jax.Array, KeysValues | tuple[Slots, ...]]:
    """Clean prediction of one chunk `x` [B, n, H, W, C] at timestep `t` (scalar), and the chunk's keys and values.

    With slots, returns the slots with the chunk's keys and values.
    """
    t = jnp.full((x.shape[0], 1), t, jnp.float32)
    flow, kv = model.apply({"params": params}, x, t, context.text, context.layout, context.cache, return_kv=True)
    return config.schedule.to_clean(flow, x, t), kv


def clean_pass(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    context: Context,
    clean: jax.Array,
    t: jax.Array | float = 0.0,
) -> KeysValues | tuple[Slots, ...]:
    """Keys and values (or the slots with them) of the chunk `clean` [B, n, H, W, C] at timestep `t`."""
    layout = context.layout
    if isinstance(context.cache, tuple):
        layout = layout.replace(keys_only=jnp.bool_(True))
    elif not model.config.scan_layers:  # every layer would compile attention for every number of cached frames
        layout = layout.replace(prefixes=(), prefixes_masked=False)
    return predict(model, config, params, clean, t, context.replace(layout=layout))[1]


def write_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache | SlotCache,
    clean: jax.Array,
    start: jax.Array | int,
    t: float = 0.0,
) -> KVCache | SlotCache:
    """The cache with the keys and values of the frames `clean` [B, n, H, W, C] from `start` on.

    The clean pass computes them at timestep `t`, which is 0 unless the context is noisy.

    Raises:
      ValueError: see `open_chunk`.
    """
    span = Span(start, clean.shape[1])
    written = clean_pass(model, config, params, open_chunk(config, cache, text, span), clean, t)
    return close_chunk(cache, written, span)


def context_input(config: RolloutConfig, clean: jax.Array, draw: Draw, index: jax.Array | int) -> jax.Array:
    """The clean pass's input: the finished chunk [B, n, H, W, C], with context noise if configured."""
    if not config.adds_context_noise:
        return clean
    sigma = config.context_sigma
    return (1 - sigma) * clean + sigma * draw("context", index, 0, clean.shape)


def renoised(config: RolloutConfig, chunk: NoisyChunk, clean: jax.Array, step: jax.Array | int) -> jax.Array:
    """The input of denoising step `step` > 0, from the step before it, which predicted `clean` [B, n, H, W, C]."""
    noise = chunk.draw("renoise", chunk.index, step - 1, clean.shape)
    return config.schedule.add_noise(clean, noise, chunk.timesteps_in(config)[step])


def generate_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache | SlotCache,
    chunk: NoisyChunk,
    last: jax.Array | bool = False,
    finish: jax.Array | bool = True,
) -> tuple[KVCache | SlotCache, jax.Array, jax.Array]:
    """Generates one chunk, without gradient, and writes it to the cache.

    Args:
      model: the student.
      config: the rollout's settings.
      params: the student's parameters.
      text: prompt keys and values, from `encode_text`.
      cache: keys and values of the previous frames.
      chunk: the chunk, with its exit step.
      last: whether no chunk follows. The clean pass is then skipped, as nothing would read its keys and values, and
        the cache gets those of the last call. May be traced.
      finish: whether to run the exit step. If not, `last` must be set, and the clean chunk is zero. May be traced.

    Returns:
      The new cache, the clean chunk and its noisy input at the exit step, both [B, n, H, W, C].

    Raises:
      ValueError: see `open_chunk`.
    """
    params, text, cache, noise = jax.lax.stop_gradient((params, text, cache, chunk.noise))
    chunk = dataclasses.replace(chunk, noise=noise)
    exit_step = chunk.exit_step
    calls = exit_step + jnp.int32(finish) + ((config.context == "clean") & ~jnp.asarray(last)).astype(jnp.int32)
    span = Span(chunk.start, noise.shape[1])
    context = open_chunk(config, cache, text, span)
    written, clean, x = denoise_chunk(model, config, params, context, chunk, calls)
    if finish is not True:
        unfinished = ~jnp.asarray(finish) & (exit_step > 0)
        now = jax.lax.cond(unfinished, lambda: renoised(config, chunk, clean, exit_step), lambda: noise)
        clean, x = jnp.where(finish, clean, 0), jnp.where(finish, x, now)
    return close_chunk(cache, written, span), clean, x


def denoise_chunk(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    context: Context,
    chunk: NoisyChunk,
    calls: jax.Array | int,
    exit_call: jax.Array | int | None = None,
) -> tuple[KeysValues | tuple[Slots, ...], jax.Array, jax.Array]:
    """All network calls for one chunk, without gradient, in one loop so that the network is compiled once.

    Args:
      model: see `generate_chunk`, as are `config`, `params` and `chunk`.
      config: see `generate_chunk`.
      params: see `generate_chunk`.
      context: from `open_chunk`.
      chunk: see `generate_chunk`.
      calls: number of network calls: up to `exit_call`, and the clean pass if there is one. If they end before
        `exit_call`, the returned input is not that of the exit step.
      exit_call: index of the call that runs the exit step; None if it equals `chunk.exit_step`. Until then the first
        step, whose result does not change, is repeated, so that batched videos with different numbers of steps make the
        same number of calls.

    Returns:
      The last call's keys and values (or the slots with them), the clean chunk, and its noisy input at the exit step.
    """
    timesteps = jnp.append(chunk.timesteps_in(config), jnp.float32(config.context_timestep))
    in_place = not model.config.scan_layers
    exit_step, noise = chunk.exit_step, chunk.noise
    exit_call = exit_step if exit_call is None else exit_call

    def call(index, carry):
        clean, x, kv = carry
        step, finished = jnp.maximum(index - (exit_call - exit_step), 0), index > exit_call
        kind = (step > 0).astype(jnp.int32) + finished
        inputs = (
            lambda: noise,
            lambda: renoised(config, chunk, clean, step),
            lambda: context_input(config, clean, chunk.draw, chunk.index),
        )
        now = jax.lax.switch(kind, inputs)
        t = jnp.where(finished, timesteps[-1], timesteps[step])
        here = context
        if in_place:
            here = context.replace(cache=kv, layout=context.layout.replace(keys_only=finished))
        predicted, kv = predict(model, config, params, now, t, here)
        return (*(jnp.where(finished, *pair) for pair in ((clean, predicted), (x, now))), kv)

    first = _first_carry(model, config, params, context, noise)
    clean, x, kv = jax.lax.fori_loop(0, calls, call, (jnp.zeros_like(noise), noise, first))
    if in_place and not isinstance(context.cache, tuple):
        kv = model.apply({"params": params}, kv, method="own_keys_values")
    return jax.lax.stop_gradient((kv, clean, x))


def _first_carry(model, config, params, context, noise):
    """What the calls for a chunk hand on: slots, or the chunk's keys and values, which are zero at first."""
    network, cache, layout = model.config, context.cache, context.layout
    if isinstance(cache, tuple):
        return cache
    if network.scan_layers:
        kv = jax.eval_shape(lambda: predict(model, config, params, noise, 0.0, context)[1])
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kv)
    grid = network.grid(*noise.shape[2:4])
    rotation = rope.rotation(layout.context_frames, grid, network.head_dim)
    seen = layout.prefixes[-1] if layout.prefixes else cache.capacity
    multiple = attention.key_multiple(network.attention, network.dtype, network.head_dim)
    return take_apart(cache, context.text, rotation, noise.shape[1] * grid[0] * grid[1], seen, multiple)


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
    last_exit: bool = True,
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
      last_exit: whether to run the exit step of the last chunk. `replay`, which recomputes it, does not need it; the
        last chunk of `Rollout.video` is zero without it.

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
            cache = write_chunk(model, config, params, text, cache, initial[:, first:last], first)
    kv_cache.check_capacity(cache, start + frames, config.window)
    exits = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), (len(chunks),))

    def step(cache, noise, index, first, exit_step):
        last = jnp.asarray(index) == len(chunks) - 1
        finish = True if last_exit else ~last
        chunk = NoisyChunk(noise, first, index, exit_step, draw)
        cache, clean, x = generate_chunk(model, config, params, text, cache, chunk, last=last, finish=finish)
        read = (context_input(config, clean, draw, index),) if config.adds_context_noise else ()
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
