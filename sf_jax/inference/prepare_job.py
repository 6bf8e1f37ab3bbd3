"""Implements `python -m sf_jax.prepare`: encodes prompts to embeddings, and videos to latents, with Wan's networks."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sf_jax.data import captions, prompts, shards, videos
from sf_jax.files import check_utf8
from sf_jax.inference.decoders import VaeEncoder
from sf_jax.inference.lengths import MAX_SIDE, MAX_VIDEOS, WAN_FACTOR, WAN_SIDE
from sf_jax.inference.programs import encode_pixels
from sf_jax.inference.text_encoder import load_embedder
from sf_jax.inference.tokenizer import find_file, load_tokenizer
from sf_jax.io import video as video_io
from sf_jax.io.video_read import MAX_FPS
from sf_jax.messages import printable
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.models.vae import WanVae
from sf_jax.weights.folders import ModelFiles, find_model
from sf_jax.weights.networks import identify, load_network

# The official configs' negative prompt.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)
DTYPES = ("bfloat16", "float32")
MAX_CLIP = 2**33  # bytes of its pixels


@dataclasses.dataclass(frozen=True)
class Job:
    """What to prepare; one field per flag of the command.

    Attributes:
      model: model folder.
      output: data folder.
      prompts: file of prompts; None if `videos` is given.
      videos: folder of captioned videos.
      negative_prompt: prompt that guidance leads away from.
      dtype: type of the text encoder's computation and of the embeddings; latents are float32.
      frames: latent frames of a clip.
      height: pixel rows of a clip.
      width: pixel columns of a clip.
      fps: frames per second to resample videos to; None keeps their own.
      clips_per_video: maximum number of consecutive clips per video.
      process_index: index of this process among those that fill the folder.
      process_count: number of these processes.
    """

    model: str
    output: str
    prompts: str | None = None
    videos: str | None = None
    negative_prompt: str = NEGATIVE_PROMPT
    dtype: str = "bfloat16"
    frames: int = 21
    height: int = 480
    width: int = 832
    fps: float | None = None
    clips_per_video: int = 1
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        """Validates everything that can be checked before loading."""
        if (self.prompts is None) == (self.videos is None):
            raise ValueError("prompts and videos: give one of them, a file of prompts or a folder of videos")
        for field in ("model", "output", "prompts", "videos"):
            if getattr(self, field) == "":
                raise ValueError(f"{field} is empty: give a path")
        check_utf8(self.output, "output")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")
        for field in ("frames", "clips_per_video"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at least 1")
        limits = {"frames": MAX_FRAMES, "clips_per_video": MAX_VIDEOS, "height": MAX_SIDE, "width": MAX_SIDE}
        for field, high in limits.items():
            if getattr(self, field) > high:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at most {high}")
        for field in ("height", "width"):
            size = getattr(self, field)
            if size < WAN_SIDE or size % WAN_SIDE:
                near = max(WAN_SIDE, round(size / WAN_SIDE) * WAN_SIDE)
                raise ValueError(f"{field} is {size}: it must be a multiple of {WAN_SIDE}, such as {near}")
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"fps is {self.fps}: it must be above 0 and at most {MAX_FPS}")
        if (size := self.pixel_frames * self.height * self.width * 3) > MAX_CLIP:
            raise ValueError(
                f"frames, height and width are {self.frames}, {self.height} and {self.width}: a clip would have "
                f"{size / 2**30:.0f} GiB of pixels, it must have at most {MAX_CLIP // 2**30}"
            )
        shards.check_processes(self.process_index, self.process_count)

    @property
    def pixel_frames(self) -> int:
        """Pixel frames of a clip."""
        return WAN_FACTOR * (self.frames - 1) + 1


def run(job: Job) -> bool:
    """Runs this process's part of the job and keeps existing results. Returns whether the dataset is complete.

    Raises:
      ValueError: if an input is invalid; the message says what to change.
      OSError: if a file cannot be written.
    """
    needed = ("text_encoder", "tokenizer", *(["vae"] if job.videos else []))
    model, output = find_model(job.model, needed), Path(job.output)
    if job.prompts is not None:
        texts, duplicates = captions.read_prompts(job.prompts)
        if duplicates:
            print(f"{job.prompts}: {duplicates} duplicates left out", flush=True)
        done = _write_texts(job, model, output / prompts.PROMPTS, texts)
        return _told(done, f"{len(texts)} prompts", output / prompts.PROMPTS)
    found, note = captions.find_videos(job.videos)
    if note:
        print(f"{job.videos}: {note}", flush=True)
    _check_folders_of_frames(job, found)
    texts = list(dict.fromkeys(video.caption for video in found))
    _write_texts(job, model, output / prompts.CAPTIONS, texts)
    done = _write_clips(job, model, output / videos.VIDEOS, found)
    done = done and (output / prompts.CAPTIONS / shards.INFO).is_file()
    what = f"clips of {len(found)} videos"
    if done:
        made, wanted = len(shards.open_records(output / videos.VIDEOS, videos.NAME)), len(found) * job.clips_per_video
        what = f"{made} {what}"
        if made < wanted:
            short = videos.short_files(output / videos.VIDEOS, len(found), job.clips_per_video)
            names = ", ".join(map(str, short)) if len(short) <= 4 else output / videos.VIDEOS
            print(
                f"{wanted - made} of {wanted} clips left out: videos too short or not readable; to have them tried "
                f"again, remove {names}",
                flush=True,
            )
    return _told(done, what, output / videos.VIDEOS)


def _told(done: bool, what: str, folder: Path) -> bool:
    if done:
        print(f"{what} in {folder}", flush=True)
    else:
        print(f"{folder}: this process has done its part, others have not yet", flush=True)
    return done


def _check_folders_of_frames(job: Job, found: Sequence[captions.Video]) -> None:
    """Checks that no folders of images, which have no frame rate, are to be resampled."""
    folders = [] if job.fps is None else [video.name for video in found if video.path.is_dir()]
    if folders:
        raise ValueError(f"fps is {job.fps}: folders of frames such as {folders[0]} have no rate, leave fps out")


def _write_texts(job: Job, model: ModelFiles, folder: Path, texts: Sequence[str]) -> bool:
    """Writes the embeddings; loads the text encoder only if some are missing, and frees it afterwards."""
    tokenizer = load_tokenizer(model.tokenizer)
    config, encoder = identify(model.text_encoder, "umt5")

    @functools.cache
    def embedder():
        return load_embedder(model, job.dtype, jax.local_devices())

    return prompts.write_prompts(
        folder,
        texts,
        job.negative_prompt,
        lambda texts: embedder().embed(texts),
        text_dim=config.dim,
        text_len=tokenizer.length,
        dtype=job.dtype,
        made_with={"encoder": encoder, "tokenizer": _hash_of(find_file(model.tokenizer))},
        process_index=job.process_index,
        process_count=job.process_count,
    )


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _write_clips(job: Job, model: ModelFiles, folder: Path, found: Sequence[captions.Video]) -> bool:
    """Writes the latents of the clips."""
    config, vae = identify(model.vae, "vae")
    factor = config.spatial_factor
    files = [f"{video.name} {video.path.stat().st_size if video.path.is_file() else ''}" for video in found]
    files += [f"{video.name} {len(images)}" for video in found if (images := video.frames())]
    made_with = {
        "videos": captions.digest(files),
        "captions_of_videos": captions.digest(video.caption for video in found),
        "fps": job.fps,
        "vae": vae,
    }

    shape = (job.frames, job.height // factor, job.width // factor, config.z_dim)
    _tell_room(folder, len(found) * job.clips_per_video, 4 * int(np.prod(shape)))

    @functools.cache
    def encoder():
        return _Encoder.load(model.vae, jax.local_devices())

    def encode(first, stop):
        chosen = found[first // job.clips_per_video : stop // job.clips_per_video]
        clips = ((first + i, clip) for i, clip in _clips(job, chosen))
        return encoder().encode(clips)

    return videos.write_videos(
        folder,
        [video.name for video in found],
        [video.caption for video in found],
        job.clips_per_video,
        shape,
        encode,
        made_with=made_with,
        process_index=job.process_index,
        process_count=job.process_count,
    )


def _tell_room(folder: Path, clips: int, size: int) -> None:
    """Warns before the work if the disk may be too small for the latents of `clips` clips of `size` bytes each."""
    there = sum(file.stat().st_size for file in folder.glob("*.array_record-*"))
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free, needed = shutil.disk_usage(place).free, clips * size - there
    if needed > free:
        print(
            f"{folder}: {clips} clips take up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, or "
            "the command will stop there",
            flush=True,
        )


def _clips(job: Job, found: Sequence[captions.Video]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the clips of videos: number, pixels uint8 [F, H, W, 3]. Reports videos, or their rests, left out."""
    for i, k, pixels in _ahead(_read(job, found)):
        if isinstance(pixels, np.ndarray):
            yield i * job.clips_per_video + k, pixels
        else:
            tqdm.write(printable(f"left out {f'what follows {k} clips of ' if k else ''}{found[i].name}: {pixels}"))


def _read(job: Job, found: Sequence[captions.Video]) -> Iterator[tuple[int, int, np.ndarray | str]]:
    """Yields the video's index, the clip's index in it, and its pixels or why it has none; reads one clip at a time."""
    length = job.pixel_frames
    for i, video in enumerate(found):
        k = 0
        try:
            frames = _frames(job, video)
            for k in range(job.clips_per_video):
                clip = list(itertools.islice(frames, length))
                if len(clip) < length:
                    if not k:
                        yield i, 0, f"it has {len(clip)} frames, a clip needs {length}"
                    break
                yield i, k, np.stack(clip)
        except (OSError, ValueError) as error:
            _check_still_there(video.path)
            yield i, k, str(error)


def _check_still_there(path: Path) -> None:
    """Ends the command if the disk or share with the videos is gone, which is no fault of this video.

    Raises:
      OSError: if the video is no longer there.
    """
    try:
        path.stat()
    except OSError as error:
        raise OSError(
            f"videos: {path} was there and no longer is ({error.strerror}): see that its disk or share is there, then "
            "run this again to continue"
        ) from error


def _frames(job: Job, video: captions.Video) -> Iterator[np.ndarray]:
    """The frames of a video or of a folder of images, uint8 [H, W, 3]."""
    if not video.path.is_dir():
        return video_io.stream_video(video.path, job.height, job.width, job.fps)
    return (video_io.read_image(path, job.height, job.width) for path in video.frames())


def _ahead(items: Iterable) -> Iterator:
    """Yields the items; a thread prepares the next one while the current one is used."""
    items, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


@dataclasses.dataclass(frozen=True, eq=False)
class _Encoder:
    """The VAE's encoder on the devices of a mesh, one clip per device."""

    vae: VaeEncoder
    mesh: Mesh

    @classmethod
    def load(cls, path: Path, devices: Sequence[jax.Device]) -> "_Encoder":
        mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
        config, params = load_network(path, "vae", sharding=NamedSharding(mesh, PartitionSpec()))
        return cls(VaeEncoder(WanVae(config), params), mesh)

    def encode(self, clips: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        """Encodes numbered clips in order."""
        part = []
        for clip in clips:
            part.append(clip)
            if len(part) == self.mesh.size:
                yield from self._encoded(part)
                part = []
        if part:
            yield from self._encoded(part)

    def _encoded(self, part):
        # every device needs a clip
        pixels = [pixels for _, pixels in part] + [part[0][1]] * (self.mesh.size - len(part))
        pixels = jax.device_put(np.stack(pixels), NamedSharding(self.mesh, PartitionSpec("data")))
        latents = np.asarray(encode_pixels(self.vae, pixels))
        yield from ((number, latent) for (number, _), latent in zip(part, latents, strict=False))
