"""Files that appear whole or not at all, and folders that can be written."""

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

# What libraries say of a file system, among much else.
_KNOWN = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Permission denied",
    "Read-only file system",
)


def reason_of(error: BaseException) -> str:
    """Why something failed, in a few words."""
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
    """A path of this machine: the home folder of "~" put in, other places refused.

    Raises:
      ValueError: on an address such as gs://bucket/folder, on a path of Windows on another system, and on what is no
        path at all: an empty text, or one with a NUL.
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
    """Makes a folder, unless it is there, and tries to write in it.

    Args:
      folder: The folder.
      field: What the error message calls it.

    Returns:
      The folder's path.

    Raises:
      ValueError: The folder cannot be made, or nothing can be written in it.
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
    """Refuses a name that writers of datasets do not take.

    Raises:
      ValueError: the path is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} is {path!r}: its name must be UTF-8, choose another folder") from error


@contextlib.contextmanager
def locked(folder: Path, field: str) -> Iterator[None]:
    """Keeps a folder from other processes that ask for it; one that is killed has it no longer.

    Args:
      folder: The folder, in which an empty file `.lock` is made.
      field: What the error message calls it.

    Raises:
      ValueError: Another process has it.
    """
    # No marker file where the file system has no locks: it would stay behind a process that is killed.
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
    """A hidden name for what is to become `name`, which tells `remove_leftovers` whose it is.

    It holds the number of the process and a mark of its machine: processes of several machines have the same numbers.
    """
    name = os.fsdecode(os.fsencode(name)[:190])  # of the 255 bytes that file systems take
    return f".{name}.{os.getpid()}.{_machine()}{secrets.token_hex(4)}.tmp"


def remove_leftovers(folder: str | Path) -> None:
    """Removes what killed processes have left unfinished in a folder, as far as they are known to be gone.

    That is what has a `temporary_name` of a process of this machine that runs no more. Where the machine is not known
    (earlier versions did not write it down) it is also left alone for an hour after it was last changed. What belongs
    to another machine is never touched.
    """
    for path in Path(folder).glob(".*"):
        with contextlib.suppress(OSError):
            if not _is_leftover(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# name, process, machine (unless an earlier version made it) and a random part; and what earlier versions made besides.
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.([0-9a-f]{8})?[0-9a-f]{8}\.tmp", re.DOTALL)
_NAMELESS = re.compile(r"\.metadata\.[a-z0-9_]{8}|\.shared\.[0-9a-f]{8}")
_QUIET_SECONDS = 3600


def _is_leftover(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match and match[2]:
        return match[2] == _machine() and not _is_running(int(match[1]))
    if not match and not _NAMELESS.fullmatch(path.name):
        return False
    return is_quiet(path) and not (match and _is_running(int(match[1])))


def is_quiet(path: Path) -> bool:
    """Whether nothing of a file or folder was changed in the last hour."""
    paths = (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,)
    return time.time() - max(each.lstat().st_mtime for each in paths) > _QUIET_SECONDS


def _machine() -> str:
    """A mark of this machine; containers have process numbers of their own, and count as machines."""
    marks = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no Linux
        marks.append(str(os.stat("/proc/self/ns/pid").st_ino))
    with contextlib.suppress(OSError):  # machines that share a folder may share a name, too
        marks.append(Path("/etc/machine-id").read_text(encoding="utf-8").strip())
    return hashlib.sha256(" ".join(marks).encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder that takes the final name if the block succeeds.

    Args:
      path: The final name; a file there is kept until the new one is complete.

    Yields:
      The path to write to. It is removed if the block raises.

    Raises:
      ValueError: The folder cannot be written.
      OSError: The disk is full.
    """
    path = Path(path)
    check_writable(path.parent, "path")
    if path.is_dir():
        raise ValueError(f"path: got the folder {path}, allowed: the name of a file")
    # Not tempfile, whose files only their owner may read, which the final file would inherit.
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
