"""Compares a video on several devices with one device: `python -m tests.mesh_cases CASE...` prints the errors as JSON.

Run with JAX_NUM_CPU_DEVICES=8, as tests/test_mesh_stream.py does.
"""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sf_jax
from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import batch, programs, stream_state
from sf_jax.inference.decoders import VaeDecoder
from sf_jax.inference.job import Job
from sf_jax.models import tiny_vae, vae, wan
from sf_jax.models.slots import unstack_layers
from sf_jax.rollout import RolloutConfig
from sf_jax.weights.eight_bit import quantize_params, quantizer_for
from tests.helpers import random_params, relative
from tests.wan_folder import make_folder, random_like

MODEL = wan.WanConfig(dim=32, ffn_dim=48, num_heads=4, num_layers=2, text_dim=8, text_len=3, freq_dim=16, channels=4)
WINDOW = RolloutConfig(chunk=2, window=6, sink=2, positions="relative", context_noise="none", steps=(1000, 500))
FRAMEWISE = RolloutConfig(chunk=1, context_noise="none", steps=(1000, 500))
SOLVER = Solver("unipc", 5.0, 3)
# case -> (mesh, kind); with 4 heads, tensor 4 x context 2 must split the queries.
CASES = {
    "quick": ("tensor:2,context:2", "quick"),
    "window": ("tensor:2,context:2", "window"),
    "tensor": ("tensor:2", "window"),
    "context": ("context:2", "window"),
    "data": ("data:2,tensor:2", "window"),
    "queries": ("tensor:4,context:2", "window"),
    "apart": ("tensor:2,context:2", "apart"),
    "eight bit": ("tensor:2,context:2", "eight bit"),
    "framewise": ("tensor:2,context:2", "framewise"),
    "framewise queries": ("tensor:4,context:2", "framewise"),
    "causal": ("tensor:2,context:2", "causal"),
    "bidirectional": ("tensor:2,context:2", "bidirectional"),
    "bidirectional queries": ("data:1,tensor:4,context:2", "bidirectional"),
    "wan pixels": ("tensor:2,context:2", "wan"),
    "tiny pixels": ("tensor:2,context:2", "tiny"),
    "files": ("tensor:2,context:2", "files"),
}


def embeddings(count: int = 2) -> np.ndarray:
    """Prompts."""
    return np.random.default_rng(0).standard_normal((count, MODEL.text_len, MODEL.text_dim), np.float32)


def pipeline(kind: str) -> sf_jax.VideoPipeline:
    """A small pipeline on one device."""
    config, params, decoder, options = MODEL, random_params(MODEL), None, {"height": 4, "width": 8}
    rollout = {"framewise": FRAMEWISE, "bidirectional": None}.get(kind, WINDOW)
    if kind == "apart":
        config, params = dataclasses.replace(MODEL, scan_layers=False), unstack_layers(params)
    elif kind == "eight bit":
        params = quantize_params(params, quantizer_for("int8"))
    elif kind == "wan":
        sizes = vae.wan_vae(dim=4, num_res_blocks=1, z_dim=4, mean=(0.0,) * 4, std=(1.0,) * 4)
        decoder = VaeDecoder(vae.WanVae(sizes), random_like(vae.param_shapes(sizes)))
        options = {"height": 32, "width": 64}
    elif kind == "tiny":
        sizes = dataclasses.replace(tiny_vae.TinyVaeConfig(), z_dim=4)
        decoder = VaeDecoder(tiny_vae.TinyVaeDecoder(sizes), random_like(tiny_vae.param_shapes(sizes)))
        options = {"height": 32, "width": 64}
    if kind in ("causal", "bidirectional"):
        options |= {"solver": SOLVER, "guidance": 3.0}
    pipe = sf_jax.VideoPipeline(None, wan.WanTransformer(config), params, rollout, decoder, progress=False)
    return dataclasses.replace(pipe, sampling=dataclasses.replace(pipe.sampling, **options))


def whole(pipe: sf_jax.VideoPipeline) -> list[np.ndarray]:
    """Latents, and pixels if there is a decoder."""
    frames = 12 if pipe.decoder is None else 21
    chunks = [*pipe.chunks(embeddings(), dataclasses.replace(pipe.sampling, frames=frames))]
    parts = [np.concatenate([np.asarray(chunk.latents) for chunk in chunks], axis=1)]
    if pipe.decoder is not None:
        parts.append(np.concatenate([np.asarray(chunk.pixels) for chunk in chunks], axis=1))
    return parts


def streamed(pipe: sf_jax.VideoPipeline, stream: sf_jax.Stream) -> list[np.ndarray]:
    """Latents and pixels of two streams that join one after the other and change their prompts."""
    texts, parts = embeddings(4), []
    initial = np.random.default_rng(3).standard_normal((2, *pipe.latent_size(pipe.sampling)), np.float32)
    ids = [stream.join(texts[0], seed=1)]
    parts.append(stream.step())
    ids.append(stream.join(texts[1], seed=2, number=3, initial=initial))
    parts += [stream.step(), stream.step()]
    stream.prompt(ids[0], texts[2], "recache", transition_chunks=1)
    stream.prompt(ids[1], texts[3], "flush")
    parts += [stream.step(), stream.step([ids[1]]), stream.step()]
    stream.prompt(ids[0], texts[0], "cut")
    stream.prompt(ids[1], texts[2], "swap", fade=0.4)
    parts += [stream.step()]
    found = [part.latents(one) for part in parts for one in part]
    return found if pipe.decoder is None else [*found, *(part[one] for part in parts for one in part)]


def joined(stream: sf_jax.Stream) -> np.ndarray:
    """Latents of the streams that match a pipeline's videos 0 and 1."""
    ids = [stream.join(text, number=number) for number, text in enumerate(embeddings())]
    steps = [stream.step() for _ in range(3)]
    return np.stack([np.concatenate([step.latents(one) for step in steps]) for one in ids])


def apart(ours: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, float]:
    """The largest relative error of the latents, and the largest difference in gray levels."""
    pairs = list(zip(ours, reference, strict=True))
    errors = [relative(a, b) for a, b in pairs if a.dtype == np.float32]
    grey = [int(np.abs(a.astype(int) - b).max()) for a, b in pairs if a.dtype == np.uint8]
    return {"error": max(errors), "grey": max(grey, default=0)}


def from_files(mesh: str) -> dict:
    """Loads weights from files onto the mesh, and runs the command on two prompts, one after the other."""
    found, latents = {}, []
    with tempfile.TemporaryDirectory() as root:
        folder = make_folder(Path(root) / "wan")
        student, small = str(folder / "student.safetensors"), {"height": 32, "width": 64, "frames": 21}
        for name in (None, mesh):
            out = str(Path(root) / ("alone" if name is None else "split"))
            files = {"model": str(folder), "checkpoint": student, "save_latents": True, "out": out}
            with contextlib.redirect_stdout(sys.stderr):
                paths = batch.run(Job(("a cat", "a dog"), mesh=name, **files, **small))
            latents.append([np.load(path) for path in paths if path.suffix == ".npy"])
        pipe = sf_jax.load_pipeline(folder, student, mesh=mesh, keep_text_encoder=True)
        pipe.embed(["a cat"])
        kernels = pipe.params["blocks"]["ffn_in"]["kernel"], pipe.text_encoder._embedder.params["embedding"]
        found["files"] = apart(latents[1], latents[0])
        found["held"] = [kernel.size // int(np.prod(kernel.sharding.shard_shape(kernel.shape))) for kernel in kernels]
    return found


def run(case: str) -> dict:
    """Runs a case; returns its measurements."""
    mesh, kind = CASES[case]
    if kind == "files":
        return from_files(mesh)
    if kind == "quick":
        pipe = pipeline("window")
        expected, stream = pipe(embeddings(), frames=6, output="latent"), sf_jax.Stream(pipe.with_mesh(mesh), slots=2)
        keys = jax.tree.leaves(stream.state.k)[0]
        parts = keys.size // int(np.prod(keys.sharding.shard_shape(keys.shape)))
        return {
            "error": relative(joined(stream), expected),
            "programs": stream_state.step._cache_size(),
            "cache": parts,
        }
    alone = pipeline(kind)
    expected = whole(alone)
    spread = alone.with_mesh(mesh)
    program = programs.bidirectional_step if kind == "bidirectional" else programs.next_chunk
    before = program._cache_size()
    found = {"pipeline": apart(whole(spread), expected), "programs": program._cache_size() - before}
    kernel = jax.tree.leaves(spread.params)[0] if kind == "apart" else spread.params["blocks"]["ffn_in"]["kernel"]
    numbers = jax.tree.leaves(kernel)[0]
    found["parameter"] = numbers.size / math.prod(numbers.sharding.shard_shape(numbers.shape))
    if spread.kind != "student" or spread.rollout.window is None:
        return found
    stream = sf_jax.Stream(alone, slots=2)
    expected = streamed(alone, stream)
    stream = sf_jax.Stream(spread, slots=2)
    before = stream_state.step._cache_size()
    found["stream"] = apart(streamed(spread, stream), expected)
    found["stream programs"] = stream_state.step._cache_size() - before
    keys = jax.tree.leaves(stream.state.k)[0]
    found["cache"] = keys.size // int(np.prod(keys.sharding.shard_shape(keys.shape)))
    found["bytes"] = [pipe.bytes_per_stream(2).cache for pipe in (spread, alone)]
    if spread.decoder is not None:
        leaf = jax.tree.leaves(stream.state.decoder)[0]
        found["decoder"] = leaf.size // int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
    return found


if __name__ == "__main__":
    assert jnp.zeros(()).dtype == np.float32 and len(jax.devices()) == 8
    for name in sys.argv[1:]:
        print(json.dumps({name: run(name)}), flush=True)
