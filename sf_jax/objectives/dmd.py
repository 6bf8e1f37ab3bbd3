"""Distribution matching distillation: the student's loss and the critic's.

Source: paper, Section 3.3; official `DMD` (model/dmd.py); DMD2 (arXiv 2405.14867), DMD (arXiv 2311.18828) eq. 7 and 8.
"""

import jax
import jax.numpy as jnp

from sf_jax.diffusion.solvers import guided
from sf_jax.models.wan import WanTransformer
from sf_jax.objectives import scores
from sf_jax.objectives.scores import ScoreConfig, predict_clean, predict_guided, video_mean


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
    """The student's DMD loss; its gradient with respect to `video` is `gradient / number of elements`.

    Args:
      video: [B, F, H, W, C] the student's clean latents, differentiable.
      teacher: real score network and its parameters.
      critic: fake score network and its parameters.
      text: [B, S, text_dim] prompt embeddings.
      negative: [B, S, text_dim] negative-prompt embeddings.
      t: float [B, 1] times from `scores.score_time`.
      noise: [B, F, H, W, C] standard normal.
      config: how the scores are evaluated.
      mask: bool, broadcastable to `video`: where the loss counts; None means everywhere.

    Returns:
      Scalar loss `0.5 mean(gradient^2)` (as the official code reports it), NaN if a score is not finite, and
      aux: `gradient` [B, F, H, W, C]; `gradient_norm`, its mean absolute value; `critic_lag`, the critic's loss on
      this video, which grows when the critic does not keep up with the student; and `teacher_distance`, the mean
      absolute difference between the video and the teacher's prediction, which normalizes the gradient.
    """
    fixed = jax.lax.stop_gradient(video)
    noisy = config.student_schedule.add_noise(fixed, noise, t)
    frozen_teacher, frozen_critic = (jax.lax.stop_gradient(net[1]) for net in (teacher, critic))
    schedule = config.score_schedule
    conditional = predict_clean(critic[0], frozen_critic, schedule, noisy, t, text)
    fake = conditional
    if config.fake_guidance != 1.0:
        unconditional = predict_clean(critic[0], frozen_critic, schedule, noisy, t, negative)
        fake = guided(conditional, unconditional, config.fake_guidance)
    real = predict_guided(teacher[0], frozen_teacher, schedule, noisy, t, text, negative, config.guidance)
    distance = video_mean(jnp.abs(fixed - real))
    gradient = (fake - real) / distance
    gradient = jax.lax.stop_gradient(jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0))
    norm = jnp.abs(gradient).mean() + scores.nothing_or_nan(fake, real)
    weight = jnp.ones_like(video) if mask is None else jnp.broadcast_to(mask, video.shape).astype(video.dtype)
    count = jnp.maximum(weight.sum(), 1)
    value = 0.5 * (weight * jnp.square(gradient)).sum() / count
    # Its derivative in `video` is exactly gradient / count; mse(video, video - gradient) would lose precision.
    surrogate = (weight * gradient * video).sum() / count
    loss = surrogate + jax.lax.stop_gradient(value - surrogate + scores.nothing_or_nan(fake, real))
    flow = config.student_schedule.to_flow(conditional, noisy, t)
    lag = jnp.square(flow - (noise - fixed)).mean()
    aux = {"gradient": gradient, "gradient_norm": norm, "critic_lag": lag, "teacher_distance": distance.mean()}
    return loss, aux


def critic_loss(
    params: dict,
    model: WanTransformer,
    video: jax.Array,
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    config: ScoreConfig,
) -> tuple[jax.Array, dict]:
    """The critic's flow-matching loss on the student's videos.

    Args:
      params: the critic's parameters.
      model: the critic.
      video: [B, F, H, W, C] the student's clean latents (taken as constants).
      text: [B, S, text_dim] prompt embeddings.
      t: float [B, 1] times from `scores.score_time`.
      noise: [B, F, H, W, C] standard normal.
      config: how the scores are evaluated.

    Returns:
      Scalar loss and an empty aux.
    """
    video = jax.lax.stop_gradient(video)
    noisy = config.student_schedule.add_noise(video, noise, t)
    clean = predict_clean(model, params, config.score_schedule, noisy, t, text)
    # The official code converts back with the student's table; the two sigmas differ by less than one entry.
    flow = config.student_schedule.to_flow(clean, noisy, t)
    return jnp.square(flow - (noise - video)).mean(), {}
