"""The job of `python -m sf_jax.generate`, and the pipeline settings that it requires."""

import collections
import dataclasses
import functools
import math

import numpy as np

from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import lengths
from sf_jax.inference.layers import Videos
from sf_jax.inference.lengths import (
    MAX_PROMPT,
    MAX_SIDE,
    MAX_STEPS,
    MAX_VIDEO_FRAMES,
    MAX_VIDEOS,
    WAN_FACTOR,
    WAN_SIDE,
)
from sf_jax.inference.load import NAMED_PARTS, RCM, VAES, WanOptions, causal_header, load_digits
from sf_jax.inference.names import IF_EXISTS, plain_name, vbench_name
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.sampling import Sampling
from sf_jax.inference.scenes import Scene, read_schedule
from sf_jax.io import video as video_io
from sf_jax.io.video_file import duration
from sf_jax.parallel.mesh import check_tokens, mesh_sizes
from sf_jax.rollout import RolloutConfig
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.package import Package

NAME_BYTES = 180  # file systems allow 255; leaves room for the index and the suffix
# VBench looks for whole prompts; VBench 2.0 cuts those too long for a file name to 180 characters.
VBENCH_BYTES, VBENCH_CHARACTERS = 240, 180
WAN_ONLY = ("part", "height", "width", "image", "video", "vae", "dtype", "mesh")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to generate; one field per flag of the command. None is the model's default.

    Attributes:
      prompts: the prompts.
      model: folder of Wan2.1, or its name on the hub; None for the moving digits, or if options name all parts.
      transformer: file of the bidirectional transformer, instead of the model folder's.
      text_encoder: file of the text encoder, instead of the model folder's.
      tokenizer: file or folder of the tokenizer, instead of the model folder's or the text encoder's.
      checkpoint: Wan: weights of a causal transformer; None is the folder's own bidirectional one. Digits: see
        `load_digits`.
      part: which network of the checkpoint to use.
      lora: adapters to merge into the network.
      frames: pixel frames of the whole video, including given ones.
      height: pixel rows.
      width: pixel columns.
      seed: seed of the noise.
      num_samples: videos per prompt.
      fps: frames per second of the files.
      scale: enlargement factor of the pixels in the files.
      out: folder for the files.
      image: first frame.
      video: video to extend.
      solver: "few" (a distilled student) or one of `solvers.SOLVERS`.
      steps: number of solver steps.
      shift: shift of the schedule.
      guidance: guidance scale, with a solver.
      negative_prompt: prompt to guide away from.
      denoising_steps: steps of a few-step student, on the even (unshifted) scale.
      first_chunk_steps: as `denoising_steps`, for the first chunk of a video.
      chunk: latent frames generated together.
      window: latent frames visible to a chunk, including its own.
      sink: first latent frames, which always stay visible.
      positions: "absolute", or "relative" to the window (endless videos).
      context: "clean", or "noisy" for a few-step student that was trained to cache its last denoising step.
      schedule: file of prompts that change while the video plays (`scenes.read_schedule`), in place of `prompts`.
      vae: "wan" or "tiny", or the file of a VAE.
      dtype: type of parameters and computation.
      quantize: "int8" or "fp8", for the network's weights.
      cache_dtype: type of a causal network's cached keys and values, one of `kv_cache.DTYPES`.
      mesh: how devices share a video, such as "tensor:2,context:2".
      save_latents: whether to write the latents next to the videos.
      vbench_names: whether to name the files `prompt-index.mp4`.
      names: texts for the file names, one per prompt; empty uses the prompts themselves.
      abstract: whether nothing is generated and no weights are needed; without checkpoint and solver, the network is
        then a few-step student.
      if_exists: what to do if a file of the same name exists, one of `names.IF_EXISTS`; None is "number", or "refuse"
        with `vbench_names`, whose names have a meaning.
    """

    prompts: tuple[str, ...]
    model: str | None = None
    transformer: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    checkpoint: str | None = None
    part: str | None = None
    lora: tuple[Lora, ...] = ()
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    num_samples: int = 1
    fps: float | None = None
    scale: int | None = None
    out: str = "out"
    image: str | None = None
    video: str | None = None
    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    denoising_steps: tuple[int, ...] | None = None
    first_chunk_steps: tuple[int, ...] | None = None
    chunk: int | None = None
    window: int | None = None
    sink: int | None = None
    positions: str | None = None
    context: str | None = None
    schedule: str | None = None
    vae: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    cache_dtype: str | None = None
    mesh: str | None = None
    save_latents: bool = False
    vbench_names: bool = False
    names: tuple[str, ...] = ()
    if_exists: str | None = None
    abstract: bool = False

    def __post_init__(self):
        """Validates everything that can be checked before loading."""
        for field in ("checkpoint", "image", "video", "model", "out", "schedule", "vae", *NAMED_PARTS):
            if getattr(self, field) == "":
                raise ValueError(f"{field} is empty: give a path or leave it out")
        for field in ("guidance", "shift", "fps"):
            value, low = getattr(self, field), -math.inf if field == "guidance" else 0.0
            if value is not None and not low < value < math.inf:
                raise ValueError(f"{field} is {value}: it must be a finite number" + " above 0" * (low == 0.0))
        self._check_amounts()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must be at least 0 and below 2**32")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}: it must be at least 1")
        if self.schedule is not None:
            if self.prompts:
                raise ValueError("schedule and prompt are both given: the schedule has the prompts")
            self.scenes  # noqa: B018 (reads the file)
            if self.is_wan and (not self.few_steps or not self.is_causal):
                raise ValueError("schedule needs a few-step student: give its weights as checkpoint, and no solver")
            if self.is_wan and self.wan_rollout.window is None:
                raise ValueError("window is None: a schedule needs one, such as 21 latent frames")
        elif not self.prompts and not self.abstract:
            raise ValueError("prompt is missing: say what to show, or name a file of prompts with --prompts")
        if self.vae == "none" and not self.abstract:
            raise ValueError("vae is 'none': a video needs a decoder; save_latents writes the latents beside it")
        if not self.is_wan:
            for field in WAN_ONLY:
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} is given without model: it is for Wan, whose folder --model names")
        else:
            self._check_wan()

    def _check_amounts(self) -> None:
        """Validates sizes and counts, before anything is built from them."""
        limits = {"frames": MAX_VIDEO_FRAMES, "height": MAX_SIDE, "width": MAX_SIDE, "scale": MAX_SIDE}
        limits |= {"steps": MAX_STEPS, "num_samples": MAX_VIDEOS, "guidance": 1000, "shift": 1000}
        for field, high in limits.items():
            value = getattr(self, field)
            if value is not None and abs(value) > high:
                raise ValueError(f"{field} is {value}: it must be at most {high}")
        for field in ("frames", "scale"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at least 1")
        empty = [i + 1 for i, prompt in enumerate(self.prompts) if not prompt.strip()]
        if empty:
            raise ValueError(f"prompt is empty: say what to show (prompt {empty[0]})")
        count = max(1, len(self.prompts))
        if count * self.num_samples > MAX_VIDEOS:
            raise ValueError(
                f"num_samples is {self.num_samples}: with {count} prompts these are {count * self.num_samples} videos, "
                f"at most {MAX_VIDEOS} can be made at once"
            )
        for index, text in enumerate((*self.prompts, *self.names, self.negative_prompt or "")):
            if len(text) > MAX_PROMPT:
                raise ValueError(f"prompt {index + 1} has {len(text)} characters: it must have at most {MAX_PROMPT}")
        if self.names and len(self.names) != len(self.prompts):
            raise ValueError(
                f"names is a list of {len(self.names)}, prompts one of {len(self.prompts)}: every prompt needs a name"
            )
        if self.if_exists not in (None, *IF_EXISTS):
            raise ValueError(f"if_exists is {self.if_exists!r}: it must be one of {', '.join(IF_EXISTS)}")

    def _check_wan(self) -> None:
        for field in ("height", "width"):
            size = getattr(self, field)
            if size is not None and (size < WAN_SIDE or size % WAN_SIDE):
                near = max(WAN_SIDE, round(size / WAN_SIDE) * WAN_SIDE)
                raise ValueError(f"{field} is {size}: it must be a multiple of {WAN_SIDE}, such as {near}")
        rows, columns = (self.height or Sampling().height), (self.width or Sampling().width)
        check_tokens(self.mesh_sizes, rows // WAN_SIDE, columns // WAN_SIDE)
        if self.image and self.video:
            raise ValueError("image and video are both given: choose one")
        if not self.is_causal and (self.image or self.video):
            raise ValueError("image and video need a causal network: give its weights as checkpoint")
        if self.trained is not None:
            self._check_trained(self.trained)
        if self.few_steps and not self.is_causal:
            raise ValueError(
                "solver is 'few': a model without checkpoint is Wan's bidirectional one, which needs many steps; "
                "give a Self Forcing checkpoint, or choose the solver unipc, dpm++ or euler"
            )
        if self.context == "noisy" and not self.few_steps:
            raise ValueError("context is 'noisy': only few-step students cache a denoising step; leave it out")
        steps = ("denoising_steps", "first_chunk_steps")
        no_effect = {
            "a few-step student has none: choose a --solver": self.few_steps * ("steps", "guidance", "negative_prompt"),
            "it is for few steps, without --solver": (not self.few_steps) * steps,
            "it is for a causal network: give --checkpoint": (not self.is_causal)
            * ("part", "chunk", "window", "sink", "positions", "context", "cache_dtype"),
        }
        for reason, fields in no_effect.items():
            for field in fields:
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} has no effect here: {reason}")
        latent, rollout = lengths.latent_frames(self.wan_frames, WAN_FACTOR), self.wan_rollout
        lengths.check_scale(self.scale or 1, self.height or Sampling().height, self.width or Sampling().width)
        if not self.abstract:
            self.wan_options()
        if rollout is not None and not self.video:
            lengths.check_frames(rollout, latent, 1 if self.image else 0, WAN_FACTOR)

    def _check_trained(self, trained: Package) -> None:
        """Checks the options against the header of the checkpoint."""
        file, rollout = f"checkpoint {self.checkpoint}", trained.generation_rollout
        if trained.kind == "causal" and self.few_steps:
            raise ValueError(f"{file} takes many steps (its header says so): choose a solver, such as unipc")
        if trained.kind == "student" and not self.few_steps:
            raise ValueError(f"solver is {self.solver!r}: {file} takes the few steps it was trained for; leave it out")
        if self.image and not rollout.first_frame_alone:
            raise ValueError(f"image is {self.image}: {file} was trained without lone first frames")
        shift = trained.shift if trained.kind == "causal" else rollout.shift
        known = {"chunk": rollout.chunk, "context": rollout.context, "shift": shift}
        if trained.kind == "student":
            known["denoising_steps"] = rollout.steps
            known |= {"first_chunk_steps": rollout.first_steps} if rollout.first_steps else {}
        if rollout.window is not None:
            known |= {name: getattr(rollout, name) for name in ("window", "sink", "positions")}
        for name, value in known.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} is {getattr(self, name)}: {file} was trained with {value}; leave it out")

    @property
    def is_wan(self) -> bool:
        """Whether the network is one of Wan's: a model folder is given, or files of its parts."""
        parts = any(getattr(self, name) is not None for name in ("model", *NAMED_PARTS))
        return parts or self.vae not in (None, *VAES)

    @property
    def is_causal(self) -> bool:
        """Whether Wan's network generates videos chunk by chunk."""
        return self.checkpoint is not None or (self.abstract and self.few_steps)

    @functools.cached_property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices per axis of the requested mesh."""
        return {} if self.mesh is None else mesh_sizes(self.mesh)

    @functools.cached_property
    def trained(self) -> Package | None:
        """The header of Wan's checkpoint, if sf_jax.train wrote it."""
        return causal_header(self.checkpoint) if self.is_wan and self.checkpoint is not None else None

    @functools.cached_property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes of the schedule; empty without one."""
        return () if self.schedule is None else read_schedule(self.schedule)

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """All prompts to embed."""
        return self.prompts or tuple(scene.prompt for scene in self.scenes)

    @property
    def few_steps(self) -> bool:
        """Whether Wan's network runs with the few steps of a student."""
        return self.solver in (None, "few")

    @property
    def wan_frames(self) -> int:
        """Pixel frames of Wan's videos; the default is the usual length, rounded up to whole chunks."""
        frames, rollout = Sampling().frames, self.wan_rollout
        if self.frames is not None or rollout is None:
            return frames if self.frames is None else self.frames
        # whole chunks, after a first frame that is a chunk of its own
        alone = int(rollout.first_frame_alone)
        count = -(-(lengths.latent_frames(frames, WAN_FACTOR) - alone) // rollout.chunk) * rollout.chunk
        return 1 + WAN_FACTOR * (count + alone - 1)

    @property
    def rollout_changes(self) -> dict:
        """The requested fields of `RolloutConfig`."""
        fields = {"steps": self.denoising_steps, "first_steps": self.first_chunk_steps}
        fields |= {name: getattr(self, name) for name in ("chunk", "window", "sink", "positions", "context")}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def wan_rollout(self) -> RolloutConfig | None:
        """Rollout settings of Wan's causal network; None for its bidirectional one."""
        if not self.is_causal:
            return None
        shift = {} if self.shift is None or not self.few_steps else {"shift": self.shift}
        if self.trained is not None:
            return dataclasses.replace(self.trained.generation_rollout, **self.rollout_changes | shift)
        alone = {"first_frame_alone": self.image is not None}
        return RolloutConfig(**self.rollout_changes | shift | alone, context_noise="none")

    def wan_options(self, devices: tuple | None = None, unread: bool = False) -> WanOptions:
        """The options of `load_pipeline` for Wan."""
        named = {name: getattr(self, name) for name in ("vae", *NAMED_PARTS)}
        named = {name: value for name, value in named.items() if value is not None}
        return WanOptions(
            self.checkpoint,
            self.part,
            dtype=self.dtype,
            rollout=self.wan_rollout,
            videos=Videos(1, self.wan_frames, self.height or Sampling().height, self.width or Sampling().width),
            devices=devices,
            mesh=None if devices is None else self.mesh,
            loras=self.lora,
            unread=unread,
            quantize=self.quantize,
            cache_dtype=self.cache_dtype,
            **named,
        )

    def check_naming(self, naming: str) -> None:
        """Checks that files of NVlabs/rcm come with the flags that set their chunks and steps.

        Args:
          naming: the naming of the checkpoint's tensors; see `weights.recognize.NAMINGS`.
        """
        fields = ("chunk", "denoising_steps") if self.few_steps else ("chunk", "shift")
        missing = [f"--{field}" for field in fields if getattr(self, field) is None]
        if naming == "rcm" and missing:
            raise ValueError(RCM.format(f"checkpoint {self.checkpoint}", " and ".join(missing)))

    @property
    def sampling_changes(self) -> dict:
        """The requested fields of `Sampling`, except the solver."""
        names = ("frames", "height", "width", "seed", "guidance", "negative_prompt")
        fields = {name: getattr(self, name) for name in names}
        return {name: value for name, value in fields.items() if value is not None}

    def wan_sampling(self, pipe: VideoPipeline) -> VideoPipeline:
        """The given Wan pipeline with the job's sampling settings."""
        changes = self.sampling_changes | {"frames": self.wan_frames}
        if not self.few_steps:
            shift = pipe.sampling.solver.shift if pipe.sampling.solver else 5.0
            shift = shift if self.shift is None else self.shift
            changes["solver"] = Solver(self.solver, shift, self.steps or 50)
        return pipe.with_sampling(**changes)

    def digits_pipeline(self) -> VideoPipeline:
        """The job's pipeline of moving digits."""
        pipe, changes = (
            load_digits(self.checkpoint, self.lora, self.quantize, self.cache_dtype),
            self.rollout_changes,
        )
        solver, asked = pipe.sampling.solver, {"name": self.solver, "steps": self.steps, "shift": self.shift}
        asked = {name: value for name, value in asked.items() if value is not None}
        if solver is None:
            if self.solver not in (None, "few") or self.steps is not None:
                name = "steps" if self.solver in (None, "few") else "solver"
                raise ValueError(f"{name} is {getattr(self, name)!r}: a student takes the few steps it was trained for")
            changes |= {} if self.shift is None else {"shift": self.shift}
        else:
            if self.solver == "few":
                raise ValueError("solver is 'few': this network of moving digits needs many steps")
            pipe = pipe.with_sampling(solver=dataclasses.replace(solver, **asked))
        if changes:
            pipe = pipe.with_rollout(**changes)
        pipe = pipe.with_sampling(**self.sampling_changes)
        scale, sampling = self.scale or lengths.DIGITS_SCALE, pipe.sampling
        lengths.check_scale(scale, sampling.height, sampling.width, sampling.frames)
        return pipe

    def initial_pixels(self) -> np.ndarray | None:
        """Pixels uint8 [F, h, w, 3] of the given image or video; None without one."""
        height, width = self.height or Sampling().height, self.width or Sampling().width
        if self.image is not None:
            return video_io.read_image(self.image, height, width)[None]
        if self.video is None:
            return None
        chunk, whole, alone = self.wan_rollout.chunk, self.wan_frames, int(self.wan_rollout.first_frame_alone)
        (_, rate), fps = duration(self.video), self.fps or lengths.WAN_FPS
        if rate > 1.05 * fps or rate < 0.95 * fps:
            what = "frames are left out" if rate > fps else "it plays faster there"
            print(f"{self.video} has about {rate:.3g} frames a second, the new video {fps:g}: {what}", flush=True)
        # frames are never repeated: a network that sees still frames goes on with still ones
        pixels = video_io.read_end(self.video, height, width, whole, fps)
        # as many of the last frames as form whole chunks, leaving at least one chunk to generate
        latent = alone + ((len(pixels) - 1) // WAN_FACTOR + 1 - alone) // chunk * chunk
        if latent < 1:
            raise ValueError(
                f"video {self.video} has {len(pixels)} frames: a chunk of {chunk} latent frames needs at least "
                f"{(chunk - 1) * WAN_FACTOR + 1}"
            )
        frames = lengths.latent_frames(whole, WAN_FACTOR)
        latent = min(latent, max(alone or chunk, alone + (frames - 1 - alone) // chunk * chunk))
        lengths.check_frames(self.wan_rollout, frames, latent, WAN_FACTOR)
        count = (latent - 1) * WAN_FACTOR + 1
        if len(pixels) == whole:
            print(f"{self.video}: its last {count} frames are gone on from, to {whole} in all", flush=True)
        return pixels[-count:]

    @property
    def titles(self) -> tuple[str, ...]:
        """Texts for the file names: the names, the prompts, or the first prompt of a schedule."""
        return self.names or self.prompts or (self.scenes[0].prompt,)

    def video_prompts(self) -> list[str]:
        """The prompt of every video, with each prompt's samples in order."""
        return [prompt for prompt in self.prompts or self.titles for _ in range(self.num_samples)]


def video_names(job: Job) -> list[str]:
    """File names of the videos, without suffix, with each prompt's samples in order.

    VBench expects the prompt itself and the index of the sample; a repeated prompt continues the count. VBench 2.0
    expects the first 180 characters of prompts that are too long for a file name (its `prompt[:180]`).
    """
    names, seen = [], collections.Counter()
    for title in job.titles:
        if job.vbench_names:
            text = vbench_name(title)
            text = text if len(text.encode()) <= VBENCH_BYTES else text[:VBENCH_CHARACTERS]
            text = text.encode()[:VBENCH_BYTES].decode(errors="ignore") or "video"
        else:
            text = plain_name(title, NAME_BYTES)
        for sample in range(job.num_samples):
            if job.vbench_names:
                sample, seen[text] = seen[text], seen[text] + 1
            names.append(f"{text}-{sample}" if job.vbench_names or job.num_samples > 1 else text)
    if len({name if job.vbench_names else name.casefold() for name in names}) < len(names):
        names = [f"{i:04d}_{name}" for i, name in enumerate(names)]
    return names
