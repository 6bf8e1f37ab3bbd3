"""Shared by the distribution-matching losses: score networks, guidance, and the timesteps of the scores.

Source: official `WanDiffusionWrapper` (utils/wan_wrapper.py) and `DMD` (model/dmd.py).
"""

import dataclasses

import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import MAX_SHIFT, TRAIN_STEPS, FlowSchedule, shift_time
from sf_jax.diffusion.solvers import guided
from sf_jax.models.wan import WanTransformer, bidirectional_layout


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How the teacher's and critic's scores are evaluated.

    Attributes:
      guidance: the teacher's guidance scale g in `uncond + g (cond - uncond)`; official 4 (3 in its notation).
      fake_guidance: the same for the critic; 1 is no guidance.
      student_shift: shift of the schedule that noises the student's videos.
      score_shift: shift of the table that converts the teacher's and critic's flows to clean predictions.
      time_shift: shift of the random timesteps; 1 is uniform.
      time_low: lower bound to which the timesteps are clamped.
      time_high: upper bound to which the timesteps are clamped.
      from_exit: whether timesteps start at the end of the exit step's range instead of 0 (official `ts_schedule`).
      to_exit: whether timesteps end at the start of the exit step's range instead of 1000 (official `ts_schedule_max`).
      sid_alpha: weight of the second term of SiD.
    """

    guidance: float = 4.0
    fake_guidance: float = 1.0
    student_shift: float = 5.0
    score_shift: float = 8.0
    time_shift: float = 5.0
    time_low: float = 20.0
    time_high: float = 980.0
    from_exit: bool = False
    to_exit: bool = False
    sid_alpha: float = 1.0

    def __post_init__(self):
        """Validates the timesteps' range and the shifts."""
        if not 0 <= self.time_low < self.time_high <= TRAIN_STEPS:
            raise ValueError(
                f"time_low is {self.time_low}, time_high {self.time_high}: 0 <= time_low < time_high <= {TRAIN_STEPS}"
            )
        for name in ("student_shift", "score_shift", "time_shift"):
            if not 1 <= getattr(self, name) <= MAX_SHIFT:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [1, {MAX_SHIFT:g}]")

    @property
    def student_schedule(self) -> FlowSchedule:
        """The schedule that noises the student's videos."""
        return FlowSchedule(self.student_shift)

    @property
    def score_schedule(self) -> FlowSchedule:
        """The table that converts the teacher's and critic's flows to clean predictions."""
        return FlowSchedule(self.score_shift)


def score_time(config: ScoreConfig, even: jax.Array) -> jax.Array:
    """Timesteps [B, 1] of the scores, from integers [B, 1] on the even (unshifted) scale."""
    t = even.astype(jnp.float32)
    if config.time_shift > 1:
        t = shift_time(t, config.time_shift)
    return jnp.clip(t, config.time_low, config.time_high)


def time_bounds(config: ScoreConfig, exit_from: jax.Array, exit_to: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Range [low, high) of the random even-scale integers, given the even-scale range of the exit step."""
    low = exit_to if config.from_exit else jnp.zeros_like(exit_to)
    high = exit_from if config.to_exit else jnp.full_like(exit_from, TRAIN_STEPS)
    return low, high


def predict_clean(
    model: WanTransformer,
    params: dict,
    schedule: FlowSchedule,
    noisy: jax.Array,
    t: jax.Array,
    text: jax.Array,
) -> jax.Array:
    """Clean prediction of a bidirectional network: `noisy` [B, F, H, W, C], `t` [B, 1], `text` [B, S, text_dim]."""
    flow = model.apply({"params": params}, noisy, t, text, bidirectional_layout(noisy.shape[1]))
    return schedule.to_clean(flow, noisy, t)


def predict_guided(
    model: WanTransformer,
    params: dict,
    schedule: FlowSchedule,
    noisy: jax.Array,
    t: jax.Array,
    text: jax.Array,
    negative: jax.Array,
    guidance: float,
) -> jax.Array:
    """`predict_clean` with guidance against the negative prompt; guidance 1 skips the second pass."""
    conditional = predict_clean(model, params, schedule, noisy, t, text)
    if guidance == 1.0:
        return conditional
    return guided(conditional, predict_clean(model, params, schedule, noisy, t, negative), guidance)


def nothing_or_nan(*predictions: jax.Array) -> jax.Array:
    """0, or NaN if a prediction is not finite: added to a loss, it reveals values that `nan_to_num` replaced."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in predictions]).all()
    return jnp.where(finite, 0.0, jnp.nan)


def video_mean(x: jax.Array) -> jax.Array:
    """Per-sample mean over frames, rows, columns and channels, [B, 1, 1, 1, 1]."""
    return x.mean(axis=(1, 2, 3, 4), keepdims=True)
