"""Sampling settings of a pipeline, and the chunks that it yields."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a video is generated.

    Attributes:
      frames: pixel frames of the whole video, including initial ones.
      height: pixel rows.
      width: pixel columns.
      seed: seed of the noise.
      solver: solver for many guided steps; None uses the few steps of a distilled student.
      guidance: guidance scale, with a solver.
      negative_prompt: prompt to guide away from, with a solver.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    seed: int = 0
    solver: Solver | None = None
    guidance: float = 6.0
    negative_prompt: str = ""

    def __post_init__(self):
        """Validates types and ranges."""
        for name in ("frames", "height", "width", "seed"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, np.integer)):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be a whole number")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must be at least 0 and below 2**32")
        if not isinstance(self.guidance, (int, float)) or not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance!r}: it must be a finite number")
        if not (self.solver is None or isinstance(self.solver, Solver)):
            raise ValueError(f"solver is {self.solver!r}: it must be None or a Solver, such as Solver('unipc')")
        if not isinstance(self.negative_prompt, str):
            raise ValueError(f"negative_prompt is {self.negative_prompt!r}: it must be a text")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of a batch of videos, on the devices.

    Attributes:
      latents: float32 [B, n, H, W, C].
      pixels: uint8 [B, m, h, w, c]; None without a decoder.
      start: first latent frame.
      initial: whether it was given instead of generated.
    """

    latents: jax.Array
    pixels: jax.Array | None
    start: int
    initial: bool = False

    def on_host(self, output: str) -> np.ndarray:
        """Its pixels uint8, or its latents float32 if `output` is "latent"."""
        return np.asarray(self.pixels if output == "pixels" else self.latents.astype(jnp.float32))


def example_numbers(first: int | Sequence[int], count: int) -> np.ndarray:
    """Numbers int32 [count] of videos; a video's noise depends only on its number and the seed.

    Args:
      first: the first number, or all of them.
      count: number of videos.

    Raises:
      ValueError: unless there are `count` integers in the range of int32.
    """
    try:
        if isinstance(first, (Sequence, np.ndarray)):
            numbers = [operator.index(number) for number in first]
        else:
            numbers = [operator.index(first) + i for i in range(count)]
    except TypeError as error:
        raise ValueError(f"first_index is {first!r}: it must be a whole number") from error
    if len(numbers) != count or min(numbers) < 0 or max(numbers) >= 2**31:
        raise ValueError(f"first_index is {first!r}: it must give {count} numbers from 0 to 2**31 - 1")
    return np.asarray(numbers, np.int32)


def plain_number(value: Any) -> Any:
    """A number of numpy's as one of Python's, which files of streams can hold; other values unchanged."""
    return value.item() if isinstance(value, np.generic) else value
