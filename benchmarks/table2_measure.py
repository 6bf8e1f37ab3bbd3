"""Takes the figures of a row of `benchmarks.table2`."""

import dataclasses

import numpy as np

from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics
from sf_jax.evaluation.forced import generate_behind_real, measure_behind_real
from sf_jax.inference.pipeline import VideoPipeline

SAMPLES = 128
_BATCH = 64


@dataclasses.dataclass
class Measure:
    """Takes the figures of a pipeline; prompts, real clips and judge are the same for all.

    Attributes:
      captions: as `data.captions`. Without a direction in them, videos are compared with that in which they begin, and
        with real frames behind every chunk with that of the clip.
      samples: number of videos.
    """

    captions: str = "full"
    samples: int = SAMPLES

    def __post_init__(self):
        self.judge, self.context, self.references = judging.load(), {}, {}
        choose = metrics.choose_prompts if self.captions == "full" else metrics.choose_undirected_prompts
        self.prompts, self.kinds, self.targets = choose(self.samples)

    def reference(self, frames: int) -> metrics.Reference:
        """Figures of real clips of a length; the control's context are others."""
        if frames not in self.references:
            real, self.context[frames] = (metrics.real_clips(self.kinds, frames, draw) for draw in range(2))
            self.references[frames] = metrics.reference(real, self.targets, self.judge)
        return self.references[frames]

    def real(self, frames: int, chunk: int) -> metrics.Figures:
        """Figures of real clips, by a reference of others."""
        reference, starts = self.reference(frames), list(range(0, frames, chunk))
        return metrics.measure(self.context[frames], self._targets(), self.judge, reference, starts)

    def __call__(self, pipe: VideoPipeline, frames: int, seed: int, control: bool | str = False) -> metrics.Figures:
        """Figures of videos of `frames` frames, with one of `table2.CONTROLS`."""
        reference, parts = self.reference(frames), []
        for first in range(0, self.samples, _BATCH):
            part = slice(first, first + _BATCH)
            if control:
                clips, only_first = self.context[frames][part], control == "first"
                parts.append(generate_behind_real(pipe, self.prompts[part], clips, seed, first, only_first))
            else:
                parts.append(pipe(self.prompts[part], frames=frames, seed=seed, first_index=first))
        videos, figures = np.concatenate(parts), (self.judge, reference, pipe.chunk_starts(frames))
        if control is True:
            return measure_behind_real(videos, self.context[frames], self.targets, *figures)
        # Behind one real frame nothing shows the clip's direction, so a video chooses its own there, too.
        return metrics.measure(videos, self._targets(), *figures)

    def _targets(self) -> metrics.Targets:
        """The targets of videos that choose their direction."""
        return self.targets if self.captions == "full" else dataclasses.replace(self.targets, direction=None)
