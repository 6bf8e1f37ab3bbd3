"""The persistent cache of compiled programs, and the JAX settings that enable it."""

import contextlib
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
_UNUSED = 60 * _DAY  # programs that have not been read for this long are removed
_WARNINGS = ("Error reading persistent compilation cache entry", "Error writing persistent compilation cache entry")


def cache_folder() -> Path | None:
    """The folder of this package's caches, created if missing; None if there is none.

    `SF_JAX_CACHE_DIR` sets it, and `off` disables caches; the default is `sf_jax` in `XDG_CACHE_HOME` or `~/.cache`. A
    folder that is not writable, is world-writable or belongs to another user is not used, as its contents are executed.
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
    except (OSError, RuntimeError) as error:  # no home directory, or it is not writable
        problem = getattr(error, "strerror", None) or str(error)
    if value:
        print(f"{VARIABLE} is {value}: {problem}; compiled programs are not kept", file=sys.stderr)
    return None


def is_private(path: Path) -> bool:
    """Whether this user owns a file or folder that is not world-writable; always True on Windows, without such bits."""
    status, user = path.stat(), getattr(os, "getuid", None)
    return user is None or status.st_uid == user() and not status.st_mode & stat.S_IWOTH


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def keep_compiled(folder: str | Path | None = None) -> Path | None:
    """Enables a cache of compiled programs on disk for this process and its children; all commands call it.

    JAX's own settings take precedence: `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=false` disables the cache. Damaged entries are recompiled, and any number of processes
    may share the folder. Programs that have not been read for 60 days are removed, except from a folder that
    `JAX_COMPILATION_CACHE_DIR` names.

    Args:
      folder: the folder of caches; None is `cache_folder()`.

    Returns:
      The folder of JAX's cache; None if there is no cache.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in _OFF:
        return None
    # Keeps programs of every size: a start needs dozens of small ones, each faster to read than to compile.
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
    for message in _WARNINGS:  # entries that cannot be read are recompiled
        warnings.filterwarnings("ignore", message=message)
    return compiled


def _compiled_folder(folder: str | Path | None) -> Path | None:
    """The folder of JAX's cache in a folder of caches, one per processor: CPU programs are specific to it."""
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
    """Removes unused programs, such as those of earlier versions of this package and JAX, at most once a day."""
    looked, now = compiled / "looked", time.time()
    try:
        if looked.exists() and now - looked.stat().st_mtime < _DAY:
            return
        looked.touch()
        paths = list(compiled.rglob("*"))
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError):  # another process removed it first, or it cannot be removed
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and now - max(status.st_atime, status.st_mtime) > _UNUSED:
                path.unlink()


def _set(name: str, value: str | float) -> None:
    """Changes a setting of JAX, for child processes too, whether or not JAX is already imported."""
    os.environ[name.upper()] = str(value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name, value)


def processor() -> str:
    """A short name of this machine's processor and its features, as CPU programs are specific to them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    except OSError:  # not Linux
        names = [platform.processor()]
    return f"{platform.machine()}-{zlib.crc32(''.join(names).encode()):08x}"


def _user_caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
