"""Metrics of videos of bouncing digits: how far they obey the laws of `sf_jax.data.bouncing_digits`.

No prompt says where a digit goes or whose turn it is, so the metrics compare a video with itself. A window of WINDOW
frames obeys both laws if there is a path, straight between the walls and of the prompt's pace, that is never farther
than TOLERANCE pixels from the digit's center along either axis, and the prompt's two digits change exactly where the
path meets a wall.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from sf_jax.data import bouncing_digits
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
_FRAMES_COMPARED = 32  # of each video, by `shape_distances`
_KINDS = (len(bouncing_digits.PAIRS), len(bouncing_digits.SPEEDS))
_STRIDE = 37  # coprime to the number of kinds
_PAIRS = np.asarray(bouncing_digits.PAIRS)


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """What N videos should show.

    Attributes:
      pair: Index into bouncing_digits.PAIRS, int64 [N].
      speed: Index into bouncing_digits.SPEEDS, int64 [N].
    """

    pair: np.ndarray
    speed: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What N videos of F frames show.

    Attributes:
      digit: The judge's digit of every frame, int64 [N, F].
      center: The digit's center (row, column), float64 [N, F, 2]; NaN in an empty frame.
      shape: Magnitudes of every frame's Fourier transform, which ignore the place, float32 [N, F, 312].
    """

    digit: np.ndarray
    center: np.ndarray
    shape: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Values of real clips of the same length with the same targets, for comparison.

    Attributes:
      features: The judge's features of windows of 3 frames, float32 [N, W, 64].
      spread: The first of `shape_distances`.
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
      digit: Share of windows that show nothing but the prompt's two digits.
      path: Share of windows with a lawful path of the prompt's pace, whatever the digits.
      joint_per_frame: `joint` of each first frame of a window, F - WINDOW + 1 values.
      joint_per_quarter: `joint` of each quarter of the windows.
      frechet_per_quarter: As in `metrics.Figures`.
      border_jump: Median distance in pixels between the center in the first frame of a chunk and where the two frames
        before lead; NaN without two frames before a border.
      diversity: Distance between frames of different videos that show the same digit, relative to real clips.
      forgetting: Distance between frames of one video that show the same digit, relative to those of different videos:
        0 if the digit keeps its shape, also while the other one is shown, and 1 if it does not at all.
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
    forgetting: float
    brightness: float
    motion: float


def choose_prompts(num_samples: int) -> tuple[list[str], Targets]:
    """Chooses N prompts, balanced over pairs and speeds, with several samples each; also returns their targets."""
    prompt = np.arange(num_samples) % math.ceil(num_samples / metrics.SAMPLES_PER_PROMPT)
    pair, speed = np.unravel_index(prompt * _STRIDE % math.prod(_KINDS), _KINDS)
    captions = [bouncing_digits.caption(p, s) for p, s in zip(pair.tolist(), speed.tolist(), strict=True)]
    return captions, Targets(pair, speed)


def real_clips(targets: Targets, frames: int, seed: int) -> np.ndarray:
    """Renders clips with given targets from the `test` scans; uint8 [N, frames, 24, 24, 1]."""
    kinds = np.ravel_multi_index((targets.pair, targets.speed), _KINDS)
    plan = bouncing_digits.plan_clips("test", int(np.bincount(kinds).max()) * math.prod(_KINDS), frames, seed=seed)
    planned = np.ravel_multi_index((plan.pair, plan.speed), _KINDS)
    stock = [np.flatnonzero(planned == kind).tolist() for kind in range(math.prod(_KINDS))]
    return bouncing_digits.render(plan[np.array([stock[kind].pop() for kind in kinds])])


def observe(videos: np.ndarray, judge: Judge) -> Observation:
    """Looks at videos frame by frame, uint8 [N, F, 24, 24, 1]."""
    count, frames = videos.shape[:2]
    # The judge was trained on windows of three frames. It reads 98.7 % of test digits that stand still.
    opinion = judge(np.repeat(videos.reshape(count * frames, 1, *videos.shape[2:]), STILL, axis=1))
    ink = np.where(videos[..., 0] >= _INK, videos[..., 0], 0)
    digit = opinion.digit[:, 0].argmax(axis=-1).reshape(count, frames)
    shape = np.abs(np.fft.rfft2(videos[..., 0] / 255.0)).astype(np.float32).reshape(count, frames, -1)
    return Observation(digit, bouncing_digits.centers(ink), shape)


@functools.cache
def _paths() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The paths along one axis that are tried.

    Returns:
      Their positions [P, WINDOW], their paces [P], the index of each path's walls [P], and the numbers of walls that
      were met since the first frame, of each such index [K, WINDOW].
    """
    starts = np.linspace(*bouncing_digits.WALLS, _STARTS)
    fastest = max(bouncing_digits.PACES) * (1 + PACE_TOLERANCE) * (1 + bouncing_digits.PACE_JITTER)
    velocities = np.linspace(-fastest, fastest, _VELOCITIES)
    free = (starts[:, None, None] + velocities[None, :, None] * np.arange(WINDOW)).reshape(-1, WINDOW)
    positions, room = bouncing_digits.bounce(free)
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


def correctness(seen: Observation, targets: Targets) -> dict[str, np.ndarray]:
    """Which windows obey the laws.

    Args:
      seen: What the videos show.
      targets: The prompts' targets.

    Returns:
      "joint", "digit" and "path" (see `Figures`), each bool [N, F - WINDOW + 1].

    Raises:
      ValueError: The videos are shorter than a window.
    """
    count, frames = seen.digit.shape
    if frames < WINDOW:
        raise ValueError(f"videos: got {frames} frames, allowed: {WINDOW} or more")
    windows = np.lib.stride_tricks.sliding_window_view
    changed = windows(seen.digit, WINDOW, axis=1).reshape(-1, WINDOW)
    changed = changed != changed[:, :1]
    among = (seen.digit[..., None] == _PAIRS[targets.pair][:, None]).any(axis=-1)
    among = windows(among, WINDOW, axis=1).all(axis=-1).reshape(-1)
    rows, columns = (_paces(windows(seen.center[..., axis], WINDOW, axis=1).reshape(-1, WINDOW)) for axis in range(2))
    pace = np.repeat(np.asarray(bouncing_digits.PACES)[targets.speed], frames - WINDOW + 1)
    walls = _paths()[3]
    path, joint = np.zeros(len(among), bool), np.zeros(len(among), bool)
    for i in range(len(walls)):
        for j in range(len(walls)):
            slowest = np.hypot(rows[0][:, i], columns[0][:, j])
            fastest = np.hypot(np.maximum(rows[1][:, i], 0), np.maximum(columns[1][:, j], 0))
            fits = (slowest <= (1 + PACE_TOLERANCE) * pace) & (fastest >= (1 - PACE_TOLERANCE) * pace)
            path |= fits
            joint |= fits & among & (changed == (walls[i] + walls[j]) % 2).all(axis=1)
    return {name: x.reshape(count, -1) for name, x in (("joint", joint), ("digit", among), ("path", path))}


def shape_distances(seen: Observation) -> tuple[float, float]:
    """Mean distances between the shapes of frames that show the same digit.

    Returns:
      The distance in different videos, and in the same video; NaN where no digit is shown twice.
    """
    every = -(-seen.digit.shape[1] // _FRAMES_COMPARED)
    digit, shape = seen.digit[:, ::every], seen.shape[:, ::every].astype(np.float64)
    video = np.broadcast_to(np.arange(len(digit))[:, None], digit.shape)
    sums, counts = np.zeros(2), np.zeros(2)
    for value in range(DIGITS):
        points, owner = shape[digit == value], video[digit == value]
        squares = (points**2).sum(axis=1)
        distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
        same = owner[:, None] == owner
        sums += distance[~same].sum(), distance[same].sum()
        counts += (~same).sum(), same.sum() - len(points)
    between, within = np.where(counts, sums / np.maximum(counts, 1), np.nan).tolist()
    return between, within


def jump(center: np.ndarray, chunk_starts: Sequence[int]) -> float:
    """`Figures.border_jump` of centers [N, F, 2]."""
    starts = np.array([start for start in chunk_starts if start >= 2], int)
    if not starts.size:
        return float("nan")
    now, before, earlier = (center[:, starts - back] for back in range(3))
    seen = np.isfinite(now + before + earlier).all(axis=-1)  # no empty frame
    expected, _ = bouncing_digits.bounce(2 * before[seen] - earlier[seen])
    return float(np.median(np.linalg.norm(now[seen] - expected, axis=-1))) if seen.any() else float("nan")


def reference(videos: np.ndarray, judge: Judge) -> Reference:
    """Computes the values of real clips, uint8 [N, F, 24, 24, 1], that models are compared with."""
    spread, _ = shape_distances(observe(videos, judge))
    return Reference(judge(videos).features, spread, float(videos.mean()), metrics.motion(videos))


def measure(
    videos: np.ndarray, targets: Targets, judge: Judge, real: Reference, chunk_starts: Sequence[int] = (0,)
) -> Figures:
    """Computes all metrics.

    Args:
      videos: uint8 [N, F, 24, 24, 1].
      targets: The prompts' targets.
      judge: The judge.
      real: The reference, from clips of the same length.
      chunk_starts: First frames of the chunks in which the videos were generated.

    Returns:
      The metrics.

    Raises:
      ValueError: The videos are too short.
    """
    seen, parts = observe(videos, judge), metrics.quarters(videos.shape[1])
    right, features = correctness(seen, targets), judge(videos).features
    between, within = shape_distances(seen)
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
        diversity=between / real.spread,
        forgetting=within / between if between else float("nan"),
        brightness=float(videos.mean()) / real.brightness,
        motion=metrics.motion(videos) / real.motion,
    )


def measure_behind_real(
    videos: np.ndarray,
    clips: np.ndarray,
    targets: Targets,
    judge: Judge,
    real: Reference,
    chunk_starts: Sequence[int],
) -> Figures:
    """Metrics of videos from `forced.generate_behind_real`: a window begins with the real frames before its chunk.

    Args:
      videos: uint8 [N, F, 24, 24, 1], generated.
      clips: uint8 [N, F, 24, 24, 1], the real clips that each chunk was conditioned on.
      targets: The prompts' targets.
      judge: The judge.
      real: The reference, from other real clips of the same length.
      chunk_starts: First frames of the chunks.

    Returns:
      The metrics. Those of windows leave out the chunks with fewer than WINDOW - 1 frames before them.
    """
    figures = measure(videos, targets, judge, real, chunk_starts)
    own, given = observe(videos, judge), observe(clips, judge)
    right, jumps = [], []
    for start, end in zip(chunk_starts, [*chunk_starts[1:], videos.shape[1]], strict=True):
        first = start - WINDOW + 1
        if first < 0:
            continue
        joined = [
            np.concatenate([getattr(given, name)[:, first:start], getattr(own, name)[:, start:end]], axis=1)
            for name in ("digit", "center", "shape")
        ]
        right.append(correctness(Observation(*joined), targets))
        jumps.append(jump(joined[1], [WINDOW - 1]))
    merged = {name: np.concatenate([r[name] for r in right], axis=1) for name in right[0]}
    return dataclasses.replace(
        figures,
        **{name: float(values.mean()) for name, values in merged.items()},
        joint_per_frame=tuple(merged["joint"].mean(axis=0).tolist()),
        joint_per_quarter=tuple(float(x.mean()) for x in np.array_split(merged["joint"], metrics.QUARTERS, axis=1)),
        border_jump=float(np.median(jumps)),
    )
