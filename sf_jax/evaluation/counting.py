"""Metrics of videos of counting digits: how far they obey the laws of `sf_jax.data.counting_digits`.

No prompt says which digit a video shows or where it goes, so the metrics compare a video with itself. A window of
WINDOW frames obeys both laws if there is a path, straight between the walls and of the prompt's pace, that is never
farther than TOLERANCE pixels from the digit's center along either axis, and the digit becomes the next one exactly
where the path meets a wall.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sf_jax.data import counting_digits
from sf_jax.evaluation import metrics
from sf_jax.evaluation.judge import DIGITS, Judge
from sf_jax.evaluation.judge import WINDOW as STILL

WINDOW = 6
TOLERANCE = 0.75  # pixels, along each axis
PACE_TOLERANCE = 0.25  # of the prompt's pace
_INK = 32  # darker pixels are background: a codec's noise would pull the center to the canvas' middle
# Of the paths that are tried along an axis: every 0.25 pixels, every 0.1 pixels per frame.
_STARTS, _VELOCITIES = 35, 43
_PART = 2048  # windows that are compared with all paths at a time
_FRAMES_COMPARED = 32  # of each video, by `diversity`


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What N videos of F frames show.

    Attributes:
      digit: The judge's digit of every frame, int64 [N, F].
      center: The digit's center (row, column), float64 [N, F, 2]; NaN in an empty frame.
      still: The judge's features of every frame, float32 [N, F, 64].
    """

    digit: np.ndarray
    center: np.ndarray
    still: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Values of real clips of the same length and speeds, for comparison.

    Attributes:
      features: The judge's features of windows of 3 frames, float32 [N, W, 64].
      spread: See `diversity`.
      brightness: Mean pixel, 0 to 255.
      motion: Mean absolute difference of consecutive frames, 0 to 255.
    """

    features: np.ndarray
    spread: float
    brightness: float
    motion: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """Metrics of one model.

    Attributes:
      frames: Length of the videos, F.
      samples: Number of videos.
      joint: Share of windows that obey both laws.
      digit: Share of windows whose digit never goes back or jumps: at most two walls are met between two frames.
      path: Share of windows with a lawful path of the prompt's pace, whatever the digits.
      joint_per_frame: `joint` of each first frame of a window, F - WINDOW + 1 values.
      joint_per_quarter: `joint` of each quarter of the windows.
      frechet_per_quarter: As in `metrics.Figures`.
      border_jump: Median distance in pixels between the center in the first frame of a chunk and where the two frames
        before lead; NaN without two frames before a border.
      diversity: Distance between frames of different videos that show the same digit, relative to real clips.
      brightness: Mean pixel relative to real clips.
      motion: Mean absolute frame difference relative to real clips.
    """

    frames: int
    samples: int
    joint: float
    digit: float
    path: float
    joint_per_frame: tuple[float, ...]
    joint_per_quarter: tuple[float, ...]
    frechet_per_quarter: tuple[float, ...]
    border_jump: float
    diversity: float
    brightness: float
    motion: float


def choose_prompts(num_samples: int) -> tuple[list[str], np.ndarray]:
    """Returns N prompts, slow and fast by turns, and their speeds (int64 [N])."""
    speed = np.arange(num_samples) % len(counting_digits.SPEEDS)
    return [counting_digits.CAPTIONS[s] for s in speed], speed


def real_clips(speed: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Renders clips of given speeds from the `test` scans; uint8 [N, frames, 24, 24, 1]."""
    plan = counting_digits.plan_clips("test", 10 * len(counting_digits.SPEEDS) * len(speed), frames, seed=seed)
    stock = [np.flatnonzero(plan.speed == value)[: len(speed)].tolist() for value in range(len(counting_digits.SPEEDS))]
    return counting_digits.render(plan[np.array([stock[value].pop() for value in speed])])


def observe(videos: np.ndarray, judge: Judge) -> Observation:
    """Looks at videos frame by frame, uint8 [N, F, 24, 24, 1]."""
    count, frames = videos.shape[:2]
    # The judge was trained on windows of three frames. It reads 98.7 % of test digits that stand still.
    opinion = judge(np.repeat(videos.reshape(count * frames, 1, *videos.shape[2:]), STILL, axis=1))
    ink = np.where(videos[..., 0] >= _INK, videos[..., 0], 0)
    digit = opinion.digit[:, 0].argmax(axis=-1).reshape(count, frames)
    return Observation(digit, counting_digits.centers(ink), opinion.features[:, 0].reshape(count, frames, -1))


@functools.cache
def _paths() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The paths along one axis that are tried.

    Returns:
      Their positions [P, WINDOW], their paces [P], the index of each path's walls [P], and the numbers of walls that
      were met since the first frame, of each such index [K, WINDOW].
    """
    starts = np.linspace(*counting_digits.WALLS, _STARTS)
    fastest = max(counting_digits.PACES) * (1 + PACE_TOLERANCE) * (1 + counting_digits.PACE_JITTER)
    velocities = np.linspace(-fastest, fastest, _VELOCITIES)
    free = (starts[:, None, None] + velocities[None, :, None] * np.arange(WINDOW)).reshape(-1, WINDOW)
    positions, room = counting_digits.bounce(free)
    walls, index = np.unique(np.abs(room - room[:, :1]), axis=0, return_inverse=True)
    return positions, np.tile(np.abs(velocities), _STARTS), index.reshape(-1), walls


def _paces(center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest pace along one axis of the paths near the centers [M, WINDOW], by walls: [M, K] twice."""
    positions, pace, index, walls = _paths()
    least, greatest = np.full((len(center), len(walls)), np.inf), np.full((len(center), len(walls)), -np.inf)
    for begin in range(0, len(center), _PART):
        part = slice(begin, begin + _PART)
        near = np.ones((len(center[part]), len(positions)), bool)
        for k in range(WINDOW):
            near &= np.abs(center[part, None, k] - positions[:, k]) <= TOLERANCE
        for wall in range(len(walls)):
            own = near[:, index == wall]
            least[part, wall] = np.where(own, pace[index == wall], np.inf).min(axis=1)
            greatest[part, wall] = np.where(own, pace[index == wall], -np.inf).max(axis=1)
    return least, greatest


def correctness(seen: Observation, speed: np.ndarray) -> dict[str, np.ndarray]:
    """Which windows obey the laws.

    Args:
      seen: What the videos show.
      speed: The prompts' speeds, [N].

    Returns:
      "joint", "digit" and "path" (see `Figures`), each bool [N, F - WINDOW + 1].

    Raises:
      ValueError: The videos are shorter than a window.
    """
    count, frames = seen.digit.shape
    if frames < WINDOW:
        raise ValueError(f"videos: got {frames} frames, allowed: {WINDOW} or more")
    windows = np.lib.stride_tricks.sliding_window_view
    digit = windows(seen.digit, WINDOW, axis=1).reshape(-1, WINDOW)
    grown = (digit - digit[:, :1]) % DIGITS
    rows, columns = (_paces(windows(seen.center[..., axis], WINDOW, axis=1).reshape(-1, WINDOW)) for axis in range(2))
    pace = np.repeat(np.asarray(counting_digits.PACES)[speed], frames - WINDOW + 1)
    walls = _paths()[3]
    path, joint = np.zeros(len(digit), bool), np.zeros(len(digit), bool)
    for i in range(len(walls)):
        for j in range(len(walls)):
            slowest = np.hypot(rows[0][:, i], columns[0][:, j])
            fastest = np.hypot(np.maximum(rows[1][:, i], 0), np.maximum(columns[1][:, j], 0))
            fits = (slowest <= (1 + PACE_TOLERANCE) * pace) & (fastest >= (1 - PACE_TOLERANCE) * pace)
            path |= fits
            joint |= fits & (grown == walls[i] + walls[j]).all(axis=1)
    in_order = (np.diff(digit, axis=1) % DIGITS <= 2).all(axis=1)
    return {name: x.reshape(count, -1) for name, x in (("joint", joint), ("digit", in_order), ("path", path))}


def diversity(seen: Observation) -> float:
    """Mean distance between the judge's features of frames of different videos that show the same digit."""
    every = -(-seen.digit.shape[1] // _FRAMES_COMPARED)
    digit, still = seen.digit[:, ::every], seen.still[:, ::every].astype(np.float64)
    video = np.broadcast_to(np.arange(len(digit))[:, None], digit.shape)
    distances = []
    for value in range(DIGITS):
        points, owner = still[digit == value], video[digit == value]
        squares = (points**2).sum(axis=1)
        distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
        distances.append(distance[owner[:, None] != owner])
    joined = np.concatenate(distances)
    return float(joined.mean()) if joined.size else float("nan")


def jump(center: np.ndarray, chunk_starts: Sequence[int]) -> float:
    """`Figures.border_jump` of centers [N, F, 2]."""
    starts = np.array([start for start in chunk_starts if start >= 2], int)
    if not starts.size:
        return float("nan")
    now, before, earlier = (center[:, starts - back] for back in range(3))
    seen = np.isfinite(now + before + earlier).all(axis=-1)  # no empty frame
    expected, _ = counting_digits.bounce(2 * before[seen] - earlier[seen])
    return float(np.median(np.linalg.norm(now[seen] - expected, axis=-1))) if seen.any() else float("nan")


def reference(videos: np.ndarray, judge: Judge) -> Reference:
    """Computes the values of real clips, uint8 [N, F, 24, 24, 1], that models are compared with."""
    spread = diversity(observe(videos, judge))
    return Reference(judge(videos).features, spread, float(videos.mean()), metrics.motion(videos))


def measure(
    videos: np.ndarray, speed: np.ndarray, judge: Judge, real: Reference, chunk_starts: Sequence[int] = (0,)
) -> Figures:
    """Computes all metrics.

    Args:
      videos: uint8 [N, F, 24, 24, 1].
      speed: The prompts' speeds, [N].
      judge: The judge.
      real: The reference, from clips of the same length.
      chunk_starts: First frames of the chunks in which the videos were generated.

    Returns:
      The metrics.

    Raises:
      ValueError: The videos are too short.
    """
    seen, parts = observe(videos, judge), metrics.quarters(videos.shape[1])
    right, features = correctness(seen, speed), judge(videos).features
    return Figures(
        frames=videos.shape[1],
        samples=len(videos),
        **{name: float(values.mean()) for name, values in right.items()},
        joint_per_frame=tuple(right["joint"].mean(axis=0).tolist()),
        joint_per_quarter=tuple(float(x.mean()) for x in np.array_split(right["joint"], metrics.QUARTERS, axis=1)),
        frechet_per_quarter=tuple(
            metrics.frechet_distance(*(x[:, part].reshape(-1, x.shape[-1]) for x in (features, real.features)))
            for _, part in parts
        ),
        border_jump=jump(seen.center, chunk_starts[1:]),
        diversity=diversity(seen) / real.spread,
        brightness=float(videos.mean()) / real.brightness,
        motion=metrics.motion(videos) / real.motion,
    )


def measure_behind_real(
    videos: np.ndarray,
    clips: np.ndarray,
    speed: np.ndarray,
    judge: Judge,
    real: Reference,
    chunk_starts: Sequence[int],
) -> Figures:
    """Metrics of videos from `forced.generate_behind_real`: a window begins with the real frames before its chunk.

    Args:
      videos: uint8 [N, F, 24, 24, 1], generated.
      clips: uint8 [N, F, 24, 24, 1], the real clips that each chunk was conditioned on.
      speed: The prompts' speeds, [N].
      judge: The judge.
      real: The reference, from other real clips of the same length.
      chunk_starts: First frames of the chunks.

    Returns:
      The metrics. Those of windows leave out the chunks with fewer than WINDOW - 1 frames before them.
    """
    figures = measure(videos, speed, judge, real, chunk_starts)
    own, given = observe(videos, judge), observe(clips, judge)
    right, jumps = [], []
    for start, end in zip(chunk_starts, [*chunk_starts[1:], videos.shape[1]], strict=True):
        first = start - WINDOW + 1
        if first < 0:
            continue
        joined = [
            np.concatenate([getattr(given, name)[:, first:start], getattr(own, name)[:, start:end]], axis=1)
            for name in ("digit", "center", "still")
        ]
        right.append(correctness(Observation(*joined), speed))
        jumps.append(jump(joined[1], [WINDOW - 1]))
    merged = {name: np.concatenate([r[name] for r in right], axis=1) for name in right[0]}
    return dataclasses.replace(
        figures,
        **{name: float(values.mean()) for name, values in merged.items()},
        joint_per_frame=tuple(merged["joint"].mean(axis=0).tolist()),
        joint_per_quarter=tuple(float(x.mean()) for x in np.array_split(merged["joint"], metrics.QUARTERS, axis=1)),
        border_jump=float(np.median(jumps)),
    )
