"""Compiles programs for devices that are absent, and says what one chip needs for them."""

import dataclasses
import time
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from sf_jax.models import attention_kernels
from sf_jax.models.wan import WanConfig
from sf_jax.perf.chips import Chip
from sf_jax.perf.traffic import Traffic, traffic

KERNELS = {"gpu": "cudnn", "tpu": "splash"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a program, described by shapes.

    Attributes:
      name: what it does.
      function: jitted.
      arguments: shapes with shardings, and static values.
      flops: arithmetic of its matrix products, all chips together.
      work: the same with what is computed again for a backward pass; None for as much.
      trips: passes of loops whose number is known only when they run.
      branch: which branch of a choice to count, see `traffic`.
      cached: see `traffic`.
      kernel: name of the fused attention that it must have; None where any will do.
      rate: how often it runs, in units of the caller's.
      beside: bytes of a chip that stay in its memory meanwhile and are no arguments.
      mesh: on which it runs; None for the caller's.
    """

    name: str
    function: Callable
    arguments: tuple
    flops: float
    work: float | None = None
    trips: float = 1.0
    branch: str = "mean"
    cached: frozenset[int] = frozenset()
    kernel: str | None = None
    rate: float = 1.0
    beside: int = 0
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for absent devices; all figures are those of a chip and one call.

    Attributes:
      name: of the program.
      rate: how often it runs.
      arguments: bytes of its arguments.
      temporary: bytes that it needs meanwhile, results that take no argument's place included.
      flops: arithmetic of its matrix products, recomputation left out.
      work: arithmetic with what is computed again.
      traffic: what it moves.
      seconds: how long compiling took.
      host: bytes of the arguments in the host's memory.
      beside: bytes that stay in the chip's memory beside the arguments.
      kernel: see `Call`.
    """

    name: str
    rate: float
    arguments: int
    temporary: int
    flops: float
    work: float
    traffic: Traffic
    seconds: float
    host: int = 0
    beside: int = 0
    kernel: str | None = None

    @property
    def memory(self) -> int:
        """Bytes of a chip while it runs."""
        return self.arguments + self.temporary + self.beside

    @property
    def sent(self) -> float:
        """Bytes sent to other chips."""
        return sum(self.traffic.links.values())

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that arithmetic, memory and links take, each at its peak; the largest is the roofline's time."""
        return {
            "arithmetic": self.work / chip.flops,
            "memory": self.traffic.memory / chip.bandwidth,
            "links": self.sent / chip.links,
        }

    def estimate(self, chip: Chip) -> float:
        """Seconds if nothing overlaps: arithmetic at the rate of large products, then all bytes at the bandwidth."""
        return self.work / chip.products + self.traffic.memory / chip.bandwidth + self.sent / chip.links

    def missing_kernel(self) -> str | None:
        """What is wrong where the program must attend by a fused kernel and does not; None where all is well."""
        if self.kernel is None:
            return None
        calls = [each for each in self.traffic.attention if "blocks" in each.place]  # not a VAE's
        others = sorted(
            {f"{each.implementation} in {each.place}" for each in calls if each.implementation != self.kernel}
        )
        if others:
            return f"{self.name} attends by {', '.join(others)} where {self.kernel} was expected"
        return None if calls else f"{self.name} has no attention by {self.kernel}, which was expected"


def expected_kernel(config: WanConfig, platform: str) -> str | None:
    """The fused attention that "auto" is meant to find for a transformer on a platform; None where it has none."""
    if config.attention != "auto":
        return None
    if platform == "gpu":
        fits = config.head_dim <= attention_kernels.LANES and config.head_dim % 8 == 0 and config.dtype == "bfloat16"
    else:
        fits = config.head_dim % attention_kernels.LANES == 0
    return KERNELS.get(platform) if fits else None


def compile_anew() -> None:
    """Turns the cache of compiled programs off: one from there says less of itself, and at once."""
    jax.config.update("jax_enable_compilation_cache", False)


def compile_call(call: Call, mesh: Mesh) -> Compiled:
    """Compiles a call for the devices of a mesh and reads what the compiler says."""
    began, mesh = time.perf_counter(), call.mesh or mesh
    with jax.set_mesh(mesh):  # what "auto" attention asks, and how activations are split
        compiled = call.function.lower(*call.arguments).compile()
    memory = compiled.memory_analysis()
    moved = traffic(compiled.as_text(), call.trips, call.branch, call.cached)
    return Compiled(
        name=call.name,
        rate=call.rate,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=call.flops / mesh.size,
        work=(call.flops if call.work is None else call.work) / mesh.size,
        traffic=moved,
        seconds=time.perf_counter() - began,
        host=memory.host_argument_size_in_bytes,
        beside=call.beside,
        kernel=call.kernel,
    )


def check_kernels(rows: Iterable[Compiled]) -> None:
    """Refuses programs that do not attend as they should.

    Raises:
      ValueError: naming the first one.
    """
    for row in rows:
        if problem := row.missing_kernel():
            raise ValueError(f"{problem}: choose sizes that the kernel takes")
