"""Full-size training, compiled for TPU slices that are not attached: memory per chip, FLOPs, traffic, and bottleneck.

  python -m benchmarks.full_size_training --out=docs/full_size_training.jsonl          # compiles the missing cases
  python -m benchmarks.full_size_training --out=docs/full_size_training.jsonl --draw   # the table, and docs/scaling.png

The recipes are those of configs/wan_distill.py: student and critic 1.3B, 480x832, 21 latent frames, bfloat16, unless
they differ. Cases already in the file are not recompiled. JAX_OPTIMIZATION_LEVEL=O0 JAX_MEMORY_FITTING_LEVEL=O0
compiles faster. The cases "scan" and "replay" (with its `cache_gradient`) are one gradient of sum(video * weight) in
the student's parameters, including the rollout.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import wan_distill
from sf_jax import rollout as ro
from sf_jax.config import MeshConfig, TrainConfig, from_dict
from sf_jax.models.wan import WanTransformer
from sf_jax.perf.chips import CHIPS, chip_of
from sf_jax.perf.compile import Call, Compiled, compile_call
from sf_jax.perf.devices import devices_of
from sf_jax.perf.traffic import Traffic
from sf_jax.perf.training import compile_for
from sf_jax.replay import keep_from, replay
from sf_jax.training import sharding
from sf_jax.training.abstract import abstract_run
from sf_jax.training.programs import countable, matmul_flops
from sf_jax.training.self_forcing import mean_calls
from tests import oracle

# (variant, topology, mesh, batch, accumulate)
SCALING = [
    ("14b", "v5p:2x2x4", {"fsdp": 16}, 64, 4),
    ("14b", "v5p:2x4x4", {"fsdp": 32}, 64, 2),
    ("14b", "v5p:4x4x4", {"fsdp": 64}, 64, 1),
    ("14b", "v5p:4x4x8", {"fsdp": 64, "context": 2}, 64, 1),
    ("14b", "v5p:4x8x8", {"fsdp": 64, "context": 4}, 64, 1),
    ("14b", "v5p:8x8x8", {"data": 2, "fsdp": 64, "context": 4}, 128, 1),
    ("14b", "v5p:8x8x16", {"data": 4, "fsdp": 64, "context": 4}, 256, 1),
]
OTHERS = [
    ("14b", "v6e:16x16", {"fsdp": 64, "context": 4}, 64, 1),
    ("1_3b", "v5p:2x2x4", {"fsdp": 16}, 64, 4),
    ("1_3b", "v5p:2x2x4", {"fsdp": 16}, 64, 1),
    ("framewise", "v5p:4x4x4", {"fsdp": 64}, 64, 1),
    ("14b_student", "v5p:4x8x8", {"fsdp": 64, "context": 4}, 64, 1),
    ("720p", "v5p:4x8x8", {"fsdp": 64, "context": 4}, 64, 1),
    ("gan", "v5p:4x4x4", {"fsdp": 64}, 64, 1),
    ("long", "v5p:4x4x4", {"fsdp": 64}, 64, 1),
    ("causal", "v5p:4x4x4", {"fsdp": 64}, 64, 1),
    ("ode", "v5p:4x4x4", {"fsdp": 64}, 64, 1),
]
GRADIENTS = ("replay", "replay straight_through", "replay write", "scan")


def configured(variant: str, mesh: dict, batch: int, accumulate: int) -> TrainConfig:
    """The recipe on a mesh."""
    config = from_dict(wan_distill.get_config(variant))
    sizes = MeshConfig(**{"data": 1} | mesh)
    return dataclasses.replace(config, mesh=sizes, batch_size=batch, accumulate=accumulate)


def gradient_row(method: str, topology: str = "v5p:4x4x4") -> dict:
    """One gradient through a rollout of the 1.3B student, a video per chip."""
    config = configured("1_3b", {"fsdp": 64}, 64, 1)
    mesh = sharding.make_mesh(config.mesh, list(devices_of(topology)))
    run = abstract_run(config, mesh)
    data, split = config.data, sharding.batch_sharding(mesh)
    shape = (config.batch_size, data.frames, data.height, data.width, config.model.channels)
    noise = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    exits = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))

    def gradient(sizes, params, noise, weight, text, exit_step):
        model, draw = WanTransformer(sizes), ro.key_draw(jax.random.key(0), jnp.arange(config.batch_size))

        def loss(params):
            if method == "scan":
                video = oracle.rollout_video(model, config.rollout, params, text, noise, exit_step, draw)
                return (video * weight).sum()
            mode = method.removeprefix("replay").strip() or "stop"
            kept = keep_from(config.rollout, mode, data.frames)
            past = ro.rollout(
                model, config.rollout, params, text, noise, exit_step, draw, keep_from=kept, last_exit=False
            )
            return (replay(model, config.rollout, params, text, past, mode) * weight).sum()

        return jax.grad(loss)(params)

    # The scan also runs the last chunk's exit step and clean pass.
    chunks = len(config.rollout.chunks(data.frames)[1])
    trips = mean_calls(config, data.frames, last_exit=False) + (2 / chunks if method == "scan" else 0)
    params = run.state.model.params
    arguments = (params, noise, noise, run.batch["text"], exits)

    def counted(recompute):
        plain = functools.partial(gradient, countable(config, recompute).model)
        return matmul_flops(jax.make_jaxpr(plain)(*arguments), trips)

    shardings = jax.tree.map(lambda x: x.sharding, arguments)
    jitted = jax.jit(
        functools.partial(gradient, config.model), in_shardings=shardings, out_shardings=shardings[0], donate_argnums=0
    )
    call = Call(method, jitted, arguments, counted(False), counted(True), trips)
    row = row_of(compile_call(call, mesh))
    common = {"variant": "1_3b", "topology": topology, "chips": mesh.size, "mesh": {"fsdp": 64}}
    return row | common | {"gradient": method, "batch": config.batch_size, "accumulate": 1}


FIELDS = ("name", "rate", "arguments", "temporary", "flops", "work", "seconds", "host")


def row_of(compiled: Compiled) -> dict:
    """The fields of a program that the file stores."""
    moved = {"links": compiled.traffic.links, "traffic": compiled.traffic.memory, "kinds": compiled.traffic.kinds}
    return {field: getattr(compiled, field) for field in FIELDS} | moved


def compiled_of(row: dict) -> Compiled:
    """The program of a row; older rows lack the kinds of traffic."""
    kinds = row.get("kinds", {"all": row["traffic"]})
    traffic = Traffic(links=row["links"], kinds=kinds, kernels=0, attention={}, movers=())
    return Compiled(**{field: row[field] for field in FIELDS}, traffic=traffic)


def measure(out: Path) -> None:
    """Compiles the cases missing from the file."""
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    keys = {(row.get("case"), row.get("gradient")) for row in known}

    def add(row):
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: row[key] for key in ("topology", "name", "seconds")}, flush=True)

    for variant, topology, mesh, batch, accumulate in SCALING + OTHERS:
        case = f"{variant} {topology} batch {batch} accumulate {accumulate}"
        if (case, None) in keys:
            continue
        config = configured(variant, mesh, batch, accumulate)
        rows = [row_of(row) for row in compile_for(config, topology)]
        chips = len(devices_of(topology))
        common = {"variant": variant, "topology": topology, "chips": chips, "mesh": mesh, "batch": batch}
        for row in rows:
            add({"case": case, **common, "accumulate": accumulate, "jax": jax.__version__} | row)
    for method in GRADIENTS:
        if (None, method) not in keys:
            add({"jax": jax.__version__} | gradient_row(method))


def draw(out: Path) -> None:
    """Prints the table and draws the figure."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    titles = ("recipe", "slice", "mesh", "batch", "update", "GiB a chip", "of", "PFLOP a chip", "again")
    titles += ("GB sent", "TB moved", "bound")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for row in rows:
        _print_row(row)
    scaling = [row for row in rows if row["variant"] == "14b" and row["topology"].startswith("v5p")]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = {
        "memory of a chip, GiB": lambda row: (row["arguments"] + row["temporary"]) / 2**30,
        "sent by a chip, GB": lambda row: sum(row["links"].values()) / 1e9,
        "arithmetic of a chip, PFLOP": lambda row: row["flops"] / 1e15,
    }
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for name in ("student", "critic"):
            found = [row for row in scaling if row["name"] == name]
            chips = [row["chips"] for row in found]
            axis.plot(chips, [value(row) for row in found], "o-", label=f"{name} update")
        axis.set(title=title, xlabel="v5p chips", xscale="log", ylim=(0, None))
        axis.set_xticks(chips, [str(count) for count in chips], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out.with_name("scaling.png"), dpi=110)


def _print_row(row: dict) -> None:
    compiled = compiled_of(row)
    chip = chip_of(row["topology"])
    bounds = compiled.bounds(chip)
    top = max(bounds, key=bounds.get)
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    batch = f"{row['batch']}" + (f" in {row['accumulate']} parts" if row["accumulate"] > 1 else "")
    name = f"gradient by {row['name']}" if "gradient" in row else row["name"]
    print(
        f"| {row['variant']} | {row['topology']} | {mesh} | {batch} | {name} | {compiled.memory / 2**30:.2f} | "
        f"{chip.memory / 2**30:.0f} | {compiled.flops / 1e15:.3f} | {(compiled.work - compiled.flops) / 1e15:.3f} | "
        f"{compiled.sent / 1e9:.0f} | "
        f"{compiled.traffic.memory / 1e12:.2f} | {bounds[top]:.2f} s, {top} |"
    )


def main() -> None:
    """Compiles the cases, or draws the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draw", action="store_true")
    arguments = parser.parse_args()
    assert set(CHIPS) >= {topology.split(":")[0] for _, topology, *_ in SCALING + OTHERS}
    (draw if arguments.draw else measure)(arguments.out)


if __name__ == "__main__":
    main()
