"""The updates of a training run, described by shapes, which `sf_jax.train --compile_only` compiles."""

from collections.abc import Iterator

from jax.sharding import Mesh

from sf_jax.config import TrainConfig
from sf_jax.perf.chips import Chip, chip_of
from sf_jax.perf.compile import Call, Compiled, check_kernels, compile_call, expected_kernel
from sf_jax.perf.devices import devices_of
from sf_jax.perf.report import GIB, details, fits, rates_of
from sf_jax.training import sharding
from sf_jax.training.abstract import abstract_run
from sf_jax.training.ahead import flops_of
from sf_jax.training.programs import rate

_TITLES = ("update", "GiB a chip", "arguments", "temporary", "PFLOP a chip", "and again", "GB sent", "TB of memory")
_TITLES += ("TB outside", "kernels", "compiled in")


def calls(config: TrainConfig, mesh: Mesh, chip: Chip) -> Iterator[Call]:
    """One call of every update of a run.

    Raises:
      ValueError: if the mesh does not divide an axis that it splits.
    """
    run = abstract_run(config, mesh)
    flops, work = flops_of(run), flops_of(run, recompute=True)
    for program in run.programs:
        yield Call(
            name=program.name,
            function=program.update.step,
            arguments=run.arguments,
            flops=flops[program.name],
            work=work[program.name],
            trips=program.update.trips,
            kernel=expected_kernel(config.model, chip.platform),
            rate=rate(program.due, config.steps),
        )


def compile_for(config: TrainConfig, target: str) -> Iterator[Compiled]:
    """Compiles every update of a run for devices that are not attached, one after the other.

    Args:
      config: the run's configuration; its mesh must fit the devices.
      target: such as "v5p:4x4x4" or "h100:8".

    Raises:
      ValueError: if the target is not available, or the mesh does not fit.
    """
    chip = chip_of(target)
    mesh = sharding.make_mesh(config.mesh, list(devices_of(target)))
    for call in calls(config, mesh, chip):
        yield compile_call(call, mesh)


def step_bounds(rows: list[Compiled], chip: Chip) -> dict[str, float]:
    """Seconds per iteration for each bound, summed over all updates and weighted by how often they run."""
    total: dict[str, float] = {}
    for row in rows:
        for name, seconds in row.bounds(chip).items():
            total[name] = total.get(name, 0.0) + row.rate * seconds
    return total


def training_report(config: TrainConfig, target: str) -> Iterator[str]:
    """The report of `sf_jax.train --compile_only`.

    Args:
      config: see `compile_for`.
      target: see `compile_for`.

    Yields:
      Lines of text.

    Raises:
      ValueError: see `compile_for`; also, after all lines, if an expected fused kernel is missing.
    """
    chip, rows = chip_of(target), []
    sizes = ", ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in sharding.MESH_AXES)
    yield f"{target}, mesh {sizes}; batch {config.batch_size}, accumulate {config.accumulate}"
    yield f"| {' | '.join(_TITLES)} |"
    yield "|---" * len(_TITLES) + "|"
    for row in compile_for(config, target):
        rows.append(row)
        gib = " | ".join(f"{size / GIB:.2f}" for size in (row.memory, row.arguments, row.temporary))
        petaflop = f"{row.flops / 1e15:.3f} | {(row.work - row.flops) / 1e15:.3f}"
        moved = f"{row.sent / 1e9:.1f} | {row.traffic.memory / 1e12:.2f} | {row.traffic.outside / 1e12:.2f}"
        yield f"| {row.name} | {gib} | {petaflop} | {moved} | {row.traffic.kernels:.0f} | {row.seconds:.0f} s |"
    for row in rows:
        yield from details(row)
    yield rates_of(chip)
    yield fits(rows, chip)
    bounds = step_bounds(rows, chip)
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in bounds.items())
    top = max(bounds, key=bounds.get)
    yield f"an iteration at the chip's peaks: {parts}; at least {bounds[top]:.2f} s, bound by {top}"
    yield f"estimate of an iteration: {sum(row.rate * row.estimate(chip) for row in rows):.2f} s"
    check_kernels(rows)
