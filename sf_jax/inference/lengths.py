"""How long a video can be: pixel frames, latent frames and chunks."""

import math

from sf_jax import rollout as ro
from sf_jax.io.video_write import MAX_SIDE

WAN_FACTOR, WAN_SIDE = 4, 16  # Wan: pixel frames per latent frame but the first, and pixels per token along each side

# The most that is accepted of what has no bound of its own, so that a slip of the finger takes no machine's memory.
MOST = {"frames": 10**6, "num_samples": 10**5, "height": MAX_SIDE, "width": MAX_SIDE, "scale": MAX_SIDE}
MAX_BYTES = 2**32  # of frames that are enlarged at once


def check_most(**values: int | None) -> None:
    """Refuses values above `MOST`, before anything is built from them; None stands for the default."""
    for name, value in values.items():
        if value is not None and value > MOST[name]:
            raise ValueError(f"{name} is {value}: it must be at most {MOST[name]}")


def check_scale(scale: int, frames: int, height: int, width: int) -> None:
    """Refuses an enlargement of frames [frames, height, width, 3] that no file or memory holds."""
    most = min(MAX_SIDE // max(height, width), math.isqrt(MAX_BYTES // (frames * height * width * 3)))
    if scale > max(1, most):
        raise ValueError(
            f"scale is {scale}: for {frames} frames of {height}x{width} it must be at most {max(1, most)} (sides of at "
            f"most {MAX_SIDE} pixels, {MAX_BYTES // 2**30} GiB at once)"
        )


def latent_frames(frames: int, factor: int) -> int:
    """Latent frames of a video of `frames` pixel frames, `factor` for each latent frame but the first.

    Raises:
      ValueError: unless it is 1 + a multiple of the factor.
    """
    if frames < 1 or (frames - 1) % factor:
        near = max(1, (frames - 1) // factor * factor + 1)
        such = f"1 + a multiple of {factor}, such as {near} or {near + factor}" if factor > 1 else "at least 1"
        raise ValueError(f"frames is {frames}: it must be {such}")
    return (frames - 1) // factor + 1


def check_frames(config: ro.RolloutConfig, frames: int, initial: int = 0, factor: int = 1) -> None:
    """Refuses a number of latent frames that a causal network cannot generate, in terms of the video's frames.

    Args:
      config: the chunks.
      frames: latent frames, the initial ones included.
      initial: latent frames to go on from.
      factor: pixel frames per latent frame.

    Raises:
      ValueError: naming lengths that would do.
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
