"""The adversarial objective: the student against a discriminator on the critic's features.

Source: paper, Section 3.3; official `GAN` (model/gan.py), which does not run as shipped; R3GAN (arXiv 2501.05441) for
the relativistic loss with both gradient penalties, approximated by finite differences (APT, arXiv 2501.08316).
"""

import dataclasses

import jax
import jax.numpy as jnp

from sf_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sf_jax.models.wan import WanTransformer, bidirectional_layout
from sf_jax.objectives.scores import ScoreConfig


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """The adversarial loss.

    Attributes:
      head: the discriminator's head.
      relativistic: whether a logit is compared with that of a paired video (real with generated), or used alone.
      generator_weight: weight of the student's loss.
      critic_weight: weight of the discriminator's loss.
      r1_weight: weight of the penalty on the discriminator's slope at real videos; 0 turns it off.
      r2_weight: the same at the student's videos.
      r1_sigma: size of the random step of the finite difference at real videos.
      r2_sigma: the same at the student's videos.
      head_lr: learning rate of the head, relative to that of the critic's other parameters.
      warmup: iterations at the start in which only the head is trained, not the student or the rest of the critic.
    """

    head: DiscriminatorConfig = DiscriminatorConfig()
    relativistic: bool = True
    generator_weight: float = 1e-2
    critic_weight: float = 1e-2
    r1_weight: float = 0.0
    r2_weight: float = 0.0
    r1_sigma: float = 0.01
    r2_sigma: float = 0.01
    head_lr: float = 1.0
    warmup: int = 0

    def __post_init__(self):
        """Validates the settings."""
        for name in ("generator_weight", "critic_weight", "r1_weight", "r2_weight", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"gan.{name} is {getattr(self, name)}: it must be at least 0")
        for name in ("r1_sigma", "r2_sigma", "head_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"gan.{name} is {getattr(self, name)}: it must be above 0")


def logits(
    params: dict,
    critic: WanTransformer,
    head: DiscriminatorConfig,
    noisy: jax.Array,
    t: jax.Array,
    text: jax.Array,
) -> jax.Array:
    """float32 logits [B, classes] of noisy videos; higher means more real.

    Args:
      params: `{"critic": the network's, "head": the discriminator's}`.
      critic: the network.
      head: the discriminator's head.
      noisy: [B, F, H, W, C] noisy latents.
      t: float [B, 1] timesteps.
      text: [B, S, text_dim] prompt embeddings.
    """
    layout = bidirectional_layout(noisy.shape[1])
    features, time = critic.apply(
        {"params": params["critic"]}, noisy, t, text, layout, head.taps, method=WanTransformer.features
    )
    return Discriminator(critic.config, head).apply({"params": params["head"]}, features, time)


def _together(params, critic, head, first, second, t, text):
    """Logits of two batches with the same timesteps and prompts, in one pass."""
    both = logits(params, critic, head, *(jnp.concatenate(pair) for pair in ((first, second), (t, t), (text, text))))
    return jnp.split(both, 2)


def generator_loss(
    video: jax.Array,
    real: jax.Array,
    critic: tuple[WanTransformer, dict],
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    real_noise: jax.Array,
    score: ScoreConfig,
    config: GanConfig,
) -> tuple[jax.Array, dict]:
    """The student's loss; the gradient flows through the discriminator into `video`, not into its parameters.

    Args:
      video: [B, F, H, W, C] the student's clean latents, differentiable.
      real: [B, F, H, W, C] real latents.
      critic: the network, and its parameters as in `logits`.
      text: [B, S, text_dim] prompt embeddings.
      t: float [B, 1] times from `scores.score_time`.
      noise: [B, F, H, W, C] standard normal, for `video`.
      real_noise: [B, F, H, W, C] standard normal, for `real`.
      score: how the critic's score is evaluated.
      config: settings of the loss.

    Returns:
      Scalar loss, and aux: the means `fake_logit` and `real_logit`, and `critic_lag`, the discriminator's loss on these
      videos.
    """
    schedule, params = score.student_schedule, jax.lax.stop_gradient(critic[1])
    noisy, noisy_real = schedule.add_noise(video, noise, t), schedule.add_noise(real, real_noise, t)
    fake_logit, real_logit = _together(params, critic[0], config.head, noisy, noisy_real, t, text)
    margin = fake_logit - real_logit if config.relativistic else fake_logit
    loss = config.generator_weight * jax.nn.softplus(-margin).mean()
    lag = jax.lax.stop_gradient(_discriminator_loss(fake_logit, real_logit, config))
    return loss, {"fake_logit": fake_logit.mean(), "real_logit": real_logit.mean(), "critic_lag": lag}


def _discriminator_loss(fake_logit, real_logit, config: GanConfig):
    """The discriminator's loss without weight and penalties."""
    if config.relativistic:
        return jax.nn.softplus(fake_logit - real_logit).mean()
    return jax.nn.softplus(-real_logit).mean() + jax.nn.softplus(fake_logit).mean()


def critic_loss(
    params: dict,
    model: WanTransformer,
    video: jax.Array,
    real: jax.Array,
    text: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    steps: tuple[jax.Array, jax.Array],
    score: ScoreConfig,
    config: GanConfig,
) -> tuple[jax.Array, dict]:
    """The discriminator's loss `D + 0.5 (R1 + R2)` on the student's and real videos.

    Args:
      params: `{"critic": the network's, "head": the discriminator's}`.
      model: the critic's network.
      video: [B, F, H, W, C] the student's clean latents (taken as constants).
      real: [B, F, H, W, C] real latents.
      text: [B, S, text_dim] prompt embeddings.
      t: float [B, 1] times from `scores.score_time`.
      noise: [B, F, H, W, C] standard normal, shared by the student's and the real videos.
      steps: two arrays [B, F, H, W, C], standard normal: directions of the finite differences at real and at the
        student's videos.
      score: how the critic's score is evaluated.
      config: settings of the loss.

    Returns:
      Scalar loss, and aux: `discriminator_loss`, `r1`, `r2`, `fake_logit` and `real_logit` [B, classes].
    """
    schedule = score.student_schedule
    noisy, noisy_real = (schedule.add_noise(jax.lax.stop_gradient(x), noise, t) for x in (video, real))
    fake_logit, real_logit = _together(params, model, config.head, noisy, noisy_real, t, text)
    loss = config.critic_weight * _discriminator_loss(fake_logit, real_logit, config)
    aux = {"discriminator_loss": loss, "fake_logit": fake_logit, "real_logit": real_logit}
    total = loss
    penalties = (
        ("r1", config.r1_weight, config.r1_sigma, noisy_real, real_logit, steps[0]),
        ("r2", config.r2_weight, config.r2_sigma, noisy, fake_logit, steps[1]),
    )
    for name, weight, sigma, at, logit, step in penalties:
        if not weight:
            continue
        moved = logits(params, model, config.head, at + sigma * step, t, text)
        aux[name] = weight * jnp.square((moved - logit) / sigma).mean()
        total = total + 0.5 * aux[name]
    return total, aux
