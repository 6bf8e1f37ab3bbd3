"""Limits on the lengths and sizes of videos: pixel frames, latent frames, chunks, files."""

import math

from sf_jax import rollout as ro
from sf_jax.io.video_write import MAX_SIDE

WAN_FACTOR, WAN_SIDE = 4, 16  # Wan: pixel frames per latent frame (except the first), pixels per token along each side
WAN_FPS = 16.0  # frames per second
# Limits per command; larger values are mistakes, or exceed memory and disks.
MAX_VIDEOS, MAX_VIDEO_FRAMES, MAX_STEPS, MAX_PROMPT = 100_000, 100_000, 1000, 100_000
DIGITS_SCALE = 12  # enlargement factor of digit videos
MAX_HELD_PIXELS = 2**31  # limit for an enlarged video that is held in memory


def latent_frames(frames: int, factor: int) -> int:
    """Latent frames of a video of `frames` pixel frames, `factor` for each latent frame except the first.

    Raises:
      ValueError: unless it is 1 + a multiple of the factor.
    """
    if frames < 1 or (frames - 1) % factor:
        near = max(1, (frames - 1) // factor * factor + 1)
        such = f"1 + a multiple of {factor}, such as {near} or {near + factor}" if factor > 1 else "at least 1"
        raise ValueError(f"frames is {frames}: it must be {such}")
    return (frames - 1) // factor + 1


def check_frames(config: ro.RolloutConfig, frames: int, initial: int = 0, factor: int = 1) -> None:
    """Checks that a causal network can generate a length; the error is in pixel frames.

    Args:
      config: rollout settings with the chunk size.
      frames: number of latent frames, including the initial ones.
      initial: number of given latent frames to continue from.
      factor: pixel frames per latent frame.

    Raises:
      ValueError: if it cannot; names valid lengths.
    """

    def fits(count):
        try:
            config.chunks(count - initial, initial)
            config.check_frames(count)
        except ValueError:
            return False
        return initial < count

    if fits(frames):
        return
    middle = frames if config.max_frames is None else min(frames, config.max_frames)
    span = 2 * config.chunk + initial
    nearby = [n for n in range(max(1, middle - span), middle + span + 1) if fits(n)]
    nearby = sorted(sorted(nearby, key=lambda n: abs(n - frames))[:2])
    allowed = " or ".join(str((n - 1) * factor + 1) for n in nearby) or "nothing, with so many initial frames"
    latent = f" ({frames} latent frames)" if factor > 1 else ""
    given = f" behind {initial} initial latent frames" if initial else ""
    limit = f" and at most {config.max_frames} in all" if config.max_frames else ""
    raise ValueError(
        f"frames is {(frames - 1) * factor + 1}{latent}{given}: with chunks of {config.chunk} latent frames{limit} "
        f"the nearest that can be generated: {allowed}"
    )


def check_scale(scale: int, height: int, width: int, frames: int = 1) -> None:
    """Checks that an enlargement does not make the files too large.

    Args:
      scale: enlargement factor of the pixels along each side.
      height: pixel rows.
      width: pixel columns.
      frames: number of pixel frames enlarged together.

    Raises:
      ValueError: if it does; names the largest valid scale.
    """
    high = min(MAX_SIDE // max(height, width), math.isqrt(MAX_HELD_PIXELS // (frames * height * width)))
    if scale > max(1, high):
        raise ValueError(f"scale is {scale}: for {frames} frames of {height}x{width} it must be at most {max(1, high)}")
