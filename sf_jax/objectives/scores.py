"""What the distribution-matching losses share: score networks, guidance, and the time at which they are asked.

Source: official `WanDiffusionWrapper` (utils/wan_wrapper.py) and `DMD` (model/dmd.py).
"""

import dataclasses

import jax
import jax.numpy as jnp

from sf_jax.diffusion.schedule import TRAIN_STEPS, FlowSchedule, shift_time
from sf_jax.diffusion.solvers import guided
from sf_jax.models.wan import WanTransformer, bidirectional_layout


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How teacher and critic are asked.

    Attributes:
      guidance: teacher's guidance scale g as usual, `uncond + g (cond - uncond)`; official 4 (3 in its terms).
      fake_guidance: the same for the critic; 1 is none.
      student_shift: shift of the schedule that noises the student's videos.
      score_shift: shift of the table that teacher and critic are read with.
      time_shift: shift of the random times; 1 is uniform.
      time_low: times are clamped to at least this.
      time_high: and to at most this.
      from_exit: official `ts_schedule`: times start at the end of the exit step's range instead of 0.
      to_exit: official `ts_schedule_max`: times end at the start of the exit step's range instead of 1000.
      sid_alpha: SiD's weight of the second term.
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
        """Refuses empty ranges of times."""
        if not 0 <= self.time_low < self.time_high <= TRAIN_STEPS:
            raise ValueError(
                f"time_low is {self.time_low}, time_high {self.time_high}: 0 <= time_low < time_high <= {TRAIN_STEPS}"
            )
        if self.time_shift < 1:
            raise ValueError(f"time_shift is {self.time_shift}: it must be at least 1")

    @property
    def student_schedule(self) -> FlowSchedule:
        """The schedule that noises the student's videos."""
        return FlowSchedule(self.student_shift)

    @property
    def score_schedule(self) -> FlowSchedule:
        """The table that teacher and critic are read with."""
        return FlowSchedule(self.score_shift)


def score_time(config: ScoreConfig, even: jax.Array) -> jax.Array:
    """Times [B, 1] at which the scores are asked, from whole numbers [B, 1] on the even scale."""
    t = even.astype(jnp.float32)
    if config.time_shift > 1:
        t = shift_time(t, config.time_shift)
    return jnp.clip(t, config.time_low, config.time_high)


def time_bounds(config: ScoreConfig, exit_from: jax.Array, exit_to: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Range [low, high) of the random whole numbers, given the even-scale range of the exit step."""
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
    """`predict_clean` with guidance against the negative prompt; the second pass is left out at guidance 1."""
    conditional = predict_clean(model, params, schedule, noisy, t, text)
    if guidance == 1.0:
        return conditional
    return guided(conditional, predict_clean(model, params, schedule, noisy, t, negative), guidance)


def nothing_or_nan(*predictions: jax.Array) -> jax.Array:
    """0, or NaN if a prediction is not finite: what is replaced in a gradient must show in the loss."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in predictions]).all()
    return jnp.where(finite, 0.0, jnp.nan)


def video_mean(x: jax.Array) -> jax.Array:
    """Mean over frames, rows, columns and channels, per sample, kept as [B, 1, 1, 1, 1]."""
    return x.mean(axis=(1, 2, 3, 4), keepdims=True)
