"""Where compiled programs are kept between runs, and how JAX is told so."""

import os
import platform
import stat
import sys
import time
import warnings
import zlib
from pathlib import Path

VARIABLE = "SF_JAX_CACHE_DIR"
_OFF = ("off", "none", "false", "0")
_DAY = 24 * 60 * 60
_UNUSED = 60 * _DAY  # programs that nobody has read for so long are removed
_WARNINGS = ("Error reading persistent compilation cache entry", "Error writing persistent compilation cache entry")


def cache_folder() -> Path | None:
    """The folder of this package's caches, made if it is missing; None where there is none.

    `SF_JAX_CACHE_DIR` names it, `off` turns caches off; by default it is `sf_jax` in `XDG_CACHE_HOME` or `~/.cache`. A
    folder that cannot be written, or that others can write, is not used: what is in it is run.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value.lower() in _OFF:
        return None
    try:
        folder = Path(value).expanduser() if value else _user_caches() / "sf_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(folder) and _writable(folder):
            return folder.absolute()
        problem = "it is another user's, or everybody can write it" if _writable(folder) else "it cannot be written"
    except (OSError, RuntimeError) as error:  # no home, or one that cannot be written
        problem = getattr(error, "strerror", None) or str(error)
    if value:
        print(f"{VARIABLE} is {value}: {problem}; compiled programs are not kept", file=sys.stderr)
    return None


def is_private(path: Path) -> bool:
    """Whether this user owns a file or folder and not everybody can write it; on Windows, which has no such bits."""
    status, user = path.stat(), getattr(os, "getuid", None)
    return user is None or status.st_uid == user() and not status.st_mode & stat.S_IWOTH


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def keep_compiled(folder: str | Path | None = None) -> Path | None:
    """Lets this process and its children share compiled programs on disk; all commands call it.

    Settings of JAX's own stand: `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=false`
    turns it off. Damaged entries are compiled again, and any number of processes may share the folder. In a folder of
    `cache_folder()`, programs that nobody has read for 60 days are removed.

    Args:
      folder: where; None is `cache_folder()`.

    Returns:
      The folder of JAX's cache; None where nothing is kept.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in _OFF:
        return None
    # Programs of every size: a start needs dozens of small ones, each of which takes longer to compile than to read.
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    compiled = Path(named) if named and folder is None else _compiled_folder(folder)
    if compiled is None:
        return None
    if folder is not None or not named:
        _set("jax_compilation_cache_dir", str(compiled))
    for name, value in settings.items():
        if name.upper() not in os.environ:
            _set(name, value)
    for message in _WARNINGS:  # what cannot be read is compiled
        warnings.filterwarnings("ignore", message=message)
    return compiled


def _compiled_folder(folder: str | Path | None) -> Path | None:
    """The folder of JAX's cache in a folder of caches; programs for a CPU run on no other, and homes are shared."""
    caches = cache_folder() if folder is None else Path(folder).expanduser().absolute()
    if caches is None:
        return None
    compiled = caches / f"compiled-{processor()}"
    try:
        compiled.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(compiled):
            return None
    except OSError:
        return None
    _remove_unused(compiled)
    return compiled


def _remove_unused(compiled: Path) -> None:
    """Removes old programs, those of former versions of this package and JAX among them; looks once a day."""
    looked, now = compiled / "looked", time.time()
    try:
        if looked.exists() and now - looked.stat().st_mtime < _DAY:
            return
        looked.touch()
        for path in compiled.rglob("*"):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and now - max(status.st_atime, status.st_mtime) > _UNUSED:
                path.unlink()
    except OSError:  # another process was there first, or the disk is read-only: the next day will do
        pass


def _set(name: str, value: str | float) -> None:
    """Changes a setting of JAX, also one that is not imported yet, and for child processes."""
    os.environ[name.upper()] = str(value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name, value)


def processor() -> str:
    """A short name of this machine's processor and of what it can do: programs compiled for a CPU run on no other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    except OSError:  # no Linux
        names = [platform.processor()]
    return f"{platform.machine()}-{zlib.crc32(''.join(names).encode()):08x}"


def _user_caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
