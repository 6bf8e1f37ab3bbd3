"""Speed of streaming: frames per second, time to the first frame, seconds per chunk.

  python -m benchmarks.streaming                 # Wan2.1-T2V-1.3B, 480x832, 21 latent frames (81 frames), bfloat16
  python -m benchmarks.streaming --framewise     # chunks of one latent frame
  python -m benchmarks.streaming --small         # a small network, for a CPU
  python -m benchmarks.streaming --small --streams=1,4,16 --rows=none   # endless streams in one forward pass

Protocol: random weights (which do not affect the speed), random prompt embeddings, one video at a time, 4 denoising
steps and the clean pass (which writes the chunk to the cache) per chunk, on one device. Every row first generates a
whole video to compile and warm up, then times `--repeats` videos; the table has medians. The time to the first frame
starts at the call and includes the prompt's keys and values, but not the text encoder. FPS is the number of frames of a
video divided by its total time; decoded frames are copied to the host. Each row is appended to `--json` as one JSON
line with the device and the versions.

With `--streams`, a row is a number of endless streams (`sf_jax.Stream`) with window 9, sink 3 and relative positions:
the median of `--repeats` times 5 chunks with a full window, and the frames per second of all streams together.
"GFLOP/s" counts the matmul FLOPs over that time. "of a product" is its share of the rate of one 1024x1024 matmul on
this machine: if one stream is close to it, more streams cannot be faster. `--embedded` uses the shipped student of
moving digits.

The paper's figures on one H100: 17.0 FPS with 0.69 s to the first chunk, frame-wise 8.9 FPS and 0.45 s.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from sf_jax import rollout as ro
from sf_jax.inference import stream_state
from sf_jax.inference.decoders import VaeDecoder
from sf_jax.inference.layers import generation_network
from sf_jax.inference.lengths import WAN_FACTOR, latent_frames
from sf_jax.inference.load import load_pipeline
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.sampling import Sampling
from sf_jax.inference.stream import Stream, stream_spec
from sf_jax.models import tiny_vae, vae
from sf_jax.models.wan import WanConfig, WanTransformer, param_shapes, wan_1_3b
from sf_jax.training.programs import matmul_flops

SMALL = {"dim": 256, "ffn_dim": 1024, "num_heads": 4, "num_layers": 4, "text_dim": 64, "text_len": 64, "freq_dim": 256}

COLUMNS = {"streams": 8, "s per chunk": 13, "frames/s of all": 17, "to one": 8, "GFLOP/s": 9, "of a product": 14}


def random_params(shapes: dict, dtype: str) -> dict:
    """Random parameters with a suitable scale for each leaf, generated on the device."""

    def leaf(i, shape):
        fan_in = max(1, int(np.prod(shape.shape[:-1])))
        values = jax.random.normal(jax.random.key(i), shape.shape, jnp.dtype(dtype))
        return values * jnp.asarray(fan_in**-0.5, dtype)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [jax.jit(leaf, static_argnums=1)(i, leaf_) for i, leaf_ in enumerate(leaves)])


def time_video(pipe: VideoPipeline, text: np.ndarray) -> list[float]:
    """Seconds from the call to each chunk."""
    began, times = time.perf_counter(), []
    for chunk in pipe.chunks(text):
        jax.block_until_ready(chunk.latents) if chunk.pixels is None else np.asarray(chunk.pixels)
        times.append(time.perf_counter() - began)
    return times


def time_streams(pipe: VideoPipeline, text: np.ndarray, slots: int, chunks: int) -> tuple[float, float]:
    """Median seconds per chunk of all streams, and their total pixel (or latent) frames per second."""
    stream = Stream(pipe, slots)
    ids = [stream.join(text[0], number=number) for number in range(slots)]
    for _ in range(3):
        stream.step().block_until_ready()
    times = []
    for _ in range(chunks):
        began = time.perf_counter()
        count = len(stream.step()[ids[0]])
        times.append(time.perf_counter() - began)
    return statistics.median(times), slots * count / statistics.median(times)


def product_rate() -> float:
    """FLOP/s of a matmul of 1024x1024 float32 matrices."""
    side = 1024
    product, x = jax.jit(jnp.matmul), jnp.ones((side, side))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(times)


def step_flops(pipe: VideoPipeline, slots: int) -> float:
    """FLOPs of a step's matmuls."""
    spec, params = stream_spec(pipe), pipe.params
    state = jax.eval_shape(lambda: stream_state.empty_state(spec, pipe.decoder, slots))
    traced = stream_state.step.trace(spec, params, pipe.decoder, state, jax.ShapeDtypeStruct((slots,), bool))
    return matmul_flops(traced.jaxpr, len(pipe.rollout.steps) + 1)


def streams_table(pipe: VideoPipeline, text: np.ndarray, about: dict, args: argparse.Namespace) -> None:
    """Prints a row for each number of streams."""
    one, product = None, product_rate()
    print(f"a product of 1024x1024 matrices: {product / 1e9:.1f} GFLOP/s")
    print(
        f"{'streams':>8s}{'s per chunk':>13s}{'frames/s of all':>17s}{'to one':>8s}{'GFLOP/s':>9s}{'of a product':>14s}"
    )
    for slots in map(int, args.streams.split(",")):
        seconds, speed = time_streams(pipe, text, slots, 5 * args.repeats)
        one, rate = one or speed, step_flops(pipe, slots) / seconds
        cells = (f"{slots}", f"{seconds:.4f}", f"{speed:.2f}", f"{speed / one:.2f}", f"{rate / 1e9:.1f}")
        cells = zip((*cells, f"{rate / product:.2f}"), COLUMNS.values(), strict=True)
        print("".join(f"{cell:>{width}s}" for cell, width in cells), flush=True)
        result = {"streams": slots, "chunk_s": seconds, "fps": speed, "flops": rate, "product_flops": product}
        with args.json.open("a") as file:
            file.write(json.dumps(about | result) + "\n")


def main() -> None:
    """Prints a table and appends JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--framewise", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float32"])
    parser.add_argument("--attention", default="auto", help="auto, xla, cudnn or splash")
    parser.add_argument("--embedded", action="store_true", help="with --streams: the shipped student")
    parser.add_argument("--streams", default=None, help="numbers of endless streams, such as 1,4,16")
    parser.add_argument("--rows", default="none,wan,tiny", help="decoders: none, wan, tiny")
    parser.add_argument("--json", type=Path, default=Path("out/streaming.jsonl"), help="file to append to")
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    dtype = args.dtype or ("float32" if args.small else "bfloat16")
    changes = {"dtype": dtype, "remat": "none", "attention": args.attention}
    config = WanConfig(channels=16, **SMALL, **changes) if args.small else wan_1_3b(**changes)
    sampling = Sampling(frames=33, height=128, width=192) if args.small else Sampling()
    rollout = ro.RolloutConfig(chunk=1 if args.framewise else 3, context_noise="none")
    latent = latent_frames(sampling.frames, WAN_FACTOR)
    text = np.random.default_rng(0).standard_normal((1, config.text_len, config.text_dim), np.float32).astype(dtype)
    params = random_params(param_shapes(config), dtype)
    device = jax.devices()[0]
    about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    about |= {"jaxlib": jaxlib.__version__, "dtype": dtype, "chunk": rollout.chunk, "frames": latent}
    about |= {"size": [sampling.height, sampling.width], "dim": config.dim, "layers": config.num_layers}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.streams:
        rollout = dataclasses.replace(rollout, window=9, sink=3, positions="relative")
        decoder = _decoder(args.rows.split(",")[0], dtype)
        shown = sampling if decoder else Sampling(latent, sampling.height // 8, sampling.width // 8)
        config, params = generation_network(config, params, rollout)
        pipe = VideoPipeline(None, WanTransformer(config), params, rollout, decoder, sampling=shown)
        if args.embedded:
            pipe = load_pipeline()
            text = pipe.embed(["a 3 moving left, fast"])
        print(pipe.describe())
        streams_table(pipe, text, about, args)
        return
    config, params = generation_network(config, params, rollout)
    print(f"{'decoder':8s} {'FPS':>8s} {'first frame, s':>15s} {'s per chunk':>12s}")
    for row in args.rows.split(","):
        decoder, shown = _decoder(row, dtype), sampling
        if decoder is None:  # sampling sizes are then in latents
            shown = Sampling(latent, sampling.height // 8, sampling.width // 8)
        pipe = VideoPipeline(None, WanTransformer(config), params, rollout, decoder, sampling=shown)
        time_video(pipe, text)
        runs = [time_video(pipe, text) for _ in range(args.repeats)]
        fps = statistics.median(sampling.frames / times[-1] for times in runs)
        first = statistics.median(times[0] for times in runs)
        chunk = statistics.median((times[-1] - times[0]) / max(1, len(times) - 1) for times in runs)
        print(f"{row:8s} {fps:8.2f} {first:15.3f} {chunk:12.3f}", flush=True)
        with args.json.open("a") as file:
            result = {"decoder": row, "fps": fps, "first_frame_s": first, "chunk_s": chunk}
            file.write(json.dumps(about | result) + "\n")


def _decoder(row, dtype):
    """The decoder of a row."""
    if row == "none":
        return None
    if row == "wan":
        config = vae.wan_vae(dtype=dtype)
        return VaeDecoder(vae.WanVae(config), random_params(vae.param_shapes(config), dtype))
    if row == "tiny":
        config = tiny_vae.TinyVaeConfig(dtype=dtype)
        params = random_params(tiny_vae.param_shapes(config), dtype)
        return VaeDecoder(tiny_vae.TinyVaeDecoder(config), params)
    raise SystemExit(f"error: rows has {row!r}: none, wan or tiny")


if __name__ == "__main__":
    main()
