"""The work of `python -m sf_jax.generate` for the moving digits: streams the videos and writes their files."""

import re
import time
from pathlib import Path

import numpy as np

from sf_jax import files
from sf_jax.inference import video_io
from sf_jax.inference.pipeline import Pipeline, load_pipeline

DEFAULT_FRAMES, DEFAULT_FPS, SCALE = 48, 12.0, 12


def _name(prompt: str, sample: int, samples: int) -> str:
    """A file name made of the prompt."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_") or "empty"
    return words if samples == 1 else f"{words}_{sample}"


def run(
    prompts: list[str],
    checkpoint: str | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    fps: float = DEFAULT_FPS,
    scale: int = SCALE,
    out: str = "out",
) -> list[Path]:
    """Generates videos of all prompts together; prints a line per chunk.

    Args:
      prompts: texts of known words.
      checkpoint: see `load_pipeline`, as is `guidance`.
      guidance: a teacher's guidance scale.
      frames: latent frames; None is 48 for a student and a teacher's own number.
      num_samples: videos per prompt.
      seed: seed of the noise.
      fps: frames a second of the files.
      scale: enlargement of the pixels.
      out: folder for an mp4 and a gif per video, and a contact sheet.

    Returns:
      The files.

    Raises:
      ValueError: if something given is wrong; the message says what to change.
      OSError: if a file cannot be written.
    """
    folder = files.check_writable(out)
    pipe = load_pipeline(checkpoint, guidance)
    frames = frames if frames is not None else pipe.max_frames or DEFAULT_FRAMES
    wanted = [prompt for prompt in prompts for _ in range(num_samples)]
    names = [_name(prompt, i % num_samples, num_samples) for i, prompt in enumerate(wanted)]
    if len(set(names)) < len(names):
        names = [f"{i:03d}_{name}" for i, name in enumerate(names)]
    print(f"{pipe.package.kind}, {len(wanted)} x {frames} frames", flush=True)
    small = _stream(pipe, wanted, frames, seed)
    written = []
    for name, video in zip(names, small, strict=True):
        large = video_io.upscale(video, scale)
        video_io.write_mp4(folder / f"{name}.mp4", large, fps)
        video_io.write_gif(folder / f"{name}.gif", large, fps)
        written += [folder / f"{name}.mp4", folder / f"{name}.gif"]
    sheet = folder / (f"{names[0]}.png" if len(names) == 1 else "contact_sheet.png")
    video_io.write_png(sheet, video_io.contact_sheet(small, every=max(1, frames // 16), labels=wanted, factor=3))
    return [*written, sheet]


def _stream(pipe: Pipeline, prompts: list[str], frames: int, seed: int) -> np.ndarray:
    """The videos, uint8 [B, F, h, w, 1]; a line per chunk and the speed."""
    began, parts = time.perf_counter(), []
    for pixels in pipe.stream(prompts, frames, seed):
        parts.append(pixels)
        done, seconds = sum(p.shape[1] for p in parts), time.perf_counter() - began
        print(f"chunk {len(parts)}: {done}/{frames} frames, {seconds:.2f} s", flush=True)
        if len(parts) == 1:
            first = seconds
    total = time.perf_counter() - began
    rate = f", then {(frames - parts[0].shape[1]) * len(prompts) / (total - first):.0f} frames/s" if parts[1:] else ""
    print(f"first chunk after {first:.2f} s{rate}", flush=True)
    return np.concatenate(parts, axis=1)
