"""Compiles programs for devices that are not attached, and reports what each chip needs."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping

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
      name: what the program does.
      function: the jitted function.
      arguments: shapes with shardings, and static values.
      flops: matmul operations, summed over all chips.
      work: the same including recomputation in a backward pass; None if nothing is recomputed.
      trips: iterations to assume for loops whose number is known only at run time.
      branch: which branch of a conditional to count, see `traffic`.
      cached: see `traffic`.
      shares: see `traffic`.
      kernel: name of the fused attention that it must use; None for any.
      rate: how often it runs, in the caller's units.
      beside: bytes that stay in a chip's memory meanwhile without being arguments.
      mesh: the mesh it runs on; None for the caller's.
    """

    name: str
    function: Callable
    arguments: tuple
    flops: float
    work: float | None = None
    trips: float = 1.0
    branch: str = "mean"
    cached: Mapping[int, int] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kernel: str | None = None
    rate: float = 1.0
    beside: int = 0
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for devices that are not attached; all figures are per chip and call.

    Attributes:
      name: name of the program.
      rate: how often it runs.
      arguments: bytes of its arguments.
      temporary: temporary bytes, including results that do not alias an argument.
      flops: matmul operations without recomputation.
      work: matmul operations including recomputation.
      traffic: the bytes it moves.
      seconds: compilation time.
      host: bytes of arguments in host memory.
      beside: bytes that stay in the chip's memory in addition to the arguments.
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
        """Bytes of chip memory in use while it runs."""
        return self.arguments + self.temporary + self.beside

    @property
    def sent(self) -> float:
        """Bytes sent to other chips."""
        return sum(self.traffic.links.values())

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds for arithmetic, memory and links, each at its peak rate; the largest is the roofline time."""
        return {
            "arithmetic": self.work / chip.flops,
            "memory": self.traffic.memory / chip.bandwidth,
            "links": self.sent / chip.links,
        }

    def estimate(self, chip: Chip) -> float:
        """Seconds if nothing overlaps: arithmetic at the rate of large matmuls, then all bytes at the bandwidth."""
        return self.work / chip.products + self.traffic.memory / chip.bandwidth + self.sent / chip.links

    def missing_kernel(self) -> str | None:
        """A message if the program does not use the fused attention it must use; None otherwise."""
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
    """The fused attention that "auto" should choose for a transformer on a platform; None if none applies."""
    if config.attention != "auto":
        return None
    if platform == "gpu":
        fits = config.head_dim <= attention_kernels.LANES and config.head_dim % 8 == 0 and config.dtype == "bfloat16"
    else:
        fits = config.head_dim % attention_kernels.LANES == 0
    return KERNELS.get(platform) if fits else None


def compile_anew() -> None:
    """Disables the compilation cache: cached programs report less about themselves and have no compilation time."""
    jax.config.update("jax_enable_compilation_cache", False)


def compile_call(call: Call, mesh: Mesh) -> Compiled:
    """Compiles a call for the devices of a mesh and reads the compiler's analysis."""
    began, mesh = time.perf_counter(), call.mesh or mesh
    with jax.set_mesh(mesh):  # decides "auto" attention and the sharding of activations
        compiled = call.function.lower(*call.arguments).compile()
    memory = compiled.memory_analysis()
    moved = traffic(compiled.as_text(), call.trips, call.branch, call.cached, call.shares)
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
    """Checks that all programs use the expected attention kernel.

    Raises:
      ValueError: if one does not; names the first.
    """
    for row in rows:
        if problem := row.missing_kernel():
            raise ValueError(f"{problem}: choose sizes that the kernel takes")
