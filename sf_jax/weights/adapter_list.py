"""Parses the adapters to merge, from the command line and from Python code."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from sf_jax.weights import hub


@dataclasses.dataclass(frozen=True)
class Lora:
    """An adapter to merge.

    Attributes:
      path: its file or its peft folder, or the name of either on the hub (see `hub`).
      scale: factor for everything it adds.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self):
        """Validates the scale."""
        object.__setattr__(self, "path", Path(self.path))
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"lora {self.path} has the scale {self.scale!r}: it must be a finite number, such as 0.8")


def parse_loras(values: Iterable[str]) -> tuple[Lora, ...]:
    """Parses comma-separated lists of FILE or FILE:SCALE.

    Raises:
      ValueError: if a name is empty or a scale is not a number.
    """
    loras = []
    for value in values:
        path, _, scale = value.rpartition(":")
        # File names may contain commas.
        parts = [value] if _is_path(value) or (_is_path(path) and "," not in scale) else value.split(",")
        loras += [_parse(part.strip()) for part in parts]
    return tuple(loras)


def _is_path(text: str) -> bool:
    return bool(text) and Path(text).exists()


def _parse(text: str) -> Lora:
    path, colon, scale = text.rpartition(":")
    # The colon may be part of the path, as in C:\lora.safetensors.
    if not colon or _is_path(text) or "/" in scale or "\\" in scale:
        path, scale = text, "1"
    if not path:
        raise ValueError(f"lora is {text!r}: give FILE or FILE:SCALE, such as style.safetensors:0.8")
    try:
        factor = float(scale)
    except ValueError as error:
        raise ValueError(f"lora is {text!r}: behind its last colon must be a number, such as {path}:0.8") from error
    try:
        local = hub.weights_path(path)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from error
    return Lora(Path(local), factor)


def as_loras(values: Sequence) -> tuple[Lora, ...]:
    """Converts a list to adapters; each item is a `Lora`, a path (or FILE:SCALE), or a pair of path and scale.

    Raises:
      ValueError: on anything else.
    """
    if isinstance(values, (str, Path, Lora)) or not isinstance(values, Sequence):
        raise ValueError(f"loras is {values!r}: it must be a list, such as [('style.safetensors', 0.8)]")
    loras = []
    for value in values:
        if isinstance(value, Lora):
            loras.append(value)
        elif isinstance(value, str):
            loras += parse_loras([value])
        elif isinstance(value, Path):
            loras.append(Lora(value))
        elif isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], (str, Path)):
            loras.append(Lora(Path(value[0]), value[1]))
        else:
            raise ValueError(f"loras holds {value!r}: it must be a path, or a pair of a path and a scale")
    return tuple(loras)
