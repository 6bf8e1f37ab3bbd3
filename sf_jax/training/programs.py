"""The compiled updates, and their FLOP counts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.extend import core
from jax.sharding import Mesh

from sf_jax.config import TrainConfig
from sf_jax.training import sharding
from sf_jax.training.step import Update

# Iterations over which the rate of an update is averaged.
_SAMPLE = 1000


def jit_updates(
    updates: Sequence[Update],
    keys: Sequence[str],
    constants: Sequence[str],
    mesh: Mesh,
    state_shardings,
    frozen_shardings,
) -> list[Update]:
    """Jits updates with donated state; returns them in the same order.

    Args:
      updates: the updates of a stage, see `stages.updates_of`.
      keys: entries of a batch that are split over the devices.
      constants: entries of a batch that are replicated.
      mesh: the devices.
      state_shardings: shardings of the state.
      frozen_shardings: shardings of the frozen networks.
    """
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    batch_shardings = dict.fromkeys(keys, split) | dict.fromkeys(constants, everywhere)
    jitted = functools.partial(
        jax.jit,
        in_shardings=(state_shardings, frozen_shardings, batch_shardings),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
    return [update._replace(step=jitted(update.step)) for update in updates]


@dataclasses.dataclass
class Program:
    """One jitted update and the devices that run it, compiled once."""

    update: Update
    mesh: Mesh
    _compiled: Callable | None = None

    @property
    def name(self) -> str:
        """The update's name."""
        return self.update.name

    def due(self, step: int) -> bool:
        """Whether an iteration runs it."""
        return self.update.due(step)

    @property
    def compiled(self) -> bool:
        """Whether it has been compiled."""
        return self._compiled is not None

    def lower(self, state, frozen, batch) -> jax.stages.Lowered:
        """Lowers the update for arguments like these, without donating them."""
        with jax.set_mesh(self.mesh):  # determines the sharding of activations
            return self.update.step.lower(state, frozen, batch)

    def use(self, compiled: jax.stages.Compiled) -> None:
        """Sets the compiled program, from the result of `lower`."""
        self._compiled = compiled

    def compile(self, state, frozen, batch) -> None:
        """Compiles the update for arguments like these, without donating them."""
        self.use(self.lower(state, frozen, batch).compile())

    def __call__(self, state, frozen, batch):
        """Runs the update."""
        return self._compiled(state, frozen, batch)


def compile_all(programs: Sequence[Program], state, frozen, batch) -> None:
    """Compiles programs for arguments like these in parallel; with several processes, in one fixed order."""
    # Traced in this thread, as settings such as `jax.default_matmul_precision` are thread-local.
    lowered = [program.lower(state, frozen, batch) for program in programs]
    workers = max(1, len(programs)) if jax.process_count() == 1 else 1
    with ThreadPoolExecutor(workers) as pool:
        for program, compiled in zip(programs, pool.map(lambda each: each.compile(), lowered), strict=True):
            program.use(compiled)


def rate(due: Callable[[int], bool], steps: int) -> float:
    """The mean number of times that an iteration runs an update."""
    count = min(steps, _SAMPLE)
    return sum(due(step) for step in range(count)) / count


def countable(config: TrainConfig, recompute: bool = False) -> TrainConfig:
    """The same computation in a form in which `matmul_flops` counts all matmuls, including those of attention.

    Args:
      config: the run's configuration.
      recompute: whether to count the recomputation of `remat` in the backward pass, which is not part of the model's
        own FLOPs. Recomputation inside attention kernels is never counted.
    """
    changes = {"attention": "whole"} | ({} if recompute else {"remat": "none"})
    models = {name: getattr(config, name) for name in ("model", "teacher", "critic") if getattr(config, name)}
    plain = {name: dataclasses.replace(model, **changes) for name, model in models.items()}
    return dataclasses.replace(config, **plain)


def model_flops(updates: Sequence[Update], arguments: Sequence) -> dict[str, float]:
    """Floating-point operations of one call of each update, over all devices.

    Args:
      updates: made from `countable(config)`.
      arguments: (state, frozen, batch) as arrays or shapes.

    Returns:
      name -> operations of matmuls and convolutions.
    """
    return {each.name: matmul_flops(jax.make_jaxpr(each.step)(*arguments), each.trips) for each in updates}


def matmul_flops(
    jaxpr, dynamic_trips: float = 1.0, largest: bool = False, shares: Mapping[str, float] | None = None
) -> float:
    """Floating-point operations of all matmuls and convolutions of a traced program, over all devices.

    XLA's own count (`cost_analysis`) counts every loop once, and the layers here are a loop.

    Args:
      jaxpr: from `jax.jit(f).trace(...)` or `jax.make_jaxpr`.
      dynamic_trips: iterations to assume for loops whose number is known only at run time.
      largest: whether to count a conditional's branch with the most operations (a full cache) instead of the mean.
      shares: scope (of `jax.named_scope`) -> fraction of the runs of its conditional that take that branch; all others
        take the one with the fewest operations.
    """
    shares = shares or {}
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, given["dimension_numbers"].rhs_spec[0]
            inner = math.prod(kernel) // kernel[features]
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            # A chunk attends to all that is cached; each branch is one length (`Layout.prefixes`).
            branches = [matmul_flops(branch, dynamic_trips, largest, shares) for branch in given["branches"]]
            scope = str(equation.source_info.name_stack).rsplit("/", 1)[-1]
            if (share := shares.get(scope)) is not None:
                total += share * max(branches) + (1 - share) * min(branches)
                continue
            branches = [flops for flops in branches if flops] or [0.0]
            total += max(branches) if largest else sum(branches) / len(branches)
        elif name == "while":
            total += dynamic_trips * matmul_flops(given["body_jaxpr"], dynamic_trips, largest, shares)
        else:
            passes = given["length"] if name == "scan" else 1
            inside = (x for value in given.values() for x in (value if isinstance(value, (tuple, list)) else (value,)))
            total += passes * sum(
                matmul_flops(x, dynamic_trips, largest, shares)
                for x in inside
                if isinstance(x, (core.Jaxpr, core.ClosedJaxpr))
            )
    return total
