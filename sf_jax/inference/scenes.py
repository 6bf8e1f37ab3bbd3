"""Schedules of prompts that change while a video plays, for `sf_jax.generate --schedule`.

The file is a JSON list with one entry per scene:

    [{"time": 0, "prompt": "a 7 moving left, fast"},
     {"time": 2.5, "prompt": "a 2 moving up", "mode": "recache", "transition_chunks": 2}]

`time` is in seconds of the video; a scene begins with the first chunk at or after it. `mode`, `transition_chunks`,
`context_timestep` and `fade` are those of `Stream.prompt`, with the defaults "swap", 0, none and 0.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from sf_jax import strict_json
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.prompt_change import check_change
from sf_jax.inference.sampling import Chunk
from sf_jax.inference.stream import Frames, Stream, stream_spec
from sf_jax.messages import quoted, shortened

LONGEST = 1e9  # seconds
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Scene:
    """One entry of a schedule; see the module's docstring."""

    time: float
    prompt: str
    mode: str = "swap"
    transition_chunks: int = 0
    context_timestep: float | None = None
    fade: float = 0.0

    def __post_init__(self):
        """Validates types and ranges."""
        if isinstance(self.time, bool) or not isinstance(self.time, (int, float)) or not 0 <= self.time < LONGEST:
            raise ValueError(
                f"time is {quoted(self.time)}: it must be a number of seconds, at least 0 and below {LONGEST:g}"
            )
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt is {quoted(self.prompt)}: it must be a text")
        check_change(self.mode, self.transition_chunks, self.context_timestep, self.fade)


def read_schedule(path: str | Path) -> tuple[Scene, ...]:
    """Reads a schedule.

    Raises:
      ValueError: if the file cannot be read, or an entry is invalid; names the file and the entry.
    """
    try:
        entries = strict_json.read(path, None, _MAX_BYTES, finite=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"schedule: cannot read {path} ({reason})") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'schedule: {path} must be a list of scenes, such as [{{"time": 0, "prompt": "a cat"}}]')
    scenes, fields = [], [field.name for field in dataclasses.fields(Scene)]
    for number, entry in enumerate(entries, 1):
        for name in [*(set(entry) - set(fields)), *({"time", "prompt"} - set(entry))]:
            fault = f"{name} is no field" if name in entry else f"{name} is missing"
            raise ValueError(f"schedule: {path}, scene {number}: {shortened(fault)}; fields are {', '.join(fields)}")
        try:
            scenes.append(Scene(**entry))
        except ValueError as error:
            raise ValueError(f"schedule: {path}, scene {number}: {error}") from error
    if set(entries[0]) - {"time", "prompt"}:
        raise ValueError(
            f"schedule: {path}, scene 1: only time and prompt are for the first scene, the rest for later ones"
        )
    times = [scene.time for scene in scenes]
    if times[0] != 0 or any(later <= earlier for earlier, later in zip(times[:-1], times[1:], strict=True)):
        raise ValueError(f"schedule: {path}: times are {times}: the first must be 0 and each later than the one before")
    return tuple(scenes)


def scheduled_chunks(
    pipe: VideoPipeline,
    scenes: Sequence[Scene],
    numbers: Sequence[int],
    fps: float,
    initial: np.ndarray | None = None,
) -> Iterator[Chunk]:
    """Generates videos whose prompts change at the same times.

    Args:
      pipe: a few-step student with a window; its `sampling` sets length, size and seed.
      scenes: the prompts.
      numbers: number of each video, for its noise.
      fps: frames per second, for the scenes' times.
      initial: latents [B, I, H, W, C] to continue from.

    Yields:
      The chunks, with `sampling.frames` pixel frames in all; the first one includes the given frames.

    Raises:
      ValueError: if the network cannot generate such videos.
    """
    stream_spec(pipe)
    given = 0 if initial is None else initial.shape[1]
    pipe.check_frames(pipe.sampling.frames, given)
    starts = scene_starts(pipe, scenes, fps, given)
    for number, scene in enumerate(scenes, 1):
        try:
            pipe.embed([scene.prompt])  # checks the prompts before any slow work
        except ValueError as error:
            raise ValueError(f"schedule: scene {number}: {error}") from error
    stream, seed = Stream(pipe, len(numbers)), pipe.sampling.seed
    rows = [None] * len(numbers) if initial is None else initial
    ids = [
        stream.join(scenes[0].prompt, seed=seed, number=number, initial=latents)
        for number, latents in zip(numbers, rows, strict=True)
    ]
    return _chunks(pipe, stream, ids, starts, initial)


def scene_starts(pipe: VideoPipeline, scenes: Sequence[Scene], fps: float, given: int = 0) -> dict[int, Scene]:
    """Maps the first chunk of each scene to the scene, except for the first scene.

    Raises:
      ValueError: if a scene would begin after the video's end, or in the same chunk as another.
    """
    chunk, factor, alone = pipe.rollout.chunk, pipe.temporal_factor, pipe.rollout.first_frame_alone
    starts, shown, index, due = {}, 0, 0, collections.deque(enumerate(scenes[1:], 2))
    first = given + alone * (not given)
    while shown < pipe.sampling.frames:
        fresh = index == 0
        if due and due[0][1].time * fps <= shown + 1e-6 and index:
            number, scene = due.popleft()
            starts[index] = scene
            fresh = scene.mode == "cut"
            first = alone if fresh else 0
            if due and due[0][1].time * fps <= shown + 1e-6:
                raise ValueError(
                    f"schedule: scene {number + 1} begins at {due[0][1].time:g} s, in the same chunk as scene "
                    f"{number}: a chunk takes {chunk * factor / fps:g} s, let it begin later"
                )
        elif index:
            first = 0
        shown += (first + chunk) * factor - (factor - 1) * fresh
        index += 1
    if due:
        number, scene = due[0]
        raise ValueError(
            f"schedule: scene {number} begins at {scene.time:g} s, behind the last chunk of a video of "
            f"{pipe.sampling.frames / fps:g} s: let it begin earlier, or make the video longer (frames)"
        )
    return starts


def _chunks(pipe, stream, ids, starts, initial) -> Iterator[Chunk]:
    shown = start = 0
    for frames in _ahead(pipe, stream, ids, starts):
        pixels = np.stack([frames[stream] for stream in ids])[:, : pipe.sampling.frames - shown]
        latents = np.stack([frames.latents(stream) for stream in ids])
        if not start and initial is not None:
            latents = np.concatenate([initial, latents], axis=1)
        yield Chunk(latents, pixels, start)
        shown, start = shown + pixels.shape[1], start + latents.shape[1]


def _ahead(pipe, stream: Stream, ids: Sequence[int], starts: dict[int, Scene]) -> Iterator[Frames]:
    """Yields the steps of a video; on a GPU or TPU, each one after the next has been dispatched."""
    ready, shown, index = collections.deque(), 0, 0
    while shown < pipe.sampling.frames:
        if index in starts:
            scene = starts[index]
            for one in ids:
                fields = dataclasses.asdict(scene)
                del fields["time"]
                stream.prompt(one, **fields)
        ready.append(stream.step())
        shown, index = shown + ready[-1].count(ids[0]), index + 1
        if jax.default_backend() == "cpu" or len(ready) > 1:
            yield ready.popleft()
    yield from ready
