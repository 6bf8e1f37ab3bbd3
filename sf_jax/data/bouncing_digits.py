"""A harder world: two digits take turns, and change at every wall that they bounce off.

A caption names the two digits and how fast they move. It says neither which of them is shown first, nor where it goes:
only the frames so far say that, so a model has to remember it, and the shape of the one that is away, too.

The digit's center (of brightness) moves in a straight line at a constant pace between the walls, and its direction is
mirrored there. Two walls that it meets between two frames, in a corner, leave its turn as it is.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sf_jax.data import moving_digits as digits

WALLS = (7.25, 15.75)  # rows and columns that the center does not cross; no ink of any scan then leaves the canvas
PAIRS = tuple(itertools.combinations(range(10), 2))
SPEEDS = digits.SPEEDS
PACES = (0.75, 1.5)  # pixels per frame
PACE_JITTER = 0.1
SPEED_OMITTED = digits.SPEED_OMITTED
REPEAT_LAGS = (9, 400)  # so many frames later, no clip has the place and direction of an earlier frame again
REPEAT_DISTANCE = 0.25  # pixels along the path


@dataclasses.dataclass(frozen=True)
class Clips:
    """The plan of N clips of F frames, before rendering.

    Attributes:
      scan: Index of each frame's scan among all of `moving_digits.load_scans`, int64 [N, F].
      digit: Each frame's digit, int64 [N, F].
      center: The digit's center of brightness (row, column) in pixels; (0, 0) is the center of the top left pixel,
        float64 [N, F, 2].
      velocity: In the first frame, pixels per frame (row, column), float64 [N, 2].
      pair: Index into PAIRS, int64 [N].
      speed: Index into SPEEDS, whether or not the caption mentions it, int64 [N].
      told: Whether the caption mentions the speed, bool [N].
    """

    scan: np.ndarray
    digit: np.ndarray
    center: np.ndarray
    velocity: np.ndarray
    pair: np.ndarray
    speed: np.ndarray
    told: np.ndarray

    def __len__(self) -> int:
        return len(self.scan)

    def __getitem__(self, part: slice) -> "Clips":
        return Clips(**{field.name: getattr(self, field.name)[part] for field in dataclasses.fields(self)})

    def captions(self) -> list[str]:
        """Returns the N captions."""
        speeds = np.where(self.told, self.speed, -1)
        return [caption(p, None if s < 0 else s) for p, s in zip(self.pair.tolist(), speeds.tolist(), strict=True)]


def caption(pair: int, speed: int | None = None) -> str:
    """Returns the caption of a clip, e.g. "a 3 and an 8, slowly"; without `speed`, no word for it."""
    text = " and ".join(f"{'an' if digit == 8 else 'a'} {digit}" for digit in PAIRS[pair])
    return text if speed is None else f"{text}, {SPEEDS[speed]}"


def all_captions() -> tuple[str, ...]:
    """Returns all 135 captions: every pair, with every speed and without one."""
    return tuple(caption(pair, speed) for pair in range(len(PAIRS)) for speed in (*range(len(SPEEDS)), None))


def bounce(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reflects free positions between the walls.

    Args:
      free: Positions along one axis as if there were no walls, any shape.

    Returns:
      The position between WALLS, and the index of the mirrored copy of the room that holds the free position; it may
      be negative. Two positions on a path have as many walls between them as their rooms are apart.
    """
    low, high = WALLS
    room = np.floor((free - low) / (high - low))
    inside = free - low - room * (high - low)
    return np.where(room % 2, high - inside, low + inside), room.astype(np.int64)


def nearly_repeats(velocity: np.ndarray) -> np.ndarray:
    """Returns which motions come back to a place and direction after REPEAT_LAGS frames; [N, 2] -> bool [N]."""
    lags = np.arange(REPEAT_LAGS[0], REPEAT_LAGS[1] + 1)
    period = 2 * (WALLS[1] - WALLS[0])  # as long as the way there and back
    moved = velocity[:, None, :] * lags[None, :, None]
    moved = (moved + period / 2) % period - period / 2
    return (np.linalg.norm(moved, axis=-1) < REPEAT_DISTANCE).any(axis=1)


def sample_motion(rng: np.random.Generator, speed: np.ndarray) -> np.ndarray:
    """Draws velocities in any direction, by rejection sampling; speeds [N] -> float64 [N, 2] (row, column)."""
    velocity = np.zeros((len(speed), 2))
    left = np.arange(len(speed))
    while left.size:
        heading = rng.uniform(0, 2 * np.pi, left.size)
        pace = np.asarray(PACES)[speed[left]] * rng.uniform(1 - PACE_JITTER, 1 + PACE_JITTER, left.size)
        velocity[left] = pace[:, None] * np.stack([np.sin(heading), np.cos(heading)], axis=-1)
        parts = np.array_split(left, -(-left.size // 1000))
        left = np.concatenate([part[nearly_repeats(velocity[part])] for part in parts])
    return velocity


def plan_clips(split: str, num_clips: int, num_frames: int, *, seed: int = digits.SEED) -> Clips:
    """Draws the clips of a split; in multiples of 90, pairs and speeds have equal shares.

    Args:
      split: One of moving_digits.SPLITS; its scans are those of the moving digits.
      num_clips: N.
      num_frames: F.
      seed: Seed; does not affect how the scans are split.

    Returns:
      The plan.

    Raises:
      ValueError: The split is unknown.
    """
    if split not in digits.SPLITS:
        raise ValueError(f"split: got {split!r}, allowed: {', '.join(digits.SPLITS)}")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, digits.SPLITS.index(split)])))
    _, labels = digits.load_scans()
    own = digits.split_scans(labels)[split]
    pair, speed = np.unravel_index(rng.permutation(num_clips) % (len(PAIRS) * len(SPEEDS)), (len(PAIRS), len(SPEEDS)))
    start = rng.uniform(*WALLS, size=(num_clips, 2))
    velocity = sample_motion(rng, speed)
    told = rng.random(num_clips) >= SPEED_OMITTED
    pairs = rng.permuted(np.asarray(PAIRS)[pair], axis=1)  # which of the two is first
    scans = np.zeros_like(pairs)
    for value in range(10):
        scans[pairs == value] = rng.choice(own[labels[own] == value], size=int((pairs == value).sum()))
    center, room = bounce(digits.trajectory(start, velocity, num_frames))
    turn = np.abs(room - room[:, :1]).sum(axis=-1) % 2
    scan, digit = (np.take_along_axis(two, turn, axis=1) for two in (scans, pairs))
    return Clips(scan, digit, center, velocity, pair, speed, told)


def render(clips: Clips, scans: np.ndarray | None = None) -> np.ndarray:
    """Draws clips, uint8 [N, F, CANVAS, CANVAS, 1]; `scans` are those of `moving_digits.load_scans`."""
    scans = digits.load_scans()[0] if scans is None else scans
    corner = clips.center - centers(scans)[clips.scan]
    frames = digits.render(scans[clips.scan.reshape(-1)], corner.reshape(-1, 1, 2))
    return frames.reshape(*clips.scan.shape, *frames.shape[2:])


def centers(images: np.ndarray) -> np.ndarray:
    """Returns the centers of brightness of images [..., h, w] as (row, column), float64 [..., 2]; NaN if all black."""
    images = np.asarray(images, np.float64)
    rows, columns = (np.arange(side) for side in images.shape[-2:])
    total = images.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        return np.stack([images.sum(axis=-1) @ rows / total, images.sum(axis=-2) @ columns / total], axis=-1)


def direction_of(velocity: np.ndarray) -> np.ndarray:
    """Returns the nearest of moving_digits.DIRECTIONS; [N, 2] -> int64 [N]."""
    turn = np.arctan2(velocity[:, 0], velocity[:, 1]) / (2 * np.pi)
    return np.round(turn * len(digits.DIRECTIONS)).astype(np.int64) % len(digits.DIRECTIONS)


def generate(clips: Clips, part: int = 250) -> Iterator[dict[str, Any]]:
    """Yields the examples of a plan.

    Args:
      clips: The plan.
      part: Number of clips that are drawn at a time.

    Yields:
      For each clip: video uint8 [F, CANVAS, CANVAS, 1], caption str, and digit, direction (both in the first frame)
      and speed, int.
    """
    directions, scans = direction_of(clips.velocity), digits.load_scans()[0]
    for begin in range(0, len(clips), part):
        some = clips[begin : begin + part]
        videos = render(some, scans)
        for i, text in enumerate(some.captions()):
            yield {
                "video": videos[i],
                "caption": text,
                "digit": int(some.digit[i, 0]),
                "direction": int(directions[begin + i]),
                "speed": int(some.speed[i]),
            }
