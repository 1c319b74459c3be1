"""The collectives of a compiled program, from the text of its optimised HLO: how often each kind runs, and how many
bytes it moves, in every iteration of every loop."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def collectives_run(text: str) -> dict[str, int]:
    """How often each kind of collective in the text of a module runs."""
    runs: Counter[str] = Counter()
    for one, computation, times in instructions_run(parse_hlo(text)):
        if not continues_collective(one, computation):
            runs[one.opcode.removesuffix("-start")] += times
    return {opcode: runs[opcode] for opcode in COLLECTIVES if runs[opcode]}


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes per device that each kind of collective gathers, reduces or exchanges, over all its runs: the bytes of its
    output, or of the input for a reduce-scatter."""
    moved: Counter[str] = Counter()
    for one, computation, times in instructions_run(parse_hlo(text)):
        if one.opcode.startswith("reduce-scatter"):
            inputs = [] if one.opcode.endswith("-done") else one.operands
            moved["reduce-scatter"] += times * sum(array_bytes(computation[name].gives) for name in inputs)
        elif not continues_collective(one, computation):
            moved[one.opcode.removesuffix("-done")] += times * array_bytes(one.gives)
    return {opcode: moved[opcode] for opcode in COLLECTIVES if moved[opcode]}


def continues_collective(one: Instruction, computation: Computation) -> bool:
    """Whether this is a collective that another fusion has started. A TPU overlaps one collective with the products of
    several fusions, and the text contains it in each of them."""
    return "chain_id=" in one.rest and not any("AsyncCollectiveStart" in other.rest for other in computation.values())


def array_bytes(gives: str) -> int:
    """Bytes of the arrays in an instruction's type, such as (f32[8,64]{1,0}, pred[])."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits or 8) // 8)
        for _, bits, sizes in ARRAY.findall(gives)
    )


# ---------------------------------------------------------------------------------------------------------- the parser

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


class Instruction(NamedTuple):
    name: str
    opcode: str
    gives: str
    """the type of its result, such as (f32[8,64]{1,0}, pred[])"""
    rest: str
    """the line after the opcode, without metadata: the operands, a closing bracket and the attributes"""
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", between_brackets(self.rest))

    @property
    def called(self) -> list[str]:
        """The names of the computations that the instruction calls."""
        return [name for group in CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    def attribute(self, name: str) -> str:
        """The value of an attribute that is a name or a number, such as body, index or direction; "" if missing."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""


#: The instructions of a computation by name, in order.
Computation = dict[str, Instruction]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse_hlo(text: str) -> Module:
    """The module that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = {}
        elif match := INSTRUCTION.match(line):
            rest = re.sub(r", metadata=\{[^}]*\}", "", match[5])
            computations[name][match[2]] = Instruction(match[2], match[4], match[3], rest, bool(match[1]))
    return Module(computations, entry)


def between_brackets(rest: str) -> str:
    """The text before the bracket that closes the operands."""
    depth = 1
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:position]
    return rest


# ----------------------------------------------------------------------------------------------------------- the loops

KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
#: Loops with more iterations are counted once, like loops whose condition depends on data.
MAX_TRIPS = 1 << 16


class Run(NamedTuple):
    """An instruction and how often it runs."""

    instruction: Instruction
    computation: Computation
    """the computation that contains it"""
    times: int


#: Known whole numbers in a computation's parameters, by (parameter, element of its tuple or None).
Known = Mapping[tuple[int, int | None], int]


def instructions_run(module: Module) -> Iterator[Run]:
    """Every instruction that the module executes, from its entry through calls, conditionals and loops. The body of a
    loop runs once per iteration, or once if their number depends on data."""

    def walk(name: str, times: int, known: Known) -> Iterator[Run]:
        computation = module.computations[name]
        for one in computation.values():
            if one.opcode == "while":
                trips, inside = loop_trips(module, one, ScalarValues(module, computation, known))
                yield Run(one, computation, times)
                for part in ("condition", "body"):
                    yield from walk(one.attribute(part), times * (1 if trips is None else trips), inside)
                continue
            yield Run(one, computation, times)
            if not one.opcode.endswith(("-update", "-done")):
                for called in one.called:
                    yield from walk(called, times, {})

    return walk(module.entry, 1, {})


def loop_trips(module: Module, loop: Instruction, around: ScalarValues) -> tuple[int | None, Known]:
    """The trip count of a loop (None if unknown), and the known elements of its state that no iteration changes.

    A CPU program contains the trip count. For a TPU program the loop counter is evaluated.
    """
    condition, body = (module.computations[loop.attribute(name)] for name in ("condition", "body"))
    root = next(one for one in body.values() if one.root)
    state: Known = {(0, i): value for i, value in around.elements(loop.operands[0]).items()}
    kept = {(0, i) for i, operand in enumerate(root.operands) if root.opcode == "tuple" and passes(body, operand, i)}
    lasting = {key: value for key, value in state.items() if key in kept}
    if said := KNOWN_TRIPS.search(loop.rest):
        return int(said[1]), lasting
    for trip in range(MAX_TRIPS):
        again = ScalarValues(module, condition, state).root()
        if again is None or (again and root.opcode != "tuple"):
            break
        if not again:
            return trip, lasting
        after = ScalarValues(module, body, state)
        values = {key: after.of(root.operands[key[1] or 0]) for key in state if key not in kept}
        state = lasting | {key: value for key, value in values.items() if value is not None}
    return None, lasting


def passes(body: Computation, operand: str, index: int) -> bool:
    """Whether an operand of the body's root is the unchanged input element with this index."""
    one = body[operand]
    while one.opcode == "copy":
        one = body[one.operands[0]]
    return one.opcode == "get-tuple-element" and one.attribute("index") == str(index)


class ScalarValues:
    """The whole numbers in a computation's scalars, as far as they follow from known parameters: the arithmetic of loop
    counters."""

    def __init__(self, module: Module, computation: Computation, known: Known):
        self.module, self.computation, self.known = module, computation, known
        self.found: dict[str, int | None] = {}

    def root(self) -> int | None:
        return self.of(next(one.name for one in self.computation.values() if one.root))

    def of(self, name: str) -> int | None:
        if name not in self.found:
            self.found[name] = self.computed(self.computation[name])
        return self.found[name]

    def elements(self, name: str) -> dict[int, int]:
        """The known elements of a tuple."""
        one = self.computation[name]
        while one.opcode in ("copy", "opt-barrier"):
            one = self.computation[one.operands[0]]
        if one.opcode == "parameter":
            return {key[1]: value for key, value in self.known.items() if key[1] is not None}
        found = {i: self.of(operand) for i, operand in enumerate(one.operands)} if one.opcode == "tuple" else {}
        return {i: value for i, value in found.items() if value is not None}

    def computed(self, one: Instruction) -> int | None:
        if not re.match(r"(pred|[su]\d+)\[\]", one.gives):
            return None
        if one.opcode == "constant":
            value = between_brackets(one.rest)
            return {"true": 1, "false": 0}[value] if value in ("true", "false") else int(value)
        if one.opcode == "parameter":
            return self.known.get((int(between_brackets(one.rest)), None))
        if one.opcode == "get-tuple-element":
            return self.elements(one.operands[0]).get(int(one.attribute("index")))
        given = [self.of(name) for name in one.operands]
        if one.opcode in ("fusion", "call"):
            inside: Known = {(i, None): value for i, value in enumerate(given) if value is not None}
            return ScalarValues(self.module, self.module.computations[one.called[0]], inside).root()
        name = one.attribute("direction") if one.opcode == "compare" else one.opcode
        return ARITHMETIC[name](*given) if name in ARITHMETIC and None not in given else None


ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "minimum": min,
    "maximum": max,
    "LT": lambda a, b: int(a < b),
    "LE": lambda a, b: int(a <= b),
    "GT": lambda a, b: int(a > b),
    "GE": lambda a, b: int(a >= b),
    "EQ": lambda a, b: int(a == b),
    "NE": lambda a, b: int(a != b),
    **dict.fromkeys(("copy", "bitcast", "convert", "reshape"), lambda a: a),
}
