"""Score identity distillation (SiD): the student's loss. The critic's loss is that of DMD.

Source: paper, Section 3.3; official `SiD` (model/sid.py); SiD (arXiv 2404.04057).
"""

import jax
import jax.numpy as jnp

from sf_jax.models.wan import WanTransformer
from sf_jax.objectives.scores import ScoreConfig, nothing_or_nan, predict_clean, predict_guided, video_mean


def generator_loss(
    video: jax.Array,
    teacher: tuple[WanTransformer, dict],
    critic: tuple[WanTransformer, dict],
    text: jax.Array,
    negative: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    config: ScoreConfig,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """The student's SiD loss; the gradient flows through both score networks into `video`, not into their parameters.

    Takes the arguments of `dmd.generator_loss`; `config.sid_alpha` weights the second term.

    Returns:
      Scalar loss, and aux: `critic_lag` and `teacher_distance`, see `dmd.generator_loss`.
    """
    if mask is not None:  # other frames' terms would also send gradients into masked frames
        video = jnp.where(mask, video, jax.lax.stop_gradient(video))
    noisy = config.student_schedule.add_noise(video, noise, t)
    frozen_teacher, frozen_critic = (jax.lax.stop_gradient(net[1]) for net in (teacher, critic))
    schedule = config.score_schedule
    fake = predict_clean(critic[0], frozen_critic, schedule, noisy, t, text)
    real = predict_guided(teacher[0], frozen_teacher, schedule, noisy, t, text, negative, config.guidance)
    loss = (real - fake) * ((real - video) - config.sid_alpha * (real - fake))
    distance = jax.lax.stop_gradient(video_mean(jnp.abs(video - real)))
    loss = loss / distance
    loss = jnp.nan_to_num(loss, posinf=0.0, neginf=0.0)
    weight = jnp.ones_like(video) if mask is None else jnp.broadcast_to(mask, video.shape).astype(video.dtype)
    lag = jnp.square(config.student_schedule.to_flow(fake, noisy, t) - (noise - video)).mean()
    broken = jax.lax.stop_gradient(nothing_or_nan(fake, real))
    aux = {"critic_lag": jax.lax.stop_gradient(lag), "teacher_distance": distance.mean()}
    return (weight * loss).sum() / jnp.maximum(weight.sum(), 1) + broken, aux
