"""Bounds on a network's sizes, which may come from an untrusted file."""

from typing import Any

import numpy as np


def check_sizes(config: Any, **limits: int) -> None:
    """Checks that fields are integers from 1 to their limit, before anything is built from them.

    The limits are far above any existing network. They keep a tensor name or a small file header from exhausting
    memory.

    Args:
      config: a dataclass of sizes.
      **limits: field -> its largest value.

    Raises:
      ValueError: if a field is out of range; names the field, its value and its bound.
    """
    for name, limit in limits.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} is {value!r}: it must be a whole number")
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
        if value > limit:
            raise ValueError(f"{name} is {value}: it must be at most {limit}")


def check_eps(eps: float) -> None:
    """Checks that the epsilon of norms is above 0 and below 1."""
    if not 0 < eps < 1:  # also NaN
        raise ValueError(f"eps is {eps}: it must be above 0 and below 1")
