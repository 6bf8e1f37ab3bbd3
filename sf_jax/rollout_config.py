"""Settings of a student's rollout: denoising steps, chunks, window and positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import TRAIN_STEPS, FlowSchedule
from sf_jax.models import attention
from sf_jax.models.rope import MAX_FRAMES

CONTEXTS = ("clean", "noisy")
CONTEXT_NOISES = ("exact", "official", "none")
POSITIONS = ("absolute", "relative")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the student generates.

    Attributes:
      steps: denoising steps on the even (unshifted) scale, descending from 1000.
      first_steps: the steps of a generated video's first chunk, which has no context; empty means `steps`. Training
        rollouts use `steps` for every chunk. The student must be trained at these times, as by consistency.
      warp: whether to map the steps through the shifted schedule's table (official `warp_denoising_step`).
      shift: shift of the student's schedule.
      chunk: latent frames generated together.
      first_frame_alone: whether the first frame is a chunk of its own (official `independent_first_frame`).
      window: latent frames visible at once, including sink and current chunk; None for all.
      sink: first latent frames, which always stay visible.
      positions: "absolute", the frame's index in the video (official; at most `rope.MAX_FRAMES` frames); or "relative"
        to the window, in which the newest chunk always has the same position and the sink comes right before the other
        frames. No distance then exceeds those of training, and the length of a video is unlimited.
      context: where the cached keys and values of a finished chunk come from: a "clean" pass over it (one more network
        call), or its last denoising step ("noisy"; as in Causal-rCM), which needs no extra call.
      context_timestep: timestep of the clean pass that writes a finished chunk to the cache.
      context_noise: noise added to the chunk for that pass: "exact" (sigma = context_timestep / 1000, so none at 0),
        "official" (the nearest table entry, as in the official training: sigma 0.005 at 0), or "none" (at any timestep,
        as in the official inference).
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    warp: bool = True
    shift: float = 5.0
    chunk: int = 3
    first_frame_alone: bool = False
    window: int | None = None
    sink: int = 0
    positions: str = "absolute"
    context: str = "clean"
    context_timestep: float = 0.0
    context_noise: str = "exact"

    def __post_init__(self):
        """Validates the settings."""
        for name in ("steps", "first_steps"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be a list or tuple of timesteps")
        for name, steps in (("steps", self.steps), ("first_steps", self.first_steps or self.steps)):
            if not steps or list(steps) != sorted(set(steps), reverse=True) or steps[-1] <= 0:
                raise ValueError(f"{name} is {steps}: it must descend strictly and end above 0")
            if steps[0] > TRAIN_STEPS:
                raise ValueError(f"{name} is {steps}: its first entry must be at most {TRAIN_STEPS}")
        FlowSchedule(self.shift)  # validates the shift
        if self.context_noise not in CONTEXT_NOISES:
            raise ValueError(f"context_noise is {self.context_noise!r}: it must be one of {', '.join(CONTEXT_NOISES)}")
        if not 0 <= self.context_timestep <= TRAIN_STEPS:
            raise ValueError(f"context_timestep is {self.context_timestep}: it must be in [0, {TRAIN_STEPS}]")
        if self.context not in CONTEXTS:
            raise ValueError(f"context is {self.context!r}: it must be one of {', '.join(CONTEXTS)}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}: it must be one of {', '.join(POSITIONS)}")
        if self.positions == "relative" and self.window is None:
            raise ValueError("positions is 'relative', window None: give a window, to which positions are relative")
        if self.context == "noisy" and (self.context_timestep or self.adds_context_noise):
            raise ValueError(
                f"context is 'noisy', context_timestep {self.context_timestep}, context_noise {self.context_noise!r}: "
                "without a clean pass they must be 0 and 'exact' or 'none'"
            )
        for name in ("chunk", "window", "sink"):
            if (getattr(self, name) or 0) > MAX_FRAMES:
                raise ValueError(f"{name} is {getattr(self, name)}: at most {MAX_FRAMES} latent frames have positions")
        attention.check_window(self.window, self.sink, (self.chunk,))

    @property
    def schedule(self) -> FlowSchedule:
        """The student's schedule."""
        return FlowSchedule(self.shift)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The denoising timesteps passed to the network."""
        return self.schedule.warp(self.steps) if self.warp else tuple(float(s) for s in self.steps)

    def timesteps_of(self, start: jax.Array | int) -> tuple[jax.Array, jax.Array | int]:
        """Denoising timesteps float32 [S] of the chunk generated at frame `start`, and how many of them it uses.

        The chunk at frame 0 uses `first_steps`. `start` may be traced, so that one program serves all chunks; the
        shorter list is padded with zeros that are never read.
        """
        if not self.first_steps:
            return jnp.asarray(self.timesteps, jnp.float32), len(self.steps)
        first = dataclasses.replace(self, steps=self.first_steps).timesteps
        longest = max(len(first), len(self.steps))
        tables = (jnp.asarray(t + (0.0,) * (longest - len(t)), jnp.float32) for t in (first, self.timesteps))
        is_first = jnp.asarray(start) == 0
        return jnp.where(is_first, *tables), jnp.where(is_first, len(first), len(self.steps))

    @property
    def max_frames(self) -> int | None:
        """The longest video, in latent frames; None if the length is unlimited."""
        return MAX_FRAMES if self.positions == "absolute" else None

    def check_frames(self, frames: int) -> None:
        """Checks that the positions cover a video of `frames` latent frames.

        Raises:
          ValueError: if there are more than `max_frames`.
        """
        if self.max_frames is not None and frames > self.max_frames:
            raise ValueError(
                f"frames is {frames}: positions are tabulated for {self.max_frames} latent frames; with a window and "
                "positions 'relative' there is no longest video"
            )

    @property
    def adds_context_noise(self) -> bool:
        """Whether the clean pass reads a noised chunk instead of the chunk itself."""
        if self.context_noise == "official":
            return True
        return self.context_noise == "exact" and self.context_timestep > 0

    @property
    def context_sigma(self) -> float:
        """Noise level of the clean pass's input, in [0, 1]."""
        if not self.adds_context_noise:
            return 0.0
        if self.context_noise == "official":  # the table entry nearest to the timestep
            nearest = np.abs(self.schedule.timesteps - np.float32(self.context_timestep)).argmin()
            return float(self.schedule.sigmas[nearest])
        return self.context_timestep / TRAIN_STEPS

    def chunks(self, frames: int, initial_frames: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Chunk sizes of the given initial latents and of the `frames` new ones."""
        alone = self.first_frame_alone
        given = attention.split_chunks(initial_frames, self.chunk, alone) if initial_frames else ()
        return given, attention.split_chunks(frames, self.chunk, alone and not initial_frames)
