"""File names of videos: made from texts, valid everywhere, and never those of existing files."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sf_jax import files

IF_EXISTS = ("number", "replace", "skip", "refuse")
SUFFIXES = (".mp4", ".png", ".gif", ".npy")
# Windows reserves these names, with any suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])", re.IGNORECASE)
# Characters that file names cannot contain, or that change how a terminal or a list of files looks.
_VBENCH_EXCLUDED = re.compile(r"[/\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WINDOWS_EXCLUDED = re.compile(r'[<>:"|?*\\]')


def plain_name(text: str, limit: int) -> str:
    """Letters, digits and underscores of a text, at most `limit` bytes; a valid name on every system."""
    name = re.sub(r"\W+", "_", text.lower()).strip("_").encode()[:limit].decode(errors="ignore") or "video"
    return f"{name}_" if _DEVICES.fullmatch(name) else name


def vbench_name(text: str, windows: bool = os.name == "nt") -> str:
    """A prompt as the file name that VBench expects.

    Args:
      text: the prompt.
      windows: whether the name must be valid on Windows.

    Raises:
      ValueError: if Windows does not allow one of the characters.
    """
    excluded = _WINDOWS_EXCLUDED.search(text) if windows else None
    if excluded:
        raise ValueError(
            f"vbench_names: the prompt {text!r} has {excluded[0]!r}, which no file name of Windows may have; "
            "generate on another system, or leave vbench_names out"
        )
    return _VBENCH_EXCLUDED.sub(" ", text)


def check_folders(names: Sequence[str], out: Path) -> None:
    """Checks before any slow work that no folder has the name of a file to write."""
    for name in names:
        for suffix in SUFFIXES:
            if (out / f"{name}{suffix}").is_dir():
                raise ValueError(f"out: {out / name}{suffix} is a folder: a file of that name is to be written")


def free_names(
    names: Sequence[str],
    out: Path,
    if_exists: str,
    suffixes: Sequence[str] = SUFFIXES,
    needed: Sequence[str] = SUFFIXES[:1],
) -> list[str | None]:
    """Names that overwrite no file unless requested.

    Args:
      names: distinct names without suffix.
      out: folder of the files.
      if_exists: what to do if a file of that name exists: "number" the new one, "replace" the old one, "skip" the
        video, or "refuse".
      suffixes: suffixes of the files to write.
      needed: suffixes of the files that a video has; only if all of them exist does "skip" skip it.

    Returns:
      The names to use, in order; None for videos to skip.

    Raises:
      ValueError: a file exists and `if_exists` is "refuse".
    """
    taken, chosen = {name.casefold() for name in names}, []
    for name in names:
        path = next((out / f"{name}{end}" for end in suffixes if (out / f"{name}{end}").exists()), None)
        missing = [end for end in needed if not (out / f"{name}{end}").exists()]
        if path is not None and if_exists == "skip" and missing:
            print(
                f"{path} is there already, {name}{missing[0]} is not: it is made, and existing files are kept",
                flush=True,
            )
        elif path is not None:
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


@contextlib.contextmanager
def reserved_names(
    names: Sequence[str],
    out: Path,
    if_exists: str,
    suffixes: Sequence[str] = SUFFIXES,
    needed: Sequence[str] = SUFFIXES[:1],
) -> Iterator[list[str | None]]:
    """Context manager around `free_names` that keeps other processes from choosing the same names.

    Yields:
      The names to use, see `free_names`, which also has the arguments. "replace" and "skip" reserve nothing.

    Raises:
      ValueError: see `free_names`; also if another process is making a video of that name.
    """
    chosen = free_names(names, out, if_exists, suffixes, needed)
    taken = {name.casefold() for name in (*names, *chosen) if name is not None}
    with contextlib.ExitStack() as stack:
        for i, name in enumerate(names if if_exists in ("number", "refuse") else ()):
            while True:
                free = stack.enter_context(files.reservation(out, chosen[i]))
                # its files may have been finished since they were looked for
                if free and not any((out / f"{chosen[i]}{end}").exists() for end in suffixes):
                    break
                if if_exists == "refuse":
                    path = files.reservation_path(out, name)
                    raise ValueError(
                        f"{out / name}{suffixes[0]} is being made by another process: give another --out or, if that "
                        f"process is gone, remove {path}"
                    )
                chosen[i] = _numbered(name, out, suffixes, taken)
                taken.add(chosen[i].casefold())
        yield chosen


def _what(name: str, if_exists: str) -> str:
    return "it is replaced" if if_exists == "replace" else f"the new one is {name}"


def _numbered(name: str, out: Path, suffixes: Sequence[str], taken: set[str]) -> str:
    number = 2
    while f"{name}_{number}".casefold() in taken or any((out / f"{name}_{number}{end}").exists() for end in suffixes):
        number += 1
    return f"{name}_{number}"
