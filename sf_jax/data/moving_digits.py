"""Captioned clips of real handwritten digits that move on a canvas with wrap-around.

The digits are scikit-learn's bundled scans. Directions are those of the image: "up" is towards row 0.

Build the clips, or refit the patch codec shipped with the package:

  python -m sf_jax.data.moving_digits --data_dir=DIR
  python -m sf_jax.data.moving_digits --fit_codec=sf_jax/assets/digits_codec.safetensors
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sf_jax.data import shards
from sf_jax.files import check_writable, is_quiet
from sf_jax.options import one_of

CANVAS = 24
SPRITE = 12
DIRECTIONS = (
    "right",
    "down and right",
    "down",
    "down and left",
    "left",
    "up and left",
    "up",
    "up and right",
)
SPEEDS = ("slowly", "fast")
PACES = (1.5, 3.0)  # Pixels per frame.
PACE_JITTER = 0.1
HEADING_JITTER = (6.0, 14.0)  # Degrees, with either sign.
REPEAT_LAGS = (8, 100)
REPEAT_DISTANCE = 1.5
SPEED_OMITTED = 0.15
SPLITS = ("train", "judge", "test")
SPLIT_SHARES = (0.65, 0.175, 0.175)
# With equal shares the set of clips looks the same played backwards, and a network with relative positions only never
# learns to tell a direction from its opposite (`docs/digits.md`).
DIRECTION_SHARES = {"train": (1, 1, 1, 1, 6, 6, 6, 6)}
SEED = 2025
FEATURES = tfds.features.FeaturesDict(
    {
        "video": tfds.features.Tensor(
            shape=(None, CANVAS, CANVAS, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        ),
        "caption": tfds.features.Text(),
        "digit": tfds.features.Scalar(dtype=np.int32),
        "direction": tfds.features.Scalar(dtype=np.int32),
        "speed": tfds.features.Scalar(dtype=np.int32),
    }
)
_CHUNK = 500
_SAMPLED = 256  # number of clips that a split's hash covers


@dataclasses.dataclass(frozen=True)
class Clips:
    """The plan of N clips, before rendering.

    Attributes:
      scan: Index of the scan among all of `load_scans`, int64 [N].
      digit: int64 [N].
      direction: Index into DIRECTIONS, int64 [N].
      speed: Index into SPEEDS, whether or not the caption mentions it, int64 [N].
      told: Whether the caption mentions the speed, bool [N].
      start: Top left corner (row, column) in the first frame, float64 [N, 2].
      velocity: Pixels per frame (row, column), float64 [N, 2].
    """

    scan: np.ndarray
    digit: np.ndarray
    direction: np.ndarray
    speed: np.ndarray
    told: np.ndarray
    start: np.ndarray
    velocity: np.ndarray

    def __len__(self) -> int:
        return len(self.scan)

    def __getitem__(self, part: slice) -> "Clips":
        return Clips(**{field.name: getattr(self, field.name)[part] for field in dataclasses.fields(self)})

    def captions(self, captions: str = "full") -> list[str]:
        """Returns the N captions, of which "undirected" ones say nothing of directions.

        Raises:
          ValueError: `captions` is none of VARIANTS.
        """
        one_of("captions", captions, tuple(VARIANTS))
        speeds = np.where(self.told, self.speed, -1)
        rows = zip(self.digit.tolist(), self.direction.tolist(), speeds.tolist(), strict=True)
        return [caption(n, d if captions == "full" else None, None if s < 0 else s) for n, d, s in rows]


def caption(digit: int, direction: int | None, speed: int | None = None) -> str:
    """Returns the caption of a clip, e.g. "an 8 moving up and right, slowly".

    Args:
      digit: 0 to 9.
      direction: Index into DIRECTIONS; None says nothing of it.
      speed: Index into SPEEDS; None says nothing of it.
    """
    words = ["an" if digit == 8 else "a", str(digit), "moving", *([] if direction is None else [DIRECTIONS[direction]])]
    return " ".join(words) + ("" if speed is None else f", {SPEEDS[speed]}")


def all_captions(captions: str = "full") -> tuple[str, ...]:
    """Returns all captions: every digit, every speed and none, and every direction (240); "undirected", none (30).

    Raises:
      ValueError: `captions` is none of VARIANTS.
    """
    one_of("captions", captions, tuple(VARIANTS))
    speeds, directions = (*range(len(SPEEDS)), None), range(len(DIRECTIONS)) if captions == "full" else (None,)
    return tuple(caption(n, d, s) for n in range(10) for d in directions for s in speeds)


def captions_words() -> tuple[str, ...]:
    """Returns the words that captions use, sorted."""
    return tuple(sorted({word for text in all_captions() for word in text.replace(",", "").split()}))


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Returns all scans, enlarged: uint8 [1797, 12, 12], white ink on black, and their digits [1797]."""
    import scipy.ndimage  # lazy, as both imports take a third of the startup of commands that never build the data
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    factor = SPRITE / digits.images.shape[1]
    large = scipy.ndimage.zoom(digits.images / 16.0, (1, factor, factor), order=3, mode="grid-constant", grid_mode=True)
    # Cubic interpolation keeps the strokes crisp; its overshoot is clipped.
    return np.round(np.clip(large, 0, 1) * 255).astype(np.uint8), digits.target.astype(np.int64)


def split_scans(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Divides the scans into disjoint splits, with the same shares for every digit.

    Args:
      labels: Digits of all scans, [N].

    Returns:
      For each of SPLITS, the sorted indices of its scans.
    """
    rng = np.random.Generator(np.random.Philox(SEED))
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        own = rng.permutation(np.flatnonzero(labels == digit))
        ends = np.round(np.cumsum(SPLIT_SHARES)[:-1] * len(own)).astype(int)
        for split, part in zip(SPLITS, np.split(own, ends), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def propose_motion(rng: np.random.Generator, direction: int, speed: int, num: int) -> np.ndarray:
    """Draws velocities near a captioned motion, float64 [num, 2] as (row, column) pixels per frame."""
    off = rng.uniform(*HEADING_JITTER, size=num) * rng.choice((-1.0, 1.0), size=num)
    heading = np.deg2rad(direction * 360 / len(DIRECTIONS) + off)
    pace = PACES[speed] * rng.uniform(1 - PACE_JITTER, 1 + PACE_JITTER, size=num)
    return pace[:, None] * np.stack([np.sin(heading), np.cos(heading)], axis=-1)


def nearly_repeats(velocity: np.ndarray) -> np.ndarray:
    """Returns which motions come close to an earlier position within REPEAT_LAGS; [N, 2] -> bool [N]."""
    lags = np.arange(REPEAT_LAGS[0], REPEAT_LAGS[1] + 1)
    moved = wrap(velocity[:, None, :] * lags[None, :, None])
    return (np.linalg.norm(moved, axis=-1) < REPEAT_DISTANCE).any(axis=1)


def wrap(displacement: np.ndarray) -> np.ndarray:
    """Returns the shortest equivalent displacement on the torus, in [-CANVAS / 2, CANVAS / 2)."""
    return (displacement + CANVAS / 2) % CANVAS - CANVAS / 2


def sample_motion(rng: np.random.Generator, direction: int, speed: int, num: int) -> np.ndarray:
    """Draws velocities whose path on the torus does not nearly repeat, by rejection sampling.

    Args:
      rng: Generator.
      direction: Index into DIRECTIONS.
      speed: Index into SPEEDS.
      num: Number of velocities.

    Returns:
      Pixels per frame (row, column), float64 [num, 2].
    """
    accepted = np.zeros((0, 2))
    while len(accepted) < num:
        proposed = propose_motion(rng, direction, speed, 3 * num + 8)
        accepted = np.concatenate([accepted, proposed[~nearly_repeats(proposed)]])
    return accepted[:num]


def plan_clips(split: str, num_clips: int, *, seed: int = SEED) -> Clips:
    """Draws the clips of a split: digits and speeds in equal shares, directions in equal or DIRECTION_SHARES' shares.

    Args:
      split: One of SPLITS.
      num_clips: N.
      seed: Seed; does not affect how the scans are split.

    Returns:
      The plan of N clips.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, allowed: {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split)])))
    _, labels = load_scans()
    own = split_scans(labels)[split]
    directions = np.repeat(np.arange(len(DIRECTIONS)), DIRECTION_SHARES.get(split, (1,) * len(DIRECTIONS)))
    shape = (10, len(directions), len(SPEEDS))
    kinds = rng.permutation(num_clips) % np.prod(shape)
    digit, place, speed = np.unravel_index(kinds, shape)
    direction = directions[place]
    scan = np.zeros(num_clips, np.int64)
    for value in range(10):
        scan[digit == value] = rng.choice(own[labels[own] == value], size=(digit == value).sum())
    velocity = np.zeros((num_clips, 2))
    for d in range(len(DIRECTIONS)):
        for s in range(len(SPEEDS)):
            chosen = (direction == d) & (speed == s)
            velocity[chosen] = sample_motion(rng, d, s, int(chosen.sum()))
    told = rng.random(num_clips) >= SPEED_OMITTED
    start = rng.uniform(0, CANVAS, size=(num_clips, 2))
    return Clips(scan, digit, direction, speed, told, start, velocity)


def trajectory(start: np.ndarray, velocity: np.ndarray, num_frames: int) -> np.ndarray:
    """Returns the sprites' top left corners (not wrapped); [N, 2] twice -> float64 [N, F, 2]."""
    return start[:, None, :] + np.arange(num_frames)[None, :, None] * velocity[:, None, :]


def render(scans: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Draws moving sprites on the wrap-around canvas, with bilinear interpolation.

    Args:
      scans: Sprites, uint8 [N, 12, 12].
      positions: Top left corners (row, column) in pixels, any real numbers, float [N, F, 2].

    Returns:
      Clips, uint8 [N, F, CANVAS, CANVAS, 1].
    """
    pixels, own = np.arange(CANVAS)[:, None], np.arange(scans.shape[1])
    # Bilinear drawing is separable: one matrix places the sprite's rows, another its columns.
    gap = np.abs(wrap(pixels - own - positions[..., None, None]))
    weights = np.maximum(0, 1 - gap).astype(np.float32)
    rows, columns = weights[:, :, 0], weights[:, :, 1]
    canvas = rows @ scans[:, None].astype(np.float32) @ columns.swapaxes(-1, -2)
    return np.round(np.clip(canvas, 0, 255)).astype(np.uint8)[..., None]


def generate(clips: Clips, num_frames: int, captions: str = "full") -> Iterator[dict[str, Any]]:
    """Yields the examples of a plan.

    Args:
      clips: The plan.
      num_frames: F.
      captions: One of VARIANTS.

    Yields:
      For each clip: video uint8 [F, CANVAS, CANVAS, 1], caption str, digit, direction and speed int.
    """
    scans, _ = load_scans()
    for begin in range(0, len(clips), _CHUNK):
        part = clips[begin : begin + _CHUNK]
        videos = render(scans[part.scan], trajectory(part.start, part.velocity, num_frames))
        for i, text in enumerate(part.captions(captions)):
            yield {
                "video": videos[i],
                "caption": text,
                "digit": int(part.digit[i]),
                "direction": int(part.direction[i]),
                "speed": int(part.speed[i]),
            }


@dataclasses.dataclass(eq=False)
class DigitsConfig(tfds.core.BuilderConfig):
    """A variant of the dataset.

    Attributes:
      clips: For each split, the number of clips and of frames per clip.
      captions: One of VARIANTS: "full", or "undirected", which say nothing of directions.
    """

    clips: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    captions: str = "full"


FULL = DigitsConfig(
    name="full",
    description="Clips for the models, for the evaluation's classifier and for its ceiling figures.",
    clips={"train": (24000, 12), "judge": (2000, 12), "test": (1000, 48)},
)
UNDIRECTED = DigitsConfig(
    name="undirected",
    description="The same clips for the models, with captions that do not say where a digit goes.",
    clips={"train": FULL.clips["train"]},
    captions="undirected",
)
VARIANTS = {"full": FULL, "undirected": UNDIRECTED}


class MovingDigits(tfds.core.GeneratorBasedBuilder):
    """Builder of the moving digits; needs neither TensorFlow nor network access."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = list(VARIANTS.values())
    # There are no metadata files next to this module, and looking for them would need importlib_resources.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits that move over a canvas that wraps round, with captions.",
            features=FEATURES,
            # The plan is already shuffled.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in self.builder_config.clips}

    def _generate_examples(self, split: str):
        num_clips, num_frames = self.builder_config.clips[split]
        yield from enumerate(generate(plan_clips(split, num_clips), num_frames, self.builder_config.captions))


@dataclasses.dataclass(frozen=True)
class ClipSource:
    """Random access to the clips of one split; captions are str."""

    records: shards.Records

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the number of clips and of `_SAMPLED` of them, evenly spread over the split.

        It covers the clips, not the files, because tfds writes different bytes for the same clips every time.
        """
        digest, length = hashlib.sha256(f"{len(self)}".encode()), len(self)
        for i in range(min(length, _SAMPLED)):
            example = self[i * length // min(length, _SAMPLED)]
            for name in sorted(example):
                digest.update(name.encode() + np.asarray(example[name]).tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.records[index]
        return {**example, "caption": example["caption"].decode()}


def build(data_dir: str | Path, config: DigitsConfig = FULL) -> Path:
    """Writes the clips as ArrayRecord files, unless they exist.

    Args:
      data_dir: Folder for datasets; created if missing.
      config: Size of the dataset.

    Returns:
      The folder with the clips.

    Raises:
      ValueError: If the folder cannot be written, or its clips are damaged.
      OSError: If the disk is full; no clips are left behind.
    """
    folder = _folder(data_dir, config)
    # tfds writes to a temporary folder and renames it at the end, so an existing folder is complete.
    if not folder.exists():
        check_writable(Path(data_dir).expanduser(), "data_dir")
        for unfinished in folder.parent.glob(f"incomplete.*_{folder.name}"):  # left by a killed tfds
            if is_quiet(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)
        total = sum(num for num, _ in config.clips.values())
        print(f"moving_digits: writing {total} clips to {folder}", flush=True)
        try:
            with shards.writing(folder), quiet():
                MovingDigits(data_dir=str(data_dir), config=config, file_format="array_record").download_and_prepare()
        except OSError:
            if not folder.exists():  # otherwise another run has written them in the meantime
                raise
    for split in config.clips:
        _open(folder, split)
    return folder


def source(data_dir: str | Path, split: str, config: DigitsConfig = FULL) -> ClipSource:
    """Opens a split that `build` has written.

    Args:
      data_dir: The folder given to `build`.
      split: One of the config's splits.
      config: Size of the dataset.

    Returns:
      The clips, by index: video uint8 [F, CANVAS, CANVAS, 1], caption str, digit, direction, speed int.

    Raises:
      ValueError: If the split is unknown, or the clips are missing or damaged.
    """
    if split not in config.clips:
        raise ValueError(f"split: got {split!r}, allowed: {', '.join(config.clips)}")
    folder = _folder(data_dir, config)
    if not folder.exists():
        raise ValueError(
            f"data_dir: got {data_dir}, which has no clips with captions {config.captions!r}, allowed: a folder that "
            f"`python -m sf_jax.data.moving_digits --data_dir=...{_option(config)}` has filled"
        )
    return ClipSource(_open(folder, split))


def _option(config: DigitsConfig) -> str:
    """The option of the command line that selects a variant."""
    return "" if config.captions == "full" else f" --captions={config.captions}"


def _folder(data_dir: str | Path, config: DigitsConfig) -> Path:
    """The folder where tfds stores the clips."""
    return Path(data_dir).expanduser() / MovingDigits.name / config.name / str(MovingDigits.VERSION)


def _open(folder: Path, split: str) -> shards.Records:
    # Single files cannot be rewritten: tfds skips a folder that exists.
    remedy = f"remove the folder {folder} and run the command again"
    records = shards.open_split(folder, MovingDigits.name, split, if_missing=remedy, if_damaged=remedy)
    if records.source.dataset_info.features.get_tensor_info() != FEATURES.get_tensor_info():
        raise ValueError(f"{folder / shards.FEATURES} does not describe clips of moving digits: {remedy}")
    return records


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses tfds' progress bars and messages."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def codec_frames(num_clips: int = 12000, stride: int = 4) -> np.ndarray:
    """Returns every `stride`-th frame of the training clips, uint8 [N, CANVAS, CANVAS, 1]."""
    examples = generate(plan_clips("train", num_clips), FULL.clips["train"][1])
    return np.concatenate([example["video"][::stride] for example in examples])


def main() -> None:
    """Command line: see the module's docstring."""
    from sf_jax import command  # lazy, as code that only reads clips needs no command line

    parser = argparse.ArgumentParser(prog="sf_jax.data.moving_digits", description=main.__doc__)
    parser.add_argument("--data_dir", help="build the clips in this folder")
    parser.add_argument("--captions", default="full", choices=VARIANTS, help="which clips to build")
    parser.add_argument("--fit_codec", help="fit the patch codec on training frames and write it to this file")
    parser.add_argument("--channels", type=int, default=8, help="channels of the codec")
    args = parser.parse_args()
    if not args.data_dir and not args.fit_codec:
        parser.error("give --data_dir or --fit_codec")
    if args.captions != "full" and not args.data_dir:
        parser.error(f"--captions={args.captions} has no effect without --data_dir")
    with command.errors_in_one_line():
        if args.data_dir:
            print(f"moving_digits: {build(args.data_dir, VARIANTS[args.captions])}")
        if args.fit_codec:
            from sf_jax.models import patch_codec  # lazy, as only this option needs JAX

            check_writable(Path(args.fit_codec).parent, "fit_codec")
            codec, explained = patch_codec.fit(codec_frames(), channels=args.channels)
            codec.save(args.fit_codec)
            print(f"codec: {codec.channels} channels explain {explained:.2%}, written to {args.fit_codec}")


if __name__ == "__main__":
    main()
