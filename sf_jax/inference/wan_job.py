"""The work of `python -m sf_jax.generate --model=...`: loads Wan's networks and writes the videos of many prompts."""

import collections
import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax import files
from sf_jax import rollout as ro
from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import video_io, wan
from sf_jax.inference.wan_text import embed_prompts
from sf_jax.models.tiny_vae import TinyVaeDecoder
from sf_jax.models.vae import WanVae
from sf_jax.weights.folders import ModelFiles, find_model
from sf_jax.weights.networks import check_network, load_network

DECODERS = {"wan": "vae", "tiny": "tiny_vae"}
NAME_BYTES = 180  # of 255 that file systems take, with room for the index, the suffix and a temporary name


@dataclasses.dataclass(frozen=True)
class Job:
    """What to generate; one field per flag of the command.

    Attributes:
      model: model folder.
      prompts: texts.
      checkpoint: weights of a causal transformer; None is the folder's own bidirectional one.
      part: which network of the checkpoint.
      frames: pixel frames of the whole video, given ones included.
      height: pixel rows.
      width: pixel columns.
      seed: seed of the noise.
      num_samples: videos per prompt.
      fps: frames a second of the files.
      out: folder for the files.
      image: first frame.
      video: video to extend.
      solver: "few" (a distilled student) or one of `solvers.SOLVERS`.
      steps: evaluations of the solver.
      shift: shift of the schedule; None is 5, for a bidirectional network 8.
      guidance: scale, where there is a solver.
      negative_prompt: what to guide away from.
      denoising_steps: of the few-step student, on the even scale.
      chunk: latent frames generated together.
      window: latent frames that a chunk sees, itself included; None for all.
      sink: first latent frames that stay visible.
      context: "clean", or "noisy" for a few-step student that was trained to cache its last denoising step.
      vae: "wan" or "tiny".
      dtype: of parameters and computation.
      save_latents: whether to write the latents beside the videos.
      vbench_names: whether to name the files `prompt-index.mp4`.
    """

    model: str
    prompts: tuple[str, ...]
    checkpoint: str | None = None
    part: str | None = None
    frames: int = 81
    height: int = 480
    width: int = 832
    seed: int = 0
    num_samples: int = 1
    fps: float = 16.0
    out: str = "out"
    image: str | None = None
    video: str | None = None
    solver: str = "few"
    steps: int = 50
    shift: float | None = None
    guidance: float = 6.0
    negative_prompt: str = ""
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    chunk: int = 3
    window: int | None = None
    sink: int = 0
    context: str = "clean"
    vae: str = "wan"
    dtype: str = "bfloat16"
    save_latents: bool = False
    vbench_names: bool = False

    def __post_init__(self):
        """Refuses what can be seen to be wrong before anything is loaded."""
        for field, size in (("height", self.height), ("width", self.width)):
            if size < 16 or size % 16:
                near = max(16, round(size / 16) * 16)
                raise ValueError(f"{field} is {size}: it must be a multiple of 16, such as {near}")
        if self.vae not in DECODERS:
            raise ValueError(f"vae is {self.vae!r}: it must be one of {', '.join(DECODERS)}")
        for field in ("checkpoint", "image", "video", "model", "out"):
            if getattr(self, field) == "":
                raise ValueError(f"{field} is empty: give a path or leave it out")
        for field in ("guidance", "shift", "fps"):
            value, low = getattr(self, field), -math.inf if field == "guidance" else 0.0
            if value is not None and not low < value < math.inf:
                raise ValueError(f"{field} is {value}: it must be a finite number" + " above 0" * (low == 0.0))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must be at least 0 and below 2**32")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}: it must be at least 1")
        if self.image and self.video:
            raise ValueError("image and video are both given: choose one")
        empty = [i for i, prompt in enumerate(self.prompts) if not prompt.strip()]
        if empty or not self.prompts:
            raise ValueError("prompt is empty: say what to show" + (f" (prompt {empty[0] + 1})" if empty else ""))
        if self.checkpoint is None and (self.image or self.video):
            raise ValueError("image and video need a causal network: give its weights as checkpoint")
        if self.solver == "few" and self.checkpoint is None:
            raise ValueError(
                "solver is 'few': a model without checkpoint is Wan's bidirectional one, which needs many steps; "
                "give a Self Forcing checkpoint, or choose the solver unipc, dpm++ or euler"
            )
        if self.context == "noisy" and (self.solver != "few" or self.checkpoint is None):
            raise ValueError("context is 'noisy': only few-step students cache a denoising step; leave it out")
        latent, _, rollout = wan.latent_frames(self.frames), self.sampling, self.rollout
        if rollout is not None and not self.video:
            wan.check_frames(rollout, latent, 1 if self.image else 0)

    @property
    def sampling(self) -> wan.Sampling:
        """How each video is made."""
        solver = None
        if self.solver != "few":
            usual = 5.0 if self.checkpoint else 8.0
            solver = Solver(self.solver, usual if self.shift is None else self.shift, self.steps)
        sides = (self.height // wan.SPATIAL_FACTOR, self.width // wan.SPATIAL_FACTOR)
        return wan.Sampling(wan.latent_frames(self.frames), *sides, self.seed, solver, self.guidance)

    @property
    def rollout(self) -> ro.RolloutConfig | None:
        """Chunks and steps of a causal network; None for a bidirectional one."""
        if self.checkpoint is None:
            return None
        return ro.RolloutConfig(
            steps=self.denoising_steps,
            shift=5.0 if self.shift is None else self.shift,
            chunk=self.chunk,
            first_frame_alone=self.image is not None,
            window=self.window,
            sink=self.sink,
            context=self.context,
            context_noise="none",
        )


def video_names(job: Job) -> list[str]:
    """File names, without suffix, of the videos, every prompt's samples in order.

    VBench wants the prompt itself and the number of the sample; a prompt that comes again is counted on.
    """
    names, seen = [], collections.Counter()
    for prompt in job.prompts:
        if job.vbench_names:
            text = re.sub(r"[/\x00]", " ", prompt)
        else:
            text = re.sub(r"\W+", "_", prompt.lower()).strip("_")
        text = text.encode()[:NAME_BYTES].decode(errors="ignore") or "video"
        for sample in range(job.num_samples):
            if job.vbench_names:
                sample, seen[text] = seen[text], seen[text] + 1
            names.append(f"{text}-{sample}" if job.vbench_names or job.num_samples > 1 else text)
    if len(set(names)) < len(names):
        names = [f"{i:04d}_{name}" for i, name in enumerate(names)]
    return names


def given_pixels(job: Job) -> np.ndarray | None:
    """Pixels [F, H, W, 3] of the given image or video; None where none is given."""
    if job.image is not None:
        return video_io.read_image(job.image, job.height, job.width)[None]
    if job.video is None:
        return None
    pixels = video_io.read_video(job.video, job.height, job.width)
    # as many of the last frames as make whole chunks
    latent = (len(pixels) - 1) // wan.TEMPORAL_FACTOR + 1
    latent = latent // job.chunk * job.chunk
    if latent < 1:
        raise ValueError(
            f"video {job.video} has {len(pixels)} frames: a chunk of {job.chunk} latent frames needs at least "
            f"{(job.chunk - 1) * wan.TEMPORAL_FACTOR + 1}"
        )
    wan.check_frames(job.rollout, job.sampling.frames, latent)
    return pixels[-((latent - 1) * wan.TEMPORAL_FACTOR + 1) :]


def check_files(job: Job, model: ModelFiles, out: Path, names: Sequence[str]) -> None:
    """Refuses weight files that do not fit, and names that folders have, before anything long begins."""
    for name in names:
        for suffix in (".mp4", ".png", ".npy"):
            if (out / f"{name}{suffix}").is_dir():
                raise ValueError(f"out: {out / name}{suffix} is a folder: a file of that name is to be written")
    path = model.transformer if job.checkpoint is None else job.checkpoint
    check_network(path, "transformer", model.config, job.part)
    check_network(model.text_encoder, "umt5")
    for kind in {DECODERS[job.vae], *(["vae"] if job.image or job.video else [])}:
        check_network(getattr(model, kind), kind)


def load_pipeline(job: Job, model: ModelFiles, mesh: Mesh) -> wan.WanPipeline:
    """The transformer and the decoder, copied to every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    path = model.transformer if job.checkpoint is None else job.checkpoint
    _, params = load_network(path, "transformer", model.config, job.dtype, job.part, everywhere)
    kind = DECODERS[job.vae]
    vae_config, vae_params = load_network(getattr(model, kind), kind, None, job.dtype, None, everywhere)
    module = WanVae if kind == "vae" else TinyVaeDecoder
    vae = module(dataclasses.replace(vae_config, dtype=job.dtype))
    config = dataclasses.replace(model.config, dtype=job.dtype, remat="none")
    return wan.WanPipeline(config, params, job.rollout, vae, vae_params, mesh)


def run(job: Job) -> list[Path]:
    """Does the job; prints a line per chunk and, at the end, the times. Returns the files.

    Raises:
      ValueError: if something given is wrong; the message says what to change.
      OSError: if a file cannot be written.
    """
    out = files.check_writable(job.out)
    given = given_pixels(job)
    needed = {DECODERS[job.vae], "text_encoder", "tokenizer", *(["vae"] if given is not None else [])}
    model = find_model(job.model, [*sorted(needed), *([] if job.checkpoint else ["transformer"])])
    if model.config is None:
        raise ValueError(f"model folder {job.model} has no config.json of a transformer, nor transformer/config.json")
    names = video_names(job)
    check_files(job, model, out, names)
    wanted = [prompt for prompt in job.prompts for _ in range(job.num_samples)]
    mine = range(jax.process_index(), len(wanted), jax.process_count())
    devices = jax.local_devices()[: max(1, len(mine))]
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    size = f"{job.frames} frames of {job.height}x{job.width}"
    print(f"{len(wanted)} x {size} on {len(devices)} x {devices[0].device_kind}, {job.dtype}", flush=True)
    negative = [job.negative_prompt] if job.sampling.solver else []
    texts = embed_prompts(model, [*job.prompts, *negative], job.dtype)
    initial = None
    if given is not None:
        config, params = load_network(model.vae, "vae")
        initial = np.asarray(wan.encode_video(WanVae(config), params, given[None]))
    pipe = load_pipeline(job, model, mesh)
    print("loaded", flush=True)
    written, times = [], Times()
    for first in range(0, len(mine), len(devices)):
        batch = list(mine[first : first + len(devices)])
        # every device needs a video; what is there twice is written once
        padded = batch + batch[:1] * (len(devices) - len(batch))
        text = np.stack([texts[wanted[i]] for i in padded])
        unwanted = texts[job.negative_prompt][None] if negative else None
        start = None if initial is None else np.repeat(initial, len(padded), axis=0)
        stream = pipe.stream(text, unwanted, np.asarray(padded), job.sampling, start)
        label = f"videos {first + 1}-{first + len(batch)} of {len(mine)}, "
        count = 0 if initial is None else initial.shape[1]
        written += _write(job, out, [names[i] for i in batch], stream, count, times, label)
    print(times.summary(), flush=True)
    return written


@dataclasses.dataclass(frozen=True)
class ChunkTime:
    """How long a new chunk took: seconds until its latents were there, then until its pixels; frames of all videos."""

    denoise: float
    decode: float
    frames: int
    compiled: bool


@dataclasses.dataclass
class Times:
    """Times of a job.

    Attributes:
      first: seconds until the first new frames were there, of each batch.
      chunks: the new chunks; those for which programs were compiled count only where there are no others.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    chunks: list[ChunkTime] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """The line at the end."""
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


def _write(job, out, names, stream, given, times, label) -> list[Path]:
    """Writes the videos of one batch, `given` latent frames first, while their later chunks are being made."""
    began = before = time.perf_counter()
    cold, latents, small, done = not times.first, [], [], 0
    paths = [out / f"{name}.mp4" for name in names]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(video_io.Mp4Writer(path, job.fps, (job.height, job.width))) for path in paths]
        start = 0
        for chunk, (clean, pixels) in enumerate(stream):
            jax.block_until_ready(clean)
            denoised = time.perf_counter()
            pixels = np.asarray(pixels)
            decoded = time.perf_counter()
            if start >= given:
                # a compiler works before the first new chunk and before the first two decoded frames
                compiled = cold and start <= max(given, 1)
                frames = pixels.shape[1] * len(names)
                times.chunks.append(ChunkTime(denoised - before, decoded - denoised, frames, compiled))
                if start == given:
                    times.first.append(decoded - began)
            before = decoded
            start += clean.shape[1]
            done += pixels.shape[1]
            print(f"{label}chunk {chunk + 1}: {done}/{job.frames} frames, {decoded - began:.2f} s", flush=True)
            for writer, video in zip(writers, pixels, strict=False):
                writer.append(video)
            step = max(1, job.height // 120)
            small.append(pixels[: len(names), :, ::step, ::step])
            if job.save_latents:
                latents.append(np.asarray(clean.astype(jnp.float32)))
    if job.save_latents:
        for path, video in zip(paths, np.concatenate(latents, axis=1), strict=False):
            with files.replacing(path.with_suffix(".npy")) as unfinished, open(unfinished, "wb") as file:
                np.save(file, video)
            paths = [*paths, path.with_suffix(".npy")]
    if job.vbench_names:  # its folders hold videos alone
        return paths
    for name, video in zip(names, np.concatenate(small, axis=1), strict=True):
        sheet = video_io.contact_sheet(video[None], every=max(1, job.frames // 8), factor=1)
        paths.append(out / f"{name}.png")
        video_io.write_png(paths[-1], sheet)
    return paths
