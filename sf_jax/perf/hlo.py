"""Parses compiled programs: the bytes that every instruction moves, with loop bodies counted once per iteration.

XLA's own cost analysis counts a loop's body once, but here layers, chunks and denoising steps are loops. An instruction
is assumed to read the part of each operand that it needs and to write its result, both once. Repeated reads by a kernel
do not count, as caches serve many of them.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
SIZES |= {f"f8{kind}": 1 for kind in ("e4m3fn", "e5m2", "e4m3", "e4m3b11fnuz", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
      dtype: XLA's name of the type.
      shape: the shape.
      layout: the rest of XLA's text for the array.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Size in bytes without padding."""
        return SIZES.get(self.dtype, 0) * self.elements

    @property
    def on_chip(self) -> bool:
        """Whether a TPU keeps it in on-chip memory (tiles, memory space 1), which uses no HBM bandwidth."""
        return "T(" in self.layout and "S(1)" in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name of the instruction.
      operation: the operation, such as "fusion".
      arrays: its result; several if it is a tuple.
      operands: names of its operand instructions.
      attributes: the rest of the line.
      root: whether its result is the computation's result.
    """

    name: str
    operation: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def elements(self) -> int:
        """Number of elements of the result."""
        return sum(array.elements for array in self.arrays)

    @property
    def source(self) -> str:
        """Its origin in the traced program: JAX's names of transformations, loops, modules and primitives."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """The kernel of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """Names of the computations in attributes such as "body"."""
        names = []
        for key in keys:
            for group in re.findall(rf"\b{key}=\{{?((?:%[\w.\-]+(?:, )?)+)\}}?", self.attributes):
                names += _NAME.findall(group)
        return names


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the name of the entry computation."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of `compiled.as_text()`.

    Raises:
      ValueError: if the text has no program.
    """
    lines: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = lines.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and _LINE.match(line):
            current.append(line)
        elif line == "}":
            current = None
        elif current:  # attributes of kernels span several lines
            current[-1] += line
    if not entry:
        raise ValueError("text holds no ENTRY computation: give what compiled.as_text() returns")
    parsed = {name: tuple(filter(None, map(_instruction, body))) for name, body in lines.items()}
    return Module(parsed, entry)


def _instruction(line: str) -> Instruction | None:
    root, name, rest = _LINE.match(line).groups()
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:]
    match = _OPERATION.match(rest)
    if match is None:
        return None
    stop = _closing(rest, match.end() - 1)
    operands = rest[match.end() : stop - 1]
    if match[1] in ("constant", "parameter"):  # keeps the number or value in `attributes`
        return Instruction(name, match[1], arrays_of(result), (), f"({operands}){rest[stop:]}", bool(root))
    return Instruction(name, match[1], arrays_of(result), tuple(_NAME.findall(operands)), rest[stop:], bool(root))


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type; those of a tuple in order."""
    parts = []
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        if dtype in SIZES:
            parts.append(Array(dtype, tuple(int(size) for size in sizes.split(",") if size), layout))
    return tuple(parts)


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return len(text)


def trips(module: Module, loop: Instruction, dynamic: float) -> float:
    """Iterations of a loop: XLA's known trip count, else a constant in its condition, else `dynamic`."""
    if known := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.attributes):
        return float(known[1])
    lines = {line.name: line for name in loop.called("condition") for line in module.computations[name]}
    (root,) = (line for line in lines.values() if line.root)
    for name in root.operands:
        constant = name in lines and lines[name].operation == "constant"
        if constant and (number := re.match(r"\((\d+)\)", lines[name].attributes)):
            return float(number[1])
    return dynamic


def reads(module: Module, name: str) -> dict[int, float]:
    """Elements that a fused computation reads from each parameter; a parameter updated in place is not read."""
    lines = module.computations[name]
    by_name = {line.name: line for line in lines}
    kept = {line.name for line in _results(lines) if _changes_parameter(by_name, line)}
    wanted: dict[str, float] = {}
    numbers: dict[int, float] = {}
    for line in reversed(lines):
        count = float(line.elements) if line.root else wanted.get(line.name, 0.0)
        if line.operation == "parameter":
            numbers[int(re.match(r"\((\d+)\)", line.attributes)[1])] = count
            continue
        inner = reads(module, line.called("calls")[0]) if line.operation == "fusion" else None
        for place, operand in enumerate(line.operands):
            if operand not in by_name:
                continue
            size = by_name[operand].elements
            if line.name in kept and place == 0:
                needed = 0.0
            elif inner is not None:
                needed = inner.get(place, size)
            else:
                needed = _needed(line, place, size, count)
            wanted[operand] = min(size, wanted.get(operand, 0.0) + needed)
    return numbers


def _needed(line: Instruction, place: int, size: int, count: float) -> float:
    """Elements of an operand of `size` elements that an instruction needs to compute `count` of its own."""
    if line.operation in ("slice", "dynamic-slice", "gather"):
        return min(size, count) if place == 0 else size
    if line.operation in ("concatenate", "reduce", "pad", "reduce-window", "dynamic-update-slice"):
        return size * count / max(1, line.elements)
    if line.operation in ("tuple", "dot", "convolution", "custom-call", "scatter", "sort"):
        return size
    return min(size, count)  # elementwise


def written(module: Module, instruction: Instruction) -> list[Array]:
    """The arrays that a fusion writes; for one updated in place, only the new part."""
    lines = module.computations[instruction.called("calls")[0]]
    by_name = {line.name: line for line in lines}
    results = _results(lines)
    arrays = list(instruction.arrays)
    if instruction.operation.endswith("-start"):  # (operands, results, 32-bit state)
        arrays = arrays[-1 - sum(len(line.arrays) for line in results) : -1]
    parts = []
    for line in results:
        own, arrays = arrays[: len(line.arrays)], arrays[len(line.arrays) :]
        if _changes_parameter(by_name, line):
            own = [dataclasses.replace(own[0], shape=by_name[line.operands[_new_part(line)]].arrays[0].shape)]
        parts += [] if line.operation == "parameter" else own
    return parts


def _results(lines: Sequence[Instruction]) -> list[Instruction]:
    """The instructions whose results a fused computation returns, in order."""
    by_name = {line.name: line for line in lines}
    root = next(line for line in lines if line.root)
    results = [by_name[name] for name in root.operands] if root.operation == "tuple" else [root]
    return [_unwrapped(by_name, line) for line in results]


def _unwrapped(by_name: dict[str, Instruction], line: Instruction) -> Instruction:
    """The instruction at the start of a chain of bitcasts, which move nothing."""
    while line.operation == "bitcast":
        line = by_name[line.operands[0]]
    return line


def _changes_parameter(by_name: dict[str, Instruction], line: Instruction) -> bool:
    """Whether an instruction updates a part of a parameter, which XLA then does in place."""
    if line.operation != "dynamic-update-slice" and not (line.operation == "scatter" and len(line.operands) == 3):
        return False
    return _unwrapped(by_name, by_name[line.operands[0]]).operation == "parameter"


def _new_part(line: Instruction) -> int:
    """Index of the operand that an update in place writes."""
    return 2 if line.operation == "scatter" else 1


def holds(module: Module, name: str, operations: Sequence[str]) -> Instruction | None:
    """The first instruction with one of `operations` in a computation and its nested fusions; None if there is none."""
    for line in module.computations.get(name, ()):
        if line.operation in operations:
            return line
        if line.operation == "fusion" and (inner := holds(module, line.called("calls")[0], operations)):
            return inner
    return None
