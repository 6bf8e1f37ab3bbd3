"""Generation conditioned on real clips: every chunk sees the real frames before it, not the network's own.

Compared with ordinary generation, this shows how much of an error is due to conditioning on the network's own outputs
(exposure bias).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.evaluation import metrics
from sf_jax.evaluation.judge import WINDOW, Judge
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.programs import decode, encode_pixels, encode_text, next_chunk
from sf_jax.rng import Purpose, key_for


def generate_behind_real(
    pipe: VideoPipeline,
    prompts: Sequence[str],
    clips: np.ndarray,
    seed: int,
    first_index: int = 0,
    only_first: bool = False,
) -> np.ndarray:
    """Generates each chunk of a video given the real frames before it, or given only a real first chunk.

    Args:
      pipe: a causal network, few-step or many-step.
      prompts: B prompts.
      clips: uint8 [B, F, h, w, 1] real clips of these prompts; F is a multiple of the network's chunk.
      seed: seed of the noise.
      first_index: number of the first prompt's video; the others follow.
      only_first: whether only the first chunk is real, and later chunks see the generated ones before them.

    Returns:
      uint8 [B, F, h, w, 1]; the first chunk is the clips' own, as nothing comes before it.

    Raises:
      ValueError: if the network is bidirectional or caches noisy chunks, or the frames do not form whole chunks.
    """
    if pipe.rollout is None:
        raise ValueError("the network is bidirectional: it generates whole videos behind nothing")
    if pipe.rollout.context == "noisy":
        raise ValueError("rollout.context is 'noisy': the network caches its own denoising steps, never a real chunk")
    model, params, config, solver = pipe.transformer, pipe.params, pipe.rollout, pipe.sampling.solver
    frames, many = clips.shape[1], None if solver is None else (solver, pipe.sampling.guidance)
    text = jnp.asarray(pipe.text_encoder.encode(list(prompts)))
    examples = jnp.arange(first_index, first_index + len(prompts), dtype=jnp.int32)
    source = (key_for(seed, 0, Purpose.SAMPLE), examples, pipe.noise_number)
    real = encode_pixels(pipe.encoder, clips)
    size = real.shape[2:]
    if many:  # interleaved with empty prompts, as `next_chunk` takes them
        text = jnp.stack([text, jnp.zeros_like(text)], axis=1).reshape(-1, *text.shape[1:])
        real = jnp.repeat(real, 2, axis=0)
    text = encode_text(model, params, text)
    cache = rollout_cache.empty_cache(model, config, len(text.k[0]), frames, *size[:2], dtype=pipe.cache_dtype)
    parts = []
    for chunk, (start, count) in enumerate(zip(pipe.chunk_starts(frames), config.chunks(frames)[1], strict=True)):
        given, place, own = real[:, start : start + count], (jnp.int32(start), jnp.int32(chunk)), None
        parts.append(clips[:, :count])
        if chunk:
            # `next_chunk` donates its cache, but the real chunk needs the same one, so it gets a copy
            copy = jax.tree.map(jnp.copy, cache)
            own, latents = next_chunk(model, config, many, (count, *size), params, text, copy, source, (*place, False))
            _, pixels = decode(pipe.decoder, pipe.decoder.init_cache(len(prompts), *size[:2]), latents)
            parts[-1] = np.asarray(pixels)
        if chunk and only_first:
            cache = own
        else:
            cache = _write(model, config, many is None, params, text, cache, given, source[:2], place)
    return np.concatenate(parts, axis=1)


def measure_behind_real(
    videos: np.ndarray,
    clips: np.ndarray,
    targets: metrics.Targets,
    judge: Judge,
    real: metrics.Reference,
    chunk_starts: Sequence[int],
) -> metrics.Figures:
    """Metrics of videos from `generate_behind_real`.

    Neighboring chunks continue real frames, not each other. A window that crosses a chunk border is therefore judged
    with the real frames before the border, and the jump there is measured between the last real and the first generated
    frame.

    Args:
      videos: uint8 [N, F, h, w, 1], generated.
      clips: uint8 [N, F, h, w, 1], the real clips that they are conditioned on.
      targets: the prompts' targets.
      judge: the judge.
      real: the reference, from other real clips of the same length.
      chunk_starts: first frames of the chunks, of which all but the first were generated.

    Returns:
      The metrics. Those per window exclude the first chunk, which is real.
    """
    figures = metrics.measure(videos, targets, judge, real, chunk_starts)
    usual = np.median(metrics.steps(clips), axis=1)
    ends = [*chunk_starts[1:], videos.shape[1]]
    right, jumps = [], []
    for start, end in zip(chunk_starts[1:], ends[1:], strict=True):
        before = min(start, WINDOW - 1)
        if before + end - start < WINDOW:  # the second of two lone frames: no window ends there
            continue
        part = np.concatenate([clips[:, start - before : start], videos[:, start:end]], axis=1)
        right.append(metrics.correctness(judge(part), targets))
        jumps.append(np.linalg.norm(metrics.steps(part)[:, before - 1] - usual, axis=-1))
    merged = {name: np.concatenate([r[name] for r in right], axis=1) for name in right[0]}
    sizes = [r["joint"].shape[1] for r in right]
    across = np.concatenate([np.arange(size) < WINDOW - 1 for size in sizes])
    return dataclasses.replace(
        figures,
        **{name: float(values.mean()) for name, values in merged.items()},
        **{f"{name}_per_frame": tuple(values.mean(axis=0).tolist()) for name, values in merged.items()},
        joint_per_quarter=tuple(float(part.mean()) for part in np.array_split(merged["joint"].mean(axis=0), 4)),
        joint_inside=float(merged["joint"][:, ~across].mean()) if (~across).any() else float("nan"),
        joint_across=float(merged["joint"][:, across].mean()),
        border_jump=float(np.median(jumps)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(model, config, few, params, text, cache, real, source, place):
    """Writes a real chunk to the cache."""
    (key, examples), (start, chunk), t = source, place, 0.0
    if few:
        real, t = ro.context_input(config, real, ro.key_draw(key, examples), chunk), config.context_timestep
    return ro.write_chunk(model, config, params, text, cache, real, start, t)
