"""The text of an optimised HLO module, parsed: its computations, and how often each of their instructions runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
#: Loops that turn more often are counted once, like those whose condition depends on data.
MOST_TURNS = 1 << 16


class Instruction(NamedTuple):
    name: str
    opcode: str
    gives: str
    """the type of its result, such as (f32[8,64]{1,0}, pred[])"""
    rest: str
    """its line after the opcode, without metadata: operands) and attributes"""
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", between_brackets(self.rest))

    @property
    def called(self) -> list[str]:
        """The names of the computations that it calls."""
        return [name for group in CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    def attribute(self, name: str) -> str:
        """The value of an attribute that is a name or a number, such as body, index or direction; "" without it."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


#: The instructions of a computation by their names, in order.
Computation = dict[str, Instruction]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class Run(NamedTuple):
    """An instruction and how often it runs."""

    instruction: Instruction
    around: Computation
    """that it stands in"""
    times: int
    turns: int | None = None
    """of a loop, each time that it runs; None where that can't be told"""


def parsed(text: str) -> Module:
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = {}
        elif found := INSTRUCTION.match(line):
            rest = re.sub(r", metadata=\{[^}]*\}", "", found[5])
            computations[name][found[2]] = Instruction(found[2], found[4], found[3], rest, bool(found[1]))
    return Module(computations, entry)


def between_brackets(rest: str) -> str:
    """The text up to the bracket that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place]
    return rest


def array_bytes(gives: str) -> int:
    """Bytes of the arrays of an instruction's type, such as (f32[8,64]{1,0}, pred[])."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits or 8) // 8)
        for _, bits, sizes in ARRAY.findall(gives)
    )


# --------------------------------------------------------------------------------------------------------- what is run


#: What is known of a computation's parameters: (parameter, element of its tuple or None) to a whole number.
Known = Mapping[tuple[int, int | None], int]


def instructions_run(module: Module) -> Iterator[Run]:
    """Every instruction that the module executes, from the entry down through calls, conditionals and loops. A loop's
    instructions run as often as it turns; once, where that can't be told (turns_unknown)."""

    def walk(name: str, times: int, known: Known) -> Iterator[Run]:
        computation = module.computations[name]
        for one in computation.values():
            if one.opcode == "while":
                turns, inside = loop_turns(module, one, Values(module, computation, known))
                yield Run(one, computation, times, turns)
                for part in ("condition", "body"):
                    yield from walk(one.attribute(part), times * (1 if turns is None else turns), inside)
                continue
            yield Run(one, computation, times)
            if not one.opcode.endswith(("-update", "-done")):
                for called in one.called:
                    yield from walk(called, times, {})

    return walk(module.entry, 1, {})


def turns_unknown(module: Module) -> int:
    """The number of loops whose turns the text doesn't tell, for they depend on data."""
    return sum(run.instruction.opcode == "while" and run.turns is None for run in instructions_run(module))


def loop_turns(module: Module, loop: Instruction, around: Values) -> tuple[int | None, Known]:
    """How often a loop turns, None where that can't be told; and what its body and condition know of their parameter at
    every turn: the elements that no turn changes.

    The compiler says it (on a CPU), or the loop's counter is run (a TPU's text says no number).
    """
    condition, body = (module.computations[loop.attribute(name)] for name in ("condition", "body"))
    root = next(one for one in body.values() if one.root)
    state: Known = {(0, i): value for i, value in around.elements(loop.operands[0]).items()}
    kept = {(0, i) for i, operand in enumerate(root.operands) if root.opcode == "tuple" and passes(body, operand, i)}
    lasting = {key: value for key, value in state.items() if key in kept}
    if said := KNOWN_TURNS.search(loop.rest):
        return int(said[1]), lasting
    for turn in range(MOST_TURNS):
        again = Values(module, condition, state).root()
        if again is None or (again and root.opcode != "tuple"):
            break
        if not again:
            return turn, lasting
        after = Values(module, body, state)
        values = {key: after.of(root.operands[key[1] or 0]) for key in state if key not in kept}
        state = lasting | {key: value for key, value in values.items() if value is not None}
    return None, lasting


def passes(body: Computation, operand: str, index: int) -> bool:
    """Whether an operand of the body's root is the element of this index as it came in."""
    one = body[operand]
    while one.opcode == "copy":
        one = body[one.operands[0]]
    return one.opcode == "get-tuple-element" and one.attribute("index") == str(index)


class Values:
    """The whole numbers that a computation's scalars have, as far as they follow from what is known of its parameters:
    the arithmetic of loop counters."""

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
            return Values(self.module, self.module.computations[one.called[0]], inside).root()
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
