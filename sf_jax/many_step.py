"""Causal diffusion: generates a video chunk by chunk, with many guided solver steps per chunk.

Source: official `CausalDiffusionInferencePipeline`. Prompts and negative prompts are interleaved in one batch of twice
the size, so that they share every forward pass and a pair stays on one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.diffusion.solvers import Solver, euler, guided, integrate
from sf_jax.models import attention
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.slot_cache import Span
from sf_jax.models.wan import KeysValues, Layout, WanTransformer


def guided_chunk(
    model: WanTransformer,
    config: ro.RolloutConfig,
    params: dict,
    text: KeysValues,
    cache: KVCache,
    noise: jax.Array,
    start: jax.Array | int,
    solver: Solver,
    guidance: float,
) -> tuple[KVCache, jax.Array]:
    """Generates one chunk and writes it to the cache.

    Args:
      model: a causal network trained by diffusion or teacher forcing.
      config: chunk, window and sink; its denoising steps are ignored.
      params: the network's parameters.
      text: keys and values from `encode_text` of 2B prompts, each followed by its negative prompt.
      cache: the cache, with batch size 2B in the same order.
      noise: [B, n, H, W, C].
      start: first frame of the chunk; may be traced.
      solver: the ODE solver.
      guidance: guidance scale; 1 uses only the prompt.

    Returns:
      The new cache and the clean chunk [B, n, H, W, C].
    """
    context = rollout_cache.open_chunk(config, cache, text, Span(start, noise.shape[1]))

    def flow(x, t):
        t = jnp.full((2 * x.shape[0], 1), t, jnp.float32)
        inputs = (jnp.repeat(x, 2, axis=0), t, context.text, context.layout, context.cache)
        both = model.apply({"params": params}, *inputs)
        return guided(both[::2], both[1::2], guidance)

    clean = integrate(solver, flow, noise)
    cache = ro.write_chunk(model, config, params, text, cache, jnp.repeat(clean, 2, axis=0), start)
    return cache, clean


def guided_rollout(
    model: WanTransformer,
    config: ro.RolloutConfig,
    params: dict,
    text: jax.Array,
    negative: jax.Array,
    noise: jax.Array,
    solver: Solver,
    guidance: float,
    initial: jax.Array | None = None,
) -> jax.Array:
    """Generates a whole video by causal diffusion.

    Args:
      model: see `guided_chunk`, as are `config`, `params`, `solver` and `guidance`.
      config: see `guided_chunk`.
      params: see `guided_chunk`.
      text: prompt embeddings [B, S, text_dim].
      negative: embeddings [B, S, text_dim] of the negative prompts.
      noise: [B, F, H, W, C].
      solver: see `guided_chunk`.
      guidance: see `guided_chunk`.
      initial: [B, I, H, W, C] clean latents to continue from.

    Returns:
      Clean latents [B, I + F, H, W, C].
    """
    batch, frames, height, width, _ = noise.shape
    start = 0 if initial is None else initial.shape[1]
    given, chunks = config.chunks(frames, start)
    pairs = jnp.stack([text, negative], axis=1).reshape(2 * batch, *text.shape[1:])
    kv = model.apply({"params": params}, pairs, method="encode_text")
    cache = rollout_cache.empty_cache(model, config, 2 * batch, start + frames, height, width)
    done = []
    for first, last in attention.chunk_bounds(given) if given else ():
        clean = initial[:, first:last]
        cache = ro.write_chunk(model, config, params, kv, cache, jnp.repeat(clean, 2, axis=0), first)
        done.append(clean)

    def step(cache, noise, chunk, first, _):
        del chunk
        return guided_chunk(model, config, params, kv, cache, noise, first, solver, guidance)

    _, clean = ro.run_chunks(step, cache, noise, chunks, start, jnp.zeros(len(chunks)))
    return jnp.concatenate([*done, clean], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def forced_trajectory(
    model: WanTransformer,
    config: ro.RolloutConfig,
    shift: float,
    steps: int,
    guidance: float,
    rows: tuple[int, ...],
    params: dict,
    noise: jax.Array,
    clean: jax.Array,
    text: jax.Array,
    negative: jax.Array,
) -> jax.Array:
    """Euler trajectories of a causal network, where each chunk is conditioned on the real clean chunks before it.

    All chunks are integrated in parallel; the keys and values of the real chunks are computed once.

    Source: Causal Forcing (arXiv 2602.02214), which initializes few-step students from such pairs.

    Args:
      model: see `guided_chunk`, as are `config`, `params` and `guidance`.
      config: see `guided_chunk`.
      shift: shift of the schedule.
      steps: Euler steps.
      guidance: see `guided_chunk`.
      rows: indices of the points to keep, from 0 (noise) to `steps` (clean), ascending; the last must be `steps`.
      params: see `guided_chunk`.
      noise: [B, F, H, W, C].
      clean: [B, F, H, W, C] real clean latents.
      text: prompt embeddings [B, S, text_dim].
      negative: embeddings [B, S, text_dim] of the negative prompts.

    Returns:
      [len(rows), B, F, H, W, C].
    """
    batch, frames = noise.shape[:2]
    chunks = attention.split_chunks(frames, config.chunk, config.first_frame_alone)
    positions = np.arange(frames)
    causal = Layout(frames=positions, pattern=attention.block_causal(chunks, config.window, config.sink))
    behind = Layout(
        frames=positions,
        context_frames=positions,
        pattern=attention.replay(chunks, 0, config.window, config.sink, frames),
    )
    causal, behind = (rollout_cache.with_moved_sink(config, layout) for layout in (causal, behind))
    contexts = []
    for prompt in (text, negative)[: 1 if guidance == 1 else 2]:
        kv = model.apply({"params": params}, prompt, method="encode_text")
        _, context = model.apply({"params": params}, clean, jnp.zeros((batch, 1)), kv, causal, return_kv=True)
        contexts.append((kv, context))

    def flow(x, t):
        flows = [model.apply({"params": params}, x, t, kv, behind, context) for kv, context in contexts]
        return guided(*flows, guidance) if len(flows) == 2 else flows[0]

    return euler(flow, noise, shift, steps)[np.asarray(rows)]
