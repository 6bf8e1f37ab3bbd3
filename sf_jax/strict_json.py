"""Strict JSON parsing for untrusted input: limits on size and depth, and only finite numbers.

Python's own parser accepts Infinity, NaN and integers of any length, and raises RecursionError for deeply nested
values. Here, all of these raise a one-line ValueError.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sf_jax.messages import quoted

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
_MAX_WHOLE = 1 << 64
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def parse(
    text: str | bytes,
    kind: type | None = dict,
    pairs: Callable[[list], Mapping] | None = None,
    finite: bool = True,
) -> Any:
    """Parses JSON.

    Args:
      text: a text, or bytes in UTF-8 (a byte order mark is skipped).
      kind: type of the top-level value, `dict` or `list`; None accepts any.
      pairs: builds an object from its (key, value) pairs; None is `dict`, in which the last of equal keys wins.
      finite: whether to reject non-finite numbers, and integers beyond 64 bits. Files of other programs may contain
        them in parts that are never read; callers must check the numbers that they use from such a file.

    Raises:
      ValueError: if it is not JSON, has another type, is nested deeper than `MAX_DEPTH`, or has such a number.
    """
    numbers = {"parse_constant": _constant, "parse_float": _fraction, "parse_int": _whole} if finite else {}
    try:
        value = json.loads(
            text.decode("utf-8-sig") if isinstance(text, bytes) else text, object_pairs_hook=pairs, **numbers
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8, by byte {error.start}") from error
    _check_depth(value)
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"it holds {_KINDS.get(type(value), 'a number')}, it must hold {_KINDS[kind]}")
    return value


def read(path: Path | str, kind: type | None = dict, max_bytes: int = MAX_BYTES, finite: bool = True) -> Any:
    """Parses a file of at most `max_bytes`; see `parse`.

    Raises:
      ValueError: see `parse`, or if the file is longer. The message does not name the file.
      OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes, the most that is read")
    return parse(content, kind, finite=finite)


def _constant(name: str) -> float:
    raise ValueError(f"it has the number {name}: numbers must be finite")


def _fraction(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {quoted(text, 24)}: numbers must be finite")
    return value


def _whole(text: str) -> int:
    if len(text) > 21 or abs(value := int(text)) >= _MAX_WHOLE:
        raise ValueError(f"it has the whole number {quoted(text, 24)}: at most 64 bits are read")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while parents := [entry for entry in level if isinstance(entry, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        level = [entry for each in parents for entry in (each.values() if isinstance(each, dict) else each)]
