"""Training data: the moving digits of this package, or prepared prompts and videos for Wan2.1."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable

import grain
import jax
import numpy as np

from sf_jax.config import TrainConfig
from sf_jax.data import moving_digits, pipeline, prompts, videos
from sf_jax.distributed import by_first
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.text import WordEmbedding
from sf_jax.models.vae import VaeConfig
from sf_jax.training.media import Media, digits_media, wan_media

# Entry of a batch that holds the real videos.
VIDEO_KEYS = {"digits": "video", "wan": "latent"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of batches; every process gets its own rows.

    Attributes:
      media: converts between the batches' videos, latents and pixels.
      negative: [1, L, D], embedding of the negative prompt.
      video_key: entry of a batch that holds the real videos.
      prompt: index -> (caption, embedding [L, D]); takes any integer, as prompts are used in turn.
      clip: index -> (caption, embedding [L, D], the video as in a batch); the same with real videos.
      prompts: opens endless batches of embedded prompts.
      videos: opens endless batches of captioned videos.
      digest: hash of what the data was made from, independent of its location.
      records: hash of the records to read, in order; None if no files are read.
      samples: opens the batch for sample videos: `caption` [N], `text` [N, L, D] and, if needed, real videos.
    """

    media: Media
    negative: np.ndarray
    video_key: str
    prompt: Callable[[int], tuple[str, np.ndarray]]
    clip: Callable[[int], tuple[str, np.ndarray, np.ndarray]]
    prompts: Callable[[], grain.DatasetIterator]
    videos: Callable[[], grain.DatasetIterator]
    samples: Callable[[], dict]
    digest: str
    records: str | None = None


def digest_of(parts) -> str:
    """A hash of JSON-serializable values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def open_source(config: TrainConfig, needs_videos: bool, vae: VaeConfig | None = None) -> Source:
    """Opens the data of a config.

    Args:
      config: the run's configuration.
      needs_videos: whether the stage reads videos; missing videos of digits are generated.
      vae: sizes of Wan's VAE, if the run needs it.

    Raises:
      ValueError: if data is missing or has other sizes; names the field.
    """
    share = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    # Only networks that are sampled with guidance need to learn the empty prompt.
    dropout = config.data.text_dropout if config.stage in ("teacher", "causal") else 0.0
    return (_digits if config.data.name == "digits" else _wan)(config, needs_videos, vae, share, dropout)


def _digits(config, needs_videos, vae, share, dropout) -> Source:
    del vae  # digits have none
    folder, variant = config.data.dir, moving_digits.VARIANTS[config.data.captions]
    codec, text = PatchCodec.load(), WordEmbedding()
    _check_digits(config, codec, text)
    captions = moving_digits.all_captions(variant.captions)

    def prompt(index):
        caption = captions[index % len(captions)]
        return caption, text.encode([caption])[0]

    @functools.cache
    def open_clips():
        by_first(lambda: moving_digits.build(folder, variant))
        clips = moving_digits.source(folder, "train", variant)
        frames = len(clips[0]["video"])
        if config.data.frames > frames:
            raise ValueError(f"data.frames is {config.data.frames}: the clips of moving digits have {frames} frames")
        return clips

    if needs_videos:  # here, which all processes reach, as opening waits for the first of them
        open_clips()

    def clip(index):
        row = open_clips()[index % len(open_clips())]
        return row["caption"], text.encode([row["caption"]])[0], row["video"][: config.data.frames]

    def open_videos():
        return pipeline.video_iterator(
            open_clips(),
            num_frames=config.data.frames,
            text_encoder=text,
            text_dropout=dropout,
            cut=(config.data.cut, config.rollout.sink),
            **share,
        )

    def samples():
        if config.image_to_video:
            clips = open_clips()
            rows = [clips[i] for i in range(config.log.sample_count)]
            chosen = [row["caption"] for row in rows]
            shown = {"video": np.stack([row["video"][: config.data.frames] for row in rows])}
        else:
            count = config.log.sample_count
            chosen = config.log.sample_prompts or [captions[i * len(captions) // count] for i in range(count)]
            shown = {}
        return shown | {"caption": list(chosen), "text": text.encode(list(chosen))}

    return Source(
        digits_media(codec),
        text.encode([""]),
        VIDEO_KEYS["digits"],
        prompt,
        clip,
        lambda: pipeline.prompt_iterator(captions, text_encoder=text, **share),
        open_videos,
        samples,
        digest_of([variant.name, str(moving_digits.MovingDigits.VERSION), captions]),
        open_clips().digest if needs_videos else None,
    )


def _wan(config, needs_videos, vae, share, dropout) -> Source:
    data, model = config.data, config.model
    sizes = {"text_dim": model.text_dim, "text_len": model.text_len}

    def open_clips():
        shape = {"frames": data.frames, "height": data.height, "width": data.width, "channels": model.channels}
        return videos.open_videos(data.dir, **shape, **sizes)

    if needs_videos:
        found = open_clips()
        texts = found.captions
    else:
        found = texts = prompts.open_prompts(data.dir, **sizes)

    def prompt(index):
        entry = texts[index % len(texts)]
        return entry["caption"], entry["text"]

    def clip(index):
        entry = found[index % len(found)]
        return entry["caption"], entry["text"], entry["latent"]

    def samples():
        shown = found if needs_videos or not config.image_to_video else open_clips()  # for the given first frames
        rows = [shown[i % len(shown)] for i in range(config.log.sample_count)]
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        return {name: column if name == "caption" else np.stack(column) for name, column in batch.items()}

    return Source(
        wan_media(vae or VaeConfig()),
        found.negative[None],
        VIDEO_KEYS["wan"],
        prompt,
        clip,
        lambda: pipeline.embedded_prompt_iterator(texts, **share),
        lambda: pipeline.latent_iterator(found, text_dropout=dropout, **share),
        samples,
        digest_of([texts.records.recipe, found.records.recipe]),
        digest_of([texts.digest, found.records.digest]),
    )


def _check_digits(config: TrainConfig, codec: PatchCodec, text: WordEmbedding) -> None:
    """Checks that the sizes are those of the moving digits."""
    side = moving_digits.CANVAS // codec.spatial_factor
    wanted = {
        "model.channels": (config.model.channels, codec.channels),
        "model.text_dim": (config.model.text_dim, text.dim),
        "model.text_len": (config.model.text_len, text.length),
        "data.height": (config.data.height, side),
        "data.width": (config.data.width, side),
    }
    for field, (seen, allowed) in wanted.items():
        if seen != allowed:
            raise ValueError(f"{field} is {seen}: for moving digits it must be {allowed}")
