"""One stream over several chips, from the compiler: memory per chip, bytes sent per chunk of frames. Needs no chips.

  JAX_PLATFORMS=cpu python -m benchmarks.one_stream --model=14B --mesh=tensor:4 --target=v6e:2x2 --target=h100:4
  JAX_PLATFORMS=cpu python -m benchmarks.one_stream --table=14B --out=rows.jsonl      # the tables of docs/streaming.md

Compiles a chunk of 3 latent frames with a full cache: 21 frames without --window, else --window (with --sink).
Parameters and cache are bfloat16. Rows already in --out are not recompiled; --draw only prints them. Some GPUs differ
only in memory here: one of them is compiled for, and its figures are compared with the others' limits (`SAME`).
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import jax

from sf_jax import rollout as ro
from sf_jax.inference.sampling import Sampling
from sf_jax.parallel.mesh import mesh_sizes
from sf_jax.perf import generation
from sf_jax.perf.chips import chip_of
from sf_jax.perf.compile import compile_call
from sf_jax.perf.devices import devices_of

GIB = 2**30
SAME = {"h100:1": ("h200:1", "b200:1", "rtx4090:1")}
SIZES, WINDOWS = ("480x832", "720x1280"), ((None, 0), (12, 3))
# model -> target -> meshes
TABLES = {
    "14B": {
        "h100:1": ("data:1",),
        "h100:2": ("tensor:2",),
        "h100:4": ("tensor:4", "tensor:2,context:2"),
        "h100:8": ("tensor:8", "tensor:4,context:2"),
        "v6e:2x2": ("tensor:4", "tensor:2,context:2"),
        "v6e:2x4": ("tensor:8", "tensor:4,context:2"),
        "v5p:2x2x1": ("tensor:2,context:2",),
    },
    "1.3B": {
        "h100:4": ("context:4", "tensor:2,context:2", "tensor:4"),
        "v6e:2x2": ("context:4", "tensor:2,context:2", "tensor:4"),
        "v6e:2x4": ("tensor:2,context:4", "tensor:4,context:2", "context:8"),
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and its target; `size` is height x width in pixels."""

    model: str
    size: str
    window: int | None
    sink: int
    target: str
    mesh: str

    def generation(self) -> generation.Generation:
        """The stream."""
        height, width = map(int, self.size.split("x"))
        config = generation.SIZES[self.model](dtype="bfloat16", remat="none")
        positions = "absolute" if self.window is None else "relative"
        rollout = ro.RolloutConfig(window=self.window, sink=self.sink, positions=positions, context_noise="none")
        sampling = Sampling(height=height, width=width)
        decoder = generation.wan_decoder("wan", "bfloat16")
        return generation.Generation(config, rollout, sampling, decoder, mesh=mesh_sizes(self.mesh))


def measure(case: Case, what: str) -> dict:
    """Compiles the program `what` of a case."""
    described, chip = case.generation(), chip_of(case.target)
    mesh = generation.device_mesh(described, list(devices_of(case.target)))
    call = next(call for call in generation.calls(described, mesh, chip) if call.name == what)
    row = compile_call(call, mesh)
    sent = {kind: size / 1e9 for kind, size in row.traffic.links.items()}
    found = {"arguments": row.arguments, "temporary": row.temporary, "beside": row.beside, "work": row.work}
    return found | {"sent": sent, "seconds": row.seconds, "moved": row.traffic.memory}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), help="all rows of a model")
    parser.add_argument("--model", choices=list(TABLES), default="14B")
    parser.add_argument("--size", default=SIZES[0], help="height x width")
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--sink", type=int, default=0)
    parser.add_argument("--target", action="append", default=None)
    parser.add_argument("--mesh", default="tensor:4")
    parser.add_argument("--program", default=generation.CHUNK, choices=[generation.CHUNK, generation.LATER])
    parser.add_argument("--out", type=Path, help="file that the rows are kept in, a line of JSON each")
    parser.add_argument("--draw", action="store_true", help="print what --out has and compile nothing")
    args = parser.parse_args()
    if args.table:
        shapes = itertools.product(SIZES, WINDOWS, TABLES[args.table].items())
        cases = [
            Case(args.table, size, *window, target, mesh) for size, window, (target, all_) in shapes for mesh in all_
        ]
    else:
        targets = args.target or ["v6e:2x2"]
        cases = [Case(args.model, args.size, args.window, args.sink, target, args.mesh) for target in targets]
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    known = {tuple(row["case"]): row for row in map(json.loads, lines)}
    jax.config.update("jax_enable_compilation_cache", False)
    titles = ("model", "size", "cache", "devices", "mesh", "GiB a chip", "of", "fits", "GB sent", "by")
    print(f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", sep="\n", flush=True)
    for case in cases:
        key = (*dataclasses.astuple(case), args.program)
        if key not in known and not args.draw:
            known[key] = {"case": key} | measure(case, args.program)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
        if key in known:
            print(*lines_of(case, known[key]), sep="\n", flush=True)


def lines_of(case: Case, row: dict) -> list[str]:
    """Lines of a table, one for each GPU or TPU that the figures apply to."""
    gib = (row["arguments"] + row["temporary"] + row["beside"]) / GIB
    cache = "21" if case.window is None else f"{case.window - case.sink} + {case.sink}"
    by = ", ".join(f"{kind} {size:.1f}" for kind, size in sorted(row["sent"].items()) if size >= 0.05) or "-"
    lines = []
    for target in (case.target, *SAME.get(case.target, ())):
        memory = chip_of(target).memory / GIB
        fits = "yes" if gib <= memory else "no"
        cells = (case.model, case.size, cache, target, case.mesh, f"{gib:.1f}", f"{memory:.0f}", fits)
        lines.append(f"| {' | '.join(cells)} | {sum(row['sent'].values()):.1f} | {by} |")
    return lines


if __name__ == "__main__":
    main()
