"""Flow matching on real videos, which trains the teachers.

Source: paper, Section 3.1. `causal.py` has the causal variants, with a noise level and a weight per frame.
"""

import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models.wan import Layout, WanTransformer


def flow_loss(
    params: dict,
    model: WanTransformer,
    layout: Layout,
    clean: jax.Array,
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    schedule: FlowSchedule,
) -> tuple[jax.Array, dict]:
    """Mean squared error of the predicted flow.

    Args:
      params: the network's parameters.
      model: the network.
      layout: its attention pattern.
      clean: [B, F, H, W, C] clean latents.
      text: [B, S, text_dim] prompt embeddings.
      t: float [B, F] or [B, 1] timesteps, entries of the schedule's table.
      noise: [B, F, H, W, C] standard normal.
      schedule: the noise schedule.

    Returns:
      Scalar loss and an empty aux.
    """
    noisy = schedule.add_noise(clean, noise, t)
    flow = model.apply({"params": params}, noisy, t, text, layout)
    return jnp.square(flow - (noise - clean)).mean(), {}
