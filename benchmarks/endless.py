"""Tests endless streams over a long time, with the shipped student of moving digits.

  python -m benchmarks.endless --what=memory     # 10,000 chunks of one stream: resident memory and time of a chunk
  python -m benchmarks.endless --what=length     # accuracy along 40 times the training length, positions and sinks
  python -m benchmarks.endless --what=switches   # prompts that change in every mode: the new digit, and its position

memory: window 9 (newest frames kept), sink 3 (first frames kept), positions "relative", with pixels on the host. Prints
the median resident memory and time of chunks 1,000 to 2,000 and of the last 1,000, and how often the step was traced.
The machine should be idle.

length: share of 3-frame windows in which the judge sees the prompt's digit, or its digit and direction, in the first
and the last tenth of the videos.

switches: streams play 8 chunks, change their prompt to another digit and direction, and play 4 more. "new digit": share
of streams whose second chunk after the switch shows the new digit. "position": share of streams in which no step of the
digit's center, from the last old frame to the end of the second chunk, is longer than twice the longer of the old and
the new prompt's steps. A cut starts at an unrelated position.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import numpy as np

import sf_jax
from sf_jax.data import moving_digits
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics
from sf_jax.inference import stream_state
from sf_jax.inference.prompt_change import MODES

TRAINED = 9
BEFORE, AFTER, LATER = 8, 4, 16  # chunks before the switch, after it, and until the digit is judged again


def resident() -> int:
    """Resident bytes of this process; the peak on systems that do not report the current value."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(pipe, chunks: int) -> None:
    """Runs one stream for a long time."""
    stream = sf_jax.Stream(pipe)
    one = stream.join("a 3 moving left, fast")
    sizes, times = np.zeros(chunks), np.zeros(chunks)
    for i in range(chunks):
        began = time.perf_counter()
        stream.step()[one]
        times[i], sizes[i] = time.perf_counter() - began, resident()
    tenth = chunks // 10
    parts = {"second tenth": slice(tenth, 2 * tenth), "last tenth": slice(-tenth, None)}
    for name, part in parts.items():
        print(f"{name:14s}{np.median(sizes[part]) / 2**20:10.1f} MiB{np.median(times[part]) * 1e3:10.3f} ms a chunk")
    size, speed = (np.median(a[-tenth:]) / np.median(a[tenth : 2 * tenth]) for a in (sizes, times))
    print(f"{chunks} chunks, {stream.frames(one)} frames; last to second tenth: memory {size:.4f}, time {speed:.3f}")
    print(f"the step was traced {stream_state.step._cache_size()} time(s)")


def videos_of(pipe, prompts: list[str], chunks: int) -> np.ndarray:
    """Videos of endless streams, uint8 [N, F, h, w, 1]."""
    stream = sf_jax.Stream(pipe, slots=len(prompts))
    ids = [stream.join(prompt, number=i) for i, prompt in enumerate(prompts)]
    steps = (stream.step() for _ in range(chunks))
    return np.concatenate([np.stack([step[one] for one in ids]) for step in steps], axis=1)


def length(pipe, times: int, samples: int) -> None:
    """Prints the accuracy over long videos."""
    judge = judging.load()
    prompts, _, targets = metrics.choose_prompts(samples)
    default = pipe.rollout
    kinds = [("relative", 3), ("relative", 0), ("absolute", 3), ("absolute", 0)]
    print(f"{samples} videos of {times * TRAINED} frames, {times} times the training length")
    print(f"{'':34s}{'digit':>8s}{'':8s}{'both':>8s}{'':8s}")
    print(f"{'':34s}" + f"{'first':>8s}{'last':>8s}" * 2 + f"{'ratio':>8s}   tenth")
    for positions, sink in kinds:
        changed = pipe.with_rollout(positions=positions, sink=sink)
        videos = videos_of(changed, prompts, times * TRAINED // default.chunk)
        right = metrics.correctness(judge(videos), targets)
        tenth = right["joint"].shape[1] // 10
        ends = [
            right[name][:, part].mean() for name in ("digit", "joint") for part in (slice(tenth), slice(-tenth, None))
        ]
        name = f"{positions}, sink {sink}, window {default.window}" + " (its own)" * (changed.rollout == default)
        print(f"{name:34s}" + "".join(f"{end:8.3f}" for end in ends) + f"{ends[3] / ends[2]:8.3f}", flush=True)


def switches(pipe, count: int, timestep: float | None, fade: float, seed: int, modes) -> None:
    """Prints the table of prompt changes; `timestep` is the noise of recomputed context, `seed` draws the prompts."""
    judge = judging.load()
    rng, chunk = np.random.default_rng(seed), pipe.rollout.chunk
    digits = np.stack([rng.permutation(10)[:2] for _ in range(count)])
    directions = rng.integers(len(moving_digits.DIRECTIONS), size=(count, 2))
    speeds = rng.integers(len(moving_digits.SPEEDS), size=(count, 2))
    prompts = [
        [moving_digits.caption(*kind) for kind in zip(*row, strict=True)] for row in zip(digits, directions, speeds)
    ]
    print(f"{count} switches of each mode")
    columns = f"{'new digit':>12s}{'in chunk ' + str(LATER):>12s}{'position':>12s}{'longest step (median, most)':>30s}"
    print(f"{'mode':10s}{'transition':>12s}{columns}")
    for mode in modes:
        for transition in (0, 1) if mode != "cut" else (0,):
            stream = sf_jax.Stream(pipe, slots=count)
            ids = [stream.join(pair[0], number=i) for i, pair in enumerate(prompts)]
            parts = [stream.step() for _ in range(BEFORE)]
            for one, pair in zip(ids, prompts, strict=True):
                noise = timestep if mode in ("recache", "flush") else None
                stream.prompt(one, pair[1], mode, transition, noise, 0.0 if mode == "cut" else fade)
            parts += [stream.step() for _ in range(AFTER)]
            videos = np.concatenate([np.stack([part[one] for one in ids]) for part in parts], axis=1)
            first = BEFORE * chunk
            second = judge(videos[:, first + chunk : first + 2 * chunk])
            shown = (np.asarray(second.digit).argmax(-1) == digits[:, 1:]).mean(axis=1) > 0.5
            for _ in range(LATER - AFTER):
                last = stream.step()
            last = judge(np.stack([last[one] for one in ids]))
            later = (np.asarray(last.digit).argmax(-1) == digits[:, 1:]).mean(axis=1) > 0.5
            moved = np.linalg.norm(metrics.steps(videos), axis=-1)
            usual = np.maximum(
                np.median(moved[:, first - 2 * chunk : first - 1], axis=1), np.median(moved[:, first + chunk :], axis=1)
            )
            longest = moved[:, first - 1 : first + 2 * chunk - 1].max(axis=1)
            steady = longest <= 2 * usual
            longest = f"{statistics.median(longest):.2f}, {longest.max():.2f}"
            print(
                f"{mode:10s}{transition:12d}{shown.mean():12.2f}{later.mean():12.2f}{steady.mean():12.2f}{longest:>30s}",
                flush=True,
            )


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="switches", choices=["memory", "length", "switches"])
    parser.add_argument("--chunks", type=int, default=10_000, help="memory: how many")
    parser.add_argument("--times", type=int, default=40, help="length: in training lengths")
    parser.add_argument("--samples", type=int, default=160, help="length: videos of each row")
    parser.add_argument("--count", type=int, default=50, help="switches: of each mode")
    parser.add_argument("--context_timestep", type=float, default=None, help="switches: of 'recache' and 'flush'")
    parser.add_argument("--fade", type=float, default=0.0, help="switches: of all modes but 'cut'")
    parser.add_argument("--seed", type=int, default=0, help="switches: of the prompts")
    parser.add_argument("--mode", default=None, choices=MODES, help="switches: this mode alone")
    parser.add_argument("--checkpoint", default=None, help="another student of moving digits")
    args = parser.parse_args()
    pipe = sf_jax.load_pipeline(args.checkpoint)
    if args.what == "memory":
        memory(pipe, args.chunks)
    elif args.what == "length":
        length(pipe, args.times, args.samples)
    else:
        modes = (args.mode,) if args.mode else MODES
        switches(pipe, args.count, args.context_timestep, args.fade, args.seed, modes)


if __name__ == "__main__":
    main()
