"""Regression on a teacher's ODE trajectories: initializes the causal few-step student.

Source: CausVid (arXiv 2412.07772) Section 4.3; official `ODERegression` (model/ode_regression.py). The variant with
clean context chunks: Causal Forcing (arXiv 2602.02214).
"""

import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models.wan import Layout, WanTransformer


def ode_loss(
    params: dict,
    model: WanTransformer,
    layout: Layout,
    trajectory: jax.Array,
    text: jax.Array,
    index: jax.Array,
    timesteps: jax.Array,
    schedule: FlowSchedule,
    context: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """Mean squared error between the student's clean prediction and the end of the trajectory.

    Args:
      params: the student's parameters.
      model: the student.
      layout: its attention pattern: block-causal, or teacher-forcing with a `context` (see `causal.causal_layout`).
      trajectory: [B, S, F, H, W, C], from noise to clean; the last entry is the clean video.
      text: [B, N, text_dim] prompt embeddings.
      index: int32 [B, F], the trajectory entry that each frame is taken from; equal within a chunk.
      timesteps: float [S], the timestep of each entry; frames at timestep 0 are given and do not count.
      schedule: the student's noise schedule.
      context: [B, F, H, W, C] clean videos; each chunk sees their earlier chunks. With None it sees the noisy ones.

    Returns:
      Scalar loss and an empty aux.
    """
    noisy = jnp.take_along_axis(trajectory, index[:, None, :, None, None, None], axis=1)[:, 0]
    t = timesteps[index]
    if context is None:
        flow = model.apply({"params": params}, noisy, t, text, layout)
    else:
        both, times = jnp.concatenate([context, noisy], axis=1), jnp.concatenate([jnp.zeros_like(t), t], axis=1)
        flow = model.apply({"params": params}, both, times, text, layout)[:, context.shape[1] :]
    error = jnp.square(schedule.to_clean(flow, noisy, t) - trajectory[:, -1]).mean(axis=(2, 3, 4))
    learned = (t != 0).astype(error.dtype)
    return (error * learned).sum() / jnp.maximum(learned.sum(), 1), {}
