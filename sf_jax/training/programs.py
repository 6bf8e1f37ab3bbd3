"""The compiled updates, and how much arithmetic they are."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.extend import core

from sf_jax.training import sharding


def jit_updates(updates: Sequence, keys: Sequence[str], constants, mesh, state_shardings, frozen_shardings) -> list:
    """(name, jitted update with donated state, every) of updates.

    Args:
      updates: (name, update, every), see `stages.Stage`.
      keys: what of a batch is split over the devices.
      constants: names of the arrays that every device gets whole.
      mesh: the devices.
      state_shardings: of the state.
      frozen_shardings: of the frozen networks.
    """
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    batch_shardings = dict.fromkeys(keys, split) | dict.fromkeys(constants, everywhere)
    return [
        (
            name,
            jax.jit(
                update,
                in_shardings=(state_shardings, frozen_shardings, batch_shardings),
                out_shardings=(state_shardings, everywhere),
                donate_argnums=0,
            ),
            every,
        )
        for name, update, every in updates
    ]


@dataclasses.dataclass
class Program:
    """One update, traced and compiled once.

    Attributes:
      name: of the update.
      update: jitted.
      every: iterations between its calls.
      dynamic_trips: see `matmul_flops`.
      flops: of one call, over all devices; None before `compile`.
    """

    name: str
    update: object
    every: int
    dynamic_trips: float = 1.0
    flops: float | None = None
    _compiled: object = None

    def compile(self, state, frozen, batch) -> None:
        """Compiles the update for arguments like these; they are not used up."""
        traced = self.update.trace(state, frozen, batch)
        self._compiled = traced.lower().compile()
        self.flops = matmul_flops(traced.jaxpr, self.dynamic_trips)

    def __call__(self, state, frozen, batch):
        """The update."""
        return self._compiled(state, frozen, batch)


def rollout_trips(steps: int) -> float:
    """Mean number of calls of a rollout's loop per chunk: the exit step is uniform, then the clean pass."""
    return (steps - 1) / 2 + 2


def matmul_flops(jaxpr, dynamic_trips: float = 1.0) -> float:
    """Floating-point operations of all matrix products and convolutions of a traced program, over all devices.

    XLA's own count (`cost_analysis`) takes every loop for one pass, and the layers here are a loop. Recomputation by
    remat is counted: it is in the program.

    Args:
      jaxpr: of `jax.jit(f).trace(...)`.
      dynamic_trips: passes to count for loops whose number of passes is known only when they run.
    """
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
            total += max(matmul_flops(branch, dynamic_trips) for branch in given["branches"])
        elif name == "while":
            total += dynamic_trips * matmul_flops(given["body_jaxpr"], dynamic_trips)
        else:
            passes = given["length"] if name == "scan" else 1
            inside = (x for value in given.values() for x in (value if isinstance(value, (tuple, list)) else (value,)))
            total += passes * sum(
                matmul_flops(x, dynamic_trips) for x in inside if isinstance(x, (core.Jaxpr, core.ClosedJaxpr))
            )
    return total
