"""The gradient of Self Forcing: the exit steps of a rollout, recomputed in parallel.

Source: paper, Algorithm 1. The rollout keeps each chunk's noisy input at its exit step and the cache; one forward pass
over all chunks then has the rollout's values and its gradient. Differentiating through the scan instead is slower;
`tests/oracle.py` does it, for comparison.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import attention, kv_cache
from sf_jax.models.wan import KeysValues, Layout, WanTransformer
from sf_jax.rollout import Rollout, RolloutConfig, with_moved_sink

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

    Chunk i sees itself (noisy, at its exit step) and the clean keys and values of the chunks before it, as in the
    rollout, so the result has the rollout's values and the gradient of the paper's Algorithm 1.

    Args:
      model: the student.
      config: how the rollout was generated.
      params: the student's parameters.
      text: prompt embeddings [B, S, text_dim], or what `encode_text` made of them.
      past: the rollout, whose cache holds what `keep_from` says.
      cache_gradient: what of the loss of later chunks reaches the keys and values of earlier ones.
        "stop": nothing; they are constants (paper, Algorithm 1).
        "straight_through": their gradient goes to the keys and values of the earlier chunk's exit step, as in the
        official code.
        "write": the clean passes that wrote them are computed again beside the exit steps, with live parameters and
        constant latents (Self Gradient Forcing, arXiv 2607.20368). With a noisy context it is "straight_through", which
        is exact there; given frames, which have a clean pass all the same, stay constant.
      first_live: index of the first new chunk that takes a gradient; chunks before it come from the rollout.

    Returns:
      [B, F, H, W, C] clean latents, given and earlier frames included (without gradient).

    Raises:
      ValueError: on another `cache_gradient`, or if the rollout's cache does not hold what is needed.
    """
    return replay_recorded(model, config, params, text, jax.lax.stop_gradient(past), cache_gradient, first_live)


def keep_from(
    config: RolloutConfig, cache_gradient: str, frames: int, given: int = 0, first_live: int = 0
) -> int | None:
    """First frame, beside the sink, that `replay` reads in the rollout's cache; None if it reads nothing there.

    Args:
      config: how the rollout is generated.
      cache_gradient: see `replay`.
      frames: of the rollout, without the `given` ones.
      given: frames that it goes on from.
      first_live: see `replay`.

    Raises:
      ValueError: if there is no such chunk.
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
    """`replay`, but differentiable in what the rollout recorded, too; its arguments are those of `replay`."""
    if cache_gradient not in CACHE_GRADIENTS:
        raise ValueError(f"cache_gradient is {cache_gradient!r}: it must be one of {', '.join(CACHE_GRADIENTS)}")
    total = past.video.shape[1]
    given, chunks = config.chunks(past.exit_inputs.shape[1], past.initial_frames)
    first = len(given) + first_live
    offset = sum((given + chunks)[:first])
    writes = cache_gradient == "write" and config.context == "clean"
    # Frames whose clean pass is computed again: nobody reads the last chunk's.
    live = (0 if first_live == 0 else offset, total - chunks[-1]) if writes else (offset, offset)
    oldest = keep_from(config, cache_gradient, past.exit_inputs.shape[1], past.initial_frames, first_live)
    needs_cache, held = oldest is not None, past.cache.capacity
    if needs_cache and held < min(total, config.sink + total - oldest):
        raise ValueError(f"the cache holds {held} of {total} frames: make the rollout with keep_from={oldest}")
    missing = total - held if needs_cache else 0  # frames behind the sink that the cache no longer holds
    timesteps = jnp.asarray(config.timesteps, jnp.float32)[past.exits]
    t = jnp.repeat(timesteps, np.asarray(chunks), total_repeat_length=sum(chunks))[offset - past.initial_frames :]
    x = past.exit_inputs[:, offset - past.initial_frames :]
    clean, clean_t = _clean_pass_inputs(config, past, live)
    # Without a clean pass the exit step itself wrote the cache: its gradient is the straight-through one, exactly.
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
    """The frames in the slots of a cache in order."""
    return (
        np.arange(total) if held >= total else np.concatenate([np.arange(sink), np.arange(total - held + sink, total)])
    )


def _shifted(pattern, missing, config):
    """The pattern for a context without the `missing` frames behind the sink."""

    def place(part):
        start, stop = part
        if stop <= config.sink:
            return part
        return (start if start < config.sink else start - missing), stop - missing

    if not missing:
        return pattern
    return tuple(dataclasses.replace(group, context=tuple(map(place, group.context))) for group in pattern)


def _clean_pass_inputs(config, past, live):
    """What the clean passes of the frames `live` read, [B, n, H, W, C], and their timesteps [n]."""
    read, new = past.video, past.initial_frames
    if past.context_inputs is not None:
        read = jnp.concatenate([read[:, :new], past.context_inputs], axis=1)
    t = np.where(np.arange(*live) < new, 0.0, config.context_timestep).astype(np.float32)
    return read[:, slice(*live)], jnp.asarray(t)
