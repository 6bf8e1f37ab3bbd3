"""Changes of a stream's prompt: the modes, and a pending change."""

import dataclasses

import numpy as np

from sf_jax.diffusion.schedule import TRAIN_STEPS

MODES = ("swap", "recache", "flush", "cut")
MAX_TRANSITION = 1000  # chunks


@dataclasses.dataclass(frozen=True)
class Change:
    """A pending change from one prompt to another.

    Attributes:
      old: float32 [1, S, D], the embedding before the change.
      new: float32 [1, S, D], the embedding after it.
      weights: weights of the new embedding in the coming chunks, ending with 1; the old one's are 1 minus these.
      mode: one of `MODES`.
      context_timestep: timestep for recomputing the kept frames; None recomputes them only with "recache", at the
        rollout's own timestep.
      fade: share by which the values of the kept frames are reduced once the new embedding has its full weight.
    """

    old: np.ndarray
    new: np.ndarray
    weights: tuple[float, ...]
    mode: str
    context_timestep: float | None = None
    fade: float = 0.0

    @property
    def recaches(self) -> bool:
        """Whether the kept frames are recomputed."""
        return self.mode == "recache" or self.context_timestep is not None

    def next(self) -> tuple[np.ndarray, "Change | None"]:
        """The embedding of the next chunk, and the rest of the change."""
        weight, *rest = self.weights
        if not rest:
            return self.new, None
        embedding = self.old + np.float32(weight) * (self.new - self.old)
        return embedding, dataclasses.replace(self, weights=tuple(rest))


def change_weights(transition_chunks: int) -> tuple[float, ...]:
    """Weights of the new prompt's embedding, per chunk: even steps up to 1."""
    return tuple(i / (transition_chunks + 1) for i in range(1, transition_chunks + 2))


def check_change(mode: str, transition_chunks: int, context_timestep: float | None, fade: float) -> None:
    """Validates the options of a prompt change, including options that would have no effect.

    Raises:
      ValueError: naming the option and the reason.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(MODES)}")
    whole = isinstance(transition_chunks, (int, np.integer)) and not isinstance(transition_chunks, bool)
    if not whole or not 0 <= transition_chunks <= MAX_TRANSITION:
        raise ValueError(
            f"transition_chunks is {transition_chunks!r}: it must be a whole number, 0 to {MAX_TRANSITION}"
        )
    if not _number(fade) or not 0 <= fade < 1:
        raise ValueError(f"fade is {fade!r}: it must be a number of at least 0 and below 1")
    if mode == "cut" and transition_chunks:
        raise ValueError(f"transition_chunks is {transition_chunks}: a cut is at once, it must be 0")
    if mode == "cut" and fade:
        raise ValueError(f"fade is {fade!r}: a cut keeps no frames, it must be 0")
    if context_timestep is None:
        return
    if mode not in ("recache", "flush"):
        raise ValueError(
            f"context_timestep is {context_timestep!r}: with mode {mode!r} nothing is computed again, leave it out"
        )
    if not _number(context_timestep) or not 0 <= context_timestep < TRAIN_STEPS:
        raise ValueError(f"context_timestep is {context_timestep!r}: it must be at least 0 and below {TRAIN_STEPS}")


def _number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
