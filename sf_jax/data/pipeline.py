"""Input pipelines: seeded, threaded iterators whose state can be saved and restored exactly.

The iterators are grain's: `get_state()` gives a small JSON-serialisable dictionary, `set_state()` takes
it back, and Orbax saves them as they are.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # Counted in batches.


class ClipSource(Protocol):
    """Random access to clips: video uint8 [F, H, W, C], caption str, digit and direction int."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TextEncoder(Protocol):
    """Turns prompts into embeddings; the empty prompt is the unconditional input."""

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeds B prompts: float32 [B, L, D]."""


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
) -> grain.DatasetIterator:
    """Iterates over batches of captioned clips.

    Args:
      source: The clips.
      batch_size: B.
      num_frames: Frames of the random temporal crop, F.
      seed: Determines order, crops and dropped captions, 0 to 2**32 - 1.
      text_encoder: Embeds the captions.
      shuffle: Whether every epoch has its own random order.
      repeat: Whether to go on for ever, batches running across epochs. Otherwise one epoch is
        delivered whole, so that its last batch may be smaller.
      text_dropout: Share of captions replaced by the empty prompt in `text` (`caption` keeps them).

    Returns:
      An iterator over dictionaries: video uint8 [B, F, H, W, C], text float32 [B, L, D], caption
      str [B], digit int32 [B], direction int32 [B].

    Raises:
      ValueError: An argument is out of range.
    """
    _check_common(len(source), "source", batch_size, seed)
    if not 0 <= text_dropout <= 1:
        raise ValueError(f"text_dropout: got {text_dropout}, allowed: 0 to 1")
    length = len(source[0]["video"])
    if not 1 <= num_frames <= length:
        raise ValueError(f"num_frames: got {num_frames}, allowed: 1 to the clips' {length} frames")
    clips = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        clips = clips.shuffle()
    if repeat:
        clips = clips.repeat()
    clips = clips.random_map(functools.partial(_crop_and_drop, num_frames=num_frames, dropout=text_dropout))
    batches = clips.batch(batch_size, batch_fn=functools.partial(_collate, text_encoder=text_encoder))
    return iter(batches.to_iter_dataset(_READ))


def prompt_iterator(
    prompts: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    text_encoder: TextEncoder,
) -> grain.DatasetIterator:
    """Iterates over batches of prompts in shuffled epochs, for ever.

    Args:
      prompts: The prompts.
      batch_size: B; batches run across epochs.
      seed: Determines the order, 0 to 2**32 - 1.
      text_encoder: Embeds the prompts.

    Returns:
      An iterator over dictionaries: text float32 [B, L, D], caption str [B].

    Raises:
      ValueError: An argument is out of range.
    """
    _check_common(len(prompts), "prompts", batch_size, seed)
    epochs = grain.MapDataset.source(list(prompts)).seed(seed).shuffle().repeat()
    batches = epochs.batch(batch_size, batch_fn=functools.partial(_collate_prompts, text_encoder=text_encoder))
    return iter(batches.to_iter_dataset(_READ))


def _check_common(length: int, name: str, batch_size: int, seed: int) -> None:
    if length < 1:
        raise ValueError(f"{name}: got {length} entries, allowed: 1 or more")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, allowed: 1 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, allowed: 0 to {2**32 - 1}")


def _crop_and_drop(
    clip: dict[str, Any], rng: np.random.Generator, *, num_frames: int, dropout: float
) -> dict[str, Any]:
    """Crops one clip in time and decides which prompt its text will be."""
    begin = rng.integers(len(clip["video"]) - num_frames + 1)
    prompt = "" if rng.random() < dropout else clip["caption"]
    return {**clip, "video": clip["video"][begin : begin + num_frames], "prompt": prompt}


def _collate(clips: Sequence[dict[str, Any]], *, text_encoder: TextEncoder) -> dict[str, np.ndarray]:
    return {
        "video": np.stack([clip["video"] for clip in clips]),
        "text": text_encoder.encode([clip["prompt"] for clip in clips]),
        "caption": np.array([clip["caption"] for clip in clips]),
        "digit": np.array([clip["digit"] for clip in clips], np.int32),
        "direction": np.array([clip["direction"] for clip in clips], np.int32),
    }


def _collate_prompts(prompts: Sequence[str], *, text_encoder: TextEncoder) -> dict[str, np.ndarray]:
    return {"text": text_encoder.encode(prompts), "caption": np.array(prompts)}
