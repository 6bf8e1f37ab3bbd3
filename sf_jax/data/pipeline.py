"""Input pipelines: seeded, threaded iterators whose state can be saved and restored exactly.

The iterators are grain's: `get_state()` returns a small JSON-serializable dictionary, `set_state()` restores it, and
Orbax can save them directly.

Several processes share a batch: each reads only its own contiguous rows. The example of a row and its random draws
depend only on the seed and the row's place in the whole batch, and so does the state. A run can therefore resume with
another number of processes.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from sf_jax.data.shards import check_processes

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # Counted in batches.


class ClipSource(Protocol):
    """Random access to clips: video uint8 [F, H, W, C], caption str, digit and direction int."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TextEncoder(Protocol):
    """Turns prompts into embeddings; the empty prompt is the unconditional input."""

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeds B prompts: float32 [B, L, D]."""


class EmbeddedPrompts(Protocol):
    """Random access to embedded prompts: text [L, D], caption str."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class LatentSource(Protocol):
    """Random access to encoded clips: latent float32 [F, H, W, C], text [L, D], caption str."""

    @property
    def empty(self) -> np.ndarray:
        """Embedding [L, D] of the empty prompt."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


Collate = Callable[[Sequence[Any]], dict[str, np.ndarray]]


def row_iterator(
    length: int,
    collate: Collate,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    draws: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    name: str = "source",
) -> grain.DatasetIterator:
    """Iterates over batches that `collate` makes from example indices.

    Args:
      length: Number of examples.
      collate: Makes a batch from its rows; a row is an example's index or, with `draws`, (index, numpy generator).
      batch_size: B, over all processes.
      seed: Determines order and generators, 0 to 2**32 - 1.
      shuffle: Whether every epoch has its own random order.
      repeat: Whether to repeat forever, with batches across epochs; otherwise the last batch may be smaller.
      draws: Whether each row gets its own random generator.
      process_index: Index i of this process; it gets the rows [i * B / P, (i + 1) * B / P) of each batch.
      process_count: P.
      name: Name of the examples in error messages.

    Raises:
      ValueError: If an argument is out of range.
    """
    if length < 1:
        raise ValueError(f"{name}: got {length} entries, allowed: 1 or more")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, allowed: 1 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, allowed: 0 to {2**32 - 1}")
    check_processes(process_index, process_count)
    if batch_size % process_count:
        raise ValueError(f"batch_size: got {batch_size}, allowed: a multiple of the {process_count} processes")
    if process_count > 1 and not repeat:
        raise ValueError(f"repeat: got False, allowed: True where there are {process_count} processes")
    # Do not reorder these operations: grain derives each one's seed from its position.
    rows = grain.MapDataset.source(range(length)).seed(seed)
    if shuffle:
        rows = rows.shuffle()
    if repeat:
        rows = rows.repeat()
    if draws:
        rows = rows.random_map(_with_generator)
    size = batch_size // process_count
    own = slice(process_index * size, (process_index + 1) * size)
    batches = rows.batch(batch_size, batch_fn=functools.partial(_own_rows, own=own, collate=collate))
    return iter(batches.to_iter_dataset(_READ))


def _with_generator(index: int, rng: np.random.Generator) -> tuple[int, np.random.Generator]:
    # grain reuses the generator for other rows
    return index, copy.deepcopy(rng)


def _own_rows(rows: Sequence[Any], *, own: slice, collate: Collate) -> dict[str, np.ndarray]:
    return collate(rows[own])


def video_iterator(
    source: ClipSource,
    *,
    batch_size: int,
    num_frames: int,
    seed: int,
    text_encoder: TextEncoder,
    shuffle: bool = True,
    repeat: bool = True,
    text_dropout: float = 0.0,
    cut: tuple[float, int] = (0.0, 0),
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over batches of captioned clips.

    Args:
      source: The clips.
      batch_size: B, over all processes.
      num_frames: Frames of the random temporal crop, F.
      seed: Determines order, crops and dropped captions, 0 to 2**32 - 1.
      text_encoder: Embeds the captions.
      shuffle: Whether every epoch has its own random order.
      repeat: Whether to repeat forever, with batches across epochs. Otherwise the iterator covers one whole epoch, and
        its last batch may be smaller.
      text_dropout: Share of captions replaced by the empty prompt in `text` (`caption` keeps them).
      cut: Share of the clips whose first frames are rolled around the canvas by a random number of whole pixels, and
        the number of these frames. This mimics a context from long ago, when the digit could be anywhere.
      process_index: Index of this process.
      process_count: P; each process gets B / P rows.

    Returns:
      An iterator over dictionaries: video uint8 [B, F, H, W, C], text float32 [B, L, D], caption
      str [B], digit int32 [B], direction int32 [B].

    Raises:
      ValueError: If an argument is out of range.
    """
    _check_dropout(text_dropout)

    def collate(rows):
        clips = [(_crop_and_drop(source[i], rng, num_frames, text_dropout), rng) for i, rng in rows]
        return _collate([_cut(clip, rng, *cut) for clip, rng in clips], text_encoder)

    batches = row_iterator(
        len(source),
        collate,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        repeat=repeat,
        draws=True,
        process_index=process_index,
        process_count=process_count,
    )
    length = len(source[0]["video"])
    if not 1 <= num_frames <= length:
        raise ValueError(f"num_frames: got {num_frames}, allowed: 1 to the clips' {length} frames")
    return batches


def prompt_iterator(
    prompts: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    text_encoder: TextEncoder,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates forever over batches of prompts in shuffled epochs.

    Args:
      prompts: The prompts.
      batch_size: B, over all processes; batches run across epochs.
      seed: Determines the order, 0 to 2**32 - 1.
      text_encoder: Embeds the prompts.
      process_index: Index of this process.
      process_count: P; each process gets B / P rows.

    Returns:
      An iterator over dictionaries: text float32 [B, L, D], caption str [B].

    Raises:
      ValueError: If an argument is out of range.
    """

    def collate(rows):
        chosen = [prompts[i] for i in rows]
        return {"text": text_encoder.encode(chosen), "caption": np.array(chosen)}

    processes = {"process_index": process_index, "process_count": process_count}
    return row_iterator(len(prompts), collate, batch_size=batch_size, seed=seed, name="prompts", **processes)


def embedded_prompt_iterator(
    source: EmbeddedPrompts, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterates forever over batches of embedded prompts in shuffled epochs.

    Args:
      source: The prompts, such as those of `prompts.open_prompts`.
      batch_size: B, over all processes; batches run across epochs.
      seed: Determines the order, 0 to 2**32 - 1.
      process_index: Index of this process.
      process_count: P; each process reads only its B / P rows.

    Returns:
      An iterator over dictionaries: text [B, L, D] in the source's type, caption str [B].

    Raises:
      ValueError: If an argument is out of range.
    """

    def collate(rows):
        return _stack([source[i] for i in rows])

    processes = {"process_index": process_index, "process_count": process_count}
    return row_iterator(len(source), collate, batch_size=batch_size, seed=seed, name="prompts", **processes)


def latent_iterator(
    source: LatentSource,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    text_dropout: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over batches of encoded clips with embedded captions.

    Args:
      source: The clips, such as those of `videos.open_videos`.
      batch_size: B, over all processes.
      seed: Determines order and dropped captions, 0 to 2**32 - 1.
      shuffle: Whether every epoch has its own random order.
      repeat: Whether to repeat forever, with batches across epochs; otherwise the last batch may be smaller.
      text_dropout: Share of captions replaced by the empty prompt in `text` (`caption` keeps them).
      process_index: Index of this process.
      process_count: P; each process reads only its B / P rows.

    Returns:
      An iterator over dictionaries: latent float32 [B, F, H, W, C], text [B, L, D] in the source's type, caption
      str [B].

    Raises:
      ValueError: If an argument is out of range.
    """
    _check_dropout(text_dropout)

    def clip(index, rng):
        found = source[index]
        return {**found, "text": source.empty} if rng.random() < text_dropout else found

    return row_iterator(
        len(source),
        lambda rows: _stack([clip(*row) for row in rows]),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        repeat=repeat,
        draws=True,
        process_index=process_index,
        process_count=process_count,
    )


def _check_dropout(text_dropout: float) -> None:
    if not 0 <= text_dropout <= 1:
        raise ValueError(f"text_dropout: got {text_dropout}, allowed: 0 to 1")


def _crop_and_drop(clip: dict[str, Any], rng: np.random.Generator, num_frames: int, dropout: float) -> dict[str, Any]:
    """Crops one clip in time and draws whether its caption is dropped."""
    begin = rng.integers(len(clip["video"]) - num_frames + 1)
    prompt = "" if rng.random() < dropout else clip["caption"]
    return {**clip, "video": clip["video"][begin : begin + num_frames], "prompt": prompt}


def _cut(clip: dict[str, Any], rng: np.random.Generator, share: float, frames: int) -> dict[str, Any]:
    """Rolls the first frames around the canvas, for a random share of the clips."""
    if not share or rng.random() >= share:
        return clip
    first, rest = clip["video"][:frames], clip["video"][frames:]
    shifts = [int(rng.integers(side)) for side in first.shape[1:3]]
    return {**clip, "video": np.concatenate([np.roll(first, shifts, axis=(1, 2)), rest])}


def _collate(clips: Sequence[dict[str, Any]], text_encoder: TextEncoder) -> dict[str, np.ndarray]:
    return {
        "video": np.stack([clip["video"] for clip in clips]),
        "text": text_encoder.encode([clip["prompt"] for clip in clips]),
        "caption": np.array([clip["caption"] for clip in clips]),
        "digit": np.array([clip["digit"] for clip in clips], np.int32),
        "direction": np.array([clip["direction"] for clip in clips], np.int32),
    }


def _stack(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
