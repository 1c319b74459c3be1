"""What a compiled program does and needs, counted in its optimised HLO and in the compiler's own analyses.

This is evidence of programs, memory and collectives on any compiler that JAX reaches, never of speed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .hlo_text import Computation, Instruction, array_bytes, instructions_run, parsed

#: A matrix product is a dot, a convolution (what the TPU's compiler makes of a dot), or a call of a library's.
PRODUCTS = ("dot", "convolution")
LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(gemm|matmul|\$conv)[^"]*"', re.IGNORECASE)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


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
    fusions = Counter(one.attribute("kind") for one in found if one.opcode == "fusion")
    collectives = Counter(one.opcode.removesuffix("-start") for one in found)
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Program(
        fusions=dict(sorted(fusions.items())),
        products=sum(map(is_product, found)),
        collectives={opcode: collectives[opcode] for opcode in COLLECTIVES if collectives[opcode]},
        copies=sum(one.opcode == "copy" for one in found),
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def program_bytes(compiled) -> int:
    """Program.memory of what `jax.jit(f).lower(...).compile()` gave, without a look at its text."""
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


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


def executed(text: str) -> Iterator[Instruction]:
    """Every instruction that a module's text executes, as Program counts them."""
    module = parsed(text)

    def walk(name: str, fused: bool) -> Iterator[Instruction]:
        computation = module.computations[name]
        for one in computation.values():
            if not (fused and one.opcode in ("fusion", "copy")) and not goes_on(one, computation):
                yield one
            if not one.opcode.endswith(("-update", "-done")):
                for called in one.called:
                    yield from walk(called, fused or one.opcode == "fusion")

    return walk(module.entry, False)


def collectives_run(text: str) -> dict[str, int]:
    """How often each kind of collective of a module's text runs, those in a loop's body at every turn."""
    runs: Counter[str] = Counter()
    for one, around, times, _ in instructions_run(parsed(text)):
        if not goes_on(one, around):
            runs[one.opcode.removesuffix("-start")] += times
    return {opcode: runs[opcode] for opcode in COLLECTIVES if runs[opcode]}


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of one device's array that each kind of collective gathers, reduces or exchanges, over all its runs: of
    what it gives, and of what a reduce-scatter takes."""
    found: Counter[str] = Counter()
    for one, around, times, _ in instructions_run(parsed(text)):
        if one.opcode.startswith("reduce-scatter"):
            taken = [] if one.opcode.endswith("-done") else one.operands
            found["reduce-scatter"] += times * sum(array_bytes(around[name].gives) for name in taken)
        elif not goes_on(one, around):
            found[one.opcode.removesuffix("-done")] += times * array_bytes(one.gives)
    return {opcode: found[opcode] for opcode in COLLECTIVES if found[opcode]}


def goes_on(one: Instruction, around: Computation) -> bool:
    """Whether this is a collective that another fusion has started: a TPU runs a collective piece by piece beside the
    products of several fusions, and the text has it in each of them."""
    return "chain_id=" in one.rest and not any("AsyncCollectiveStart" in other.rest for other in around.values())


def is_product(one: Instruction) -> bool:
    library = one.opcode == "custom-call" and LIBRARY_PRODUCT.search(one.rest) is not None
    return one.opcode in PRODUCTS or library
