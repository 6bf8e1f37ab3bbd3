"""Datasets of encoded video clips: latents, each with the index of its caption in a dataset of module `prompts`.

A data folder has the latents in `videos` and the embeddings of the distinct captions in `captions`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sf_jax.data import prompts, shards
from sf_jax.data.captions import digest

NAME = "wan_videos"
VIDEOS = "videos"
PER_SHARD = 16  # clips, 8 MB each at 480x832
MADE_BY = "`python -m sf_jax.prepare --videos=...`"
_AGAIN = f"remove data.dir's {VIDEOS} and {prompts.CAPTIONS} and make them again"

Encode = Callable[[int, int], Iterable[tuple[int, np.ndarray]]]


def write_videos(
    folder: Path | str,
    names: Sequence[str],
    captions: Sequence[str],
    clips_per_video: int,
    shape: tuple[int, int, int, int],
    encode: Encode,
    *,
    made_with: Mapping[str, Any],
    process_index: int = 0,
    process_count: int = 1,
    field: str = "output",
) -> bool:
    """Writes the latents of clips; resumes after an interruption.

    Args:
      folder: the folder of this dataset.
      names: names of the V videos.
      captions: captions of the V videos; the caption dataset must contain the distinct ones in this order.
      clips_per_video: K; clip k of video v is entry v * K + k.
      shape: [F, H, W, C] of a clip.
      encode: (first, stop) -> (entry, latent float32 `shape`) for the existing entries in [first, stop), in order;
        called only for missing shards, and for whole videos.
      made_with: everything else that determines the latents, JSON-serializable.
      process_index: index of this process; each process writes its own shards.
      process_count: number of processes.
      field: name of the folder in error messages.

    Returns:
      Whether the dataset is complete.

    Raises:
      ValueError: see `shards.write`; also if there is not a single clip.
      OSError: if the disk is full.
    """
    unique = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    features = {
        "latent": tfds.features.Tensor(shape=shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES),
        "caption": tfds.features.Scalar(dtype=np.int64),
        "video": tfds.features.Text(),
        "clip": tfds.features.Scalar(dtype=np.int64),
    }
    recipe = {"captions": digest(unique), "latent": list(shape), "clips_per_video": clips_per_video, **made_with}
    per_shard = _per_shard(clips_per_video)
    entries = {"train": len(names) * clips_per_video}
    plan = shards.Plan(Path(folder), NAME, tfds.features.FeaturesDict(features), recipe, entries, per_shard, field)

    def make(shard):
        for entry, latent in encode(shard.start, shard.stop):
            video, clip = divmod(entry, clips_per_video)
            yield {"latent": latent, "caption": unique[captions[video]], "video": names[video], "clip": clip}

    return shards.write(plan, make, process_index, process_count)


def _per_shard(clips_per_video: int) -> int:
    return max(1, PER_SHARD // clips_per_video) * clips_per_video


def short_files(folder: Path | str, num_videos: int, clips_per_video: int) -> list[Path]:
    """The shards of a complete dataset of `write_videos` with fewer clips than the maximum."""
    records, size = shards.open_records(folder, NAME), _per_shard(clips_per_video)
    counts = np.diff([0, *records.ends])
    wanted = [min(size, num_videos * clips_per_video - i * size) for i in range(len(counts))]
    return [path for path, count, most in zip(records.files, counts, wanted, strict=True) if count < most]


@dataclasses.dataclass(frozen=True, eq=False)
class VideoSource:
    """Random access to clips: latent float32 [F, H, W, C], text [L, D], caption str.

    Attributes:
      records: the stored clips.
      captions: their captions.
      frames: F; the first F stored frames are returned.
    """

    records: shards.Records
    captions: prompts.PromptSource
    frames: int

    @property
    def empty(self) -> np.ndarray:
        """Embedding [L, D] of the empty prompt."""
        return self.captions.empty

    @property
    def negative(self) -> np.ndarray:
        """Embedding [L, D] of the negative prompt."""
        return self.captions.negative

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        caption = int(record["caption"])
        if not 0 <= caption < len(self.captions):
            raise ValueError(f"record {index} of {VIDEOS} has caption {caption} of {len(self.captions)}: {_AGAIN}")
        return {"latent": record["latent"][: self.frames], **self.captions[caption]}


def open_videos(
    folder: Path | str, *, frames: int, height: int, width: int, channels: int, text_dim: int, text_len: int
) -> VideoSource:
    """Opens the encoded clips of a data folder.

    Args:
      folder: the data folder, `data.dir`.
      frames: F, latent frames; longer clips are cut to the first F.
      height: latent rows.
      width: latent columns.
      channels: latent channels.
      text_dim: D of the network.
      text_len: L of the network.

    Raises:
      ValueError: if they are missing, incomplete or damaged, or have other sizes.
    """
    folder = Path(folder)
    records = shards.open_records(folder / VIDEOS, NAME, "train", "data.dir", MADE_BY)
    shape = records.recipe.get("latent")
    shape = shape if isinstance(shape, list) and len(shape) == 4 else [None]  # a wrong shape fails as one wrong number
    stored = [prompts.whole_number(size, folder / VIDEOS, "a size of latent") for size in shape]
    wanted = {"data.height": height, "data.width": width, "model.channels": channels}
    for (name, value), there in zip(wanted.items(), stored[1:], strict=True):
        if value != there:
            raise ValueError(f"{name} is {value}: the latents of data.dir {folder} have {there}, it must be {there}")
    if not 1 <= frames <= stored[0]:
        raise ValueError(
            f"data.frames is {frames}: the clips of data.dir {folder} have {stored[0]} latent frames, it must be 1 to "
            f"{stored[0]}"
        )
    captions = prompts.open_part(folder / prompts.CAPTIONS, text_dim=text_dim, text_len=text_len)
    if captions.records.recipe.get("prompts") != records.recipe.get("captions"):
        raise ValueError(f"data.dir {folder}: {prompts.CAPTIONS} are not those of {VIDEOS}: make both again")
    return VideoSource(records, captions, frames)
