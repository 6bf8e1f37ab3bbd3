"""Many-step sampling: Euler, UniPC and DPM-Solver++ with classifier-free guidance.

UniPC (arXiv 2302.04867) and DPM-Solver++ (arXiv 2211.01095) are second-order multistep solvers in the data prediction.
Their updates are linear, with weights that depend only on the noise levels. A solver here is therefore a table of
weights, computed once in float64, and all solvers share one scan.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import TRAIN_STEPS, FlowSchedule
from sf_jax.models.wan import bidirectional_layout

SOLVERS = ("unipc", "dpm++", "euler")


@dataclasses.dataclass(frozen=True)
class Solver:
    """An ODE solver from noise to clean.

    Attributes:
      name: "unipc", "dpm++" or "euler".
      shift: shift of the schedule.
      steps: network evaluations (twice as many with guidance).
    """

    name: str = "unipc"
    shift: float = 5.0
    steps: int = 50

    def __post_init__(self):
        """Validates the settings."""
        if self.name not in SOLVERS:
            raise ValueError(f"solver is {self.name!r}: it must be one of {', '.join(SOLVERS)}")
        if self.shift < 1 or self.steps < 1:
            raise ValueError(f"shift is {self.shift}, solver steps {self.steps}: both must be at least 1")

    @property
    def sigmas(self) -> np.ndarray:
        """float32 [steps + 1], noise levels; the last is 0.

        UniPC starts at the official table's first entry below 1 (0.999 before the shift), the others at 1.
        """
        first = float(np.float32(1 - 1 / TRAIN_STEPS)) if self.name == "unipc" else 1.0
        even = np.linspace(first, 0, self.steps + 1)
        return (self.shift * even / (1 + (self.shift - 1) * even)).astype(np.float32)

    @property
    def timesteps(self) -> np.ndarray:
        """float32 [steps], timesteps for the network; the official UniPC and DPM++ truncate them to integers."""
        first = float(np.float32(1 - 1 / TRAIN_STEPS)) if self.name == "unipc" else 1.0
        even = np.linspace(first, 0, self.steps + 1)[:-1]
        times = TRAIN_STEPS * (self.shift * even / (1 + (self.shift - 1) * even))
        return (times if self.name == "euler" else np.trunc(times)).astype(np.float32)

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of every step, float32: corrector [steps, 4] and predictor [steps, 3].

        With `m` the clean predictions, the corrected sample is `c0 last + c1 m[i] + c2 m[i-1] + c3 m[i-2]`, where
        `last` is the corrected sample of the previous step, and the next sample is `p0 x + p1 m[i] + p2 m[i-1]`. A
        corrector row of zeros means no correction.
        """
        sigma = self.sigmas.astype(np.float64)
        with np.errstate(divide="ignore"):
            log_ratio = np.log1p(-sigma) - np.log(sigma)
        corrector, predictor = np.zeros((self.steps, 4)), np.zeros((self.steps, 3))
        orders = [self._order(i) for i in range(self.steps)]
        for i, order in enumerate(orders):
            predictor[i] = _predict(sigma, log_ratio, i, order)
            if self.name == "unipc" and i:
                corrector[i] = _correct(sigma, log_ratio, i - 1, orders[i - 1])
        return corrector.astype(np.float32), predictor.astype(np.float32)

    def _order(self, i: int) -> int:
        """Order of the predictor at step `i`: one at both ends (the last step has infinite length)."""
        return 1 if self.name == "euler" or i == 0 or i == self.steps - 1 else 2


def _span(sigma, log_ratio, i, order):
    """Terms of the step from level i to i + 1: alpha, e^-h - 1, h, and the position of m[i-1] in units of the step."""
    h = log_ratio[i + 1] - log_ratio[i]
    before = (log_ratio[i - 1] - log_ratio[i]) / h if order == 2 else -np.inf
    return 1 - sigma[i + 1], np.expm1(-h), h, before


def _predict(sigma, log_ratio, i, order):
    """Weights of (x, m[i], m[i-1]) in the sample at level i + 1 (UniP with B(h) = e^h - 1; DPM-Solver++ midpoint)."""
    alpha, grow, _, before = _span(sigma, log_ratio, i, order)
    slope = -alpha * grow * 0.5 / before  # 0 if there is no m[i-1], or if it lies infinitely far back
    return sigma[i + 1] / sigma[i], -alpha * grow - slope, slope


def _correct(sigma, log_ratio, i, order):
    """Weights of (x, m[i+1], m[i], m[i-1]) in the corrected sample at level i + 1 (UniC with B(h) = e^h - 1)."""
    alpha, grow, h, before = _span(sigma, log_ratio, i, order)
    rho_before, rho_after = 0.0, 0.5
    if order == 2:
        phi = -grow / h - 1
        conditions = [phi / grow, 2 * (-phi / h - 0.5) / grow]
        rho_before, rho_after = np.linalg.solve([[1.0, 1.0], [before, 1.0]], conditions)
    slope_before, slope_after = -alpha * grow * rho_before / before, -alpha * grow * rho_after
    return sigma[i + 1] / sigma[i], slope_after, -alpha * grow - slope_before - slope_after, slope_before


@flax.struct.dataclass
class SolverState:
    """A solver's state between steps.

    Attributes:
      x: the sample at the next noise level, float32 [B, F, H, W, C].
      last: the (corrected) sample of the previous step.
      clean: the last two clean predictions, newest first.
    """

    x: jax.Array
    last: jax.Array
    clean: tuple[jax.Array, jax.Array]


def start(noise: jax.Array) -> SolverState:
    """The state before the first step."""
    zeros = jnp.zeros_like(noise)
    return SolverState(noise, zeros, (zeros, zeros))


def rows(solver: Solver) -> tuple[np.ndarray, ...]:
    """Per-step inputs of `step`, float32: timestep [steps], sigma [steps], weights [steps, 4] and [steps, 3]."""
    return (solver.timesteps, solver.sigmas[:-1], *solver.weights())


def step(state: SolverState, row: tuple, flow: Callable[[jax.Array, jax.Array], jax.Array]) -> SolverState:
    """One step, given its entry of `rows`; calls `flow` with the sample and the timestep."""
    t, sigma, correct, predict = row
    clean, before = state.x - sigma * flow(state.x, t), state.clean
    corrected = correct[0] * state.last + correct[1] * clean + correct[2] * before[0] + correct[3] * before[1]
    x = jnp.where(correct[0] > 0, corrected, state.x)
    following = predict[0] * x + predict[1] * clean + predict[2] * before[0]
    return SolverState(following, x, (clean, before[0]))


def integrate(solver: Solver, flow: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array) -> jax.Array:
    """Integrates the flow from noise to clean.

    Args:
      solver: the solver.
      flow: (noisy [B, F, H, W, C], t scalar) -> flow, with guidance applied.
      noise: float32 [B, F, H, W, C].

    Returns:
      The clean latents, float32 [B, F, H, W, C].
    """
    table = jax.tree.map(jnp.asarray, rows(solver))
    return jax.lax.scan(lambda state, row: (step(state, row, flow), None), start(noise), table)[0].x


def euler(flow: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, shift: float, steps: int) -> jax.Array:
    """Integrates the flow from noise to clean with Euler steps.

    Args:
      flow: (noisy [B, F, H, W, C], t [B, 1]) -> flow, with guidance applied.
      noise: [B, F, H, W, C] standard normal.
      shift: shift of the schedule.
      steps: number of steps.

    Returns:
      [steps + 1, B, F, H, W, C]: the trajectory, noise first, clean last.
    """
    sigmas = jnp.append(jnp.asarray(FlowSchedule(shift, steps).sigmas), 0.0)

    def one(x, i):
        t = jnp.full((x.shape[0], 1), 1000.0) * sigmas[i]
        following = x + (sigmas[i + 1] - sigmas[i]) * flow(x, t)
        return following, following

    _, rest = jax.lax.scan(one, noise, jnp.arange(steps))
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
