"""Causal consistency distillation: initializes the few-step student without stored trajectories.

Source: Causal Forcing++ (arXiv 2605.15141); consistency distillation (arXiv 2303.01469).
"""

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.diffusion.solvers import guided
from sf_jax.models.wan import Layout, WanTransformer
from sf_jax.objectives.causal import causal_flow


def teacher_step(
    teacher: tuple[WanTransformer, dict],
    layout: Layout,
    clean: jax.Array,
    text: jax.Array,
    negative: jax.Array,
    index: jax.Array,
    noise: jax.Array,
    solver: FlowSchedule,
    guidance: float | np.ndarray,
) -> jax.Array:
    """One guided Euler step of the causal teacher from noised real chunks, each conditioned on earlier clean chunks.

    Args:
      teacher: the causal network and its parameters.
      layout: from `causal_layout`, with teacher forcing.
      clean: [B, F, H, W, C] clean latents.
      text: [B, S, text_dim] prompt embeddings.
      negative: [B, S, text_dim] negative-prompt embeddings.
      index: int32 [B, F], the solver's table entry at which the step starts; it ends at the next. Equal within a chunk.
        An index of `solver.steps` marks a given frame, which is left unchanged.
      noise: [B, F, H, W, C] standard normal.
      solver: the Euler table; the step from its last entry ends at clean.
      guidance: the guidance scale, or one per frame, float [F].

    Returns:
      [B, F, H, W, C] latents at the next entry, without gradient.
    """
    model, params = teacher[0], jax.lax.stop_gradient(teacher[1])
    t = entry(solver, index)
    flows = []
    guidance = np.broadcast_to(np.asarray(guidance, np.float32), clean.shape[1:2])[:, None, None, None]
    for prompt in (text, negative)[: 1 if (guidance == 1).all() else 2]:
        flow, noisy = causal_flow(params, model, layout, clean, prompt, t, noise, solver)
        flows.append(flow)
    flow = guided(*flows, guidance) if len(flows) == 2 else flows[0]
    change = (entry(solver, index + 1) - t) / 1000
    return jax.lax.stop_gradient(noisy + change[..., None, None, None] * flow)


def entry(solver: FlowSchedule, index: jax.Array) -> jax.Array:
    """float32 timesteps of table entries; 0 past the last entry."""
    table = jnp.append(jnp.asarray(solver.timesteps), jnp.float32(0))
    return table[jnp.minimum(index, solver.steps)]


def consistency_loss(
    params: dict,
    target_params: dict,
    model: WanTransformer,
    layout: Layout,
    clean: jax.Array,
    stepped: jax.Array,
    text: jax.Array,
    index: jax.Array,
    noise: jax.Array,
    solver: FlowSchedule,
) -> tuple[jax.Array, dict]:
    """Mean squared difference between the student's clean predictions at two adjacent points of the teacher's path.

    At the end of the path the target is the clean point itself.

    Args:
      params: the student's parameters.
      target_params: parameters of the target network (the student's EMA); no gradient.
      model: the student.
      layout: from `causal_layout`, with teacher forcing.
      clean: [B, F, H, W, C] clean latents; each chunk sees those of the chunks before it.
      stepped: [B, F, H, W, C] latents from `teacher_step`.
      text: [B, S, text_dim] prompt embeddings.
      index: int32 [B, F], as in `teacher_step`.
      noise: [B, F, H, W, C] the noise passed to `teacher_step`.
      solver: the teacher's Euler table.

    Returns:
      Scalar loss and an empty aux.
    """
    t, following = entry(solver, index), entry(solver, index + 1)
    flow, noisy = causal_flow(params, model, layout, clean, text, t, noise, solver)
    ours = noisy - _sigma(t) * flow
    context = jnp.concatenate([clean, stepped], axis=1)
    times = jnp.concatenate([jnp.zeros_like(following), following], axis=1)
    flow = model.apply({"params": jax.lax.stop_gradient(target_params)}, context, times, text, layout)
    target = stepped - _sigma(following) * flow[:, -clean.shape[1] :]
    error = jnp.square(ours - jax.lax.stop_gradient(target)).mean(axis=(2, 3, 4))
    learned = (t != 0).astype(error.dtype)
    return (error * learned).sum() / jnp.maximum(learned.sum(), 1), {}


def _sigma(t):
    return (t / 1000)[..., None, None, None]
