"""Writes and reads datasets shard by shard, so that a killed writer loses at most one shard.

A folder contains `recipe.json` (the inputs of the records, written first) and the ArrayRecord shards, each written
atomically. Written last are `shards.json` (hashes that detect replaced shards) and the metadata that tfds needs for
`tfds.builder_from_directory(folder)`. Several processes may fill one folder. The bytes of a shard depend only on its
examples.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, example_serializer
from tqdm import tqdm

from sf_jax import strict_json
from sf_jax.files import check_writable, reason_of, remove_leftovers, replacing, temporary_name

RECIPE, INFO, FEATURES, DIGESTS = "recipe.json", "dataset_info.json", "features.json", "shards.json"
VERSION = "1.0.0"
# The parts of a shard that are hashed (see `file_digests`); rename the method when they change.
_METHOD, _BLOCKS, _BLOCK, _END = "8 blocks and the end", 8, 1 << 12, 1 << 17
_MISSING = "run the command that made the dataset again"
_AGAIN = "remove this file and run the command that made it again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file with the entries [start, stop) of a split; file `index` of `count`."""

    split: str
    index: int
    count: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset to write.

    Attributes:
      folder: its folder.
      name: its name in tfds.
      features: tfds features of a record.
      recipe: everything that determines the records, JSON-serializable; records with another recipe are not reused.
      splits: number of entries of each split; an entry gives one record, or none if `make` skips it.
      per_shard: entries per shard.
      field: name of the folder in error messages.
    """

    folder: Path
    name: str
    features: tfds.features.FeaturesDict
    recipe: Mapping[str, Any]
    splits: Mapping[str, int]
    per_shard: int
    field: str = "out"

    @property
    def full_recipe(self) -> dict[str, Any]:
        """The contents of `recipe.json`."""
        whole = {"dataset": self.name, "splits": dict(self.splits), "per_shard": self.per_shard, **self.recipe}
        return json.loads(json.dumps(whole))

    @functools.cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in order."""
        found = []
        for split, entries in self.splits.items():
            count = max(1, -(-entries // self.per_shard))
            for i in range(count):
                found.append(Shard(split, i, count, i * self.per_shard, min(entries, (i + 1) * self.per_shard)))
        return tuple(found)

    def path(self, shard: Shard) -> Path:
        """The file of a shard, with the name that tfds expects."""
        return self.folder / _file_name(self.name, shard.split, shard.index, shard.count)


Make = Callable[[Shard], Iterable[dict[str, Any]]]


def _file_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def begin(plan: Plan) -> None:
    """Creates the folder and writes the recipe.

    Raises:
      ValueError: If the folder cannot be written, or contains something else.
    """
    path = plan.folder / RECIPE
    if not path.is_file():
        if (plan.folder / INFO).is_file():
            raise ValueError(
                f"{plan.field} {plan.folder} holds a dataset without {RECIPE}, not one of sf_jax: use another folder"
            )
        check_writable(plan.folder, plan.field)
        with replacing(path) as unfinished:
            unfinished.write_text(
                json.dumps(plan.full_recipe, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8"
            )
    check_recipe(plan)
    remove_leftovers(plan.folder)


def check_recipe(plan: Plan) -> None:
    """Raises if the folder's records have another recipe, naming the differences."""
    saved, wanted = read_recipe(plan.folder), plan.full_recipe
    differ = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if differ:
        what = "; ".join(f"{key} {_short(saved.get(key))}, wanted {_short(wanted.get(key))}" for key in differ)
        raise ValueError(
            f"{plan.field} {plan.folder} holds {plan.name} of another recipe ({what}): remove the folder or use "
            "another one"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_recipe(folder: Path | str) -> dict[str, Any]:
    """Reads the recipe in a folder; raises a ValueError if that fails."""
    path = Path(folder) / RECIPE
    try:
        return strict_json.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove the folder and make the dataset again") from error


def missing(plan: Plan) -> tuple[Shard, ...]:
    """The shards that do not exist yet."""
    return tuple(shard for shard in plan.shards if not plan.path(shard).is_file())


def _array_record():
    """The module that reads and writes records.

    Raises:
      ImportError: if it is not installed; there is none for Windows.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ImportError(
            "datasets need the package array_record, of which there is none for Windows: use WSL, Linux or macOS"
        ) from error
    return array_record_module


def write_shard(plan: Plan, shard: Shard, examples: Iterable[dict[str, Any]]) -> None:
    """Writes one shard atomically: it gets its name when it is complete and flushed to disk.

    Raises:
      OSError: If it cannot be written.
    """
    path = plan.path(shard)
    serializer = example_serializer.ExampleSerializer(plan.features.get_serialized_info())
    with replacing(path) as unfinished:
        with writing(path):
            writer = _array_record().ArrayRecordWriter(str(unfinished), "group_size:1")
        try:
            for example in examples:
                record = serializer.get_tf_example(plan.features.encode_example(example))
                with writing(path):
                    # `serialize_example` would order the fields differently in every process
                    writer.write(record.SerializeToString(deterministic=True))
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        with writing(path):
            writer.close()
        with open(unfinished, "r+b") as file:  # Windows flushes only writable files
            os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what tfds and its C++ writer raise, such as on a full disk, into an error that names the path."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = reason_of(error)
        raise OSError(f"cannot write {path} ({reason}): make room, or choose another folder") from error


def write(plan: Plan, make: Make, process_index: int = 0, process_count: int = 1) -> bool:
    """Writes this process's missing shards; once all shards exist, also writes the metadata for tfds.

    Shard `i` belongs to process `i % process_count`. The processes share nothing but the folder.

    Args:
      plan: the dataset to write.
      make: (shard) -> its examples in order, at most one per entry; called for missing shards only.
      process_index: index of this process.
      process_count: number of processes.

    Returns:
      Whether the dataset is complete.

    Raises:
      ValueError: If the folder cannot be written, contains another dataset, or has a damaged shard.
      OSError: If the disk is full.
    """
    check_processes(process_index, process_count)
    begin(plan)
    own = plan.shards[process_index::process_count]
    todo = [shard for shard in own if not plan.path(shard).is_file()]
    if todo:
        # Outdated metadata: a shard that was removed may get another number of records.
        for name in (DIGESTS, INFO):
            (plan.folder / name).unlink(missing_ok=True)
        total = sum(shard.stop - shard.start for shard in own)
        done = total - sum(shard.stop - shard.start for shard in todo)
        with tqdm(total=total, initial=done, desc=plan.name, unit="record", dynamic_ncols=True) as bar:
            for shard in todo:
                write_shard(plan, shard, counted(make(shard), bar, shard))
    return finish(plan)


def counted(examples: Iterable[dict[str, Any]], bar: tqdm, shard: Shard) -> Iterator[dict[str, Any]]:
    """Yields the examples and updates the progress bar; skipped entries are added at the shard's end."""
    left = shard.stop - shard.start
    for example in examples:
        yield example
        left -= 1
        bar.update(1)
    bar.update(left)


def check_processes(process_index: int, process_count: int) -> None:
    """Validates the index and number of processes."""
    if process_count < 1:
        raise ValueError(f"process_count is {process_count}: it must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}: it must be in [0, process_count = {process_count})")


def finish(plan: Plan) -> bool:
    """Writes the metadata for tfds if all shards exist, and returns whether they do. Every process may call it.

    Raises:
      ValueError: If a shard is damaged, or a split has no records.
    """
    if missing(plan):
        return False
    if (plan.folder / INFO).is_file() and (plan.folder / FEATURES).is_file():
        if not (plan.folder / DIGESTS).is_file():  # written by an earlier version, or shards rewritten
            with contextlib.suppress(ValueError, OSError):  # the folder may be read-only
                _write_digests(plan)
        return True
    _write_digests(plan)
    lengths = dict(zip(plan.shards, _counts([plan.path(shard) for shard in plan.shards]), strict=True))
    infos = []
    for split in plan.splits:
        own = [shard for shard in plan.shards if shard.split == split]
        counts = [lengths[shard] for shard in own]
        if not sum(counts):
            for shard in own:  # so that the next run tries again
                plan.path(shard).unlink(missing_ok=True)
            raise ValueError(
                f"{plan.field} {plan.folder}: not a single record was made of {plan.splits[split]} inputs: remedy what "
                "was said of them, and give the command again"
            )
        size = sum(plan.path(shard).stat().st_size for shard in own)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=counts, num_bytes=size))
    identity = dataset_info.DatasetIdentity(
        name=plan.name, version=tfds.core.Version(VERSION), data_dir=str(plan.folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=plan.features,
        description=json.dumps(plan.full_recipe, sort_keys=True, ensure_ascii=False),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    unfinished = plan.folder / temporary_name("metadata")
    unfinished.mkdir()
    try:
        info.write_to_directory(unfinished)
        # INFO comes last, as it marks the dataset as complete.
        for name in sorted(os.listdir(unfinished), key=lambda name: name == INFO):
            os.replace(unfinished / name, plan.folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _write_digests(plan: Plan) -> None:
    paths = [plan.path(shard) for shard in plan.shards]
    table = {path.name: digest for path, digest in zip(paths, file_digests(paths), strict=True)}
    with replacing(plan.folder / DIGESTS) as unfinished:
        unfinished.write_text(json.dumps({"method": _METHOD, "files": table}, indent=1, sort_keys=True))


def _damaged(path: Path, reason: Any, remedy: str = _AGAIN) -> ValueError:
    reason = " ".join(str(reason).split())[:160] or "it is cut short"
    return ValueError(f"{path} is damaged ({reason}): {remedy}")


def _count(path: Path, remedy: str = _AGAIN) -> int:
    """The number of records in a shard, from its footer."""
    try:
        reader = _array_record().ArrayRecordReader(str(path))
        count, good = reader.num_records(), reader.ok()
        reader.close()
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise _damaged(path, error, remedy) from error
    if not good:
        raise _damaged(path, "it is cut short", remedy)
    return count


def _counts(paths: Sequence[Path], remedy: str = _AGAIN) -> list[int]:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # network file systems are slow
        return list(pool.map(lambda path: _count(path, remedy), paths))


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A hash of a small part of each shard, so that terabytes of shards take seconds.

    It covers the file's length, `_BLOCKS` evenly spread blocks of 4 KiB, and the last 128 KiB, where ArrayRecord stores
    the offset of every record. Shorter files are hashed whole. Compressed records seldom have equal lengths, so nearly
    every change is detected; in a long shard, replacing a record by one of exactly the same length is not.

    Raises:
      OSError: if a file cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(_file_digest, paths))


def _file_digest(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(f"{size} ".encode())
    with open(path, "rb") as file:
        if size <= _BLOCKS * _BLOCK + _END:
            digest.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek(i * (size - _END) // _BLOCKS)
                digest.update(file.read(_BLOCK))
            file.seek(size - _END)
            digest.update(file.read())
    return digest.hexdigest()[:32]


def _check_digests(folder: Path, files: Sequence[Path], remedy: str) -> tuple[str, ...]:
    """Checks shards against the folder's hashes, if it has any, and returns these hashes."""
    path = folder / DIGESTS
    if not path.is_file():  # neither earlier versions nor tfds write it
        return ()
    try:
        stored = strict_json.read(path)
        table = stored["files"]
        if stored["method"] != _METHOD or not isinstance(table, dict):
            raise ValueError("it was made by another version")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error, remedy) from error
    digests = file_digests(files)
    for file, digest in zip(files, digests, strict=True):
        if table.get(file.name) != digest:
            raise _damaged(file, f"it is not the file that was written here, by {DIGESTS}", remedy)
    return tuple(digests)


@dataclasses.dataclass(frozen=True)
class Records:
    """Random access to the records of one split, decoded by tfds.

    Attributes:
      source: tfds' data source.
      files: the shards.
      ends: for each shard, the index after its last record.
      remedy: what to do about a damaged shard, for messages.
      recipe: the inputs of the records, if known.
      digests: hashes of the shards, if known.
    """

    source: Any
    files: tuple[Path, ...]
    ends: tuple[int, ...]
    remedy: str
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digests: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the shards in order (see `file_digests`); it changes with the records and their order."""
        digests = self.digests or file_digests(self.files)
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.source[index]
        except Exception as error:  # C++ and protobuf raise various types
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}") from error
            raise _damaged(self.files[bisect.bisect_right(self.ends, index)], error, self.remedy) from error


def open_split(
    folder: Path, name: str, split: str, *, if_missing: str = _MISSING, if_damaged: str = _AGAIN, **known: Any
) -> Records:
    """Opens a split of any dataset that tfds can read.

    Args:
      folder: its folder.
      name: its name.
      split: the split to open.
      if_missing: what to do if a file is missing, for messages.
      if_damaged: what to do if a file is damaged, for messages.
      **known: other fields of the result.

    Raises:
      ValueError: If a file is missing or damaged.
    """
    for path in (folder / INFO, folder / FEATURES):
        if not path.is_file():
            raise ValueError(f"{path} is missing: {if_missing}")
        try:
            strict_json.read(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error, if_damaged) from error
    try:
        builder = tfds.builder_from_directory(str(folder))
        lengths = builder.info.splits[split].shard_lengths
        if not lengths:
            raise ValueError(f"its split {split} has no shards")
    except Exception as error:  # tfds, JSON and protobuf raise various types
        raise _damaged(folder / INFO, error, if_damaged) from error
    files = tuple(folder / _file_name(name, split, i, len(lengths)) for i in range(len(lengths)))
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing: {if_missing}")
    for path, seen, told in zip(files, _counts(files, if_damaged), lengths, strict=True):
        if seen != told:
            raise _damaged(path, f"{seen} records, {told} expected", if_damaged)
    digests = _check_digests(folder, files, if_damaged)
    ends = tuple(itertools.accumulate(lengths))
    try:
        source = builder.as_data_source(split)
    except Exception as error:  # such as another file format
        raise _damaged(folder / INFO, error, if_damaged) from error
    return Records(source, files, ends, if_damaged, digests=digests, **known)


def open_records(
    folder: Path | str, name: str, split: str = "train", field: str = "data", made_by: str = ""
) -> Records:
    """Opens a split of a dataset that `write` has completed.

    Args:
      folder: its folder.
      name: its name in the plan.
      split: the split to open.
      field: name of the folder in error messages.
      made_by: the command that makes such datasets, for messages.

    Raises:
      ValueError: If the dataset does not exist or is incomplete, or a shard is missing or damaged.
    """
    folder = Path(folder)
    hint = f"; {made_by} makes one" if made_by else ""
    if not (folder / INFO).is_file():
        there = "only a part of" if any(folder.glob(f"{name}-*.array_record-*")) else "no"
        again = ": run the command that makes it again, it goes on where it stopped" if there != "no" else ""
        raise ValueError(f"{field}: {folder} has {there} dataset {name}{again}{hint}")
    recipe = read_recipe(folder)
    if recipe.get("dataset") != name:
        raise ValueError(f"{field}: {folder} holds the dataset {recipe.get('dataset')!r}, {name!r} is needed{hint}")
    return open_split(folder, name, split, if_missing=f"{_MISSING}{hint}", recipe=recipe)
