"""Parses the text of an optimised HLO module into its computations and their instructions."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

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
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


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
        elif found := INSTRUCTION.match(line):
            rest = re.sub(r", metadata=\{[^}]*\}", "", found[5])
            computations[name][found[2]] = Instruction(found[2], found[4], found[3], rest, bool(found[1]))
    return Module(computations, entry)


def between_brackets(rest: str) -> str:
    """The text before the bracket that closes the operands."""
    depth = 1
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:position]
    return rest


def array_bytes(gives: str) -> int:
    """Bytes of the arrays in an instruction's type, such as (f32[8,64]{1,0}, pred[])."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits or 8) // 8)
        for _, bits, sizes in ARRAY.findall(gives)
    )
