"""Datasets of prompt embeddings, stored without padding and zero-padded when read.

A data folder has them in `prompts`, or in `captions` if they are the captions of its videos.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sf_jax.data import shards
from sf_jax.data.captions import digest
from sf_jax.messages import quoted

NAME = "wan_prompts"
PROMPTS, CAPTIONS = "prompts", "captions"
UNCONDITIONAL = "unconditional"  # the split with the negative and the empty prompt
PER_SHARD = 256
MADE_BY = "`python -m sf_jax.prepare --prompts=...`"
_AGAIN = ": remove the folder and make the dataset again"

Embed = Callable[[Sequence[str]], Iterable[tuple[np.ndarray, int]]]


def write_prompts(
    folder: Path | str,
    prompts: Sequence[str],
    negative_prompt: str,
    embed: Embed,
    *,
    text_dim: int,
    text_len: int,
    dtype: str,
    made_with: Mapping[str, Any],
    process_index: int = 0,
    process_count: int = 1,
    field: str = "output",
) -> bool:
    """Writes the embeddings of the prompts, the negative and the empty prompt; resumes after an interruption.

    Args:
      folder: the folder of this dataset.
      prompts: N texts.
      negative_prompt: the prompt that guidance moves away from.
      embed: texts -> for each in order, its embedding [text_len, text_dim] and its number of real tokens; called only
        for missing shards.
      text_dim: D.
      text_len: maximum number of tokens in a prompt.
      dtype: type of the stored embeddings, "bfloat16" or "float32".
      made_with: everything else that determines the embeddings, JSON-serializable.
      process_index: index of this process; each process writes its own shards.
      process_count: number of processes.
      field: name of the folder in error messages.

    Returns:
      Whether the dataset is complete.

    Raises:
      ValueError: see `shards.write`.
      OSError: if the disk is full.
    """
    kind = np.dtype(dtype)
    tensor = tfds.features.Tensor(shape=(None, text_dim), dtype=kind, encoding=tfds.features.Encoding.BYTES)
    recipe = {
        "prompts": digest(prompts),
        "negative_prompt": negative_prompt,
        "text_dim": text_dim,
        "text_len": text_len,
        "dtype": dtype,
        **made_with,
    }
    plan = shards.Plan(
        Path(folder),
        NAME,
        tfds.features.FeaturesDict({"embedding": tensor, "caption": tfds.features.Text()}),
        recipe,
        {"train": len(prompts), UNCONDITIONAL: 2},
        PER_SHARD,
        field,
    )

    def make(shard):
        texts = prompts if shard.split == "train" else (negative_prompt, "")
        texts = texts[shard.start : shard.stop]
        for text, (embedding, tokens) in zip(texts, embed(texts), strict=True):
            yield {"embedding": embedding[:tokens].astype(kind), "caption": text}

    return shards.write(plan, make, process_index, process_count)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSource:
    """Random access to embedded prompts: text [L, D], zero-padded after the prompt's end, and caption str.

    Attributes:
      records: the stored prompts.
      text_len: L.
      negative: embedding [L, D] of the negative prompt.
      empty: embedding [L, D] of the empty prompt.
    """

    records: shards.Records
    text_len: int
    negative: np.ndarray
    empty: np.ndarray

    @property
    def digest(self) -> str:
        """A hash of all embeddings; see `Records.digest`."""
        fixed = hashlib.sha256(self.negative.tobytes() + self.empty.tobytes()).hexdigest()[:16]
        return f"{self.records.digest} {fixed}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return {"text": _padded(record["embedding"], self.text_len), "caption": record["caption"].decode()}


def _padded(embedding: np.ndarray, length: int) -> np.ndarray:
    if len(embedding) > length:
        raise ValueError(f"an embedding of data.dir has {len(embedding)} tokens, at most {length} are expected{_AGAIN}")
    out = np.zeros((length, embedding.shape[1]), embedding.dtype)
    out[: len(embedding)] = embedding
    return out


def open_prompts(folder: Path | str, *, text_dim: int, text_len: int) -> PromptSource:
    """Opens the embedded prompts of a data folder, or else the captions of its videos.

    Args:
      folder: the data folder, `data.dir`.
      text_dim: D of the network.
      text_len: L of the network.

    Raises:
      ValueError: if they are missing, incomplete or damaged, or have other sizes.
    """
    folder = Path(folder)
    part = CAPTIONS if (folder / CAPTIONS).is_dir() and not (folder / PROMPTS).is_dir() else PROMPTS
    return open_part(folder / part, text_dim=text_dim, text_len=text_len)


def whole_number(value: Any, folder: Path, key: str) -> int:
    """Returns a value of a folder's recipe; raises a ValueError that names the file unless it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        where = f"{folder / shards.RECIPE} is damaged"
        raise ValueError(f"{where} ({key} is {quoted(value)}, not a whole number from 1){_AGAIN}")
    return value


def open_part(folder: Path, *, text_dim: int, text_len: int) -> PromptSource:
    """Like `open_prompts`, but for the folder of one dataset."""
    records, fixed = (
        shards.open_records(folder, NAME, split, "data.dir", MADE_BY) for split in ("train", UNCONDITIONAL)
    )
    dim, length = (whole_number(records.recipe.get(key), folder, key) for key in ("text_dim", "text_len"))
    if text_dim != dim:
        raise ValueError(f"model.text_dim is {text_dim}: the prompts of data.dir {folder} have {dim}, it must be {dim}")
    if text_len < length:
        raise ValueError(
            f"model.text_len is {text_len}: the prompts of data.dir {folder} have up to {length} tokens, it must be at "
            f"least {length}"
        )
    if len(fixed) != 2:
        raise ValueError(f"{folder} has {len(fixed)} unconditional embeddings, not 2{_AGAIN}")
    negative, empty = (_padded(fixed[i]["embedding"], text_len) for i in range(2))
    return PromptSource(records, text_len, negative, empty)
