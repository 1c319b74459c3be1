"""What a compiled program does and needs, counted in its optimised HLO and in the compiler's own analyses.

This is evidence of programs, memory and collectives on any compiler that JAX reaches, never of speed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

#: A matrix product is a dot, a convolution (what the TPU's compiler makes of a dot), or a call of a library's.
PRODUCTS = ("dot", "convolution")
LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(gemm|matmul|\$conv)[^"]*"', re.IGNORECASE)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
LOOP = re.compile(r' while\(.*?\bbody=%?([\w.\-]+).*?"known_trip_count":\{"n":"(\d+)"')
CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


class Program(NamedTuple):
    """One compiled program, on one device of its mesh.

    Fusions, products and collectives are counted as instructions that are executed: from the entry computation down
    through calls, conditionals and loops, once for each place that calls (a loop's body once, whatever its trips). A
    fusion or copy inside a fusion is part of its kernel and not counted; products and collectives are, wherever they
    stand. An asynchronous collective is counted once, at its start.
    """

    fusions: dict[str, int]
    """by kind: kLoop (elementwise), kInput, kOutput (on the TPU: around a matrix product), kCustom"""
    products: int
    collectives: dict[str, int]
    """by opcode"""
    copies: int
    """arrays brought into another layout by a kernel of its own; asynchronous copies are not counted"""
    flops: float
    bytes_accessed: float
    """by the compiler's cost model: what every instruction reads and writes, in main memory or on the chip"""
    arguments: int
    """bytes of memory, padding included"""
    outputs: int
    """bytes of outputs that take over no donated argument"""
    temporaries: int
    """bytes"""
    code: int
    """bytes of the program itself"""

    @property
    def memory(self) -> int:
        """Bytes of memory that the program needs in all."""
        return self.arguments + self.outputs + self.temporaries + self.code


def describe_program(compiled) -> Program:
    """The counts of what `jax.jit(f).lower(...).compile()` gave."""
    found = list(executed(compiled.as_text()))
    fusions = Counter(re.findall(r"kind=(\w+)", rest)[0] for opcode, rest in found if opcode == "fusion")
    collectives = Counter(opcode.removesuffix("-start") for opcode, _ in found)
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Program(
        fusions=dict(sorted(fusions.items())),
        products=sum(is_product(opcode, rest) for opcode, rest in found),
        collectives={opcode: collectives[opcode] for opcode in COLLECTIVES if collectives[opcode]},
        copies=sum(opcode == "copy" for opcode, _ in found),
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def excess(program: Program, base: Program, *, bytes_share: float) -> list[str]:
    """What `program` has more of than `base`, a line each: fusions, matrix products, collectives, or bytes accessed
    beyond a share of the base's (0.005: half a percent). Empty where it costs nothing."""
    counts = {
        "fusions": (sum(program.fusions.values()), sum(base.fusions.values())),
        "matrix products": (program.products, base.products),
        "collectives": (sum(program.collectives.values()), sum(base.collectives.values())),
    }
    lines = [f"{more} {name}, base {fewer}" for name, (more, fewer) in counts.items() if more > fewer]
    if program.bytes_accessed > base.bytes_accessed * (1 + bytes_share):
        lines.append(f"{program.bytes_accessed:.12g} bytes accessed, base {base.bytes_accessed:.12g}")
    return lines


def executed(text: str) -> Iterator[tuple[str, str]]:
    """(opcode, the rest of its line) of every instruction that a module's text executes, as Program counts them."""
    computations, entry = parsed(text)

    def walk(name: str, fused: bool) -> Iterator[tuple[str, str]]:
        for opcode, rest, _ in computations[name]:
            if not (fused and opcode in ("fusion", "copy")):
                yield opcode, rest
            if not opcode.endswith(("-update", "-done")):
                for called in called_by(rest):
                    yield from walk(called, fused or opcode == "fusion")

    return walk(entry, False)


def collectives_run(text: str) -> dict[str, int]:
    """How often each collective of a module's text runs: those in a loop's body as often as the compiler says that the
    loop turns (once where it doesn't say)."""
    runs: Counter[str] = Counter()
    for opcode, _, times in instructions_run(text):
        runs[opcode.removesuffix("-start")] += times
    return {opcode: runs[opcode] for opcode in COLLECTIVES if runs[opcode]}


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of what each collective of a module's text gives one device, over all its runs: see collectives_run."""
    found: Counter[str] = Counter()
    for opcode, gives, times in instructions_run(text):
        found[opcode.removesuffix("-done")] += times * array_bytes(gives)
    return {opcode: found[opcode] for opcode in COLLECTIVES if found[opcode]}


def instructions_run(text: str) -> Iterator[tuple[str, str, int]]:
    """(opcode, what it gives, how often it runs) of every instruction that a module's text executes, loops unrolled."""
    computations, entry = parsed(text)
    turns = {body: int(count) for body, count in LOOP.findall(text)}

    def walk(name: str, times: int) -> Iterator[tuple[str, str, int]]:
        for opcode, rest, gives in computations[name]:
            yield opcode, gives, times
            if not opcode.endswith(("-update", "-done")):
                for called in called_by(rest):
                    yield from walk(called, times * turns.get(called, 1))

    return walk(entry, 1)


def array_bytes(gives: str) -> int:
    """Bytes of the arrays of an instruction's type, such as (f32[8,64]{1,0}, pred[])."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits or 8) // 8)
        for _, bits, sizes in ARRAY.findall(gives)
    )


def parsed(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """The computations of a module's text, each a list of (opcode, the rest of its line, the type of what it gives),
    and the entry's name."""
    computations: dict[str, list[tuple[str, str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif found := INSTRUCTION.match(line):
            computations[name].append((found[2], found[3].partition(", metadata=")[0], found[1]))
    return computations, entry


def called_by(rest: str) -> list[str]:
    """The names of the computations that an instruction calls."""
    return [name for group in CALLED.findall(rest) for name in re.findall(r"[\w.\-]+", group)]


def is_product(opcode: str, rest: str) -> bool:
    return opcode in PRODUCTS or (opcode == "custom-call" and LIBRARY_PRODUCT.search(rest) is not None)
