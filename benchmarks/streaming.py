"""Speed of streaming: frames per second, time to the first frame, seconds per chunk.

  python -m benchmarks.streaming                 # Wan2.1-T2V-1.3B, 480x832, 21 latent frames (81 frames), bfloat16
  python -m benchmarks.streaming --framewise     # chunks of one latent frame
  python -m benchmarks.streaming --small         # a small network, for a CPU

Protocol: random weights (the speed does not depend on them), random prompt embeddings, a video at a time, 4 denoising
steps and the clean pass for every chunk, on one device. Every row runs a whole video first to compile and warm up; then
`--repeats` videos are timed and the median is taken. The time to the first frame counts from the call, prompt keys and
values included, the text encoder not. FPS is all frames of a video over its whole time, with the frames on the host
where they are decoded. One JSON line per row is appended to `--json`, with the device and the versions.

The reference's figures on one H100 (paper): 17.0 FPS with 0.69 s to the first chunk, frame-wise 8.9 FPS and 0.45 s.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from sf_jax import rollout as ro
from sf_jax.inference.decoders import VaeDecoder
from sf_jax.inference.lengths import WAN_FACTOR, latent_frames
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.sampling import Sampling
from sf_jax.models import tiny_vae, vae
from sf_jax.models.wan import WanConfig, WanTransformer, param_shapes, wan_1_3b

SMALL = {"dim": 256, "ffn_dim": 1024, "num_heads": 4, "num_layers": 4, "text_dim": 64, "text_len": 64, "freq_dim": 256}


def random_params(shapes: dict, dtype: str) -> dict:
    """Random parameters of the right size for each leaf, made on the device."""

    def leaf(i, shape):
        fan_in = max(1, int(np.prod(shape.shape[:-1])))
        values = jax.random.normal(jax.random.key(i), shape.shape, jnp.dtype(dtype))
        return values * jnp.asarray(fan_in**-0.5, dtype)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [jax.jit(leaf, static_argnums=1)(i, leaf_) for i, leaf_ in enumerate(leaves)])


def time_video(pipe: VideoPipeline, text: np.ndarray) -> list[float]:
    """Times at which every chunk was there."""
    began, times = time.perf_counter(), []
    for chunk in pipe.chunks(text):
        jax.block_until_ready(chunk.latents) if chunk.pixels is None else np.asarray(chunk.pixels)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Prints a table and appends JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--framewise", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float32"])
    parser.add_argument("--attention", default="auto", help="auto, xla, cudnn or splash")
    parser.add_argument("--rows", default="none,wan,tiny", help="decoders: none, wan, tiny")
    parser.add_argument("--json", type=Path, default=Path("streaming.jsonl"))
    args = parser.parse_args()
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
    print(f"{'decoder':8s} {'FPS':>8s} {'first frame, s':>15s} {'s per chunk':>12s}")
    for row in args.rows.split(","):
        decoder, shown = _decoder(row, dtype), sampling
        if decoder is None:  # sizes are those of the latents
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
