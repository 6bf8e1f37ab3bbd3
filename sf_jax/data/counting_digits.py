"""A harder world of digits: a digit bounces between walls and becomes the next one at each of them.

A caption says how fast it moves, never which digit it is or where it goes. Only the frames so far say that, so a model
has to remember it. What follows a 9 is a 0. Every new digit is another scan.

The digit's center (of brightness) moves in a straight line at a constant pace between the walls, and its direction is
mirrored there.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from sf_jax.data import moving_digits as digits

WALLS = (7.25, 15.75)  # rows and columns that the center does not cross; no ink of any scan then leaves the canvas
SPEEDS = digits.SPEEDS
PACES = (0.75, 1.5)  # pixels per frame
PACE_JITTER = 0.1
CAPTIONS = ("counting, slowly", "counting, fast", "counting")
SPEED_OMITTED = digits.SPEED_OMITTED


@dataclasses.dataclass(frozen=True)
class Clips:
    """The plan of N clips of F frames, before rendering.

    Attributes:
      scan: Index of each frame's scan among all of `moving_digits.load_scans`, int64 [N, F].
      digit: Each frame's digit, int64 [N, F].
      center: The digit's center of brightness (row, column), in pixels from the first one's, float64 [N, F, 2].
      velocity: In the first frame, pixels per frame (row, column), float64 [N, 2].
      speed: Index into SPEEDS, whether or not the caption mentions it, int64 [N].
      told: Whether the caption mentions the speed, bool [N].
    """

    scan: np.ndarray
    digit: np.ndarray
    center: np.ndarray
    velocity: np.ndarray
    speed: np.ndarray
    told: np.ndarray

    def __len__(self) -> int:
        return len(self.scan)

    def __getitem__(self, part: slice) -> "Clips":
        return Clips(**{field.name: getattr(self, field.name)[part] for field in dataclasses.fields(self)})

    def captions(self) -> list[str]:
        """Returns the N captions."""
        return [CAPTIONS[s if told else -1] for s, told in zip(self.speed.tolist(), self.told.tolist(), strict=True)]


def bounce(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reflects free positions between the walls.

    Args:
      free: Positions along one axis as if there were no walls, any shape.

    Returns:
      The position between WALLS, and the number (with its sign) of the room among mirrored ones that the free position
      is in. Two positions on a path have as many walls between them as their rooms are apart.
    """
    low, high = WALLS
    room = np.floor((free - low) / (high - low))
    inside = free - low - room * (high - low)
    return np.where(room % 2, high - inside, low + inside), room.astype(np.int64)


def plan_clips(split: str, num_clips: int, num_frames: int, *, seed: int = digits.SEED) -> Clips:
    """Draws the clips of a split, with first digits and speeds in equal shares.

    Args:
      split: One of moving_digits.SPLITS; its scans are those of the moving digits.
      num_clips: N.
      num_frames: F; the first frames of longer clips with the same seed are not the same clips.
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
    first, speed = np.unravel_index(rng.permutation(num_clips) % (10 * len(SPEEDS)), (10, len(SPEEDS)))
    start = rng.uniform(*WALLS, size=(num_clips, 2))
    heading = rng.uniform(0, 2 * np.pi, num_clips)
    pace = np.asarray(PACES)[speed] * rng.uniform(1 - PACE_JITTER, 1 + PACE_JITTER, num_clips)
    velocity = pace[:, None] * np.stack([np.sin(heading), np.cos(heading)], axis=-1)
    told = rng.random(num_clips) >= SPEED_OMITTED
    center, room = bounce(digits.trajectory(start, velocity, num_frames))
    hits = np.abs(room - room[:, :1]).sum(axis=-1)
    digit = (first[:, None] + hits) % 10
    # The scan stays the same between two walls. A digit's first one is drawn, later ones are those behind it in the
    # split, so that a clip does not show a scan twice.
    later, values = hits // 10, (first[:, None] + np.arange(min(10, int(hits.max()) + 1))) % 10
    scan = np.zeros_like(hits)
    for value in range(10):
        pool, drawn = own[labels[own] == value], np.zeros(values.shape, np.int64)
        drawn[values == value] = rng.choice(len(pool), size=int((values == value).sum()))
        shown = digit == value
        scan[shown] = pool[(np.take_along_axis(drawn, hits % 10, axis=1) + later)[shown] % len(pool)]
    return Clips(scan, digit, center, velocity, speed, told)


def render(clips: Clips) -> np.ndarray:
    """Draws clips, uint8 [N, F, CANVAS, CANVAS, 1]."""
    scans, _ = digits.load_scans()
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
      For each clip: video uint8 [F, CANVAS, CANVAS, 1], caption str; digit and direction of its first frame, and speed,
      int.
    """
    directions = direction_of(clips.velocity)
    for begin in range(0, len(clips), part):
        some = clips[begin : begin + part]
        videos = render(some)
        for i, text in enumerate(some.captions()):
            yield {
                "video": videos[i],
                "caption": text,
                "digit": int(some.digit[i, 0]),
                "direction": int(directions[begin + i]),
                "speed": int(some.speed[i]),
            }
