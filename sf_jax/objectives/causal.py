"""Causal diffusion training: teacher forcing and diffusion forcing over all chunks of a video in one pass.

Source: paper, Section 2 and the baselines of Table 2; official `CausalDiffusion` (model/diffusion.py); Diffusion
Forcing (arXiv 2407.01392).
"""

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models import attention
from sf_jax.models.wan import Layout, WanTransformer


def per_chunk(values: jax.Array, chunks: tuple[int, ...]) -> jax.Array:
    """Sets the values [B, F, ...] of all frames of a chunk to that of its first frame; keeps the shape."""
    first = np.repeat([start for start, _ in attention.chunk_bounds(chunks)], chunks)
    return values[:, first]


def causal_layout(chunks: tuple[int, ...], teacher_forcing: bool, window: int | None = None, sink: int = 0) -> Layout:
    """The layout of `causal_flow`: the noisy frames, preceded by the clean ones with teacher forcing."""
    make = attention.teacher_forcing if teacher_forcing else attention.block_causal
    positions = np.arange(sum(chunks))
    positions = np.tile(positions, 2) if teacher_forcing else positions
    return Layout(frames=positions, pattern=make(chunks, window, sink))


def causal_flow(
    params: dict,
    model: WanTransformer,
    layout: Layout,
    clean: jax.Array,
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    schedule: FlowSchedule,
    context_t: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Predicted flow of every noised chunk, given the chunks before it.

    With diffusion forcing, the earlier chunks are noisy too, each at its own level. With teacher forcing they are clean
    or, as an augmentation, noised to `context_t` with the same noise.

    Args:
      params: the network's parameters.
      model: the network.
      layout: from `causal_layout`; twice the frames of `clean` selects teacher forcing.
      clean: [B, F, H, W, C] clean latents.
      text: [B, S, text_dim] prompt embeddings.
      t: float [B, F] timesteps, equal within a chunk (see `per_chunk`); frames at timestep 0 get no noise.
      noise: [B, F, H, W, C] standard normal.
      schedule: the noise schedule.
      context_t: float [B, F] timesteps of the context in teacher forcing; None means a clean context.

    Returns:
      The flow and the noisy latents, both [B, F, H, W, C].

    Raises:
      ValueError: if the layout has the wrong number of frames, or `context_t` is given without teacher forcing.
    """
    frames = clean.shape[1]
    forcing = len(layout.frames) == 2 * frames
    if len(layout.frames) not in (frames, 2 * frames):
        raise ValueError(f"the layout has {len(layout.frames)} frames: it must be {frames}, or {2 * frames}")
    if context_t is not None and not forcing:
        raise ValueError("context_t is given: it is for teacher forcing alone")

    def noised(t):
        # The table has no entry without noise: a given frame would get the noise of the last entry.
        return jnp.where((t == 0)[..., None, None, None], clean, schedule.add_noise(clean, noise, t))

    noisy = noised(t)
    x, times = noisy, t
    if forcing:
        given_t = jnp.zeros_like(t) if context_t is None else context_t
        x, times = jnp.concatenate([noised(given_t), noisy], axis=1), jnp.concatenate([given_t, t], axis=1)
    return model.apply({"params": params}, x, times, text, layout)[:, -frames:], noisy


def causal_loss(
    params: dict,
    model: WanTransformer,
    layout: Layout,
    clean: jax.Array,
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    schedule: FlowSchedule,
    context_t: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """Weighted mean squared error of the flow predicted by `causal_flow`; takes the same arguments.

    `schedule.training_weight` weights the frames. Frames at timestep 0 are given and do not count.

    Returns:
      Scalar loss, and aux: `clean` [B, F, H, W, C], the prediction.
    """
    flow, noisy = causal_flow(params, model, layout, clean, text, t, noise, schedule, context_t)
    error = jnp.square(flow - (noise - clean)).mean(axis=(2, 3, 4))
    learned = (t != 0).astype(error.dtype)
    loss = (error * schedule.training_weight(t) * learned).sum() / jnp.maximum(learned.sum(), 1)
    return loss, {"clean": schedule.to_clean(flow, noisy, t)}


def causal_video(
    params: dict,
    model: WanTransformer,
    layout: Layout,
    clean: jax.Array,
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    schedule: FlowSchedule,
) -> jax.Array:
    """Clean prediction [B, F, H, W, C] from `causal_flow`, with the same arguments; returns given frames unchanged.

    This is the student's output in the baselines without rollouts (paper, Table 2; official `CausVid._run_generator`).
    """
    flow, noisy = causal_flow(params, model, layout, clean, text, t, noise, schedule)
    return jnp.where((t == 0)[..., None, None, None], noisy, schedule.to_clean(flow, noisy, t))
