"""Inspects a PyTorch file before PyTorch reads it, so that small files cannot expand to gigabytes.

`torch.save` writes an uncompressed zip archive with one pickle, which describes the tensors, and their data. Before
PyTorch 1.6 it wrote several pickles in a row, followed by the data. PyTorch would inflate compressed entries and build
whatever a pickle of any length describes. Nothing in a pickle is executed here.
"""

import collections
import io
import pickletools
import zipfile
from pathlib import Path

# Limits on the pickles' bytes and instructions; a checkpoint of Wan2.1-14B needs a hundredth of them.
MAX_PICKLE, MAX_INSTRUCTIONS = 1 << 24, 1_000_000
# Pickles before the data in the old format: magic number, protocol, machine, tensors, storage keys.
_OLD_PICKLES = 5
_SAVE_AGAIN = "read it with the program that wrote it, and save its state_dict() with torch.save"


def check_container(path: Path) -> int:
    """Raises for a PyTorch file that would expand beyond its size, or that contains programs.

    Args:
      path: a file that starts like a zip archive or a pickle.

    Returns:
      The protocol of its pickles.

    Raises:
      ValueError: naming the file and the problem.
      OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return _check_zip(path)
        file.seek(0)
        content = file.read(MAX_PICKLE)
    _check_pickles(path, content, _OLD_PICKLES)
    return content[1]


def record_sizes(path: Path) -> collections.Counter | None:
    """Counts the data records of an archive by their size in bytes; None for other files."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    return collections.Counter(sizes)


def _check_zip(path: Path) -> int:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, archive, size)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path} is a zip archive, but not one of torch.save: it has no single data.pkl")
            if pickles[0].file_size > MAX_PICKLE:
                raise ValueError(
                    f"{path} describes its tensors in {pickles[0].file_size} bytes, at most {MAX_PICKLE} are read"
                )
            content = archive.read(pickles[0])
    # Odd entry names and encrypted or damaged entries make zipfile raise these, too.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} is no readable PyTorch file, perhaps an unfinished download ({error})") from error
    _check_pickles(path, content, 1)
    return content[1] if content[:1] == b"\x80" else 0


def _check_entries(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError(
            f"{path} is a TorchScript archive, a program with its weights, which is not run: {_SAVE_AGAIN}"
        )
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(
            f"{path} is refused: {packed.filename[:80]!r} in it is compressed ({packed.file_size} bytes in "
            f"{packed.compress_size}), which torch.save never does; unpack it and pack it again without compression"
        )
    total = sum(entry.file_size for entry in entries)
    # A comment could hide a second central directory that PyTorch's reader may use instead.
    if total > size or len(set(names)) != len(names) or archive.comment:
        raise ValueError(f"{path} is refused: its entries of {total} bytes overlap or are hidden in its {size} bytes")


def _check_pickles(path: Path, content: bytes, count: int) -> None:
    """Raises for pickles that are invalid or too long; counts their instructions without executing any."""
    stream, instructions, ended = io.BytesIO(content), 0, 0
    try:
        while ended < count and instructions <= MAX_INSTRUCTIONS:
            for _ in pickletools.genops(stream):
                instructions += 1
                if instructions > MAX_INSTRUCTIONS:
                    break
            ended += 1
    except Exception as error:  # Damaged pickles can make pickletools raise almost anything.
        if len(content) < MAX_PICKLE and ended:
            raise ValueError(f"{path} is a pickle, but not one of torch.save: {_SAVE_AGAIN}") from error
        if len(content) < MAX_PICKLE:
            raise ValueError(f"{path} is no readable PyTorch file, perhaps an unfinished download") from error
        instructions = MAX_INSTRUCTIONS + 1
    if instructions > MAX_INSTRUCTIONS:
        raise ValueError(
            f"{path} is refused: it describes its tensors in more than {MAX_INSTRUCTIONS} instructions or {MAX_PICKLE} "
            "bytes, the most that are read"
        )
