"""What in a run's metrics says that it is going wrong."""

import statistics
from collections.abc import Mapping, Sequence

# metric -> (what it tells when it grows, what it tells when it shrinks); None where that is no bad sign
SIGNS = {
    "critic_lag": ("the critic does not keep up with the student: lower optimizer.lr or raise generator_every", None),
    "dmd_gradient_norm": ("the student leaves what the teacher knows: lower optimizer.lr", None),
    "saturation": ("the student's latents leave their range: lower optimizer.lr or score.guidance", None),
    "motion": ("the student's videos flicker", "the student's videos stand still"),
    "generator_grad_norm": ("the student's gradient explodes: lower optimizer.lr or optimizer.clip", None),
    "critic_grad_norm": ("the critic's gradient explodes: lower critic_optimizer.lr or critic_optimizer.clip", None),
}
LINES, FACTOR = 20, 5.0
# below this a metric is as good as zero, and factors of it mean nothing
FLOOR = 1e-3


def warnings(history: Sequence[Mapping[str, float]], values: Mapping[str, float]) -> list[str]:
    """Names metrics that are `FACTOR` times above (or below) the median of the last `LINES` log lines.

    Args:
      history: the log lines so far, oldest first; fewer than half of `LINES` with a metric say nothing about it.
      values: the new line.
    """
    found = []
    for name, (above, below) in SIGNS.items():
        past = [line[name] for line in history if name in line][-LINES:]
        if name not in values or len(past) < LINES // 2:
            continue
        usual, value = max(statistics.median(past), FLOOR), max(values[name], FLOOR)
        if above and value > FACTOR * usual:
            found.append(f"{name} is {value:.3g}, usually {usual:.3g}: {above}")
        if below and value < usual / FACTOR:
            found.append(f"{name} is {value:.3g}, usually {usual:.3g}: {below}")
    return found
