"""Generation behind real clips: every chunk sees the real frames before it, not the network's own.

Against ordinary generation this tells how much of an error comes from the network's own outputs (exposure bias).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax.diffusion.solvers import Solver
from sf_jax.inference.pipeline import Pipeline
from sf_jax.many_step import guided_chunk
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.patch_codec import to_float, to_uint8
from sf_jax.models.wan import KeysValues, WanTransformer
from sf_jax.rng import Purpose, key_for


def generate_behind_real(
    pipe: Pipeline, prompts: Sequence[str], clips: np.ndarray, seed: int, first_index: int = 0
) -> np.ndarray:
    """Videos whose chunks were each generated behind the real frames before them.

    Args:
      pipe: a causal network, of few or many steps.
      prompts: B prompts.
      clips: uint8 [B, F, h, w, 1] real clips of these prompts; F is a multiple of the network's chunk.
      seed: seed of the noise.
      first_index: index of the first prompt; the others count on.

    Returns:
      uint8 [B, F, h, w, 1]; the first chunk is the clips' own, as there is nothing before it.

    Raises:
      ValueError: if the network is a bidirectional teacher or caches noisy chunks, or the frames are no chunks of it.
    """
    package = pipe.package
    if package.kind == "teacher":
        raise ValueError("the network is a bidirectional teacher: it generates whole videos behind nothing")
    if package.rollout.context == "noisy":
        raise ValueError("rollout.context is 'noisy': the network caches its own denoising steps, never a real chunk")
    frames = clips.shape[1]
    config, few = package.rollout, package.kind == "student"
    text = jnp.asarray(pipe.text.encode(list(prompts)))
    examples = jnp.arange(first_index, first_index + len(prompts), dtype=jnp.int32)
    key = key_for(seed, 0, Purpose.SAMPLE)
    real = pipe.codec.encode(to_float(jnp.asarray(clips)))
    if not few:  # prompts and empty prompts in turn, as `guided_chunk` takes them
        text = jnp.stack([text, jnp.zeros_like(text)], axis=1).reshape(-1, *text.shape[1:])
        real = jnp.repeat(real, 2, axis=0)
    text = pipe.model.apply({"params": pipe.params}, text, method="encode_text")
    solver = None if few else Solver("unipc", package.shift, pipe.teacher_steps)
    cache = ro.empty_cache(pipe.model, config, len(text.k[0]), frames, *package.size)
    parts = []
    for chunk, (start, size) in enumerate(zip(pipe.chunk_starts(frames), config.chunks(frames)[1], strict=True)):
        given = real[:, start : start + size]
        static = (pipe.model, config, solver, package.guidance)
        cache, clean = _chunk(*static, pipe.params, text, cache, key, examples, given, start, chunk)
        parts.append(np.asarray(to_uint8(pipe.codec.decode(clean))) if chunk else clips[:, :size])
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _chunk(
    model: WanTransformer,
    config: ro.RolloutConfig,
    solver: Solver | None,
    guidance: float,
    params: dict,
    text: KeysValues,
    cache: KVCache,
    key: jax.Array,
    examples: jax.Array,
    real: jax.Array,
    start: jax.Array,
    chunk: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Generates a chunk, and writes the real one of its place to the cache."""
    shape = (len(examples), *real.shape[1:])
    noise = ro.example_noise(jax.random.fold_in(jax.random.fold_in(key, 2 * len(config.steps)), chunk), examples, shape)
    if solver is None:
        draw, last = ro.key_draw(key, examples), len(config.steps) - 1
        _, clean, _ = ro.generate_chunk(model, config, params, text, cache, noise, start, chunk, last, draw)
    else:
        _, clean = guided_chunk(model, config, params, text, cache, noise, start, solver, guidance)
    t = 0.0
    if solver is None:
        real, t = ro.context_input(config, real, ro.key_draw(key, examples), chunk), config.context_timestep
    cache, _ = ro.write_chunk(model, config, params, text, cache, real, start, t)
    return cache, clean
