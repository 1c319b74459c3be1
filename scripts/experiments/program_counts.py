"""Counts of a compiled program, from its optimised HLO and the compiler's own analyses.

They are evidence about programs, memory and collectives for any compiler that JAX can use, but never about speed.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from hlo import COLLECTIVES, Instruction, continues_collective, parse_hlo

#: A matrix product is a dot, a convolution (which the TPU compiler makes from a dot), or a call of a library.
PRODUCTS = ("dot", "convolution")
LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(gemm|matmul|\$conv)[^"]*"', re.IGNORECASE)


class Program(NamedTuple):
    """A compiled program, on one device of its mesh.

    Fusions, products and collectives are executed instructions: from the entry computation through calls, conditionals
    and loops, once per call (the body of a loop once, whatever its trip count). A fusion or copy inside a fusion is
    part of its kernel and not counted. Products and collectives are counted everywhere, an asynchronous collective
    once, at its start.
    """

    fusions: dict[str, int]
    """by kind: kLoop (elementwise), kInput, kOutput (on the TPU: around a matrix product), kCustom"""
    products: int
    collectives: dict[str, int]
    """by opcode"""
    copies: int
    """arrays that a separate kernel brings into another layout, without asynchronous copies"""
    flops: float
    bytes_accessed: float
    """by the compiler's cost model: bytes that all instructions read and write, in main memory or on the chip"""
    arguments: int
    """bytes of memory, padding included"""
    outputs: int
    """bytes of outputs that do not reuse a donated argument"""
    temporaries: int
    """bytes"""
    code: int
    """bytes of the program itself"""

    @property
    def memory(self) -> int:
        """Bytes of memory that the program needs in total."""
        return self.arguments + self.outputs + self.temporaries + self.code


def describe_program(compiled) -> Program:
    """The counts of a program from `jax.jit(f).lower(...).compile()`."""
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


def executed(text: str) -> Iterator[Instruction]:
    """Every executed instruction in the text of a module, as Program counts them."""
    module = parse_hlo(text)

    def walk(name: str, fused: bool) -> Iterator[Instruction]:
        computation = module.computations[name]
        for one in computation.values():
            if not (fused and one.opcode in ("fusion", "copy")) and not continues_collective(one, computation):
                yield one
            if not one.opcode.endswith(("-update", "-done")):
                for called in one.called:
                    yield from walk(called, fused or one.opcode == "fusion")

    return walk(module.entry, False)


def is_product(one: Instruction) -> bool:
    library = one.opcode == "custom-call" and LIBRARY_PRODUCT.search(one.rest) is not None
    return one.opcode in PRODUCTS or library
