"""Atomic file writes, folder locks and writability checks."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

# File-system errors to look for in the longer messages of libraries.
_KNOWN = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Permission denied",
    "Read-only file system",
)


def reason_of(error: BaseException) -> str:
    """The reason of a failure, in a few words."""
    text, seen = "", error
    while seen is not None:
        text += f" {seen} {getattr(seen, 'strerror', None) or ''}"
        seen = seen.__cause__ or seen.__context__
    for known in _KNOWN:
        if known.lower() in text.lower():
            return known
    words = " ".join(str(error).split())
    return f"{words[:160]}{'...' if len(words) > 160 else ''}" or type(error).__name__


def local_path(value: str) -> str:
    """Checks a local path, and expands "~".

    Raises:
      ValueError: if it is an address such as gs://bucket/folder, a Windows path on another system, empty, contains a
        NUL, or begins with an unknown home folder.
    """
    if not value.strip() or "\0" in value:
        raise ValueError(f"the path is {value!r}: give the name of a file or folder, or leave it out")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", value)
    if scheme:
        raise ValueError(
            f"{value} is an address ({scheme[1]}): files of this machine alone are read and written; mount it, or copy "
            "it here and back (gcloud storage cp -r, hf download)"
        )
    if os.name != "nt" and (re.match(r"[A-Za-z]:[\\/]", value) or value.startswith("\\\\")):
        raise ValueError(f"{value} is a path of Windows: give one of this system, such as /mnt/c/videos")
    if not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{value}: there is no home folder of that name") from error


def check_writable(folder: str | Path, field: str = "out") -> Path:
    """Creates a folder if it is missing, and checks that it is writable.

    Args:
      folder: The folder.
      field: Name of the folder's option in the error message.

    Returns:
      The folder's path.

    Raises:
      ValueError: The folder cannot be created, or is not writable.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{field}: cannot write in {folder} ({error.strerror}), allowed: a folder that can be written"
        ) from error
    return folder


def check_utf8(path: str, field: str) -> None:
    """Checks that a name is UTF-8, as the writers of datasets require.

    Raises:
      ValueError: the path is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} is {path!r}: its name must be UTF-8, choose another folder") from error


@contextlib.contextmanager
def locked(folder: Path, field: str) -> Iterator[None]:
    """Locks a folder against other processes that call this; the lock of a killed process is released.

    Args:
      folder: The folder, in which an empty file `.lock` is created.
      field: Name of the folder's option in the error message.

    Raises:
      ValueError: Another process holds the lock.
    """
    # No soft lock on file systems without locks: its marker file would outlive a killed process.
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{field} is {folder}: another run is using it; wait for its end, use another --{field}, or, if its "
            f"machine is gone, remove {folder / '.lock'}"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise
    try:
        yield
    finally:
        lock.release()


def temporary_name(name: str) -> str:
    """A hidden temporary name for the file `name`; `remove_leftovers` reads the owner from it.

    It contains the process id and a hash of the machine, as ids repeat across machines.
    """
    name = os.fsdecode(os.fsencode(name)[:190])  # file systems allow 255 bytes
    return f".{name}.{os.getpid()}.{_machine()}{secrets.token_hex(4)}.tmp"


def remove_leftovers(folder: str | Path) -> None:
    """Removes unfinished files of killed processes from a folder, if the processes are known to be gone.

    These are files with the `temporary_name` of a process on this machine that no longer runs. If the machine is
    unknown (earlier versions did not record it), the file must also be unchanged for an hour. Files of other machines
    are never touched, except reservations of names after a day.
    """
    for path in Path(folder).glob(".*"):
        with contextlib.suppress(OSError):
            if not _is_leftover(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# Name, process, machine (missing in earlier versions) and a random part; then names without a process.
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.([0-9a-f]{8})?[0-9a-f]{8}\.tmp", re.DOTALL)
_NAMELESS = re.compile(r"\.metadata\.[a-z0-9_]{8}|\.shared\.[0-9a-f]{8}")
_RESERVED = re.compile(r"\.[0-9a-f]{24}\.reserved")
_QUIET_SECONDS = 3600
_FOREIGN_SECONDS = 24 * 3600
_WRITING_SECONDS = 60


def _is_leftover(path: Path) -> bool:
    if _RESERVED.fullmatch(path.name):
        return _is_abandoned(path)
    match = _TEMPORARY.fullmatch(path.name)
    if match and match[2]:
        return match[2] == _machine() and not _is_running(int(match[1]))
    if not match and not _NAMELESS.fullmatch(path.name):
        return False
    return is_quiet(path) and not (match and _is_running(int(match[1])))


def reservation_path(folder: Path, name: str) -> Path:
    """The hidden file that reserves a name in a folder."""
    return folder / f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:24]}.reserved"


@contextlib.contextmanager
def reservation(folder: Path, name: str) -> Iterator[bool]:
    """Context manager that reserves a name in a folder with a small hidden file.

    Yields:
      Whether the name was free: nobody holds it. Reservations of processes that have ended count as free, and so do
      those of other machines after a day.
    """
    path = reservation_path(folder, name)
    if _is_abandoned(path):
        path.unlink(missing_ok=True)
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115 (closed below)
    except FileExistsError:
        yield False
        return
    try:
        with file:
            file.write(f"{os.getpid()} {_machine()}")
        yield True
    finally:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    """Whether a reservation's process has ended."""
    try:
        age, owner = time.time() - path.stat().st_mtime, path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # there is none, or it is another user's
        return False
    if len(owner) != 2:  # its writer has been killed, or is writing it
        return age > _WRITING_SECONDS
    if owner[1] == _machine() and os.name != "nt":
        return not _is_running(int(owner[0])) if owner[0].isdecimal() else True
    return age > _FOREIGN_SECONDS


def is_quiet(path: Path) -> bool:
    """Whether a file or folder has been unchanged for an hour."""
    paths = (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,)
    return time.time() - max(each.lstat().st_mtime for each in paths) > _QUIET_SECONDS


def _machine() -> str:
    """A hash of this machine; containers have process ids of their own, and count as machines."""
    marks = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        marks.append(str(os.stat("/proc/self/ns/pid").st_ino))
    with contextlib.suppress(OSError):  # machines that share a folder may also share a host name
        marks.append(Path("/etc/machine-id").read_text(encoding="utf-8").strip())
    return hashlib.sha256(" ".join(marks).encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is renamed to `path` if the block succeeds.

    Args:
      path: The final path; an existing file is kept until the new one is complete.

    Yields:
      The path to write to. It is removed if the block raises.

    Raises:
      ValueError: The folder is not writable, or the path is a folder.
      OSError: The disk is full.
    """
    path = Path(path)
    check_writable(path.parent, "path")
    if path.is_dir():
        raise ValueError(f"path: got the folder {path}, allowed: the name of a file")
    # Not `tempfile`: only the owner can read its files, and the final file would inherit that.
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"cannot write {path}: the disk is full, make room or choose another folder") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
