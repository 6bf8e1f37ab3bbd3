"""The cost of an empty cache's size: times chunks of a video in key-value caches of several capacities.

  python -m benchmarks.cache_growth            # dim 384, 6 layers, 24x40 latents (240 tokens per frame), batch 1
  python -m benchmarks.cache_growth --small    # dim 128, 4 layers, 12x20 latents
  python -m benchmarks.cache_growth --streams=1   # endless streams, whose window takes the place of the capacity
  python -m benchmarks.cache_growth --rotation    # what rotating the cached keys in every call costs

Each row is one program: a chunk of 3 latent frames in 4 denoising steps and the clean pass (which writes the chunk to
the cache), random weights, float32. It is timed as the first chunk (empty cache) and as the last one that fits into the
cache, `--repeats` times in turns; the table has medians. CPU times are those of the process. The last line is the ratio
of the first chunk's time in the largest cache to that in the smallest. Streams start together; the time of their first
chunk includes joining and encoding the prompt, and their last chunk is one with a full window.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import sf_jax
from benchmarks.streaming import random_params
from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.models import attention, rope
from sf_jax.models.wan import WanConfig, WanTransformer, param_shapes


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def chunk(model, config, params, text, cache, noise, start):
    """The latents of one chunk, and the cache with it; the given cache is donated."""
    draw = ro.key_draw(jax.random.key(0), jnp.arange(noise.shape[0]))
    noisy = ro.NoisyChunk(noise, start, 0, len(config.steps) - 1, draw)
    made = ro.generate_chunk(model, config, params, text, cache, noisy)
    return made[1], made[0]


def video_calls(model, params, text, capacity, size):
    """Functions that generate the first chunk of a video, and the last one that fits into its cache."""
    rollout = ro.RolloutConfig(context_noise="none")
    text = model.apply({"params": params}, text, method="encode_text")
    noise = jax.random.normal(jax.random.key(1), (1, rollout.chunk, *size, model.config.channels))
    empty, full = (rollout_cache.empty_cache(model, rollout, 1, capacity, *size) for _ in range(2))
    full = full.replace(frames=jnp.where(jnp.arange(capacity) < capacity - 3, jnp.arange(capacity), -1))
    caches, starts = {"first": empty, "last": full}, {"first": 0, "last": capacity - 3}

    def call(which):
        # The frames of the call before are not visible to this one, which writes them again.
        start = jnp.int32(starts[which])
        latents, caches[which] = chunk(model, rollout, params, text, caches[which], noise, start)
        return latents, caches[which]

    return {which: functools.partial(call, which) for which in caches}


def stream_calls(model, params, text, window, size, slots):
    """Functions that generate the first chunk of new streams, and one of streams with a full window."""
    rollout = ro.RolloutConfig(context_noise="none", window=window, positions="relative")
    pipe = sf_jax.VideoPipeline(None, model, params, rollout).with_sampling(height=size[0], width=size[1])
    new, old = (sf_jax.Stream(pipe, slots) for _ in range(2))
    initial = np.random.default_rng(1).standard_normal((window - 3, *size, model.config.channels), np.float32)
    for _ in range(slots):
        old.join(np.asarray(text[0]), initial=initial)

    def first():
        for one in new.playing:
            new.leave(one)
        for _ in range(slots):
            new.join(np.asarray(text[0]))
        new.step()
        return new.state.latents

    def last():
        old.step()
        return old.state.latents

    return {"first": first, "last": last}


def rotation_table(config, size, capacities, repeats):
    """Prints the least CPU time of rotating one layer's cached keys, and of a chunk's attention to them."""
    tokens = int(np.prod(config.grid(*size)))
    q = jax.random.normal(jax.random.key(0), (1, 3 * tokens, config.num_heads, config.head_dim))
    rotate = jax.jit(rope.rotate)
    attend = jax.jit(lambda q, k: attention.attend(q, [(k, k, None)]))
    print(f"{'frames':>8s} {'rotation, CPU ms':>17s} {'attention':>10s}")
    for capacity in capacities:
        k = jax.random.normal(jax.random.key(1), (1, capacity * tokens, config.num_heads, config.head_dim))
        turns = rope.rotation(np.arange(capacity), config.grid(*size), config.head_dim)
        least = {}
        for _ in range(1 + 10 * repeats):
            for call in ((rotate, k, turns), (attend, q, k)):
                cpu = time.process_time()
                jax.block_until_ready(call[0](*call[1:]))
                least[call[0]] = min(time.process_time() - cpu, least.get(call[0], np.inf))
        print(f"{capacity:8d} {1e3 * least[rotate]:17.2f} {1e3 * least[attend]:10.2f}")


def main() -> None:
    """Prints a table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--capacities", default="9,21,63", help="latent frames, ascending")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--streams", type=int, help="number of endless streams; without it, one video")
    parser.add_argument("--rotation", action="store_true")
    args = parser.parse_args()
    capacities = [int(capacity) for capacity in args.capacities.split(",")]
    if args.small:
        config, size = WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4), (12, 20)
    else:
        config, size = WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6), (24, 40)
    device = jax.devices()[0].device_kind
    print(f"JAX {jax.__version__}, {device}, dim {config.dim}, {config.num_layers} layers, {size[0]}x{size[1]} latents")
    if args.rotation:
        rotation_table(config, size, capacities, args.repeats)
        return
    model = WanTransformer(config)
    params = random_params(param_shapes(config), "float32")
    text = jnp.asarray(np.random.default_rng(0).standard_normal((1, config.text_len, config.text_dim), np.float32))
    calls = {}
    for capacity in capacities:
        arguments = (model, params, text, capacity, size)
        pair = video_calls(*arguments) if args.streams is None else stream_calls(*arguments, args.streams)
        calls |= {(capacity, which): call for which, call in pair.items()}
    times = {key: [] for key in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(args.repeats):
        for key, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[key].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"{'capacity':>8s} {'chunk':>6s} {'seconds':>8s} {'CPU s':>8s}")
    medians = {key: [statistics.median(part) for part in zip(*runs, strict=True)] for key, runs in times.items()}
    for (capacity, which), (wall, cpu) in medians.items():
        print(f"{capacity:8d} {which:>6s} {wall:8.3f} {cpu:8.3f}")
    small, large = (medians[capacity, "first"] for capacity in (capacities[0], capacities[-1]))
    wall, cpu = (large[i] / small[i] for i in range(2))
    print(f"first chunk, capacity {capacities[-1]} against {capacities[0]}: {wall:.2f} (CPU {cpu:.2f})")


if __name__ == "__main__":
    main()
