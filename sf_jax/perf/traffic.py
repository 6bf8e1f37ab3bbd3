"""Traffic of a compiled program on one chip: bytes by kind, bytes sent to other chips, kernels, and attention."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

from sf_jax.models.slot_cache import WHILE_SINK_GROWS
from sf_jax.models.wan import UNLESS_KEYS_ONLY
from sf_jax.perf import hlo
from sf_jax.perf.hlo import Array, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PRODUCTS, ATTENTION = "matrix products", "attention"
# Neither of the two; copies of cached keys and values are counted separately.
COPIES, REST = "copies of the cache", "the rest"
BRANCHES = ("largest", "mean")
# Instructions that move no bytes themselves.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "iota", "async-start", "async-update", "opt-barrier", "domain", "add-dependency"),
}
# Custom calls on TPUs that only rename arrays.
_NAMES_ONLY = ("ConcatBitcast", "AssumeGatherIndicesInBound")
_GEMM = re.compile(r"gemm|cublas|conv|matmul", re.IGNORECASE)
# Names of attention kernels, and the scope in which `models.attention` computes attention by matmuls.
_KERNEL = re.compile(r"/[^/]*(?:splash|dot_product_attention)")
_SCOPE = re.compile(r"attention_xla\b")


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of attention in a program.

    Attributes:
      implementation: "cudnn", "splash", or "xla" for matmuls.
      place: the module that calls it.
      shapes: shapes of queries and keys, for a kernel.
    """

    implementation: str
    place: str
    shapes: str = ""


@dataclasses.dataclass(frozen=True)
class Mover:
    """Instructions of one origin that are neither matmuls nor attention.

    Attributes:
      kind: `COPIES` or `REST`.
      source: JAX's name of the operation.
      bytes: bytes that they move in total.
    """

    kind: str
    source: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes that a chip moves.

    Attributes:
      links: operation -> bytes that it sends to other chips.
      kinds: kind -> bytes read from and written to memory, without repeated reads by a kernel.
      kernels: number of instructions that run; each is a kernel launch on a GPU.
      attention: calls of attention -> how often they run.
      movers: sources of traffic outside matmuls and attention, largest first.
    """

    links: dict[str, float]
    kinds: dict[str, float]
    kernels: float
    attention: dict[Attention, float]
    movers: tuple[Mover, ...]

    @property
    def memory(self) -> float:
        """Bytes read and written."""
        return sum(self.kinds.values())

    @property
    def outside(self) -> float:
        """Bytes of instructions that are neither matmuls nor attention."""
        return self.memory - self.kinds.get(PRODUCTS, 0.0) - self.kinds.get(ATTENTION, 0.0)


class _Tally:
    """Sums of one computation."""

    def __init__(self):
        self.links, self.kinds, self.attention = (collections.Counter() for _ in range(3))
        self.movers: collections.Counter = collections.Counter()
        self.kernels = 0.0
        self.operands = 0.0  # operand elements of matmuls and attention, which grow with the number of keys

    def add(self, other: "_Tally", times: float) -> None:
        """Adds another computation that runs `times` times."""
        for name in ("links", "kinds", "attention", "movers"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        self.kernels += times * other.kernels
        self.operands += times * other.operands

    @property
    def bytes(self) -> float:
        """Bytes of all kinds."""
        return sum(self.kinds.values())


def traffic(
    text: str,
    dynamic_trips: float = 1.0,
    branch: str = "mean",
    cached: Mapping[int, int] | None = None,
    shares: Mapping[str, float] | None = None,
) -> Traffic:
    """Counts the bytes that a compiled program moves on one chip.

    Args:
      text: the output of `compiled.as_text()`.
      dynamic_trips: iterations to assume for loops whose number is known only at run time.
      branch: which branch of a conditional to count: the "largest" (by operands of matmuls and attention, so at a full
        cache) or the "mean" of all.
      cached: number of elements -> number of rows (tokens) of arrays that hold all cached keys or values, to identify
        copies of them.
      shares: scope (of `jax.named_scope`) -> fraction of the runs of its conditional that take the branch which moves
        most; all others take the one that moves least.

    Raises:
      ValueError: if the text has no program, or `branch` is unknown.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}: it must be one of {', '.join(BRANCHES)}")
    module, shares, cached = hlo.parse(text), shares or {}, cached or {}

    @functools.cache
    def tally(name: str) -> _Tally:
        lines = module.computations[name]
        total = _count(module, lines, cached)
        for line in lines:
            if line.operation == "while":
                total.add(tally(line.called("body")[0]), hlo.trips(module, line, dynamic_trips))
            elif line.operation in ("call", "async-start"):
                for inner in line.called("to_apply", "calls", "called_computations"):
                    total.add(tally(inner), 1.0)
            elif line.operation == "conditional":
                names = line.called("branch_computations", "true_computation", "false_computation")
                scope = line.source.removesuffix("/cond").rsplit("/", 1)[-1]
                if names and (share := shares.get(scope)) is not None:
                    by_bytes = sorted(map(tally, names), key=lambda inner: inner.bytes)
                    total.add(by_bytes[-1], share)
                    total.add(by_bytes[0], 1 - share)
                elif branch == "largest" and names:
                    total.add(max(map(tally, names), key=lambda inner: (inner.operands, inner.bytes)), 1.0)
                else:
                    for inner in names:
                        total.add(tally(inner), 1.0 / len(names))
        return total

    total = tally(module.entry)
    movers = [Mover(*key, size) for key, size in total.movers.most_common()]
    return Traffic(dict(total.links), dict(total.kinds), total.kernels, dict(total.attention), tuple(movers))


def _has_rows(array: Array, rows: int | None) -> bool:
    """Whether adjacent axes of an array make up a number of rows; None: no."""
    axes = len(array.shape)
    spans = (array.shape[i:j] for i in range(axes) for j in range(i + 1, axes + 1))
    return rows is not None and any(math.prod(span) == rows for span in spans)


def _count(module: Module, lines: Sequence[Instruction], cached: Mapping[int, int]) -> _Tally:
    """Sums of a computation's own instructions."""
    total, by_name = _Tally(), {line.name: line for line in lines}
    users: dict[str, list[Instruction]] = {}
    for line in lines:
        for name in line.operands:
            users.setdefault(name, []).append(line)
    for line in lines:
        if _is_free(line):
            continue
        collective = line.operation.removesuffix("-start")
        if collective in COLLECTIVES:
            total.links[collective] += _sent(collective, line, by_name)
        size, results = _read(module, by_name, line), _written(module, by_name, line)
        size += sum(array.bytes for array in results if not array.on_chip)
        if called := _attention(module, line, by_name):
            total.attention[called] += 1
        if called or _product(module, line) is not None:
            total.operands += sum(by_name[name].elements for name in line.operands if name in by_name)
        reader = _reader(line, users) if all(array.on_chip for array in results) else line
        kind = PRODUCTS if _product(module, reader) is not None else REST
        if _attention(module, reader, by_name):
            kind = ATTENTION
        elif kind == REST and any(_has_rows(array, cached.get(array.elements)) for array in results):
            kind = COPIES
        total.kinds[kind] += size
        total.kernels += 1
        if kind in (COPIES, REST):
            total.movers[(kind, place_of(reader.source) or line.operation)] += size
    return total


def _is_free(line: Instruction) -> bool:
    """Whether an instruction moves no bytes itself."""
    return line.operation in _FREE or line.operation.endswith(("-done", "-update")) or line.target in _NAMES_ONLY


def _reader(line: Instruction, users: dict[str, list[Instruction]]) -> Instruction:
    """The first instruction that needs an array, for which a TPU copies it to on-chip memory."""
    start = line
    while line is start or _is_free(line):
        following = users.get(line.name)
        if not following:  # the computation returns it
            return start
        line = following[0]
    return line


def _written(module: Module, by_name: dict, line: Instruction) -> list[Array]:
    """The arrays that an instruction writes; for one updated in place, only the new part."""
    if line.operation in ("fusion", "fusion-start"):
        return hlo.written(module, line)
    if line.operation == "dynamic-update-slice":
        return list(by_name[line.operands[1]].arrays)
    if line.operation == "scatter" and len(line.operands) == 3:  # (original, indices, updates)
        return list(by_name[line.operands[2]].arrays)
    if line.operation == "copy-start":  # (copy, original, state)
        return list(line.arrays[:1])
    if line.operation.endswith("-start") and line.operation != "all-reduce-start":  # (originals, results, state)
        originals = sum(len(by_name[name].arrays) for name in line.operands if name in by_name)
        return [array for array in line.arrays[originals:] if array.shape]
    if line.operation == "custom-call" and len(line.arrays) > 1 and _GEMM.search(line.target):
        return [array for array in line.arrays if not _is_workspace(array)]
    return list(line.arrays)


def _is_workspace(array: Array) -> bool:
    """Whether a matmul's result is scratch space, which cuBLAS uses only if it splits the sums."""
    return array.dtype in ("s8", "u8") and len(array.shape) == 1


def _read(module: Module, by_name: dict, line: Instruction) -> float:
    """Bytes that an instruction reads; only the part of an array that it uses."""
    operands = [by_name[name] for name in line.operands if name in by_name]
    operation = line.operation.removesuffix("-start")
    if operation in ("dynamic-slice", "gather", "slice"):
        on_chip = all(array.on_chip for array in operands[0].arrays) if operands else False
        return 0.0 if on_chip else sum(array.bytes for array in _written(module, by_name, line))
    if operation == "dynamic-update-slice" or (operation == "scatter" and len(operands) == 3):
        operands = operands[1:]
    numbers = hlo.reads(module, line.called("calls")[0]) if operation == "fusion" else {}
    total = 0.0
    for place, operand in enumerate(operands):
        arrays = [array for array in operand.arrays if not array.on_chip]
        size, elements = sum(array.bytes for array in arrays), sum(array.elements for array in arrays)
        total += size * min(1.0, numbers.get(place, elements) / max(1, elements))
    return total


def _product(module: Module, line: Instruction) -> Instruction | None:
    """The matmul or convolution that an instruction is, or that is fused into it."""
    if line.operation in ("dot", "convolution"):
        return line
    if line.operation == "custom-call" and _GEMM.search(line.target):
        return line
    if line.operation in ("fusion", "fusion-start"):
        return hlo.holds(module, line.called("calls")[0], ("dot", "convolution"))
    return None


def _attention(module: Module, line: Instruction, by_name: dict) -> Attention | None:
    """The attention that an instruction computes, by a kernel or by matmuls of `attention.attend`."""
    product = _product(module, line)
    if line.operation == "custom-call":
        implementation = "cudnn" if "fmha" in line.target else "splash" if "splash" in line.source + line.name else ""
        if implementation:
            arrays = [by_name[name].arrays[0] for name in line.operands if name in by_name]
            shapes = [array.shape for array in arrays if "f" in array.dtype and len(array.shape) > 2][:2]
            text = " x ".join("[" + ",".join(map(str, shape)) + "]" for shape in shapes)
            return Attention(implementation, place_of(_KERNEL.split(line.source)[0], 2), text)
    scope = None if product is None else _SCOPE.search(product.source)
    if scope is None:
        return None
    return Attention("xla", place_of(product.source[: scope.start()].rstrip("/"), 2))


# Parts of JAX's names other than modules and primitives.
_TRANSFORMS = re.compile(
    r"while|body|cond|closed_call|eval_jaxpr|checkpoint|rematted_computation|branch_\d+_fun|shard_map"
    rf"|{UNLESS_KEYS_ONLY}|{WHILE_SINK_GROWS}"
)


def place_of(source: str, parts: int = 3) -> str:
    """The end of JAX's name of an operation, without layer numbers, loops and transformations."""
    names = [re.sub(r"^(?:jit|pjit)\((.*)\)$", r"\1", name) for name in source.split("/")]
    names = [re.sub(r"_\d+(?=\.|$)", "", name) for name in names if not _TRANSFORMS.fullmatch(name)]
    return "/".join(names[-parts:])


def _sent(kind: str, line: Instruction, by_name: dict) -> float:
    """Bytes that a chip sends for a collective on a large ring of chips."""
    operand = sum(by_name[name].bytes for name in line.operands if name in by_name)
    result = line.bytes - operand if line.operation.endswith("-start") else line.bytes
    if kind == "all-reduce":
        return 2 * operand
    return max(result, operand) if kind == "all-gather" else operand
