"""Prompts for an evaluation, real clips for the same prompts, and metrics of generated clips.

Entry i of a per-frame metric belongs to the window of frames i to i + WINDOW - 1. A quarter is a quarter of the
windows. In videos of four times the training length, a model was trained on the first quarter (except for its last
window) and extrapolates in the others.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sf_jax.data import moving_digits
from sf_jax.evaluation.judge import WINDOW, Judge, Opinion

QUARTERS = 4
MIN_FRAMES = 2 * QUARTERS
SAMPLES_PER_PROMPT = 4
IDENTITY_LAG = 5
OWN_WINDOWS = 9 - WINDOW + 1  # those of the training length
_KINDS = (10, len(moving_digits.DIRECTIONS), len(moving_digits.SPEEDS))
_NUM_KINDS = math.prod(_KINDS)
_STRIDE = 61  # Coprime to the number of kinds; of all such numbers, it balances any first few prompts best.


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """What N videos should show.

    Attributes:
      digit: int64 [N].
      direction: Index into moving_digits.DIRECTIONS, int64 [N]; None, if prompts do not tell it, is the one in which
        each video begins, the most frequent one of its first OWN_WINDOWS windows. Those windows favor a video then, and
        one that stands still keeps its direction: read it with `Figures.motion`.
      prompt: Index of the sample's prompt, int64 [N].
    """

    digit: np.ndarray
    direction: np.ndarray | None
    prompt: np.ndarray

    def __post_init__(self):
        for name in ("direction", "prompt"):
            if getattr(self, name) is not None and np.shape(getattr(self, name)) != np.shape(self.digit):
                got = np.shape(getattr(self, name))
                raise ValueError(f"Targets.{name}: got shape {got}, allowed: {np.shape(self.digit)}")

    def __len__(self) -> int:
        return len(self.digit)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Values of real clips with the same targets, for comparison.

    Attributes:
      features: The judge's features, float32 [N, F - WINDOW + 1, 64].
      spread: See `diversity`.
      spread_per_quarter: The same for the windows of each quarter.
      style_spread: See `style_diversity`.
      brightness: Mean pixel, 0 to 255.
      motion: Mean absolute difference of consecutive frames, 0 to 255.
    """

    features: np.ndarray
    spread: float
    spread_per_quarter: tuple[float, ...]
    style_spread: float
    brightness: float
    motion: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """Metrics of one model.

    Attributes:
      frames: Length of the videos, F.
      samples: Number of videos.
      digit: Share of windows with the prompt's digit.
      direction: Share of windows with the prompt's direction.
      joint: Share of windows with both.
      digit_per_frame: The same for each first frame of a window, F - WINDOW + 1 values.
      direction_per_frame: As above.
      joint_per_frame: As above.
      joint_inside: Share of windows within one chunk where both are correct; NaN if there are none.
      joint_across: The same for windows that cross a chunk border.
      border_jump: Median over borders and videos of the distance between the digit's step across a border and its usual
        step inside chunks, in pixels.
      inside_jump: The same for all other steps, which is the metric's own floor.
      joint_per_quarter: Share of each quarter's windows where both are correct.
      frechet_per_quarter: Frechet distance of the features to those of real clips, per quarter. It depends on the
        number of videos: compare it with the distance of other real clips.
      diversity: Distance between samples of the same prompt, relative to real clips; 1 is ideal, 0 means identical
        samples. A digit that changes while it moves lowers it, too.
      diversity_per_quarter: The same, for the windows of each quarter.
      style_diversity: The same, with the frames' power spectra instead of the judge's features.
      identity: How well a digit keeps its shape while it moves, see `identity`; 1 is ideal, 0 is another shape.
      saturation: Share of pixels at 255.
      brightness: Mean pixel relative to real clips; 1 is ideal.
      brightness_per_quarter: The same per quarter, which shows drift.
      motion: Mean absolute frame difference relative to real clips; 1 is ideal, 0 is a still image.
      motion_per_quarter: The same per quarter.
    """

    frames: int
    samples: int
    digit: float
    direction: float
    joint: float
    digit_per_frame: tuple[float, ...]
    direction_per_frame: tuple[float, ...]
    joint_per_frame: tuple[float, ...]
    joint_inside: float
    joint_across: float
    border_jump: float
    inside_jump: float
    joint_per_quarter: tuple[float, ...]
    frechet_per_quarter: tuple[float, ...]
    diversity: float
    diversity_per_quarter: tuple[float, ...]
    style_diversity: float
    identity: float
    saturation: float
    brightness: float
    brightness_per_quarter: tuple[float, ...]
    motion: float
    motion_per_quarter: tuple[float, ...]


def choose_prompts(num_samples: int) -> tuple[list[str], np.ndarray, Targets]:
    """Chooses prompts balanced over digits, directions and speeds, with several samples each.

    Args:
      num_samples: N; in multiples of 64 all directions and speeds are equally frequent, in multiples of 640 all digits,
        too.

    Returns:
      The N prompts, the kind of each (index into digits x directions x speeds) and the targets.
    """
    if num_samples < SAMPLES_PER_PROMPT:
        raise ValueError(f"num_samples: got {num_samples}, allowed: {SAMPLES_PER_PROMPT} or more")
    prompt = np.arange(num_samples) % math.ceil(num_samples / SAMPLES_PER_PROMPT)
    kinds = prompt * _STRIDE % _NUM_KINDS
    digit, direction, speed = np.unravel_index(kinds, _KINDS)
    captions = [moving_digits.caption(*kind) for kind in zip(*map(np.ndarray.tolist, (digit, direction, speed)))]
    return captions, kinds, Targets(digit, direction, prompt)


def choose_undirected_prompts(num_samples: int) -> tuple[list[str], np.ndarray, Targets]:
    """`choose_prompts` for captions "undirected": balanced over digits and speeds.

    Args:
      num_samples: N; in multiples of 20 all digits and speeds are equally frequent.

    Returns:
      The N prompts; the kind of each, with directions in the shares of the training clips; and the targets with these
      directions, which are those of `real_clips`. Generated videos choose their own.

    Raises:
      ValueError: There are too few.
    """
    if num_samples < SAMPLES_PER_PROMPT:
        raise ValueError(f"num_samples: got {num_samples}, allowed: {SAMPLES_PER_PROMPT} or more")
    index = np.arange(num_samples)
    prompt = index % (_KINDS[0] * _KINDS[2])
    digit, speed = np.unravel_index(prompt, (_KINDS[0], _KINDS[2]))
    directions = np.repeat(np.arange(_KINDS[1]), moving_digits.DIRECTION_SHARES["train"])
    # In any order that depends on neither digit nor speed.
    direction = np.random.Generator(np.random.Philox(0)).permutation(np.resize(directions, num_samples))
    captions = [moving_digits.caption(n, None, s) for n, s in zip(digit.tolist(), speed.tolist(), strict=True)]
    kinds = np.ravel_multi_index((digit, direction, speed), _KINDS)
    return captions, kinds, Targets(digit, direction, prompt)


def real_clips(kinds: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Renders clips of given kinds from the `test` scans; uint8 [N, frames, 24, 24, 1]."""
    rounds = int(np.bincount(kinds).max())
    plan = moving_digits.plan_clips("test", rounds * _NUM_KINDS, seed=seed)
    planned = np.ravel_multi_index((plan.digit, plan.direction, plan.speed), _KINDS)
    stock = [np.flatnonzero(planned == kind).tolist() for kind in range(_NUM_KINDS)]
    clips = plan[np.array([stock[kind].pop() for kind in kinds])]
    scans, _ = moving_digits.load_scans()
    return moving_digits.render(scans[clips.scan], moving_digits.trajectory(clips.start, clips.velocity, frames))


def quarters(frames: int) -> list[tuple[slice, slice]]:
    """Divides a video into quarters.

    Args:
      frames: F.

    Returns:
      For each quarter, the slice of its frames and the slice of its windows.

    Raises:
      ValueError: A quarter would be too short to show motion.
    """
    if frames < MIN_FRAMES:
        raise ValueError(f"frames: got {frames}, allowed: {MIN_FRAMES} or more")

    def split(count: int) -> list[slice]:
        ends = [count * i // QUARTERS for i in range(QUARTERS + 1)]
        return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    return list(zip(split(frames), split(frames - WINDOW + 1), strict=True))


def correctness(opinion: Opinion, targets: Targets) -> dict[str, np.ndarray]:
    """Compares the judge's output with the targets.

    Args:
      opinion: Output for N videos with W windows, [N, W, ...].
      targets: Targets of the N videos.

    Returns:
      "digit", "direction" and "joint" (both correct): bool [N, W].
    """
    if len(opinion.digit) != len(targets):
        raise ValueError(f"targets: got {len(targets)}, allowed: one for each of {len(opinion.digit)} videos")
    digit = opinion.digit.argmax(axis=-1) == targets.digit[:, None]
    seen, wanted = opinion.direction.argmax(axis=-1), targets.direction
    if wanted is None:
        first = seen[:, :OWN_WINDOWS, None] == np.arange(len(moving_digits.DIRECTIONS))
        wanted = first.sum(axis=1).argmax(axis=-1)
    direction = seen == wanted[:, None]
    return {"digit": digit, "direction": direction, "joint": digit & direction}


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6).

    Args:
      features_a: [N, D], N at least 2.
      features_b: [M, D], M at least 2.

    Returns:
      |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)), A and B the covariances.

    Raises:
      ValueError: The sets have different dimensions or are too small.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features: got {a.shape} and {b.shape}, allowed: [N, D] and [M, D], N and M above 1")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # Up to rounding, the symmetric form has real, non-negative eigenvalues; A B itself need not.
    root_a = _symmetric_root(cov_a)
    values = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    cross = np.sqrt(np.maximum(values, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def diversity(features: np.ndarray, prompt: np.ndarray) -> float:
    """Mean distance between different samples of the same prompt.

    Args:
      features: [N, W, D]; samples are compared by their mean over the W windows, which averages out the position on the
        canvas and keeps the digit's shape.
      prompt: Index of each sample's prompt, [N].

    Returns:
      The mean Euclidean distance over all pairs; NaN if there is no pair.
    """
    return _mean_distance(np.asarray(features, np.float64).mean(axis=1), prompt)


def _mean_distance(points: np.ndarray, prompt: np.ndarray) -> float:
    """Mean distance between points [N, D] of the same prompt [N]; NaN if there is no pair."""
    distances = []
    for kind in np.unique(prompt):
        mates = points[prompt == kind]
        distance = np.linalg.norm(mates[:, None] - mates[None], axis=-1)
        distances.append(distance[~np.eye(len(mates), dtype=bool)])
    distances = np.concatenate(distances)
    return float(distances.mean()) if distances.size else float("nan")


def style_diversity(videos: np.ndarray, prompt: np.ndarray) -> float:
    """`diversity` without the judge: uses the magnitudes of the frames' Fourier transforms, which ignore the position.

    Args:
      videos: uint8 [N, F, h, w, 1].
      prompt: Index of each sample's prompt, [N].
    """
    spectra = np.stack([np.abs(np.fft.rfft2(video[..., 0] / 255.0)).mean(axis=0) for video in videos])
    return _mean_distance(spectra.reshape(len(videos), -1), prompt)


def identity(videos: np.ndarray, prompt: np.ndarray, lag: int = IDENTITY_LAG) -> float:
    """Correlation of a digit's shape with its shape `lag` frames later.

    The shape is the magnitude of the Fourier transform, averaged over WINDOW frames, minus its mean over the samples of
    the same prompt, so that what all 3s have in common does not count.

    Args:
      videos: uint8 [N, F, h, w, 1].
      prompt: Index of each sample's prompt, [N].
      lag: Frames between the two; at least WINDOW, or they share frames.

    Returns:
      The correlation over all windows; NaN if no video is long enough or no prompt has two samples.
    """
    shapes = np.stack([_shapes(video[..., 0]) for video in videos])
    for kind in np.unique(prompt):
        shapes[prompt == kind] -= shapes[prompt == kind].mean(axis=0)
    products = np.zeros(3)
    for video in shapes:  # one at a time, as all of them may half fill the memory
        now, later = video[:-lag].astype(np.float64), video[lag:].astype(np.float64)
        products += (now * later).sum(), (now * now).sum(), (later * later).sum()
    size = np.sqrt(products[1] * products[2])
    return float(products[0] / size) if size else float("nan")


def _shapes(video: np.ndarray) -> np.ndarray:
    """Shapes float32 [F - WINDOW + 1, n] of the digit in a video uint8 [F, h, w]."""
    spectra = np.abs(np.fft.rfft2(video / 255.0)).reshape(len(video), -1)
    windows = [spectra[i : i + WINDOW].mean(axis=0) for i in range(len(video) - WINDOW + 1)]
    return np.array(windows, np.float32).reshape(len(windows), spectra.shape[1])


def steps(videos: np.ndarray) -> np.ndarray:
    """Displacements of the digit between frames, in pixels (row, column).

    Args:
      videos: uint8 [N, F, h, w, 1].

    Returns:
      float64 [N, F - 1, 2], the shortest displacements of the center of brightness on the wrapping canvas.
    """
    places = []
    for axis in (2, 3):  # the phase of the first Fourier mode is the center, even if the digit wraps around
        side = videos.shape[axis]
        profile = videos[..., 0].sum(axis=5 - axis, dtype=np.float64)
        turns = np.exp(2j * np.pi * np.arange(side) / side)
        places.append(np.angle(profile @ turns) / (2 * np.pi) * side)
    return moving_digits.wrap(np.diff(np.stack(places, axis=-1), axis=1))


def jumps(videos: np.ndarray, chunk_starts: Sequence[int]) -> tuple[float, float]:
    """Distances of steps from a video's usual step, its median step inside chunks.

    Args:
      videos: uint8 [N, F, h, w, 1].
      chunk_starts: First frames of the chunks.

    Returns:
      Medians over videos and steps, in pixels: for steps across borders (NaN without borders), and for all others.
      Without any others, the usual step is the median of all steps, and the second median is NaN.
    """
    moved = steps(videos)
    across = np.isin(np.arange(1, videos.shape[1]), chunk_starts)
    usual = np.median(moved if across.all() else moved[:, ~across], axis=1, keepdims=True)
    size = np.linalg.norm(moved - usual, axis=-1)
    return tuple(float(np.median(size[:, part])) if part.any() else float("nan") for part in (across, ~across))


def inside_chunks(frames: int, chunk_starts: Sequence[int]) -> np.ndarray:
    """Which windows of a video lie within one chunk, bool [frames - WINDOW + 1]."""
    chunk = np.searchsorted(np.asarray(chunk_starts), np.arange(frames), side="right")
    return chunk[: frames - WINDOW + 1] == chunk[WINDOW - 1 :]


def motion(videos: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames, 0 to 255; uint8 [N, F, h, w, c]."""
    return float(np.abs(np.diff(videos.astype(np.int16), axis=1)).mean())


def reference(videos: np.ndarray, targets: Targets, judge: Judge) -> Reference:
    """Computes the values of real clips that models are compared with.

    Args:
      videos: Real clips, uint8 [N, F, 24, 24, 1].
      targets: What they show.
      judge: The judge.

    Returns:
      The reference.
    """
    features, prompt = judge(videos).features, targets.prompt
    return Reference(
        features,
        diversity(features, prompt),
        _floats(diversity(features[:, windows], prompt) for _, windows in quarters(videos.shape[1])),
        style_diversity(videos, prompt),
        float(videos.mean()),
        motion(videos),
    )


def measure(
    videos: np.ndarray, targets: Targets, judge: Judge, real: Reference, chunk_starts: Sequence[int] = (0,)
) -> Figures:
    """Computes all metrics.

    Args:
      videos: uint8 [N, F, 24, 24, 1], F at least MIN_FRAMES.
      targets: The prompts' targets.
      judge: The judge.
      real: The reference, from clips of the same length.
      chunk_starts: First frames of the chunks in which the videos were generated; only the first frame for whole
        videos.

    Returns:
      The metrics.

    Raises:
      ValueError: The videos are too short, or do not match the targets or the reference.
    """
    frames = videos.shape[1]
    parts = quarters(frames)
    opinion = judge(videos)
    if opinion.features.shape[1] != real.features.shape[1]:
        length = real.features.shape[1] + WINDOW - 1
        raise ValueError(f"videos: got {frames} frames, allowed: {length} as in the reference")
    right = correctness(opinion, targets)
    per_frame = {name: _floats(values.mean(axis=0)) for name, values in right.items()}
    inside = inside_chunks(frames, chunk_starts)
    border_jump, inside_jump = jumps(videos, chunk_starts[1:])
    spreads = zip(parts, real.spread_per_quarter, strict=True)
    return Figures(
        frames=frames,
        samples=len(videos),
        **{name: float(values.mean()) for name, values in right.items()},
        **{f"{name}_per_frame": values for name, values in per_frame.items()},
        joint_inside=_mean(right["joint"][:, inside]),
        joint_across=_mean(right["joint"][:, ~inside]),
        border_jump=border_jump,
        inside_jump=inside_jump,
        joint_per_quarter=_floats(right["joint"][:, windows].mean() for _, windows in parts),
        frechet_per_quarter=_floats(
            frechet_distance(_flat(opinion.features[:, windows]), _flat(real.features[:, windows]))
            for _, windows in parts
        ),
        diversity=diversity(opinion.features, targets.prompt) / real.spread,
        diversity_per_quarter=_floats(
            diversity(opinion.features[:, windows], targets.prompt) / spread for (_, windows), spread in spreads
        ),
        style_diversity=style_diversity(videos, targets.prompt) / real.style_spread,
        identity=identity(videos, targets.prompt),
        saturation=float((videos == 255).mean()),
        brightness=float(videos.mean()) / real.brightness,
        brightness_per_quarter=_floats(videos[:, part].mean() / real.brightness for part, _ in parts),
        motion=motion(videos) / real.motion,
        motion_per_quarter=_floats(motion(videos[:, part]) / real.motion for part, _ in parts),
    )


def _flat(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1])


def _mean(values: np.ndarray) -> float:
    """The mean; NaN if there are no values."""
    return float(values.mean()) if values.size else float("nan")


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
