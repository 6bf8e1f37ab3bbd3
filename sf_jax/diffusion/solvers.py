"""Many-step sampling of bidirectional (teacher) networks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models.wan import bidirectional_layout


def euler(flow: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, shift: float, steps: int) -> jax.Array:
    """Integrates the flow from noise to clean with Euler steps.

    Args:
      flow: (noisy [B, F, H, W, C], t [B, 1]) -> flow, guidance included.
      noise: [B, F, H, W, C] standard normal.
      shift: shift of the schedule.
      steps: number of steps.

    Returns:
      [steps + 1, B, F, H, W, C]: the trajectory, noise first, clean last.
    """
    sigmas = jnp.append(jnp.asarray(FlowSchedule(shift, steps).sigmas), 0.0)

    def step(x, i):
        t = jnp.full((x.shape[0], 1), 1000.0) * sigmas[i]
        following = x + (sigmas[i + 1] - sigmas[i]) * flow(x, t)
        return following, following

    _, rest = jax.lax.scan(step, noise, jnp.arange(steps))
    return jnp.concatenate([noise[None], rest])


def guided(conditional: jax.Array, unconditional: jax.Array, guidance: float) -> jax.Array:
    """Classifier-free guidance, `uncond + guidance (cond - uncond)`."""
    return conditional + (guidance - 1) * (conditional - unconditional)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def teacher_trajectory(model, shift, steps, guidance, params, noise, text, negative):
    """Euler trajectory [steps + 1, B, F, H, W, C] of a bidirectional network with guidance."""
    layout = bidirectional_layout(noise.shape[1])
    prompts = [model.apply({"params": params}, prompt, method="encode_text") for prompt in (text, negative)]

    def flow(x, t):
        conditional, unconditional = (model.apply({"params": params}, x, t, prompt, layout) for prompt in prompts)
        return guided(conditional, unconditional, guidance)

    return euler(flow, noise, shift, steps)
