"""Bytes that a compiled program's kernels read and write, counted in its optimised HLO.

Every instruction of the schedule is a kernel that reads its operands from memory and writes its
result there once; what happens inside a fusion stays on the chip. Of an operand that is sliced, the
slice is read, and of an array in which a slice is replaced in place, the slice is written. Caches
make it less, several passes inside a kernel more.
"""

import collections
import math
import re
from typing import NamedTuple

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

# Of an operand with as many elements as the result, each is used for one of these.
_ONE_TO_ONE = {
    "abs", "add", "and", "bitcast", "bitcast-convert", "compare", "convert", "copy", "cosine",
    "divide", "exponential", "log", "maximum", "minimum", "multiply", "negate", "not", "or",
    "power", "reduce-precision", "reshape", "rsqrt", "select", "sine", "sqrt", "subtract", "tanh",
    "transpose",
}  # fmt: skip

# These move nothing.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "iota"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?([^,}]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class UnknownLoopLength(ValueError):
    """A program has a loop whose length the compiler does not tell."""


class _Instruction(NamedTuple):
    is_root: bool
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # of the line


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    is_entry: bool

    @property
    def root(self) -> _Instruction:
        """What it returns."""
        return next(x for x in self.instructions.values() if x.is_root)

    def source(self, name: str) -> _Instruction:
        """What an instruction is, but for its type."""
        x = self.instructions[name]
        return self.source(x.operands[0]) if x.opcode == "bitcast" else x


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
            root, name, type_, opcode, rest = match.groups()
            arguments = rest[: _closing_parenthesis(rest)]
            operands = re.findall(r"%([\w.\-]+)", arguments)
            current[name] = _Instruction(root is not None, name, type_, opcode, operands, rest)
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
    scope = computations[name]
    return sum(_instruction_bytes(computations, scope, x) for x in scope.instructions.values())


def _instruction_bytes(
    computations: dict[str, _Computation], scope: _Computation, x: _Instruction
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
    if x.opcode == "fusion" and called:
        return _fusion_bytes(computations[called[0]], _replaceable(scope, x))
    operands = [_type_bytes(scope.instructions[o].type) for o in x.operands]
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _type_bytes(x.type)
    if x.opcode == "dynamic-update-slice" and 0 in _replaceable(scope, x):
        return 2 * operands[1] + sum(operands[2:])
    return sum(operands) + _type_bytes(x.type)


def _replaceable(scope: _Computation, x: _Instruction) -> set[int]:
    """Which operands a result may take the place of: no arguments, and nobody else needs them."""
    uses = collections.Counter(o for y in scope.instructions.values() for o in y.operands)
    return {
        i
        for i, o in enumerate(x.operands)
        if scope.source(o).opcode != "parameter" and uses[o] == 1
    }


def _fusion_bytes(fused: _Computation, replaceable: set[int]) -> int:
    """Bytes of its parameters that a fusion uses, and of its results that it writes."""
    instructions, root = fused.instructions, fused.root
    names = root.operands if root.opcode == "tuple" else [root.name]
    results = [fused.source(name) for name in names]
    in_place = set()
    for x in results:
        if x.opcode == "dynamic-update-slice":
            target = fused.source(x.operands[0])
            if target.opcode == "parameter" and _parameter_number(target) in replaceable:
                in_place.add(x.name)
    written = sum(
        _type_bytes(instructions[x.operands[1]].type if x.name in in_place else x.type)
        for x in results
    )
    used = _used_bytes(fused, in_place)
    return written + sum(used[x.name] for x in instructions.values() if x.opcode == "parameter")


def _used_bytes(fused: _Computation, in_place: set[str]) -> dict[str, int]:
    """Bytes, at most, of each instruction's result that others use or that are returned."""
    instructions, root = fused.instructions, fused.root.name
    size = {name: _type_bytes(x.type) for name, x in instructions.items()}
    width = {name: _element_bytes(x.type) for name, x in instructions.items()}
    used = dict.fromkeys(instructions, 0) | {root: size[root]}
    for x in reversed(instructions.values()):
        needed = dict.fromkeys(x.operands, 0)
        for i, o in enumerate(x.operands):
            as_many = size[o] // width[o] == size[x.name] // width[x.name]
            is_sliced = i == 0 and x.opcode in ("dynamic-slice", "slice")
            if is_sliced or (x.opcode in _ONE_TO_ONE and as_many):
                needed[o] = max(needed[o], used[x.name] // width[x.name] * width[o])
            elif i > 0 or x.name not in in_place:
                needed[o] = size[o]
        for o, more in needed.items():
            used[o] = min(size[o], used[o] + more)
    return used


def _element_bytes(type_: str) -> int:
    return max((_BYTES.get(dtype, 0) for dtype, *_ in _ARRAY.findall(type_)), default=0) or 1


def _parameter_number(x: _Instruction) -> int:
    return int(x.rest.split(")")[0])
