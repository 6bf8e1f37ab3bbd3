"""Datasets that are made once and read often, written shard by shard so that a killed writer loses one shard at most.

A folder holds `recipe.json` (what the records were made from, written first), the ArrayRecord shards (each is there
whole or not at all) and, written last, `shards.json` (hashes by which other shards are noticed) and what tfds needs to
read them: `tfds.builder_from_directory(folder)`. Several processes may fill one folder. The bytes of a shard depend on
its examples alone.
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
# What of a shard is hashed, see `file_digests`; another choice is another method.
_METHOD, _BLOCKS, _BLOCK, _END = "8 blocks and the end", 8, 1 << 12, 1 << 17
_MISSING = "run the command that made the dataset again"
_AGAIN = "remove this file and run the command that made it again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file: entries [start, stop) of a split, the `index`-th of `count` files."""

    split: str
    index: int
    count: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset to be written.

    Attributes:
      folder: where.
      name: its name for tfds.
      features: tfds features of a record.
      recipe: everything that determines the records, JSON-serializable; records of another recipe are not reused.
      splits: entries of each split; an entry gives one record, or none where `make` leaves it out.
      per_shard: entries of a shard.
      field: what error messages call the folder.
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
        """What `recipe.json` holds."""
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
        """The file of a shard, named as tfds wants it."""
        return self.folder / _file_name(self.name, shard.split, shard.index, shard.count)


Make = Callable[[Shard], Iterable[dict[str, Any]]]


def _file_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def begin(plan: Plan) -> None:
    """Makes the folder, and leaves the recipe there.

    Raises:
      ValueError: The folder cannot be written, or holds something else.
    """
    path = plan.folder / RECIPE
    if not path.is_file():
        if (plan.folder / INFO).is_file():
            raise ValueError(
                f"{plan.field} {plan.folder} holds a dataset without {RECIPE}, not one of sf_jax: use another folder"
            )
        check_writable(plan.folder, plan.field)
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(plan.full_recipe, indent=1, sort_keys=True, ensure_ascii=False))
    check_recipe(plan)
    remove_leftovers(plan.folder)


def check_recipe(plan: Plan) -> None:
    """Refuses a folder whose records were made by another recipe, naming what differs."""
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
    """The recipe in a folder; raises ValueError if it cannot be read."""
    path = Path(folder) / RECIPE
    try:
        return strict_json.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove the folder and make the dataset again") from error


def missing(plan: Plan) -> tuple[Shard, ...]:
    """The shards that are not there yet."""
    return tuple(shard for shard in plan.shards if not plan.path(shard).is_file())


def _array_record():
    """The module that reads and writes records.

    Raises:
      ImportError: this system has none.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ImportError(
            "datasets need the package array_record, of which there is none for Windows: use WSL, Linux or macOS"
        ) from error
    return array_record_module


def write_shard(plan: Plan, shard: Shard, examples: Iterable[dict[str, Any]]) -> None:
    """Writes one shard; it takes its name when it is complete and on the disk.

    Raises:
      OSError: It cannot be written.
    """
    path = plan.path(shard)
    for leftover in plan.folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    serializer = example_serializer.ExampleSerializer(plan.features.get_serialized_info())
    with replacing(path) as unfinished:
        with writing(path):
            writer = _array_record().ArrayRecordWriter(str(unfinished), "group_size:1")
        try:
            for example in examples:
                record = serializer.get_tf_example(plan.features.encode_example(example))
                with writing(path):
                    # not `serialize_example`, whose fields are in another order in every process
                    writer.write(record.SerializeToString(deterministic=True))
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        with writing(path):
            writer.close()
        with open(unfinished, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What tfds and its C++ writer raise where the disk is full, as an error about a file or folder."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = reason_of(error)
        raise OSError(f"cannot write {path} ({reason}): make room, or choose another folder") from error


def write(plan: Plan, make: Make, process_index: int = 0, process_count: int = 1) -> bool:
    """Writes the shards that this process owns and that are missing, then what tfds needs, once all shards are there.

    Shard `i` belongs to process `i % process_count`. The processes need nothing but the folder in common.

    Args:
      plan: what to write.
      make: (shard) -> its examples in order, at most one per entry; called for missing shards only.
      process_index: which process this is.
      process_count: how many there are.

    Returns:
      Whether the dataset is complete.

    Raises:
      ValueError: The folder cannot be written, holds another dataset, or a shard there is damaged.
      OSError: The disk is full.
    """
    check_processes(process_index, process_count)
    begin(plan)
    own = plan.shards[process_index::process_count]
    todo = [shard for shard in own if not plan.path(shard).is_file()]
    if todo:
        # of shards that were there before; where one was removed, its count may change
        for name in (DIGESTS, INFO):
            (plan.folder / name).unlink(missing_ok=True)
        total = sum(shard.stop - shard.start for shard in own)
        done = total - sum(shard.stop - shard.start for shard in todo)
        with tqdm(total=total, initial=done, desc=plan.name, unit="record", dynamic_ncols=True) as bar:
            for shard in todo:
                write_shard(plan, shard, counted(make(shard), bar, shard))
    return finish(plan)


def counted(examples: Iterable[dict[str, Any]], bar: tqdm, shard: Shard) -> Iterator[dict[str, Any]]:
    """Passes examples on and counts them; entries that were left out are counted at the shard's end."""
    left = shard.stop - shard.start
    for example in examples:
        yield example
        left -= 1
        bar.update(1)
    bar.update(left)


def check_processes(process_index: int, process_count: int) -> None:
    """Refuses an index that is none of the processes."""
    if process_count < 1:
        raise ValueError(f"process_count is {process_count}: it must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}: it must be in [0, process_count = {process_count})")


def finish(plan: Plan) -> bool:
    """Writes what tfds needs if all shards are there; returns whether they are. May be called by every process.

    Raises:
      ValueError: A shard is damaged, or a split has no record at all.
    """
    if missing(plan):
        return False
    if (plan.folder / INFO).is_file() and (plan.folder / FEATURES).is_file():
        if not (plan.folder / DIGESTS).is_file():  # made by an earlier version, or shards of it again
            with contextlib.suppress(ValueError, OSError):  # it may be read-only
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
        # last of all the file that says that everything is there
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
    """Records in a shard, by its footer."""
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
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # folders of networks answer slowly
        return list(pool.map(lambda path: _count(path, remedy), paths))


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A hash of each shard, of so little of it that terabytes of shards take seconds.

    Hashed are its length, `_BLOCKS` blocks of 4 KiB that are evenly spread over it, and its last 128 KiB, where
    ArrayRecord says at which byte every record begins. A file that is not longer than all of these is hashed whole.
    Compressed records seldom have the same length, and so nearly every change shows; a record of a long shard that is
    replaced by another of exactly its length does not.

    Raises:
      OSError: a file cannot be read.
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
    """Refuses shards other than those that were written, where the folder says so; returns their hashes if it does."""
    path = folder / DIGESTS
    if not path.is_file():  # earlier versions wrote none, and tfds does not
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
      ends: number of the record after the last one of each shard.
      remedy: what to do about a damaged shard, for messages.
      recipe: what the records were made from, where that is known.
      digests: hashes of the shards, where they are known.
    """

    source: Any
    files: tuple[Path, ...]
    ends: tuple[int, ...]
    remedy: str
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digests: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the shards in their order, see `file_digests`; other records, or another order, change it."""
        digests = self.digests or file_digests(self.files)
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.source[index]
        except Exception as error:  # C++ and protobuf raise whatever they like
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}") from error
            raise _damaged(self.files[bisect.bisect_right(self.ends, index)], error, self.remedy) from error


def open_split(
    folder: Path, name: str, split: str, *, if_missing: str = _MISSING, if_damaged: str = _AGAIN, **known: Any
) -> Records:
    """Opens a split of any dataset that tfds can read.

    Args:
      folder: where it is.
      name: its name.
      split: which part.
      if_missing: what to do where a file is missing, for messages.
      if_damaged: what to do where a file is damaged, for messages.
      **known: other fields of the result.

    Raises:
      ValueError: A file is missing or damaged.
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
    except Exception as error:  # of tfds, JSON and protobuf
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
    except Exception as error:  # another format of files among others
        raise _damaged(folder / INFO, error, if_damaged) from error
    return Records(source, files, ends, if_damaged, digests=digests, **known)


def open_records(
    folder: Path | str, name: str, split: str = "train", field: str = "data", made_by: str = ""
) -> Records:
    """Opens a split of a dataset that `write` has completed.

    Args:
      folder: where it is.
      name: its name, as in the plan.
      split: which part.
      field: what error messages call the folder.
      made_by: the command that makes such datasets, for messages.

    Raises:
      ValueError: There is none, it is incomplete, or a shard is missing or damaged.
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
