"""Generates videos: `python -m sf_jax.generate --prompt="a 7 moving left, fast"`.

Without arguments it uses the shipped student of moving digits. Writes an mp4, a GIF and a contact sheet per prompt.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from sf_jax import files
from sf_jax.inference import video_io
from sf_jax.inference.pipeline import Pipeline, load_pipeline

_PROMPT = flags.DEFINE_string("prompt", "a 3 moving up and right, slowly", "What to show")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file with a prompt a line, instead of --prompt")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Weights that sf_jax.train wrote; 'teacher' is the shipped teacher; default: the shipped student",
)
_FRAMES = flags.DEFINE_integer("frames", None, "Latent frames (default: 48 for a student, its own for a teacher)")
_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Videos per prompt", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise", lower_bound=0)
_GUIDANCE = flags.DEFINE_float("guidance", None, "A teacher's guidance scale")
_FPS = flags.DEFINE_float("fps", 12.0, "Frames per second of the files", lower_bound=1.0, upper_bound=50.0)
_SCALE = flags.DEFINE_integer("scale", 12, "Enlargement of the pixels", lower_bound=1)
_OUT = flags.DEFINE_string("out", "out", "Folder for the files")


def _prompts() -> list[str]:
    """The prompts of the command line."""
    if _PROMPTS.value is None:
        return [_PROMPT.value]
    try:
        lines = [line.strip() for line in Path(_PROMPTS.value).read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"prompts: cannot read {_PROMPTS.value} ({error.strerror})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"prompts: {_PROMPTS.value} holds no prompt: give one a line")
    return lines


def _name(prompt: str, sample: int, samples: int) -> str:
    """A file name made of the prompt."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_") or "empty"
    return words if samples == 1 else f"{words}_{sample}"


def generate(pipe: Pipeline, prompts: list[str], names: list[str], frames: int, seed: int, out: Path) -> list[Path]:
    """Streams the videos of all prompts together and writes their files; prints a line per chunk."""
    began = time.perf_counter()
    parts: list[np.ndarray] = []
    for pixels in pipe.stream(prompts, frames, seed):
        parts.append(pixels)
        done, seconds = sum(p.shape[1] for p in parts), time.perf_counter() - began
        print(f"chunk {len(parts)}: {done}/{frames} frames, {seconds:.2f} s", flush=True)
        if len(parts) == 1:
            first = seconds
    total = time.perf_counter() - began
    rate = f", then {(frames - parts[0].shape[1]) * len(prompts) / (total - first):.0f} frames/s" if parts[1:] else ""
    print(f"first chunk after {first:.2f} s{rate}", flush=True)
    videos = [video_io.upscale(video, _SCALE.value) for video in np.concatenate(parts, axis=1)]
    written = []
    for name, video in zip(names, videos, strict=True):
        video_io.write_mp4(out / f"{name}.mp4", video, _FPS.value)
        video_io.write_gif(out / f"{name}.gif", video, _FPS.value)
        written += [out / f"{name}.mp4", out / f"{name}.gif"]
    sheet = out / (f"{names[0]}.png" if len(names) == 1 else "contact_sheet.png")
    small = np.concatenate(parts, axis=1)
    video_io.write_png(sheet, video_io.contact_sheet(small, every=max(1, frames // 16), labels=prompts, factor=3))
    return [*written, sheet]


def main(arguments: list[str]) -> None:
    """Command line: see the module's docstring."""
    logging.set_verbosity(logging.WARNING)
    if len(arguments) > 1:
        raise app.UsageError(f'unexpected argument {arguments[1]!r}: put prompts into --prompt="..."')
    try:
        out = files.check_writable(_OUT.value)
        pipe = load_pipeline(_CHECKPOINT.value, _GUIDANCE.value)
        frames = _FRAMES.value if _FRAMES.value is not None else pipe.max_frames or 48
        prompts = [prompt for prompt in _prompts() for _ in range(_SAMPLES.value)]
        names = [_name(prompt, i % _SAMPLES.value, _SAMPLES.value) for i, prompt in enumerate(prompts)]
        if len(set(names)) < len(names):
            names = [f"{i:03d}_{name}" for i, name in enumerate(names)]
        print(f"{pipe.package.kind}, {len(prompts)} x {frames} frames", flush=True)
        written = generate(pipe, prompts, names, frames, _SEED.value, out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("wrote", *written, sep="\n  ")


if __name__ == "__main__":
    app.run(main)
