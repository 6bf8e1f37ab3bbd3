"""What a compiled program moves: bytes between chips and to memory, with every loop counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, and here layers, chunks and denoising steps are loops.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing of their own.
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "async-start",
    "async-update",
    "async-done",
    "copy-done",
}
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?[})\]]) ([a-z][\w\-]*)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: name, operation, bytes of its result, names of its operands, and its whole text."""

    name: str
    operation: str
    size: float
    operands: tuple[str, ...]
    text: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a chip moves.

    Attributes:
      links: operation -> bytes that it sends to other chips.
      memory: bytes read from and written to its memory, kernels' repeated reads left out.
    """

    links: dict[str, float]
    memory: float


def _bytes(shape: str) -> float:
    """Bytes of a shape or a tuple of shapes, padding left out."""
    total = 0.0
    for kind, sizes in _SHAPE.findall(shape):
        if kind in _SIZES:
            total += _SIZES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """All computations by name, and the name of the one that is the program."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            root, name, shape, operation, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
            current.append(Instruction(name, operation, _bytes(shape), operands, line, bool(root)))
    return found, entry


def traffic(text: str, dynamic_trips: float = 1.0) -> Traffic:
    """Counts what a compiled program moves on one chip.

    Args:
      text: `compiled.as_text()`.
      dynamic_trips: passes to count for loops whose number of passes is known only when they run.

    Raises:
      ValueError: if there is no program in the text.
    """
    computations, entry = _parse(text)
    if not entry:
        raise ValueError("text holds no ENTRY computation: give what compiled.as_text() returns")

    @functools.cache
    def of(name: str) -> tuple[tuple[tuple[str, float], ...], float]:
        links: dict[str, float] = {}
        memory = 0.0
        sizes = {i.name: i.size for i in computations[name]}
        for instruction in computations[name]:
            memory += _memory(instruction, sizes, computations)
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                links[kind] = links.get(kind, 0.0) + _sent(kind, instruction, sizes)
            for called, times in _called(instruction, computations, dynamic_trips):
                inner, inner_memory = of(called)
                memory += times * inner_memory
                for kind, size in inner:
                    links[kind] = links.get(kind, 0.0) + times * size
        return tuple(links.items()), memory

    links, memory = of(entry)
    return Traffic(dict(links), memory)


def _called(instruction: Instruction, computations, dynamic_trips: float) -> Iterable[tuple[str, float]]:
    """Computations that an instruction runs, and how often; what is fused into it is part of it."""
    if instruction.operation not in ("while", "conditional", "call", "async-start"):
        return
    names = [name for group in _CALLS.findall(instruction.text) for name in re.findall(r"%([\w.\-]+)", group)]
    if instruction.operation == "while":
        condition = re.search(r"condition=%([\w.\-]+)", instruction.text)[1]
        body = re.search(r"body=%([\w.\-]+)", instruction.text)[1]
        yield body, _trips(computations[condition], dynamic_trips)
    else:
        share = 1.0 / len(names) if instruction.operation == "conditional" and names else 1.0
        yield from ((name, share) for name in names)


def _trips(condition: list[Instruction], dynamic_trips: float) -> float:
    """Passes of a loop that counts from 0, from its condition."""
    by_name = {i.name: i for i in condition}
    (root,) = (i for i in condition if i.root)
    for name in root.operands:
        if name in by_name and (number := re.search(r" constant\((\d+)\)", by_name[name].text)):
            return float(number[1])
    return dynamic_trips


def _sent(kind: str, instruction: Instruction, sizes: dict[str, float]) -> float:
    """Bytes that a chip sends for a collective, on a ring of many chips."""
    operand = sum(sizes.get(name, 0.0) for name in instruction.operands)
    result = instruction.size - operand if instruction.operation.endswith("-start") else instruction.size
    if kind == "all-reduce":
        return 2 * operand
    return {"all-gather": max(result, operand), "collective-permute": operand}.get(kind, operand)


def _memory(instruction: Instruction, sizes: dict[str, float], computations) -> float:
    """Bytes that an instruction reads and writes; of a large array only the slice that it takes or changes."""
    operation = instruction.operation
    if operation in _FREE or operation.endswith("-done"):
        return 0.0
    operands = [sizes.get(name, 0.0) for name in instruction.operands]
    if operation in ("dynamic-slice", "gather", "slice"):
        return 2 * instruction.size
    if operation == "dynamic-update-slice":
        return 2 * operands[1]
    if operation != "fusion":
        return instruction.size + sum(operands)
    inside = computations.get(re.search(r"calls=%([\w.\-]+)", instruction.text)[1], [])
    parameters = {
        i.name: int(number[1]) for i in inside if (number := re.search(r" parameter\((\d+)\)", i.text)) is not None
    }
    by_name = {i.name: i for i in inside}
    written = instruction.size
    for name, number in parameters.items():
        users = [i for i in inside if name in i.operands]
        if users and all(i.operation in ("dynamic-slice", "gather") for i in users):
            operands[number] = sum(i.size for i in users)
        elif users and all(i.operation == "dynamic-update-slice" and i.operands[0] == name for i in users):
            changed = sum(by_name[i.operands[1]].size for i in users if i.operands[1] in by_name)
            written += changed - operands[number]
            operands[number] = 0.0
    return max(written, 0.0) + sum(operands)
