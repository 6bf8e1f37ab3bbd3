"""The streaming table of `gpu_hour.sh`: seconds per chunk with a full cache, and for a video's first chunk.

  python -m benchmarks.gpu_table                # Wan2.1-T2V-1.3B, 480x832
  python -m benchmarks.gpu_table --small        # a small network, for a CPU

Protocol: random weights and prompt embeddings, four denoising steps and the clean pass (which writes the chunk to the
cache). A chunk is timed with the pipeline's own program (`programs.next_chunk`) on a full cache, or on an empty one for
the first chunk. Decoding is `programs.decode`, once per latent frame. Each is called once to warm up, then `--repeats`
times; the table has medians. Frames per second are those of all videos over denoising plus decoding, without the host.

Window "21" is a video of 21 latent frames, all of them visible. With "9 + 3", a chunk sees 9 cached frames, the first 3
(sink) included, and its own. The most important settings come first; "fp8" is `load_pipeline(quantize="fp8")`. Four
settings at a time are compiled in parallel, then timed one by one. Results are appended to `--jsonl`, one JSON line
each.
"""

import argparse
import concurrent.futures
import dataclasses
import glob
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.streaming import SMALL, random_params
from sf_jax import compilation
from sf_jax import rollout as ro
from sf_jax.inference import programs
from sf_jax.inference.decoders import VaeDecoder
from sf_jax.inference.layers import Videos, generation_network
from sf_jax.inference.lengths import WAN_FACTOR
from sf_jax.models import tiny_vae, vae
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.wan import WanConfig, WanTransformer, param_shapes, wan_1_3b
from sf_jax.weights.eight_bit import quantize_params, quantizer_for

FRAMES, SINK, SEEN = 21, 3, 9
TOGETHER = 4  # settings compiled in parallel
KERNELS = 15  # number of kernels in the profile


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of a denoising program.

    Attributes:
      chunk: latent frames generated together.
      window: "21" or "9 + 3".
      numbers: "bf16", "f32" or "fp8".
      batch: number of videos in one batch.
    """

    chunk: int = 3
    window: str = "21"
    numbers: str = "bf16"
    batch: int = 1


@dataclasses.dataclass(frozen=True)
class Network:
    """Sizes of the benchmark.

    Attributes:
      config: sizes of the transformer.
      size: latent (H, W, C).
      decoders: decoder configs by name.
    """

    config: WanConfig
    size: tuple[int, int, int]
    decoders: dict


def cases(numbers: str) -> list[Case]:
    """All settings, starting with those that differ from the default in one field; `numbers` is the device's type."""
    usual = Case(numbers=numbers)
    first = [usual, Case(1, numbers=numbers), Case(window="9 + 3", numbers=numbers), Case(numbers="fp8")]
    first += [Case(numbers=numbers, batch=4), Case(1, "9 + 3", numbers), Case(3, "9 + 3", numbers, 4)]
    first += [Case(3, "9 + 3", numbers, 16), Case(3, "9 + 3", "fp8"), Case(numbers=numbers, batch=16)]
    rest = itertools.starmap(Case, itertools.product((3, 1), ("21", "9 + 3"), (numbers, "fp8"), (1, 4, 16)))
    return list(dict.fromkeys([*first, *rest]))


def network(small: bool, dtype: str) -> Network:
    """The network, and the decoders."""
    changes = {"dtype": dtype, "remat": "none"}
    if small:
        config, size = WanConfig(channels=16, **SMALL | {"num_layers": 2}, **changes), (8, 12, 16)
        decoders = {"tiny": tiny_vae.TinyVaeConfig(dtype=dtype), "wan": vae.VaeConfig(dtype=dtype)}
    else:
        config, size = wan_1_3b(**changes), (60, 104, 16)
        decoders = {"tiny": tiny_vae.TinyVaeConfig(dtype=dtype), "wan": vae.wan_vae(dtype=dtype)}
    return Network(config, size, decoders)


class Denoising:
    """The program of a case with its arguments; `compile` compiles it."""

    def __init__(self, net: Network, case: Case, params: dict):
        """Takes stacked parameters, which may be freed."""
        self.net, self.case, seen = net, case, {}
        if case.window != "21":
            seen = {"window": SEEN + case.chunk, "sink": SINK, "positions": "relative"}
        self.rollout = ro.RolloutConfig(chunk=case.chunk, context_noise="none", **seen)
        config, self.params = generation_network(net.config, params, self.rollout, Videos(case.batch))
        self.model = WanTransformer(config)
        shape = (case.batch, config.text_len, config.text_dim)
        prompt = np.random.default_rng(0).standard_normal(shape, np.float32).astype(config.dtype)
        self.text = programs.encode_text(self.model, self.params, prompt)
        self.source = (programs.sample_key(np.uint32(0)), np.arange(case.batch, dtype=np.int32), None)

    def cache(self, frames: int):
        """A cache after `frames` latent frames; one of slots does not know how many it holds."""
        cache = programs.empty_cache(self.model, self.rollout, self.case.batch, FRAMES, self.net.size)
        if not isinstance(cache, KVCache):
            return cache
        slots = np.full(cache.capacity, -1, np.int32)
        for frame in range(frames):
            ring = cache.capacity - cache.sink
            slots[frame if frame < cache.sink else cache.sink + (frame - cache.sink) % ring] = frame
        return cache.replace(frames=jnp.asarray(slots))

    def compile(self) -> None:
        """Compiles the program."""
        cache = jax.eval_shape(lambda: self.cache(0))
        place = (np.int32(0), np.int32(0), np.bool_(False))
        static = (self.model, self.rollout, None, (self.case.chunk, *self.net.size))
        lowered = programs.next_chunk.lower(*static, self.params, self.text, cache, self.source, place)
        self.program = lowered.compile()

    def seconds(self, start: int, repeats: int) -> float:
        """Median seconds of the chunk that starts at latent frame `start`."""
        cache, times = self.cache(start), []
        place = (np.int32(start), np.int32(start // self.case.chunk), np.bool_(False))
        for _ in range(repeats + 1):
            began = time.perf_counter()
            cache, clean = self.program(self.params, self.text, cache, self.source, place)
            jax.block_until_ready((cache, clean))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def decoding(net: Network, name: str, batch: int, repeats: int) -> dict:
    """Median seconds of a decoder for a video's first latent frame, and for each later one."""
    config = net.decoders[name]
    module, shapes = (vae.WanVae, vae.param_shapes) if name == "wan" else (tiny_vae.TinyVaeDecoder, None)
    params = random_params((shapes or tiny_vae.param_shapes)(config), config.dtype)
    decoder, latents = VaeDecoder(module(config), params), jnp.zeros((batch, 1, *net.size))
    times: dict[str, list] = {"first": [], "later": []}
    for _ in range(repeats + 1):
        cache = jax.block_until_ready(decoder.init_cache(batch, *net.size[:2]))
        for part in times:
            began = time.perf_counter()
            cache, pixels = programs.decode(decoder, cache, latents)
            jax.block_until_ready(pixels)
            times[part].append(time.perf_counter() - began)
    return {part: statistics.median(seconds[1:]) for part, seconds in times.items()}


def profile(run: Callable[[], float]) -> dict:
    """Profiles `run` on the device: the slowest kernels, and the total seconds of all kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
        on_device = [plane for plane in planes if plane.name.startswith("/device:")]
        kernels: Counter = Counter()
        for plane in on_device or planes:
            for line in plane.lines:
                # On a device, only streams of kernels; on a CPU, only compute threads.
                if on_device and not line.name.lower().startswith(("stream", "xla ops")):
                    continue
                if not on_device and not line.name.startswith("tf_"):
                    continue
                for event in line.events:
                    if on_device or "::" not in event.name:  # a CPU's executor events contain the kernels
                        kernels[event.name] += event.duration_ns / 1e9
    longest = [{"kernel": name[:120], "seconds": spent} for name, spent in kernels.most_common(KERNELS)]
    return {"kernels": longest, "all_kernels_s": sum(kernels.values()), "median_call_s": seconds}


def measure(net: Network, args: argparse.Namespace, write: Callable[[dict], None]) -> None:
    """Times all cases within the time limit."""
    begun, decoded = time.monotonic(), {}
    asked = cases("f32" if args.dtype == "float32" else "bf16")
    asked = asked[: args.most] if args.most else asked
    for first in range(0, len(asked), TOGETHER):
        if time.monotonic() - begun > args.seconds:
            for case in asked[first:]:
                write({"case": dataclasses.asdict(case), "left": "the time was up"})
            return
        ready = []
        for case in asked[first : first + TOGETHER]:
            try:
                params = random_params(param_shapes(net.config), net.config.dtype)
                ready.append(
                    Denoising(
                        net, case, quantize_params(params, quantizer_for("fp8" if case.numbers == "fp8" else None))
                    )
                )
            except Exception as error:  # such as a missing extra or too little memory; other cases continue
                write({"case": dataclasses.asdict(case), "left": _one_line(error)})
        with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
            compiling = [pool.submit(one.compile) for one in ready]
        for one, result in zip(ready, compiling, strict=True):
            try:
                result.result()
                row = _row(net, one, args.repeats, decoded)
            except Exception as error:  # such as too little memory; other cases continue
                write({"case": dataclasses.asdict(one.case), "left": _one_line(error)})
                continue
            write({"case": dataclasses.asdict(one.case), **row})
            if one.case == asked[0]:
                try:
                    write({"profile": profile(lambda one=one: one.seconds(FRAMES - one.case.chunk, 1))})
                except Exception as error:  # the table matters more than the profile
                    write({"profile": {}, "left": _one_line(error)})
        del ready, compiling


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _row(net: Network, one: Denoising, repeats: int, decoded: dict) -> dict:
    """The figures of a case; `decoded` caches those of the decoders."""
    case, memory = one.case, one.program.memory_analysis()
    full = one.seconds(FRAMES - case.chunk, repeats)
    row = {"denoise_s": full, "first_denoise_s": one.seconds(0, repeats), "decode_s": {}, "fps": {}, "first_s": {}}
    row["gib"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30 if memory else None
    frames = case.batch * case.chunk * WAN_FACTOR
    row["fps"]["none"], row["first_s"]["none"] = frames / full, row["first_denoise_s"]
    for name in net.decoders:
        if (name, case.batch) not in decoded:
            decoded[name, case.batch] = decoding(net, name, case.batch, repeats)
        seconds = decoded[name, case.batch]
        row["decode_s"][name] = seconds["later"] * case.chunk
        row["fps"][name] = frames / (full + row["decode_s"][name])
        row["first_s"][name] = row["first_denoise_s"] + seconds["first"] + seconds["later"] * (case.chunk - 1)
    return row


def main() -> None:
    """Prints and appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", type=int, default=None, help="settings at most")
    parser.add_argument("--seconds", type=float, default=3600, help="no setting is begun after these")
    parser.add_argument("--jsonl", type=Path, default=Path("gpu_table.jsonl"))
    args = parser.parse_args()
    compilation.keep_compiled()
    args.dtype = "float32" if args.small else "bfloat16"

    def write(result: dict) -> None:
        with args.jsonl.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result)[:400], flush=True)

    measure(network(args.small, args.dtype), args, write)


if __name__ == "__main__":
    main()
