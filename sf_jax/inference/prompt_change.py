"""How the prompt of a stream changes: the modes, and a change on its way."""

import dataclasses

import numpy as np

from sf_jax.diffusion.schedule import TRAIN_STEPS

MODES = ("swap", "recache", "flush", "cut")


@dataclasses.dataclass(frozen=True)
class Change:
    """A prompt on its way to another.

    Attributes:
      old: float32 [1, S, D], the embedding before.
      new: float32 [1, S, D], the embedding afterwards.
      chunks: chunks over which it changes, the one that has all of it included.
      done: how many of them there have been.
      mode: one of `MODES`.
      context_timestep: at which what is kept is computed again; None is the rollout's own, for "recache" alone.
    """

    old: np.ndarray
    new: np.ndarray
    chunks: int
    done: int
    mode: str
    context_timestep: float | None = None

    @property
    def recaches(self) -> bool:
        """Whether what is kept is computed again."""
        return self.mode == "recache" or self.context_timestep is not None

    def next(self) -> tuple[np.ndarray, "Change | None"]:
        """The embedding of the next chunk, and what is left of the change."""
        done = self.done + 1
        if done == self.chunks:
            return self.new, None
        return self.old + np.float32(done / self.chunks) * (self.new - self.old), dataclasses.replace(self, done=done)


def check_context_timestep(mode: str, timestep: float | None) -> None:
    """Refuses a noise for what is computed again that is out of range, or has no effect.

    Raises:
      ValueError: saying so.
    """
    if timestep is None:
        return
    if mode not in ("recache", "flush"):
        raise ValueError(
            f"context_timestep is {timestep!r}: with mode {mode!r} nothing is computed again, leave it out"
        )
    number = isinstance(timestep, (int, float, np.number)) and not isinstance(timestep, bool)
    if not number or not 0 <= timestep < TRAIN_STEPS:
        raise ValueError(f"context_timestep is {timestep!r}: it must be at least 0 and below {TRAIN_STEPS}")
