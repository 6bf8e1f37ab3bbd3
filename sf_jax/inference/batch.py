"""Implements `python -m sf_jax.generate`: generates the videos of many prompts and writes their files."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from sf_jax import files
from sf_jax.inference import lengths
from sf_jax.inference.executables import Executables
from sf_jax.inference.job import Job, video_names
from sf_jax.inference.load import find_wan, load_encoder, wan_pipeline
from sf_jax.inference.names import SUFFIXES, check_folders, reserved_names
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.programs import encode_pixels
from sf_jax.inference.sampling import Chunk
from sf_jax.inference.scenes import scheduled_chunks
from sf_jax.inference.text_encoder import Umt5TextEncoder
from sf_jax.io import video as video_io
from sf_jax.io.arrays import npy_writer
from sf_jax.parallel.mesh import video_devices
from sf_jax.weights.networks import check_network, describe_network

DIGITS_FPS = 12.0
DIGITS_FRAMES = 2**17  # limit for the frames of all digit videos generated together
DIFFERENT_CHUNKS = 3  # kinds of chunks in a video: a lone first frame, the first one of full size, and all later ones
SHEET_FRAMES = 8  # of a contact sheet with one video, at least, if the video has as many
LABEL = 200  # maximum number of a prompt's characters on a contact sheet


@dataclasses.dataclass(frozen=True)
class Style:
    """How videos are written to files.

    Attributes:
      fps: frames per second.
      scale: enlargement factor of the pixels.
      gif: whether to write a GIF, too: for small videos, whose frames are all kept.
      sheet: name of the contact sheet that a batch of videos shares, with their prompts; None writes one per video.
      latents: whether to write the latents, too.
      only_videos: whether to write nothing else.
      keep: whether to keep existing files, and to write only those that are missing.
    """

    fps: float
    scale: int = 1
    gif: bool = False
    sheet: str | None = None
    latents: bool = False
    only_videos: bool = False
    keep: bool = False

    def writes(self, path: Path) -> bool:
        """Whether to write a file."""
        return not (self.keep and path.exists())


@dataclasses.dataclass(frozen=True)
class ChunkTime:
    """Duration of a new chunk: seconds until its latents, then its pixels, were ready; frames of all videos."""

    denoise: float
    decode: float
    frames: int
    compiled: bool


@dataclasses.dataclass
class Times:
    """Times of a job.

    Attributes:
      first: seconds until the first new frames of each batch were ready.
      chunks: the new chunks; those during which programs were compiled count only if there are no others.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    chunks: list[ChunkTime] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """The summary line at the end of a job."""
        if not self.chunks:
            return "no video for this process"
        compiling = " (compilation included)"
        chunks = [chunk for chunk in self.chunks if not chunk.compiled]
        note, chunks = ("", chunks) if chunks else (compiling, self.chunks)
        denoise, decode = sum(chunk.denoise for chunk in chunks), sum(chunk.decode for chunk in chunks)
        frames = sum(chunk.frames for chunk in chunks)
        return "; ".join(
            [
                f"time to first frame {self.first[-1]:.2f} s" + compiling * (len(self.first) == 1),
                f"{(denoise + decode) / len(chunks):.2f} s per chunk{note}",
                f"{frames / denoise:.2f} FPS without decoding, {frames / (denoise + decode):.2f} FPS with it{note}",
            ]
        )


def run(job: Job, executables: Executables | None = None) -> list[Path]:
    """Runs the job; prints a line per chunk and the times at the end. Returns the files.

    Args:
      job: what to generate.
      executables: cache of compiled programs; None if there is none.

    Raises:
      ValueError: if an input is invalid; the message says what to change.
      OSError: if a file cannot be written.
    """
    out, names = files.check_writable(job.out), video_names(job)
    files.remove_leftovers(out)
    check_folders(names, out)
    video_io.check_encoder()
    prompts = job.video_prompts()
    numbers = range(jax.process_index(), len(prompts), jax.process_count())
    if_exists = job.if_exists or ("refuse" if job.vbench_names else "number")
    suffixes = SUFFIXES[:1] if job.vbench_names else SUFFIXES
    needed = (".mp4", ".npy") if job.save_latents else (".mp4",)
    with reserved_names([names[i] for i in numbers], out, if_exists, suffixes, needed) as free:
        if free and not any(free):
            print("every video is there already", flush=True)
            return []
        names = {i: name for i, name in zip(numbers, free, strict=True) if name is not None}
        return _run(job, executables, names, prompts, if_exists)


def _run(
    job: Job, executables: Executables | None, names: dict[int, str], prompts: Sequence[str], if_exists: str
) -> list[Path]:
    """Generates and writes the videos whose numbers have `names`; see `run`."""
    out, numbers = Path(job.out), list(names)
    plan = _plan(job, len(numbers), executables)
    pipe, size, style = plan.pipe, plan.size, plan.style
    sampling = pipe.sampling
    print(
        f"{pipe.describe()}\n{len(prompts)} x {sampling.frames} frames of {sampling.height}x{sampling.width}",
        flush=True,
    )
    written, times = [], Times()
    for first in range(0, len(numbers), size):
        batch = numbers[first : first + size]
        chunks = _chunks(job, plan, batch)
        label = f"videos {first + 1}-{first + len(batch)} of {len(numbers)}, " if size < len(numbers) else ""
        videos = [(out / names[i], prompts[i]) for i in batch]
        with contextlib.ExitStack() as stack:
            if not job.is_wan and len(batch) > 1 and not style.only_videos:
                sheet = f"contact_sheet-{first // size + 1}" if first else "contact_sheet"
                policy = "replace" if if_exists == "replace" else "number"
                sheets = stack.enter_context(reserved_names([sheet], out, policy, (".png",)))
                style = dataclasses.replace(style, sheet=sheets[0])
            written += _write(pipe, style, videos, chunks, times, label)
    print(times.summary(), flush=True)
    return written


def compile_programs(job: Job, executables: Executables | None = None) -> Iterator[str]:
    """Compiles the programs that `run` needs for a job, by generating with zero weights until no new ones occur.

    It makes the same calls as `run`, with arrays of the same shapes, types and shardings, so that no program is missed.
    It reads none of Wan's weights and writes no files.

    Args:
      job: the job to run later.
      executables: cache of compiled programs; None if there is none.

    Yields:
      What has been compiled, in a few words each.

    Raises:
      ValueError: see `run`.
    """
    plan = _plan(job, len(job.video_prompts()), executables, unread=True)
    pipe = plan.pipe
    if pipe.rollout is None:  # all steps share one program
        solver = dataclasses.replace(pipe.sampling.solver, steps=min(2, pipe.sampling.solver.steps))
        plan = dataclasses.replace(plan, pipe=pipe.with_sampling(solver=solver))
    yield "text encoder" if job.is_wan else "network"
    numbers, generated = list(range(len(job.video_prompts()))), 0
    for index, chunk in enumerate(_chunks(job, plan, numbers[: plan.size])):
        jax.block_until_ready((chunk.latents, chunk.pixels))
        generated += not chunk.initial
        yield f"chunk {index + 1}"
        if generated == DIFFERENT_CHUNKS and not job.scenes:  # a schedule has other chunks where its prompts change
            break


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The parts of a job.

    Attributes:
      pipe: the pipeline.
      initial: latents [1, I, H, W, C] to continue from.
      size: videos per batch.
      style: how files are written.
    """

    pipe: VideoPipeline
    initial: np.ndarray | None
    size: int
    style: Style


def _plan(job: Job, count: int, executables: Executables | None, unread: bool = False) -> _Plan:
    """Loads what a job with `count` videos for this process needs; see `WanOptions.unread`."""
    if not job.is_wan:
        pipe, initial = job.digits_pipeline(), None
        most = max(1, DIGITS_FRAMES // pipe.sampling.frames)
        size = max(1, min(count, most))
        style = Style(DIGITS_FPS, lengths.DIGITS_SCALE, gif=True, sheet="contact_sheet")
    else:
        devices = _devices(job, count)
        pipe, initial = _wan(job, devices, executables, unread)
        size, style = len(devices) // video_devices(job.mesh_sizes), Style(lengths.WAN_FPS)
    style = dataclasses.replace(
        style,
        fps=job.fps or style.fps,
        scale=job.scale or style.scale,
        latents=job.save_latents,
        only_videos=job.vbench_names,  # VBench's folders contain only videos
        keep=job.if_exists == "skip",
    )
    pipe = pipe if executables is None else dataclasses.replace(pipe, executables=executables)
    return _Plan(pipe, initial, size, style)


def _chunks(job: Job, plan: _Plan, numbers: list[int]) -> Iterator[Chunk]:
    """Generates the videos of a batch."""
    # every part of the mesh needs a video; duplicates are written only once
    padded = numbers + numbers[:1] * (plan.size - len(numbers))
    initial = None if plan.initial is None else np.repeat(plan.initial, len(padded), axis=0)
    if job.scenes:
        return scheduled_chunks(plan.pipe, job.scenes, padded, plan.style.fps, initial)
    prompts = job.video_prompts()
    return plan.pipe.chunks([prompts[i] for i in padded], first_index=padded, initial=initial)


def _devices(job: Job, videos: int) -> tuple:
    """This process's devices that generate a video, or a part of one; no more than the videos need."""
    here, shared = jax.local_devices(), video_devices(job.mesh_sizes)
    data = job.mesh_sizes.get("data", max(1, min(len(here) // shared, videos)))
    return tuple(here[: data * shared])


def _wan(
    job: Job, devices: tuple, executables: Executables | None, unread: bool
) -> tuple[VideoPipeline, np.ndarray | None]:
    """Wan's pipeline, and the latents to continue from; loads large networks one after another to save memory."""
    pixels, options = job.initial_pixels(), job.wan_options(devices, unread)
    if not unread:
        print(f"loading for {len(devices)} x {devices[0].device_kind}, {options.compute_dtype}", flush=True)
    model = find_wan(job.model, options)
    if job.checkpoint is not None:
        job.check_naming(describe_network(job.checkpoint, "transformer", job.part).naming)
    if pixels is not None:
        if model.vae is None:
            raise ValueError(f"model {job.model} lacks: vae, which encodes the given frames")
        check_network(model.vae, "vae")
    encoder = {"mesh": options.device_mesh, "executables": executables, "unread": unread}
    text_encoder = Umt5TextEncoder(model, options.compute_dtype, **encoder)
    text_encoder.encode([*job.all_prompts, *([] if job.few_steps else [job.negative_prompt or ""])])
    initial = None if pixels is None else np.asarray(encode_pixels(load_encoder(model), pixels[None]))
    return job.wan_sampling(wan_pipeline(job.model, options, model, text_encoder)), initial


def _write(
    pipe: VideoPipeline,
    style: Style,
    videos: Sequence[tuple[Path, str]],
    chunks: Iterator[Chunk],
    times: Times,
    label: str,
) -> list[Path]:
    """Writes a batch's files while later chunks are being generated; `videos` are paths and prompts."""
    began = before = time.perf_counter()
    cold, latents, small, done = not times.first, [], [], 0
    paths, frames = [path.with_name(f"{path.name}.mp4") for path, _ in videos], pipe.sampling.frames
    size = (pipe.sampling.height * style.scale, pipe.sampling.width * style.scale)
    step = 1 if style.gif else max(1, pipe.sampling.height // 120)
    every = 1 if style.gif else max(1, frames // SHEET_FRAMES)  # only the frames of the contact sheet stay in memory
    with contextlib.ExitStack() as stack:
        # small videos are written later, one by one: there may be hundreds
        writers, appends = {}, {}
        for i, path in enumerate([] if style.gif else paths):
            if style.writes(path):
                writers[i] = stack.enter_context(video_io.Mp4Writer(path, style.fps, size))
            if style.latents and style.writes(path.with_suffix(".npy")):
                appends[i] = stack.enter_context(npy_writer(path.with_suffix(".npy")))
        first = None
        for index, chunk in enumerate(chunks):
            jax.block_until_ready(chunk.latents)
            denoised = time.perf_counter()
            pixels = np.asarray(chunk.pixels)
            decoded = time.perf_counter()
            if not chunk.initial:
                first = chunk.start if first is None else first
                # programs compile for the first new chunk, and for the first two decoded latent frames
                compiled = cold and chunk.start <= max(first, 1)
                times.chunks.append(
                    ChunkTime(denoised - before, decoded - denoised, pixels.shape[1] * len(videos), compiled)
                )
                if chunk.start == first:
                    times.first.append(decoded - began)
            before = decoded
            small.append(pixels[: len(videos), -done % every :: every, ::step, ::step].copy())
            done += pixels.shape[1]
            print(f"{label}chunk {index + 1}: {done}/{frames} frames, {decoded - began:.2f} s", flush=True)
            for i, writer in writers.items():
                writer.append(video_io.upscale(pixels[i], style.scale))
            if style.latents:
                new = np.asarray(chunk.latents).astype(np.float32)
                for i, append in appends.items():
                    append(new[i])
                if style.gif:
                    latents.append(new)
    small = np.concatenate(small, axis=1)
    written = paths + ([path.with_suffix(".npy") for path in paths] if style.latents else [])
    if style.gif:
        written += _write_small(style, videos, small, np.concatenate(latents, axis=1) if latents else ())
    return written if style.only_videos else [*written, *_write_sheets(style, videos, small, every)]


def _write_small(
    style: Style, videos: Sequence[tuple[Path, str]], small: np.ndarray, latents: Sequence[np.ndarray]
) -> list[Path]:
    """Writes the files of small videos uint8 [N, F, h, w, c]; returns the GIFs."""
    paths, latent_paths, gifs = (
        [path.with_name(f"{path.name}.{end}") for path, _ in videos] for end in ("mp4", "npy", "gif")
    )
    for path, video in zip(latent_paths, latents, strict=False):
        if style.writes(path):
            with npy_writer(path) as append:
                append(video)
    gifs = [] if style.only_videos else gifs
    # a video's mp4 comes last: where it exists, the others do
    for group, write in ((gifs, video_io.write_gif), (paths, video_io.write_mp4)):
        for path, video in zip(group, small, strict=False):
            if style.writes(path):
                write(path, video_io.upscale(video, style.scale), style.fps)
    return gifs


def _write_sheets(style: Style, videos: Sequence[tuple[Path, str]], small: np.ndarray, stride: int) -> list[Path]:
    """Writes contact sheets of small videos, of which uint8 [N, F, h, w, c] has every `stride`-th frame."""
    written, frames = [], small.shape[1]
    if style.sheet:
        path = videos[0][0].with_name(f"{videos[0][0].name if len(videos) == 1 else style.sheet}.png")
        labels = [prompt[:LABEL] for _, prompt in videos]
        if style.writes(path):
            sheet = video_io.contact_sheet(small, every=max(1, frames // 16), labels=labels, factor=3)
            video_io.write_png(path, sheet)
        return [*written, path]
    for (path, _), video in zip(videos, small, strict=True):
        written.append(path.with_name(f"{path.name}.png"))
        if style.writes(written[-1]):
            sheet = video_io.contact_sheet(video[None], every=max(1, frames // SHEET_FRAMES), stride=stride, factor=1)
            video_io.write_png(written[-1], sheet)
    return written
