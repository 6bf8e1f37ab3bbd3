"""File names of videos: made of texts, valid everywhere, and never those of files that are there already."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

IF_EXISTS = ("number", "replace", "skip", "refuse")
SUFFIXES = (".mp4", ".png", ".gif", ".npy")
# No file of Windows may have these names, whatever its suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])", re.IGNORECASE)
# What no file name holds, and characters that change how a terminal or a list of files looks.
_VBENCH_EXCLUDED = re.compile(r"[/\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WINDOWS_EXCLUDED = re.compile(r'[<>:"|?*\\]')


def plain_name(text: str, limit: int) -> str:
    """Letters, digits and underscores of a text, at most `limit` bytes; a name on every system."""
    name = re.sub(r"\W+", "_", text.lower()).strip("_").encode()[:limit].decode(errors="ignore") or "video"
    return f"{name}_" if _DEVICES.fullmatch(name) else name


def vbench_name(text: str, windows: bool = os.name == "nt") -> str:
    """A prompt as VBench looks for it.

    Args:
      text: the prompt.
      windows: whether the file is to have a name of Windows.

    Raises:
      ValueError: on a character that Windows has in no file name.
    """
    excluded = _WINDOWS_EXCLUDED.search(text) if windows else None
    if excluded:
        raise ValueError(
            f"vbench_names: the prompt {text!r} has {excluded[0]!r}, which no file name of Windows may have; "
            "generate on another system, or leave vbench_names out"
        )
    return _VBENCH_EXCLUDED.sub(" ", text)


def check_folders(names: Sequence[str], out: Path) -> None:
    """Refuses names that folders have, before anything long begins."""
    for name in names:
        for suffix in SUFFIXES:
            if (out / f"{name}{suffix}").is_dir():
                raise ValueError(f"out: {out / name}{suffix} is a folder: a file of that name is to be written")


def free_names(names: Sequence[str], out: Path, if_exists: str, suffixes: Sequence[str] = SUFFIXES) -> list[str | None]:
    """Names under which nothing is lost.

    Args:
      names: without suffix, all different.
      out: folder of the files.
      if_exists: what to do where a file of that name is there: "number" the new one, "replace" the old one, "skip" the
        video, or "refuse".
      suffixes: of the files that are to be written.

    Returns:
      The names to take, in order; None for videos to leave out.

    Raises:
      ValueError: a file is there and `if_exists` is "refuse".
    """
    taken, chosen = {name.casefold() for name in names}, []
    for name in names:
        path = next((out / f"{name}{end}" for end in suffixes if (out / f"{name}{end}").exists()), None)
        if path is not None:
            if if_exists == "refuse":
                raise ValueError(
                    f"{path} is there already: give another --out, or --if_exists=skip (keep it), replace or number"
                )
            if if_exists == "skip":
                name = None
            elif if_exists == "number":
                name = _numbered(name, out, suffixes, taken)
                taken.add(name.casefold())
            print(f"{path} is there already: {'kept' if name is None else _what(name, if_exists)}", flush=True)
        chosen.append(name)
    return chosen


def _what(name: str, if_exists: str) -> str:
    return "it is replaced" if if_exists == "replace" else f"the new one is {name}"


def _numbered(name: str, out: Path, suffixes: Sequence[str], taken: set[str]) -> str:
    number = 2
    while f"{name}_{number}".casefold() in taken or any((out / f"{name}_{number}{end}").exists() for end in suffixes):
        number += 1
    return f"{name}_{number}"
