"""Warnings about metrics that show a run going wrong."""

import statistics
from collections.abc import Mapping, Sequence

# metric -> (meaning of growth, meaning of shrinkage); None if that is no bad sign
SIGNS = {
    "critic_lag": ("the critic does not keep up with the student: lower optimizer.lr or raise generator_every", None),
    "dmd_gradient_norm": (
        "the student leaves what the teacher knows: lower optimizer.lr",
        "teacher and critic agree, so the student learns nothing: are they the same network?",
    ),
    "saturation": ("the student's latents leave their range: lower optimizer.lr or score.guidance", None),
    "motion": ("the student's videos flicker", "the student's videos stand still"),
    "generator_grad_norm": ("the student's gradient explodes: lower optimizer.lr or optimizer.clip", None),
    "critic_grad_norm": ("the critic's gradient explodes: lower critic_optimizer.lr or critic_optimizer.clip", None),
}
LINES, FACTOR = 20, 5.0
# Metrics below this count as zero, where ratios are meaningless.
FLOOR = 1e-3


def warnings(history: Sequence[Mapping[str, float]], values: Mapping[str, float]) -> list[str]:
    """Describes metrics that jump or drift.

    A metric jumps if it is `FACTOR` times above (or below) the median of the last `LINES` log lines. It drifts if that
    median has moved by `FACTOR` since the first `LINES` lines; a drift is reported only when it begins.

    Args:
      history: the log lines so far, oldest first; a metric needs at least half of `LINES` of them.
      values: the new line.
    """
    found = []
    for name, signs in SIGNS.items():
        past = [line[name] for line in history if name in line]
        if name not in values or len(past) < LINES // 2:
            continue
        value = values[name]
        usual = statistics.median(past[-LINES:])
        if text := _moved(usual, value, signs):
            found.append(f"{name} is {value:.3g}, usually {usual:.3g}: {text}")
        if len(past) < 2 * LINES:
            continue
        early, now = statistics.median(past[:LINES]), statistics.median([*past[1 - LINES :], value])
        if (text := _moved(early, now, signs)) and not _moved(early, usual, signs):
            found.append(f"{name} has drifted to {now:.3g}, it was {early:.3g} at first: {text}")
    return found


def _moved(before: float, now: float, signs: tuple[str | None, str | None]) -> str | None:
    """The meaning of a metric's change from `before` to `now`, or None if it is no bad sign."""
    before, now = max(before, FLOOR), max(now, FLOOR)
    if now > FACTOR * before:
        return signs[0]
    return signs[1] if now < before / FACTOR else None
