"""Reads users' prompt files and folders of captioned videos."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sf_jax import strict_json
from sf_jax.messages import quoted, shortened

CAPTION_KEYS = ("prompt", "caption", "text")
# A GIF counts as a video. Files named in a metadata table may have any suffix.
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".qt", ".3gp", ".3g2", ".mpg", ".mpeg", ".m2v", ".vob"),
    *(".ts", ".mts", ".m2ts", ".ogv", ".ogg", ".flv", ".y4m"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
_OTHER_SUFFIXES = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx", ".xls", ".ods", ".docx", ".pdf")
METADATA = ("metadata.csv", "metadata.jsonl")


@dataclasses.dataclass(frozen=True)
class Video:
    """A captioned video.

    Attributes:
      name: its path relative to the folder, with slashes.
      path: a video file, or a folder of frames.
      caption: its caption.
    """

    name: str
    path: Path
    caption: str

    def frames(self) -> list[Path]:
        """The images in a folder of frames, sorted by the numbers in their names; empty for a video file."""
        if not self.path.is_dir():
            return []
        images = [file for file in self.path.iterdir() if _is_kind(file, IMAGE_SUFFIXES)]
        return sorted(images, key=lambda file: _by_number(file.name))


def _by_number(name: str) -> list:
    """A key that sorts names by the numbers in them; numbers may have any length, with ASCII digits only."""
    parts = re.split(r"([0-9]+)", name)  # numbers are at odd indices
    return [(len(part.lstrip("0")), part.lstrip("0"), part) if i % 2 else part for i, part in enumerate(parts)]


def read_texts(
    path: Path | str, field: str = "prompts", keys: tuple[str, ...] = CAPTION_KEYS, paired: bool = False
) -> list[str]:
    """Reads a list of texts, one per line or from a table; the file's suffix selects the format.

    In a .csv or .tsv file, the texts are in the column named by the first of `keys` that it has. A .jsonl file has
    objects with such a key. A .json file is a list of texts or of such objects.

    Args:
      path: the file; blank lines and cells are skipped.
      field: its name in error messages.
      keys: allowed names of the column or key.
      paired: whether each text belongs to one of another file; then only the end may be blank.

    Raises:
      ValueError: if the file cannot be read, has an unsupported format, or contains no text.
    """
    path = Path(path)
    if (suffix := path.suffix.lower()) in _OTHER_SUFFIXES:
        raise ValueError(f"{field}: {path} is {suffix}: give a text a line, or {', '.join(_TABLE_SUFFIXES)}")
    if suffix in _TABLE_SUFFIXES:
        texts = [_value(row, keys, where) for where, row in _rows(path, field)]
    else:
        texts = _text(path, field).split("\n")  # splitlines would also split at U+2028
    texts = [text.strip() for text in texts]
    while texts and not texts[-1]:
        texts.pop()
    if paired and "" in texts:
        raise ValueError(
            f"{field}: {path}: text {texts.index('') + 1} is blank, so it is unclear which prompt each later name "
            "belongs to: remove it in both files"
        )
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"{field}: {path} holds no {field.removesuffix('s')}: give one a line")
    return texts


def read_prompts(path: Path | str, field: str = "prompts") -> tuple[list[str], int]:
    """Reads prompts; see `read_texts`.

    Returns:
      The prompts without duplicates, and the number of duplicates.

    Raises:
      ValueError: see `read_texts`.
    """
    texts = read_texts(path, field)
    unique = list(dict.fromkeys(texts))
    return unique, len(texts) - len(unique)


def find_videos(folder: Path | str, field: str = "videos") -> tuple[list[Video], str]:
    """Finds the videos in a folder and their captions.

    A `metadata.csv` or `metadata.jsonl` lists them (`file_name`, and `text`, `caption` or `prompt`). Without one, all
    video files and all folders of images count. The caption of `NAME.mp4`, or of the folder `NAME`, is in `NAME.txt`
    next to it.

    Args:
      folder: the folder.
      field: its name in error messages.

    Returns:
      The videos in the order of the metadata, else sorted by name; and one line about what is skipped, or "": videos
      missing from the metadata, or caption files whose video has an unknown type.

    Raises:
      ValueError: if there are no videos, a video has no caption, or the metadata lists a file not in the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{field}: {folder} is no folder: give the folder that holds the videos")
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{field}: {folder} has {' and '.join(METADATA)}: keep one of them")
    there = _videos_in(folder)
    if not there:
        kinds = " ".join(VIDEO_SUFFIXES)
        raise ValueError(f"{field}: {folder} has no video ({kinds}) and no folder of images")
    if tables:
        return _of_table(folder, tables[0], there, field)
    found, lost = [], []
    for path in there:
        text = _caption_file(path)
        caption = _text(text, field).strip() if text.is_file() else ""
        found.append(Video(_name(path.relative_to(folder)), path, " ".join(caption.split())))
        lost += [] if caption else [found[-1].name]
    if lost:
        raise ValueError(
            f"{field}: {len(lost)} of {len(found)} videos in {folder} have no caption ({_few(lost)}): give each a "
            f".txt of its name, or the folder a {METADATA[0]} with file_name and text"
        )
    return found, _passed_over(folder, {_caption_file(path) for path in there})


def _caption_file(path) -> Path:
    return path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")


def _passed_over(folder, used) -> str:
    """One line about caption files without a video, or the files of their names, such as videos of unknown types."""
    captioned, stems = {file.parent for file in used}, {}
    for file in sorted(_files_in(folder)):
        if file.parent in captioned and not file.name.startswith("."):
            stems.setdefault(file.with_suffix(""), []).append(file)
    names = []
    for files in stems.values():
        texts = [file for file in files if _is_kind(file, (".txt",))]
        if texts and used.isdisjoint(texts):
            names += [_name(file.relative_to(folder)) for file in files if file not in texts or files == texts]
    return f"{len(names)} files beside the videos are no videos of a known kind ({_few(names)})" if names else ""


def digest(texts: Iterable[str]) -> str:
    """A short hash of a sequence of texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def _of_table(folder, table, there, field) -> tuple[list[Video], str]:
    """The videos listed in a metadata table."""
    found = []
    for where, row in _rows(table, field):
        name, caption = _value(row, ("file_name",), where).strip(), _value(row, CAPTION_KEYS, where).strip()
        if not name or not caption:
            raise ValueError(f"{where} lacks {'a caption' if name else 'file_name'}")
        path = Path(os.path.normpath(folder / name))
        if not path.is_relative_to(inside := os.path.normpath(folder)) or path == Path(inside):
            raise ValueError(f"{where}: file_name is {quoted(name)}: it must be in the folder {folder}")
        found.append(Video(_name(path.relative_to(inside)), path, caption))
    lost = [video.name for video in found if not os.path.exists(video.path)]  # Path.exists raises on long names
    if lost:
        raise ValueError(f"{field}: {len(lost)} files that {table} names are not there ({_few(lost)})")
    if not found:
        raise ValueError(f"{field}: {table} names no video")
    unnamed = {os.path.normpath(path) for path in there} - {str(video.path) for video in found}
    return found, f"{len(unnamed)} videos that its metadata does not name are left out" if unnamed else ""


def _videos_in(folder) -> list[Path]:
    """Video files, and folders that contain images but no videos, at any depth."""
    files = _files_in(folder)
    found = {file for file in files if _is_kind(file, VIDEO_SUFFIXES)}
    mixed = {folder, *(file.parent for file in found)}
    found |= {file.parent for file in files if file.parent not in mixed and _is_kind(file, IMAGE_SUFFIXES)}
    return sorted(found)


def _files_in(folder) -> list[Path]:
    """Files at any depth, also behind links to folders elsewhere, but not in hidden folders."""
    files, tops, seen = [], [folder], set()
    while tops:
        for place, folders, names in os.walk(tops.pop(0), onerror=_unreadable):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [path for name in folders if (path := Path(place, name)).is_symlink()]  # not entered by this walk
            files += [Path(place, name) for name in names]
    return files


def _unreadable(error: OSError) -> None:
    """Raises what keeps a folder from being listed, unless it belongs to somebody else."""
    if not isinstance(error, PermissionError):
        raise ValueError(f"videos: cannot list {error.filename} ({error.strerror})") from error


def _is_kind(file, suffixes) -> bool:
    return file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()


def _few(names) -> str:
    return shortened(", ".join(names[:4])) + (", ..." if len(names) > 4 else "")


def _text(path, field) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{field}: cannot read {path} ({reason}): it must be a text file in UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{field}: {path} has NUL characters: it must be a text file in UTF-8, not in UTF-16")
    return text


def _rows(path, field) -> list[tuple[str, Mapping | str]]:
    """The rows of a table, each with its location for messages; rows of a .json file may be strings."""
    text, suffix = _text(path, field), path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, text, field)
    if suffix == ".json" and (rows := _json_rows(path, text, field)) is not None:
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{field}: {path} line {number}"
        try:
            row = strict_json.parse(line, None, _unique, finite=False)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where} is {type(row).__name__}: it must be an object such as {{"text": "a cat"}}')
        rows.append((where, row))
    return rows


def _json_rows(path, text, field) -> list[tuple[str, Mapping | str]] | None:
    """The entries of a .json file's list, or its only object; None if it has one object per line."""
    lines = text.strip().split("\n")
    try:
        whole = strict_json.parse(text, None, _unique, finite=False)
    except ValueError as error:
        if len(lines) > 1 and lines[0].strip().startswith("{") and lines[0].strip().endswith("}"):
            return None
        raise ValueError(f"{field}: {path} is no JSON ({error})") from error
    if not isinstance(whole, list):
        if isinstance(whole, dict):
            return [(f"{field}: {path}", whole)]
        raise ValueError(f"{field}: {path} holds {type(whole).__name__}: it must hold a list of texts or of objects")
    rows = [(f"{field}: {path} entry {number}", row) for number, row in enumerate(whole, 1)]
    for where, row in rows:
        if not isinstance(row, (dict, str)):
            raise ValueError(f'{where} is {type(row).__name__}: it must be a text or an object as {{"text": "a cat"}}')
    return rows


def _unique(pairs: list) -> dict:
    """A JSON object; raises on duplicates of the keys that are read."""
    names = [name for name, _ in pairs]
    _check_unique(names, "key")
    return dict(pairs)


def _check_unique(names: Sequence[str], what: str) -> None:
    twice = next((name for name in (*CAPTION_KEYS, "file_name", "name") if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"the {what} {twice} is there {names.count(twice)} times, keep one")


def _csv_rows(path, text, field) -> list[tuple[str, dict]]:
    """The rows of a .tsv file, or of a .csv file with commas, semicolons or tabs as separators."""
    header, known = text.split("\n", 1)[0].strip(), {*CAPTION_KEYS, "file_name", "name"}
    marks = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
    cells = {mark: {cell.strip().strip('"') for cell in header.split(mark)} for mark in marks}
    separator = next((mark for mark, names in cells.items() if names & known), marks[0])
    try:
        reader = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _check_unique(reader.fieldnames, "column")
        table = list(reader)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{field}: {path} is no table of separated values ({error})") from error
    rows = []
    for number, row in enumerate(table, 1):
        where = f"{field}: {path} row {number}"
        if None in row:
            raise ValueError(f"{where} has more cells than the header: put texts with {separator!r} into quotes")
        rows.append((where, {name: "" if value is None else value for name, value in row.items()}))
    return rows


def valid_text(text: str) -> str:
    """Replaces lone surrogates, which cannot be encoded in a file, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _name(path: Path) -> str:
    r"""A relative path with slashes; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _value(row, keys, where) -> str:
    """The text under the first key that a row has; the row itself if it is a string."""
    key = None if isinstance(row, str) else next((key for key in keys if key in row), None)
    if key is None and not isinstance(row, str):
        has = shortened(", ".join(map(str, row))) or "nothing"
        raise ValueError(f"{where} has {has}: it must have {' or '.join(keys)}")
    value = row if key is None else row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {quoted(value)}: it must be a text")
    if "\0" in value:
        raise ValueError(f"{where} has a NUL character: remove it")
    return valid_text(value)
