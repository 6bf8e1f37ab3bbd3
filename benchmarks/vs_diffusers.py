"""Compares our networks with those of diffusers and transformers on the same CPU.

  python -m benchmarks.vs_diffusers              # all rows; needs pip install 'sf_jax[parity]'
  python -m benchmarks.vs_diffusers --row=vae    # one row: dit, vae, vae_narrow, umt5, dit_large
  python -m benchmarks.vs_diffusers --large      # all rows and dit_large (dim 1536, 4 layers)
  python -m benchmarks.vs_diffusers --one_core   # CPU time on one core, for machines that others use, too

Protocol: one process, float32, the same sizes, weights and inputs on both sides. Both use all cores
(`torch.set_num_threads(os.cpu_count())`; XLA does by default). Ours is jitted; theirs runs as shipped: eager, under
`inference_mode`. Each side runs once to compile or warm up, then they alternate `--repeats` times, with a pause between
them in which idle threads stop spinning. Only the network is timed; its inputs are already in its own layout. The table
has the median and, as other load on the machine only adds time, the minimum. `ratio` is ours / theirs, below 1 if ours
is faster. `others` is the share of all cores that other processes used meanwhile (on Linux); unless it is small, the
ratio means little, since it affects the two sides differently. With `--one_core` the process stays on one core and CPU
time is measured, which other load hardly changes. `difference` is the relative L2 difference of the outputs, to verify
that both do the same work. Each row is appended to `--json` as one JSON line.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side_by_side import HEADER, Row, device, line, measure
from sf_jax.models.umt5 import Umt5Encoder
from sf_jax.models.vae import WanVae
from sf_jax.models.wan import WanTransformer, bidirectional_layout
from sf_jax.weights import mapping
from sf_jax.weights.recognize import entries_of, param_shapes_of, recognize

try:
    import diffusers
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install 'sf_jax[parity]'") from error

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "numpy")


def _params(kind: str, model: torch.nn.Module, **changes) -> tuple:
    """Our sizes and parameters from a library's network."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    guess = recognize({name: value.shape for name, value in tensors.items()})
    config = dataclasses.replace(guess.config, **changes)
    entries = entries_of(kind, config, guess.naming)
    params = mapping.to_params(entries, tensors, param_shapes_of(kind, config), kind)
    return config, jax.tree.map(jnp.asarray, params)


def _random(model: torch.nn.Module) -> torch.nn.Module:
    """Randomizes all matrices, including those that a library initializes with zeros; for inference only."""
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    for value in model.parameters():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5)
    return model


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _to_torch(x: np.ndarray) -> torch.Tensor:
    """[B, F, H, W, C] to PyTorch's [B, C, F, H, W]."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def _jitted(function: Callable, params: dict, *arguments: np.ndarray) -> Callable[[], jax.Array]:
    """A function that calls one of our networks and waits for the result."""
    run = jax.jit(function)
    arguments = [jnp.asarray(a) for a in arguments]
    return lambda: jax.block_until_ready(run(params, *arguments))


def dit(dim: int, layers: int, ffn_dim: int, head_dim: int, frames: int = 3) -> Row:
    """The transformer with full attention over all frames of 30x52 latents and 512 text tokens."""
    heads = dim // head_dim
    sizes = {"num_attention_heads": heads, "attention_head_dim": head_dim, "ffn_dim": ffn_dim, "num_layers": layers}
    theirs = _random(diffusers.WanTransformer3DModel(**sizes, text_dim=1024))
    config, params = _params("transformer", theirs, num_heads=heads, remat="none")
    x, text, t = _normal(1, frames, 30, 52, 16), _normal(1, 512, 1024), np.float32([500])
    model, layout = WanTransformer(config), bidirectional_layout(frames)
    inputs = _to_torch(x), torch.from_numpy(t), torch.from_numpy(text)
    return Row(
        f"transformer forward: dim {dim}, {layers} layers, {frames} x 30x52 latents",
        _jitted(lambda p, x, t, text: model.apply({"params": p}, x, t, text, layout), params, x, t[:, None], text),
        lambda: np.moveaxis(theirs(*inputs, return_dict=False)[0].numpy(), 1, -1),
    )


def vae(dim: int, blocks: int, frames: int = 3, side: int = 16) -> Row:
    """The decoder of the VAE, frame by frame on both sides."""
    theirs = _random(diffusers.AutoencoderKLWan(base_dim=dim, num_res_blocks=blocks))
    config, params = _params("vae", theirs)
    model, latents = WanVae(config), _normal(1, frames, side, side, 16)
    inputs = _to_torch(latents * np.float32(config.std) + np.float32(config.mean))
    return Row(
        f"VAE decode: dim {dim}, {blocks} blocks, {frames} x {side}x{side} latents",
        _jitted(lambda p, z: model.apply({"params": p}, z, method="decode").clip(-1, 1), params, latents),
        lambda: np.moveaxis(theirs.decode(inputs, return_dict=False)[0].numpy(), 1, -1),
    )


def umt5(dim: int, layers: int, length: int = 512) -> Row:
    """The text encoder over a padded prompt."""
    sizes = transformers.UMT5Config(
        vocab_size=1024, d_model=dim, d_kv=64, d_ff=dim * 5 // 2, num_heads=dim // 64, num_layers=layers
    )
    theirs = _random(transformers.UMT5EncoderModel(sizes))
    config, params = _params("umt5", theirs)
    ids = np.random.default_rng(0).integers(0, sizes.vocab_size, (1, length)).astype(np.int32)
    mask = (np.arange(length) < length // 2).astype(np.int32)[None]
    model, text = Umt5Encoder(config), length // 2
    inputs = torch.from_numpy(ids), torch.from_numpy(mask)
    return Row(
        f"UMT5 forward: dim {dim}, {layers} layers, {length} tokens",
        _jitted(lambda p, ids, mask: model.apply({"params": p}, ids, mask)[:, :text], params, ids, mask),
        lambda: theirs(*inputs).last_hidden_state.numpy()[:, :text],
    )


ROWS = {
    "dit": lambda: dit(dim=384, layers=6, ffn_dim=1536, head_dim=64),
    "vae": lambda: vae(dim=96, blocks=2, side=8),
    "vae_narrow": lambda: vae(dim=32, blocks=1),
    "umt5": lambda: umt5(dim=1024, layers=4),
    "dit_large": lambda: dit(dim=1536, layers=4, ffn_dim=8960, head_dim=128),
}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS), default=None, help="only this row")
    parser.add_argument("--large", action="store_true", help="dit_large, too")
    parser.add_argument("--one_core", action="store_true", help="CPU time on one core instead of time on all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("out/vs_diffusers.jsonl"), help="file to append to")
    args = parser.parse_args()
    threads, clock = os.cpu_count(), time.perf_counter
    if args.one_core:
        # Set before JAX and PyTorch start their threads, which inherit it.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        threads, clock = 1, time.process_time
    torch.set_num_threads(threads)
    machine = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": device(),
        "threads": threads,
        "time": "CPU" if args.one_core else "clock",
    }
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(f"{machine['device']}, threads: {threads}, float32; {machine['time']} time: ", end="")
    print(f"median (minimum) of {args.repeats} runs, seconds")
    print(HEADER)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for name in [args.row] if args.row else [name for name in ROWS if args.large or name != "dit_large"]:
        with torch.inference_mode():
            row = measure(ROWS[name](), args.repeats, clock)
        print(line(row), flush=True)
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"row": name, **row, **machine}) + "\n")


if __name__ == "__main__":
    main()
