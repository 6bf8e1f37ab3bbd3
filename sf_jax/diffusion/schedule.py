"""The flow-matching schedule: `x_t = (1 - sigma_t) clean + sigma_t noise`, `flow = noise - clean`.

Source: official `FlowMatchScheduler` (utils/scheduler.py) with sigma_min 0 and `extra_one_step`. Timesteps run over
(0, 1000]; a timestep is looked up in the table by nearest value, so 0 means the last entry, not zero noise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

TRAIN_STEPS = 1000
MAX_SHIFT = 1000.0  # nearly all levels are then close to pure noise; far beyond, float32 cannot tell them apart


@functools.lru_cache(maxsize=32)
def _sigmas(shift: float, steps: int) -> np.ndarray:
    # Rounds like PyTorch's linspace (from both ends, with a float32 step): the last bit of a timestep affects outputs.
    step, i = np.float64(np.float32(-1 / steps)), np.arange(steps)
    sigmas = np.where(i < (steps + 1) // 2, 1 + step * i, step * (i - steps)).astype(np.float32)
    shift = np.float32(shift)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shift_time(t: jax.Array | float, shift: float) -> jax.Array | float:
    """Moves a timestep in [0, 1000] towards noise: `1000 s u / (1 + (s - 1) u)` with `u = t / 1000`."""
    u = t / TRAIN_STEPS
    return TRAIN_STEPS * (shift * u / (1 + (shift - 1) * u))


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """A table of noise levels.

    Attributes:
      shift: how far the levels are shifted towards noise; 1 is uniform, official student 5, official scores 8.
      steps: number of table entries; 1000 for training, the number of solver steps for sampling.
    """

    shift: float = 5.0
    steps: int = TRAIN_STEPS

    def __post_init__(self):
        """Validates `steps` and `shift`; shifts below 1 are not supported, and too large ones leave no levels."""
        if not self.shift >= 1 or self.steps < 1:  # also NaN
            raise ValueError(f"shift is {self.shift}, steps {self.steps}: both must be at least 1")
        if self.shift > MAX_SHIFT:
            raise ValueError(f"shift is {self.shift}: it must be at most {MAX_SHIFT:g}")

    @property
    def sigmas(self) -> np.ndarray:
        """float32 [steps], descending from 1."""
        return _sigmas(self.shift, self.steps)

    @property
    def timesteps(self) -> np.ndarray:
        """float32 [steps], `1000 * sigmas`."""
        return self.sigmas * np.float32(TRAIN_STEPS)

    @property
    def training_weights(self) -> np.ndarray:
        """float32 [steps], bell-shaped loss weights over timesteps, as in the official diffusion training."""
        steps = np.float32(self.steps)
        bell = np.exp(-2 * ((self.timesteps - steps / 2) / steps) ** 2)
        bell = bell - bell.min()
        return (bell * (steps / bell.sum())).astype(np.float32)

    def warp(self, steps: tuple[float, ...]) -> tuple[float, ...]:
        """Maps steps on the even (unshifted) scale to the table's timesteps: 1000 to the first, 0 to no noise."""
        table = np.append(self.timesteps, np.float32(0))
        return tuple(float(table[TRAIN_STEPS - int(s)]) for s in steps)

    def index(self, t: jax.Array) -> jax.Array:
        """int32 index of the table entry nearest to each timestep."""
        t = jnp.asarray(t, jnp.float32)
        return jnp.argmin(jnp.abs(jnp.asarray(self.timesteps) - t[..., None]), axis=-1)

    def sigma(self, t: jax.Array) -> jax.Array:
        """float32 noise level of the nearest table entry, shape of `t`."""
        return jnp.take(jnp.asarray(self.sigmas), self.index(t))

    def training_weight(self, t: jax.Array) -> jax.Array:
        """`training_weights` of the nearest table entry, shape of `t`."""
        return jnp.take(jnp.asarray(self.training_weights), self.index(t))

    def add_noise(self, clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """`clean` [B, F, H, W, C] noised to timesteps `t`, [B, F] or broadcastable to it."""
        sigma = _over_pixels(self.sigma(t), clean)
        return ((1 - sigma) * clean + sigma * noise).astype(clean.dtype)

    def to_clean(self, flow: jax.Array, noisy: jax.Array, t: jax.Array) -> jax.Array:
        """Clean latents from the predicted flow (official `_convert_flow_pred_to_x0`)."""
        return noisy - _over_pixels(self.sigma(t), noisy) * flow

    def to_flow(self, clean: jax.Array, noisy: jax.Array, t: jax.Array) -> jax.Array:
        """Flow from predicted clean latents (official `_convert_x0_to_flow_pred`)."""
        return (noisy - clean) / _over_pixels(self.sigma(t), noisy)

    def step(self, flow: jax.Array, noisy: jax.Array, t: jax.Array, to_clean: bool = False) -> jax.Array:
        """One Euler step to the next table entry, or (also after the last entry) all the way to clean."""
        index = self.index(t)
        following = jnp.append(jnp.asarray(self.sigmas), 0.0)[index + 1]
        following = jnp.zeros_like(following) if to_clean else following
        change = _over_pixels(following - jnp.take(jnp.asarray(self.sigmas), index), noisy)
        return noisy + flow * change


def _over_pixels(values, like):
    """Appends axes to per-frame values so that they broadcast over `like`'s rows, columns and channels."""
    return values.reshape(*values.shape, *(1,) * (like.ndim - values.ndim)) if values.ndim else values
