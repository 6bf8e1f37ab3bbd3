"""Compares the replay gradient with differentiating through the scan: time and temporary memory.

  python -m benchmarks.replay            # embedded size: 9 frames of 9 tokens, dim 128, 4 layers
  python -m benchmarks.replay --middle   # dim 384, 6 layers, 9 frames of 24x40 latent pixels (240 tokens per frame)

Computes one gradient of sum(video * weight) in the student's parameters, including the rollout, with exit step 2 of 4
(where the rollout stops and takes the gradient), in float32. The time is the median of `--repeats` runs after one
warm-up, without compilation. Memory is XLA's `temp_size_in_bytes`. FLOPs are not shown, as XLA's cost analysis counts
the body of a loop once.
"""

import argparse
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax.models.wan import WanConfig, WanTransformer, init_params
from sf_jax.replay import CACHE_GRADIENTS, replay
from tests import oracle


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--middle", action="store_true", help="the middle size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--remat", default="dots", help="none, dots or block")
    args = parser.parse_args()
    if args.middle:
        sizes, frames, latent = (
            WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6, remat=args.remat),
            9,
            (24, 40),
        )
    else:
        sizes, frames, latent = WanConfig(channels=8, remat=args.remat), 9, (6, 6)
    batch = args.batch or (1 if args.middle else 32)
    model, config, params = WanTransformer(sizes), ro.RolloutConfig(chunk=3), init_params(sizes, jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (batch, frames, *latent, sizes.channels))
    weight = jax.random.normal(jax.random.key(2), noise.shape)
    text = jax.random.normal(jax.random.key(3), (batch, sizes.text_len, sizes.text_dim))
    draw = ro.key_draw(jax.random.key(4), jnp.arange(batch))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(5), params["head"]["kernel"].shape) * 0.05

    def by_scan(params, exit_step, mode):
        video = oracle.rollout_video(model, config, params, text, noise, exit_step, draw, cache_gradient=mode)
        return (video * weight).sum()

    def by_replay(params, exit_step, mode):
        past = ro.rollout(model, config, params, text, noise, exit_step, draw, last_exit=False)
        return (replay(model, config, params, text, past, mode) * weight).sum()

    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind} x {jax.device_count()}, {platform.machine()}")
    size = f"{frames} frames of {latent[0]}x{latent[1]}, dim {sizes.dim}, {sizes.num_layers} layers"
    print(f"batch {batch}, {size}, remat {args.remat}")
    print(f"{'cache_gradient':18s}{'method':10s}{'seconds':>9s}{'temp MB':>10s}{'rel. difference':>18s}")
    for mode in CACHE_GRADIENTS:
        reference = None
        for name, loss in (("scan", by_scan), ("replay", by_replay)):
            compiled = jax.jit(jax.grad(lambda p, e, loss=loss, mode=mode: loss(p, e, mode))).lower(params, 2).compile()
            grads, seconds = jax.block_until_ready(compiled(params, 2)), []
            for _ in range(args.repeats):
                began = time.perf_counter()
                jax.block_until_ready(compiled(params, 2))
                seconds.append(time.perf_counter() - began)
            flat = np.concatenate([np.ravel(g).astype(np.float64) for g in jax.tree.leaves(grads)])
            reference = flat if reference is None else reference
            error = np.linalg.norm(flat - reference) / np.linalg.norm(reference)
            memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
            print(f"{mode:18s}{name:10s}{np.median(seconds):9.3f}{memory:10.1f}{error:18.1e}", flush=True)


if __name__ == "__main__":
    main()
