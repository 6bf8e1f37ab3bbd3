"""The table of docs/speed.md: what a chunk of Wan2.1-1.3B needs on GPUs and TPUs, which need not be attached.

  pip install -e '.[aot,gpu_aot]'
  JAX_PLATFORMS=cpu python -m benchmarks.speed                       # compiles what is missing, writes docs/speed.md
  JAX_PLATFORMS=cpu python -m benchmarks.speed --target=h100:1 --layers=2 --file=/tmp/speed.jsonl    # a quick look

Compiles a chunk of 3 latent frames of 480x832 (12 frames) in bfloat16, with four denoising steps and the clean pass
(which writes the chunk to the cache), for a full cache of 21 latent frames and for 9 cached frames, 3 of them the sink,
with its own; then the decoders. Programs in the file that were compiled at this commit are not recompiled. Decoders for
TPUs compile for tens of minutes each, or for seconds at XLA's level O1, which moves more bytes:

  export JAX_OPTIMIZATION_LEVEL=O1 JAX_MEMORY_FITTING_LEVEL=O1
  JAX_PLATFORMS=cpu python -m benchmarks.speed --target=v6e:2x2 --program=VAE --program='tiny VAE'
"""

import argparse
import dataclasses
import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import jax

from sf_jax.inference.sampling import Sampling
from sf_jax.models.wan import wan_1_3b
from sf_jax.parallel.mesh import make_mesh
from sf_jax.perf import generation
from sf_jax.perf.chips import chip_of
from sf_jax.perf.compile import Compiled, compile_anew, compile_call
from sf_jax.perf.devices import devices_of
from sf_jax.perf.traffic import COPIES
from sf_jax.rollout import RolloutConfig

TARGETS = ("h100:1", "h200:1", "b200:1", "a100:1", "rtx4090:1", "v5p:2x2x1", "v6e:2x2")
WINDOWS = {"18 + 3": {}, "9 + 3": {"window": 12, "sink": 3, "positions": "relative"}}
DECODERS = {"wan": "VAE", "tiny": "tiny VAE"}
FILE, PAGE = Path("docs/speed.jsonl"), Path("docs/speed.md")
BEGIN, END = "<!-- benchmarks.speed: begin -->", "<!-- benchmarks.speed: end -->"
LEVEL = "JAX_OPTIMIZATION_LEVEL"
PACKAGES = ("jax", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "libtpu")


def calls(target: str, layers: int):
    """(name, call, mesh) of all programs of a target."""
    chip, mesh = chip_of(target), make_mesh({}, list(devices_of(target)))
    config = wan_1_3b(dtype="bfloat16", remat="none", num_layers=layers)
    rollouts = {name: RolloutConfig(context_noise="none", **fields) for name, fields in WINDOWS.items()}
    whole = generation.Generation(config, rollouts["18 + 3"], Sampling())
    for name, rollout in rollouts.items():
        what = dataclasses.replace(whole, rollout=rollout)
        yield name, next(call for call in generation.calls(what, mesh, chip) if call.name == generation.CHUNK), mesh
    for name, title in DECODERS.items():
        what = dataclasses.replace(whole, decoder=generation.wan_decoder(name, "bfloat16"))
        yield title, next(call for call in generation.calls(what, mesh, chip) if call.name == generation.LATER), mesh


def row_of(compiled: Compiled, chip) -> dict:
    """The fields of a program that the file stores."""
    moved = compiled.traffic
    attention = [f"{each.implementation} {each.shapes}".strip() for each in moved.attention]
    return {
        "arguments": compiled.arguments,
        "temporary": compiled.temporary,
        "flops": compiled.flops,
        "bytes": moved.memory,
        "outside": moved.outside,
        "copies": moved.kinds.get(COPIES, 0.0),
        "kernels": moved.kernels,
        "attention": attention,
        "movers": [[mover.kind, mover.source, mover.bytes] for mover in moved.movers[:12]],
        "roofline": max(compiled.bounds(chip).values()),
        "estimate": compiled.estimate(chip),
        "problem": compiled.missing_kernel(),
        "compiled_in": round(compiled.seconds, 1),
    }


def commit() -> str:
    """The short hash of the commit, with a plus if files differ from it."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "sf_jax"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + "+" * bool(changed.stdout.strip())


def versions() -> dict:
    """Versions of the compilers."""
    there = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return {name: there[name] for name in PACKAGES if name in there}


def measure(targets: list[str], programs: list[str], layers: int, file: Path) -> None:
    """Compiles the programs that the file lacks for this commit."""
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    level = {"level": os.environ[LEVEL]} if LEVEL in os.environ else {}
    fields = ("target", "program", "layers", "commit", "level")
    now, keys = commit(), {tuple(map(row.get, fields)) for row in known}
    for target in targets:
        missing = [name for name in programs if (target, name, layers, now, level.get("level")) not in keys]
        for name, call, mesh in calls(target, layers) if missing else ():
            if name not in missing:
                continue
            row = row_of(compile_call(call, mesh), chip_of(target))
            common = {"target": target, "program": name, "layers": layers, "commit": now, "versions": versions()}
            common |= level
            with file.open("a") as out:
                out.write(json.dumps(common | row) + "\n")
            print(
                target, name, {key: row[key] for key in ("outside", "estimate", "problem", "compiled_in")}, flush=True
            )


def table(file: Path, layers: int) -> list[str]:
    """The lines of the table, with the newest row of each program."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    newest = {(row["target"], row["program"]): row for row in rows if row["layers"] == layers}
    targets = [target for target in TARGETS if any(key[0] == target for key in newest)]
    used = list(newest.values())
    commits = ", ".join(sorted({row["commit"] for row in used}))
    told = sorted({f"{name} {version}" for row in used for name, version in row["versions"].items()})
    lines = [f"Commit {commits}; {', '.join(told)}; {layers} layers.", ""]
    titles = ("one chip", "attends to", "GiB", "TFLOP", "GB moved", "GB outside", "GB copies", "kernels", "roofline")
    titles += ("estimate", "FPS", "with the VAE", "with the tiny VAE", "attention")
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for target in targets:
        chip = chip_of(target)
        decoders = [newest.get((target, title)) for title in DECODERS.values()]
        for name in WINDOWS:
            if (row := newest.get((target, name))) is None:
                continue
            gib = f"{(row['arguments'] + row['temporary']) / 2**30:.1f} of {chip.memory / 2**30:.0f}"
            moved = f"{row['bytes'] / 1e9:.0f} | {row['outside'] / 1e9:.0f} | {row['copies'] / 1e9:.1f}"
            speeds = [12 / row["estimate"]]
            speeds += [12 / (row["estimate"] + 3 * each["estimate"]) if each else 0.0 for each in decoders]
            fps = " | ".join(f"{speed:.1f}" if speed else "" for speed in speeds)
            times = f"{row['roofline']:.3f} s | {row['estimate']:.3f} s"
            attention = ", ".join(sorted({text.split()[0] for text in row["attention"]}))
            lines.append(
                f"| {_title(target)} | {name} | {gib} | {row['flops'] / 1e12:.0f} | {moved} | {row['kernels']:.0f} | "
                f"{times} | {fps} | {row['problem'] or attention} |"
            )
    titles = ("one chip", "decoder, a latent frame", "GiB", "TFLOP", "GB moved", "GB outside", "kernels", "roofline")
    titles += ("estimate", "attention")
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for target in targets:
        for title in DECODERS.values():
            if (row := newest.get((target, title))) is None:
                continue
            gib = f"{(row['arguments'] + row['temporary']) / 2**30:.1f}"
            moved = f"{row['bytes'] / 1e9:.1f} | {row['outside'] / 1e9:.1f}"
            times = f"{1e3 * row['roofline']:.1f} ms | {1e3 * row['estimate']:.1f} ms"
            attention = ", ".join(sorted({text.split()[0] for text in row["attention"]})) or "none"
            name = f"{title}, at {row['level']}" if "level" in row else title
            lines.append(
                f"| {_title(target)} | {name} | {gib} | {row['flops'] / 1e12:.2f} | {moved} | {row['kernels']:.0f} | "
                f"{times} | {attention} |"
            )
    return lines


def _title(target: str) -> str:
    chip = target.split(":")[0]
    return f"TPU {chip}" if chip_of(target).platform == "tpu" else chip.upper().replace("RTX", "RTX ")


def main() -> None:
    """Compiles missing programs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", default=None, help="such as h100:1; all of the table otherwise")
    programs = [*WINDOWS, *DECODERS.values()]
    parser.add_argument("--program", action="append", choices=programs, help="all of them otherwise")
    parser.add_argument("--layers", type=int, default=30, help="of the transformer; fewer compile faster")
    parser.add_argument("--file", type=Path, default=FILE, help="where the figures are kept")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    compile_anew()
    if not args.table:
        measure(args.target or list(TARGETS), args.program or programs, args.layers, args.file)
    lines = table(args.file, args.layers)
    print(f"JAX {jax.__version__}", *lines, sep="\n")
    if args.file == FILE and args.layers == 30:
        text = PAGE.read_text()
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(head + "\n".join([BEGIN, *lines, END]) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
