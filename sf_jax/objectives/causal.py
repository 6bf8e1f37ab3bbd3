"""Causal diffusion training: teacher forcing and diffusion forcing, all chunks of a video in one pass.

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
    """Gives all frames of a chunk the value of its first frame; [B, F, ...], shape kept."""
    first = np.repeat([start for start, _ in attention.chunk_bounds(chunks)], chunks)
    return values[:, first]


def causal_layout(chunks: tuple[int, ...], teacher_forcing: bool, window: int | None = None, sink: int = 0) -> Layout:
    """Own frames are the noisy ones; with teacher forcing the clean ones stand before them."""
    make = attention.teacher_forcing if teacher_forcing else attention.block_causal
    positions = np.arange(sum(chunks))
    positions = np.tile(positions, 2) if teacher_forcing else positions
    return Layout(frames=positions, pattern=make(chunks, window, sink))


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
    """Weighted mean squared error of the predicted flow of every chunk, given the chunks before it.

    With diffusion forcing those chunks are noisy themselves, each at its own level; with teacher forcing they are
    clean or, as an augmentation, noised to `context_t` with the same noise.

    Args:
      params: the network's parameters.
      model: the network.
      layout: from `causal_layout`; twice as many frames as `clean` has mean teacher forcing.
      clean: [B, F, H, W, C] clean latents.
      text: [B, S, text_dim] prompt embeddings.
      t: float [B, F] timesteps, equal within a chunk (see `per_chunk`).
      noise: [B, F, H, W, C] standard normal.
      schedule: the noise schedule; its `training_weight` weighs the frames.
      context_t: float [B, F] timesteps of the context in teacher forcing; None is a clean context.

    Returns:
      Scalar loss, and aux: `clean` [B, F, H, W, C], the prediction.

    Raises:
      ValueError: if the layout has another number of frames, or `context_t` is given without teacher forcing.
    """
    frames = clean.shape[1]
    forcing = len(layout.frames) == 2 * frames
    if len(layout.frames) not in (frames, 2 * frames):
        raise ValueError(f"the layout has {len(layout.frames)} frames: it must be {frames}, or {2 * frames}")
    if context_t is not None and not forcing:
        raise ValueError("context_t is given: it is for teacher forcing alone")
    noisy = schedule.add_noise(clean, noise, t)
    x, times = noisy, t
    if forcing:
        given = clean if context_t is None else schedule.add_noise(clean, noise, context_t)
        given_t = jnp.zeros_like(t) if context_t is None else context_t
        x, times = jnp.concatenate([given, noisy], axis=1), jnp.concatenate([given_t, t], axis=1)
    flow = model.apply({"params": params}, x, times, text, layout)[:, -frames:]
    error = jnp.square(flow - (noise - clean)).mean(axis=(2, 3, 4))
    loss = (error * schedule.training_weight(t)).mean()
    return loss, {"clean": schedule.to_clean(flow, noisy, t)}
