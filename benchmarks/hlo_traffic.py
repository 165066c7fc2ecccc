"""Bytes that a compiled program's kernels read and write, counted in its optimised HLO.

Every instruction of the schedule is a kernel that reads its operands from memory and writes its
result there once; what happens inside a fusion stays on the chip. Caches make it less, several
passes inside a kernel more.
"""

import math
import re
from typing import NamedTuple

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

# These move nothing.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "iota"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?([^,}]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class UnknownLoopLength(ValueError):
    """A program has a loop whose length the compiler does not tell."""


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # of the line


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    is_entry: bool


def traffic_bytes(hlo: str) -> int:
    """Bytes read and written by the program `hlo`, the text of `Compiled.as_text()`.

    Loops count as often as the compiler knows that they run.

    Raises:
      ValueError: if the text has no entry computation or a loop of unknown length.
    """
    computations = _parse(hlo)
    entries = [name for name, c in computations.items() if c.is_entry]
    if not entries:
        raise ValueError("hlo: there is no entry computation.")
    return _computation_bytes(computations, entries[0])


def _parse(hlo: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current: dict[str, _Instruction] = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = {}
            computations[header[2]] = _Computation(current, header[1] is not None)
        elif match := _INSTRUCTION.match(line):
            name, type_, opcode, rest = match.groups()
            arguments = rest[: _closing_parenthesis(rest)]
            operands = re.findall(r"%([\w.\-]+)", arguments)
            current[name] = _Instruction(name, type_, opcode, operands, rest)
    return computations


def _closing_parenthesis(text: str) -> int:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)


def _type_bytes(type_: str, *, with_fast_memory: bool = False) -> int:
    """Bytes of arrays in the device's main memory: S(1) marks those in a TPU's fast memory."""
    return sum(
        _BYTES.get(dtype, 0) * math.prod(map(int, filter(None, sizes.split(","))))
        for dtype, sizes, layout in _ARRAY.findall(type_)
        if with_fast_memory or "S(1)" not in layout
    )


def _computation_bytes(computations: dict[str, _Computation], name: str) -> int:
    instructions = computations[name].instructions
    return sum(_instruction_bytes(computations, instructions, x) for x in instructions.values())


def _instruction_bytes(
    computations: dict[str, _Computation], scope: dict[str, _Instruction], x: _Instruction
) -> int:
    if x.opcode in _FREE or (x.opcode.endswith("-start") and x.opcode != "async-start"):
        return 0
    if (
        x.opcode.endswith("-done") and x.opcode != "async-done"
    ):  # of a copy: its type is that of what has arrived
        return _type_bytes(x.type, with_fast_memory=True) + _type_bytes(x.type)
    called = [match.lstrip("%") for match in _CALLED.findall(x.rest)]
    if x.opcode == "while":
        count = _TRIP_COUNT.search(x.rest)
        if count is None:
            raise UnknownLoopLength(f"hlo: the length of the loop {x.name} is not known.")
        return int(count[1]) * sum(_computation_bytes(computations, c) for c in called)
    if x.opcode in ("call", "conditional", "async-start"):
        return sum(_computation_bytes(computations, c) for c in called)
    operands = [_type_bytes(scope[o].type) for o in x.operands if o in scope]
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _type_bytes(x.type)
    if x.opcode == "fusion" and called:
        sliced = _sliced_parameters(computations[called[0]])
        operands = [min(size, sliced.get(i, size)) for i, size in enumerate(operands)]
    return sum(operands) + _type_bytes(x.type)


def _sliced_parameters(fused: _Computation) -> dict[int, int]:
    """Bytes read of those parameters of a fusion of which only slices are used."""
    sliced: dict[int, int] = {}
    for x in fused.instructions.values():
        if x.opcode != "parameter":
            continue
        users = [y for y in fused.instructions.values() if x.name in y.operands]
        if users and all(y.opcode in ("dynamic-slice", "slice") for y in users):
            sliced[int(x.rest.split(")")[0])] = sum(_type_bytes(y.type) for y in users)
    return sliced
