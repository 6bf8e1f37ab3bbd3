"""Metrics of videos of bouncing digits: how far they obey the laws of `sf_jax.data.bouncing_digits`.

No prompt says where a digit goes or whose turn it is, so the metrics compare a video with itself. A window of WINDOW
frames obeys both laws if there is a path, straight between the walls and of the prompt's pace, that is never farther
than TOLERANCE pixels from the digit's center along either axis, and the prompt's two digits change in those steps in
which the path meets a wall. Only paths that are nearly as close as the closest one (SLACK) count.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sf_jax.data import bouncing_digits
from sf_jax.evaluation import metrics
from sf_jax.evaluation.judge import DIGITS, Judge
from sf_jax.evaluation.judge import WINDOW as STILL

WINDOW = 6
TOLERANCE = 0.75  # pixels, along each axis
SLACK = 0.15  # pixels: about as far apart as the paths that are tried
PACE_TOLERANCE = 0.25  # of the prompt's pace
_INK = 32  # darker pixels are background: a codec's noise would pull the center to the canvas' middle
# Grid of paths along an axis: starts 0.25 pixels apart, velocities about 0.1 pixels per frame apart.
_STARTS, _VELOCITIES = 35, 43
_PART = 2048  # windows that are compared with all paths at a time
_FRAMES_COMPARED = 32  # of each video, by `shape_distances`
_KINDS = (len(bouncing_digits.PAIRS), len(bouncing_digits.SPEEDS))
_STRIDE = 73  # coprime to the number of kinds; it balances the digits of any first few prompts
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
      digit: Share of windows in which the judge sees no digit but the prompt's two.
      path: Share of windows with a lawful path of the prompt's pace, whatever the digits.
      turns: `joint` of the windows whose closest path meets a wall between two of its frames; NaN if there are none.
      joint_per_frame: `joint` of each first frame of a window, F - WINDOW + 1 values.
      joint_per_quarter: `joint` of each quarter of the windows.
      frechet_per_quarter: As in `metrics.Figures`.
      border_jump: Median distance in pixels between the center in the first frame of a chunk and where the two frames
        before lead; NaN without two frames before a border, or if one of the three is always empty.
      diversity: Distance between frames of different videos that show the same digit, relative to real clips.
      forgetting: Distance between frames of one video that show the same digit in different turns, relative to those of
        different videos: about 0.2 in real clips, 1 if a digit comes back in any shape; NaN if none comes back.
      brightness: Mean pixel relative to real clips.
      motion: Mean absolute frame difference relative to real clips.
    """

    frames: int
    samples: int
    joint: float
    digit: float
    path: float
    turns: float
    joint_per_frame: tuple[float, ...]
    joint_per_quarter: tuple[float, ...]
    frechet_per_quarter: tuple[float, ...]
    border_jump: float
    diversity: float
    forgetting: float
    brightness: float
    motion: float


def choose_prompts(num_samples: int) -> tuple[list[str], Targets]:
    """Chooses prompts with several samples each.

    Args:
      num_samples: N; in multiples of 8 both speeds are equally frequent, in multiples of 360 all pairs, too.

    Returns:
      The N prompts and their targets.

    Raises:
      ValueError: There are too few.
    """
    if num_samples < metrics.SAMPLES_PER_PROMPT:
        raise ValueError(f"num_samples: got {num_samples}, allowed: {metrics.SAMPLES_PER_PROMPT} or more")
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
    fastest = max(bouncing_digits.PACES) * (1 + PACE_TOLERANCE)
    velocities = np.linspace(-fastest, fastest, _VELOCITIES)
    free = (starts[:, None, None] + velocities[None, :, None] * np.arange(WINDOW)).reshape(-1, WINDOW)
    positions, room = bouncing_digits.bounce(free)
    walls, index = np.unique(np.abs(room - room[:, :1]), axis=0, return_inverse=True)
    return positions, np.tile(np.abs(velocities), _STARTS), index.reshape(-1), walls


def _paces(center: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares centers along one axis with the paths.

    Args:
      center: Positions in M windows, [M, WINDOW].

    Returns:
      The least and the greatest pace of the paths near the centers, for each of the K patterns of walls, [M, K] twice
      (infinite, and minus infinity, without such a path), and the closest path's pattern, [M].
    """
    positions, pace, index, walls = _paths()
    least, greatest = np.full((len(center), len(walls)), np.inf), np.full((len(center), len(walls)), -np.inf)
    closest = np.zeros(len(center), np.int64)
    for begin in range(0, len(center), _PART):
        part = slice(begin, begin + _PART)
        distance = np.zeros((len(center[part]), len(positions)))
        for k in range(WINDOW):
            distance = np.maximum(distance, np.abs(center[part, None, k] - positions[:, k]))  # NaN stays
        near = distance <= np.minimum(TOLERANCE, distance.min(axis=1, keepdims=True) + SLACK)
        closest[part] = index[distance.argmin(axis=1)]
        for wall in range(len(walls)):
            own = near[:, index == wall]
            least[part, wall] = np.where(own, pace[index == wall], np.inf).min(axis=1)
            greatest[part, wall] = np.where(own, pace[index == wall], -np.inf).max(axis=1)
    return least, greatest, closest


def correctness(seen: Observation, targets: Targets) -> dict[str, np.ndarray]:
    """Which windows obey the laws.

    Args:
      seen: What the videos show.
      targets: The prompts' targets.

    Returns:
      "joint", "digit" and "path" (see `Figures`), and "walls", whether the closest path meets a wall: each bool
      [N, F - WINDOW + 1].

    Raises:
      ValueError: The videos are shorter than a window, or not as many as the targets.
    """
    count, frames = seen.digit.shape
    if frames < WINDOW:
        raise ValueError(f"videos: got {frames} frames, allowed: {WINDOW} or more")
    if count != len(targets.pair):
        raise ValueError(f"videos: got {count}, allowed: {len(targets.pair)}, one for each target")
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
    met = (walls[rows[2], -1] + walls[columns[2], -1]) > 0
    shares = {"joint": joint, "digit": among, "path": path, "walls": met}
    return {name: values.reshape(count, -1) for name, values in shares.items()}


def shape_distances(seen: Observation) -> tuple[float, float]:
    """Mean distances between the shapes of frames that show the same digit.

    Returns:
      The distance in different videos, and in the same video with another digit between the two frames; NaN where there
      are no such frames.
    """
    every = -(-seen.digit.shape[1] // _FRAMES_COMPARED)
    # A frame's turn: frames of one video with the same number have no other digit between them.
    turn = np.pad((np.diff(seen.digit, axis=1) != 0).cumsum(axis=1), ((0, 0), (1, 0)))[:, ::every]
    digit, shape = seen.digit[:, ::every], seen.shape[:, ::every].astype(np.float64)
    video = np.broadcast_to(np.arange(len(digit))[:, None], digit.shape)
    sums, counts = np.zeros(2), np.zeros(2)
    for value in range(DIGITS):
        points, owner, time = (x[digit == value] for x in (shape, video, turn))
        squares = (points**2).sum(axis=1)
        distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
        other = owner[:, None] != owner
        again = ~other & (time[:, None] != time)
        sums += distance[other].sum(), distance[again].sum()
        counts += other.sum(), again.sum()
    between, within = np.where(counts, sums / np.maximum(counts, 1), np.nan).tolist()
    return between, within


def jumps(center: np.ndarray, chunk_starts: Sequence[int]) -> np.ndarray:
    """Distances between a digit's center in a chunk's first frame and where the two frames before lead.

    Args:
      center: float64 [N, F, 2].
      chunk_starts: First frames of chunks; those with fewer than two frames before them are left out.

    Returns:
      Pixels, [J], without those where one of the three frames is empty.
    """
    starts = np.array([start for start in chunk_starts if start >= 2], int)
    now, before, earlier = (center[:, starts - back] for back in range(3))
    seen = np.isfinite(now + before + earlier).all(axis=-1)
    expected, _ = bouncing_digits.bounce(2 * before[seen] - earlier[seen])
    return np.linalg.norm(now[seen] - expected, axis=-1)


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
      ValueError: The videos are too short, or do not match the targets or the reference.
    """
    frames = videos.shape[1]
    _check_windows(frames - WINDOW + 1)
    seen, parts, features = observe(videos, judge), metrics.quarters(frames), judge(videos).features
    if features.shape[1] != real.features.shape[1]:
        length = real.features.shape[1] + STILL - 1
        raise ValueError(f"videos: got {frames} frames, allowed: {length} as in the reference")
    between, within = shape_distances(seen)
    return Figures(
        frames=frames,
        samples=len(videos),
        **_shares(correctness(seen, targets)),
        frechet_per_quarter=tuple(
            metrics.frechet_distance(*(x[:, part].reshape(-1, x.shape[-1]) for x in (features, real.features)))
            for _, part in parts
        ),
        border_jump=_median(jumps(seen.center, chunk_starts[1:])),
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

    Raises:
      ValueError: As `measure`; or too few frames are left.
    """
    figures = measure(videos, targets, judge, real, chunk_starts)
    own, given = observe(videos, judge), observe(clips, judge)
    right, distances = [], []
    for start, end in zip(chunk_starts, [*chunk_starts[1:], videos.shape[1]], strict=True):
        first = start - WINDOW + 1
        if first < 0:
            continue
        joined = Observation(
            np.concatenate([given.digit[:, first:start], own.digit[:, start:end]], axis=1),
            np.concatenate([given.center[:, first:start], own.center[:, start:end]], axis=1),
            own.shape[:, :0],  # no window needs it
        )
        right.append(correctness(joined, targets))
        distances.append(jumps(joined.center, [WINDOW - 1]))
    _check_windows(sum(part["joint"].shape[1] for part in right))
    merged = {name: np.concatenate([part[name] for part in right], axis=1) for name in right[0]}
    return dataclasses.replace(figures, **_shares(merged), border_jump=_median(np.concatenate(distances)))


def _check_windows(count: int) -> None:
    if count < metrics.QUARTERS:
        raise ValueError(f"videos: got {max(0, count)} windows of {WINDOW} frames, allowed: {metrics.QUARTERS} or more")


def _shares(right: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of `Figures` that are shares of windows."""
    joint, walls = right["joint"], right["walls"]
    return {
        **{name: float(right[name].mean()) for name in ("joint", "digit", "path")},
        "turns": float(joint[walls].mean()) if walls.any() else float("nan"),
        "joint_per_frame": tuple(joint.mean(axis=0).tolist()),
        "joint_per_quarter": tuple(float(x.mean()) for x in np.array_split(joint, metrics.QUARTERS, axis=1)),
    }


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else float("nan")
