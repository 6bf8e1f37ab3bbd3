"""Takes the figures of a row of `benchmarks.table2`, in either world of digits."""

import dataclasses

import numpy as np

from sf_jax.evaluation import bouncing, metrics
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation.forced import generate_behind_real, measure_behind_real
from sf_jax.inference.pipeline import VideoPipeline

SAMPLES = 128
_BATCH = 64


def generate(
    pipe: VideoPipeline, prompts: list[str], frames: int, seed: int, clips: np.ndarray | None, only_first: bool
) -> np.ndarray:
    """Videos of the prompts, uint8 [N, F, 24, 24, 1], behind the real `clips` if there are any."""
    parts = []
    for first in range(0, len(prompts), _BATCH):
        part = slice(first, first + _BATCH)
        if clips is None:
            parts.append(pipe(prompts[part], frames=frames, seed=seed, first_index=first))
        else:
            parts.append(generate_behind_real(pipe, prompts[part], clips[part], seed, first, only_first))
    return np.concatenate(parts)


@dataclasses.dataclass
class Measure:
    """Takes the figures of a pipeline; prompts, real clips and judge are the same for all.

    Attributes:
      world: which digits, as `data.world`.
      samples: number of videos.
    """

    world: str = "moving"
    samples: int = SAMPLES

    def __post_init__(self):
        self.judge, self.context, self.references = judging.load(), {}, {}
        if self.world == "bouncing":
            self.prompts, self.targets = bouncing.choose_prompts(self.samples)
            self.kinds = self.targets
        else:
            self.prompts, self.kinds, self.targets = metrics.choose_prompts(self.samples)

    def reference(self, frames: int) -> metrics.Reference | bouncing.Reference:
        """Figures of real clips of a length; the control's context are others."""
        if frames not in self.references:
            clips_of = bouncing.real_clips if self.world == "bouncing" else metrics.real_clips
            real, self.context[frames] = (clips_of(self.kinds, frames, draw) for draw in range(2))
            if self.world == "bouncing":
                self.references[frames] = bouncing.reference(real, self.judge)
            else:
                self.references[frames] = metrics.reference(real, self.targets, self.judge)
        return self.references[frames]

    def real(self, frames: int, chunk: int) -> metrics.Figures | bouncing.Figures:
        """Figures of real clips, by a reference of others."""
        figures = (self.targets, self.judge, self.reference(frames), range(0, frames, chunk))
        return (bouncing if self.world == "bouncing" else metrics).measure(self.context[frames], *figures)

    def __call__(
        self, pipe: VideoPipeline, frames: int, seed: int, control: bool | str = False
    ) -> metrics.Figures | bouncing.Figures:
        """Figures of videos of `frames` frames, with one of `table2.CONTROLS`."""
        reference, clips = self.reference(frames), self.context[frames] if control else None
        videos = generate(pipe, self.prompts, frames, seed, clips, control == "first")
        figures = (self.targets, self.judge, reference, pipe.chunk_starts(frames))
        if control is True:
            behind_real = bouncing.measure_behind_real if self.world == "bouncing" else measure_behind_real
            return behind_real(videos, clips, *figures)
        return (bouncing if self.world == "bouncing" else metrics).measure(videos, *figures)
