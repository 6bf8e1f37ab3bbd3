"""Wan2.1-T2V-1.3B from a file on disk: peak memory of loading, and a first chunk end to end.

  python -m benchmarks.full_size --folder=wan_random

Writes a full-size transformer (2.8 GB, bfloat16) and VAE with random weights to the folder. A second process loads the
transformer and prints its peak memory (VmHWM, including Python and JAX). A third one generates one chunk of 3 latent
frames at 128x128 pixels (few steps, `--dtype`), decodes it and writes an mp4. Prompt embeddings are random, as the text
encoder alone is 11 GB. Memory is read from /proc, so this works only on Linux.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from sf_jax import rollout as ro
from sf_jax.inference.decoders import VaeDecoder
from sf_jax.inference.layers import generation_network
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.io import video as video_io
from sf_jax.models import vae as vae_model
from sf_jax.models.wan import WanTransformer, param_shapes, wan_1_3b
from sf_jax.weights import mapping, transformer
from sf_jax.weights import vae as vae_names
from sf_jax.weights.networks import load_network
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile

PATHS = {"transformer": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.safetensors"}


def write(folder: Path) -> None:
    """Writes the two files, one tensor at a time."""
    vae = vae_model.wan_vae()
    maps = {
        "transformer": (transformer.entries(wan_1_3b()), param_shapes(wan_1_3b()), ml_dtypes.bfloat16),
        "vae": (vae_names.entries(vae), vae_model.param_shapes(vae), np.float32),
    }
    rng = np.random.default_rng(0)
    for name, (entries, like, dtype) in maps.items():
        shapes = mapping.file_shapes(entries, like)

        def read(tensor, shapes=shapes, dtype=dtype):
            shape = shapes[tensor]
            fan_in = max(1, int(np.prod(shape[1:])))
            return (rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)).astype(dtype)

        tensors = TensorFile(folder, shapes, dict.fromkeys(shapes, np.dtype(dtype)), read)
        write_safetensors(folder / PATHS[name], tensors)


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def load(folder: Path) -> None:
    """Loads the transformer and prints the peak."""
    path = folder / PATHS["transformer"]
    began = time.perf_counter()
    _, params = load_network(path, "transformer", wan_1_3b())
    jax.block_until_ready(params)
    seconds, size = time.perf_counter() - began, path.stat().st_size
    print(f"loading {size / 1e9:.2f} GB: {seconds:.1f} s, peak {peak() / 1e9:.2f} GB = {peak() / size:.2f} x the file")


def generate(folder: Path, dtype: str) -> None:
    """Generates, decodes and writes one chunk."""
    config = wan_1_3b(dtype=dtype, remat="none")
    _, params = load_network(folder / PATHS["transformer"], "transformer", config)
    vae_config, vae_params = load_network(folder / PATHS["vae"], "vae")
    rollout = ro.RolloutConfig(context_noise="none")
    config, params = generation_network(config, params, rollout)
    decoder = VaeDecoder(vae_model.WanVae(vae_config), vae_params)
    pipe = VideoPipeline(None, WanTransformer(config), params, rollout, decoder)
    text = np.random.default_rng(1).standard_normal((1, 512, 4096), np.float32)
    for run in ("with compilation", "again"):
        began = time.perf_counter()
        pixels = pipe(text, frames=9, height=128, width=128)
        print(f"one chunk, {dtype}, {run}: {time.perf_counter() - began:.1f} s, {pixels.shape[1:]}", flush=True)
    video_io.write_mp4(folder / "chunk.mp4", pixels[0], 16)
    print(f"peak {peak() / 1e9:.2f} GB; wrote {folder / 'chunk.mp4'}")


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--part", choices=["write", "load", "generate"], help="only this part")
    args = parser.parse_args()
    if args.part is None:
        args.folder.mkdir(parents=True, exist_ok=True)
        print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
        for part in ("write", "load", "generate"):
            command = [sys.executable, "-m", "benchmarks.full_size", f"--folder={args.folder}", f"--dtype={args.dtype}"]
            subprocess.run([*command, f"--part={part}"], check=True)
    elif args.part == "write":
        write(args.folder)
    elif args.part == "load":
        load(args.folder)
    else:
        generate(args.folder, args.dtype)


if __name__ == "__main__":
    main()
