"""The gradient of Self Forcing: the exit steps of a rollout, recomputed in parallel.

Source: paper, Algorithm 1. The rollout records the cache and each chunk's noisy input at its exit step, the denoising
step at which a training rollout stops. One forward pass over all chunks then reproduces the rollout's values, with
their gradient. Differentiating through the rollout's scan is slower; `tests/oracle.py` does so for comparison.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import attention, kv_cache
from sf_jax.models.wan import KeysValues, Layout, WanTransformer
from sf_jax.rollout import Rollout, RolloutConfig
from sf_jax.rollout_cache import with_moved_sink

CACHE_GRADIENTS = ("stop", "straight_through", "write")


def replay(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: jax.Array | KeysValues,
    past: Rollout,
    cache_gradient: str = "stop",
    first_live: int = 0,
) -> jax.Array:
    """Recomputes the exit step of all chunks in parallel; differentiable in `params` and `text`.

    Chunk i attends to itself (noisy, at its exit step) and to the clean keys and values of the chunks before it, as in
    the rollout. The result therefore has the rollout's values and the gradient of the paper's Algorithm 1.

    Args:
      model: the student.
      config: the settings of the rollout.
      params: the student's parameters.
      text: prompt embeddings [B, S, text_dim], or the output of `encode_text`.
      past: the rollout, with or without `last_exit`; its cache holds the frames from `keep_from` on.
      cache_gradient: how the loss of later chunks reaches the keys and values of earlier ones.
        "stop": not at all; they are constants (paper, Algorithm 1).
        "straight_through": their gradient goes to the keys and values of the earlier chunk's exit step, as in the
        official code.
        "write": the clean passes that wrote them are recomputed together with the exit steps, with live parameters and
        constant latents (Self Gradient Forcing, arXiv 2607.20368). With a noisy context this is "straight_through",
        which is exact there; given frames, which still have a clean pass, stay constant.
      first_live: index of the first new chunk that takes a gradient; earlier chunks come from the rollout.

    Returns:
      [B, F, H, W, C] clean latents, including given and earlier frames (without gradient).

    Raises:
      ValueError: if `cache_gradient` is unknown, or if the rollout's cache lacks frames that are needed.
    """
    return replay_recorded(model, config, params, text, jax.lax.stop_gradient(past), cache_gradient, first_live)


def keep_from(
    config: RolloutConfig, cache_gradient: str, frames: int, given: int = 0, first_live: int = 0
) -> int | None:
    """First frame, besides the sink, that `replay` reads from the rollout's cache; None if it reads none.

    Args:
      config: the settings of the rollout.
      cache_gradient: see `replay`.
      frames: frames of the rollout, without the `given` ones.
      given: number of initial frames that the rollout continues.
      first_live: see `replay`.

    Raises:
      ValueError: if there is no chunk `first_live`.
    """
    if cache_gradient == "write" and config.context == "clean" and not first_live:
        return None
    if config.window is None:
        return 0
    before, new = config.chunks(frames, given)
    if not 0 <= first_live < len(new):
        raise ValueError(f"first_live is {first_live}: it must be at least 0 and below the {len(new)} new chunks")
    stop = attention.chunk_bounds(before + new)[len(before) + first_live][1]
    return max(0, stop - (config.window - config.sink))


def replay_recorded(
    model: WanTransformer,
    config: RolloutConfig,
    params: dict,
    text: jax.Array | KeysValues,
    past: Rollout,
    cache_gradient: str,
    first_live: int,
) -> jax.Array:
    """`replay`, but also differentiable in the arrays of `past`; takes the same arguments."""
    if cache_gradient not in CACHE_GRADIENTS:
        raise ValueError(f"cache_gradient is {cache_gradient!r}: it must be one of {', '.join(CACHE_GRADIENTS)}")
    total = past.video.shape[1]
    given, chunks = config.chunks(past.exit_inputs.shape[1], past.initial_frames)
    first = len(given) + first_live
    offset = sum((given + chunks)[:first])
    writes = cache_gradient == "write" and config.context == "clean"
    # Frames whose clean pass is recomputed: all but the last chunk's, which nothing reads.
    live = (0 if first_live == 0 else offset, total - chunks[-1]) if writes else (offset, offset)
    oldest = keep_from(config, cache_gradient, past.exit_inputs.shape[1], past.initial_frames, first_live)
    needs_cache, held = oldest is not None, past.cache.capacity
    if needs_cache and held < min(total, config.sink + total - oldest):
        raise ValueError(f"the cache holds {held} of {total} frames: make the rollout with keep_from={oldest}")
    missing = total - held if needs_cache else 0  # frames after the sink that the cache no longer holds
    timesteps = jnp.asarray(config.timesteps, jnp.float32)[past.exits]
    t = jnp.repeat(timesteps, np.asarray(chunks), total_repeat_length=sum(chunks))[offset - past.initial_frames :]
    x = past.exit_inputs[:, offset - past.initial_frames :]
    clean, clean_t = _clean_pass_inputs(config, past, live)
    # Without a clean pass the exit step itself wrote the cache, so the straight-through gradient is exact.
    through = cache_gradient == "straight_through" or (cache_gradient == "write" and not writes)
    layout = Layout(
        frames=np.concatenate([np.arange(*live), np.arange(offset, total)]),
        context_frames=_frames_held(config.sink, total, held) if needs_cache else None,
        pattern=_shifted(
            attention.replay(given + chunks, first, config.window, config.sink, total, live), missing, config
        ),
        straight_through=offset - missing if through else None,
    )
    cache = kv_cache.in_order(past.cache, total)
    context = KeysValues(cache.k, cache.v) if needs_cache else None
    own_t = jnp.broadcast_to(jnp.concatenate([clean_t, t]), (x.shape[0], len(layout.frames)))
    own = jnp.concatenate([clean, x], axis=1)
    layout = with_moved_sink(config, layout)
    flow = model.apply({"params": params}, own, own_t, text, layout, context)[:, clean.shape[1] :]
    video = config.schedule.to_clean(flow, x, jnp.broadcast_to(t, x.shape[:2]))
    return jnp.concatenate([past.video[:, :offset], video], axis=1)


def _frames_held(sink, total, held):
    """The frames that an ordered cache holds."""
    return (
        np.arange(total) if held >= total else np.concatenate([np.arange(sink), np.arange(total - held + sink, total)])
    )


def _shifted(pattern, missing, config):
    """The pattern for a context without the `missing` frames after the sink."""

    def place(part):
        start, stop = part
        if stop <= config.sink:
            return part
        return (start if start < config.sink else start - missing), stop - missing

    if not missing:
        return pattern
    return tuple(dataclasses.replace(group, context=tuple(map(place, group.context))) for group in pattern)


def _clean_pass_inputs(config, past, live):
    """Inputs [B, n, H, W, C] and timesteps [n] of the clean passes of the frames `live`."""
    read, new = past.video, past.initial_frames
    if past.context_inputs is not None:
        read = jnp.concatenate([read[:, :new], past.context_inputs], axis=1)
    t = np.where(np.arange(*live) < new, 0.0, config.context_timestep).astype(np.float32)
    return read[:, slice(*live)], jnp.asarray(t)
