"""Reads the part of a parameter that this process's devices hold, piece by piece to save memory.

Weights come from any source with `shapes` (tensor shapes by name) and `read(name, start, stop, columns)` (part of a
tensor as a NumPy array): safetensors files and GGUF files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

#: Values per read: 64 MB of float64, 32 MB of float32, 16 MB of bfloat16.
PIECE_VALUES = 8 * 2**20


@runtime_checkable
class Source(Protocol):
    """Where weights are read from."""

    @property
    def path(self) -> Path: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray: ...


class Recipe(NamedTuple):
    """How to make a parameter from a stored tensor."""

    source: str
    """the tensor's name"""
    shape: tuple[int, ...]
    """the tensor's shape"""
    start: int = 0
    """its first row that belongs to the parameter"""
    transpose: bool = False


class Block(NamedTuple):
    """Rows [start:stop] and columns [left:right] of a stored tensor. A vector is one column."""

    start: int
    stop: int
    left: int
    right: int


def load_parameter(
    source: Source, recipe: Recipe, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> tuple[jax.Array, bool]:
    """A parameter, and whether all values that this process read are finite. It reads its own parts only."""
    blocks = needed_blocks(shape, recipe.transpose, sharding)
    values, finite = read_blocks(source, recipe, blocks, dtype)

    def part(index: Any) -> np.ndarray:
        held = values[stored_block(index, shape, recipe.transpose)]
        return held if len(shape) == 2 else held[:, 0]

    # device_put uses the values' memory without a copy on a CPU.
    if sharding is None:
        array = jax.device_put(part((slice(None),) * len(shape)))
    else:
        array = jax.make_array_from_callback(shape, sharding, part)
    return jax.block_until_ready(array), finite


def needed_blocks(
    shape: tuple[int, ...],
    transpose: bool,
    sharding: jax.sharding.Sharding | None,
    devices: Collection[Any] | None = None,
) -> list[Block]:
    """The distinct blocks of a stored tensor that hold the devices' parts of a parameter.

    Args:
        devices: default: this process's.
    """
    if sharding is None:
        return [stored_block((slice(None),) * len(shape), shape, transpose)]
    devices = sharding.addressable_devices if devices is None else devices
    found = {device: index for device, index in sharding.devices_indices_map(shape).items() if device in devices}
    return sorted({stored_block(index, shape, transpose) for index in found.values()})


def stored_block(index: tuple[slice, ...], shape: tuple[int, ...], transpose: bool) -> Block:
    first, second = (*spans(index, shape), (0, 1))[:2]
    return Block(*second, *first) if transpose else Block(*first, *second)


def spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [one.indices(count)[:2] for one, count in zip(index, shape, strict=True)]


def read_blocks(
    source: Source, recipe: Recipe, blocks: list[Block], dtype: np.dtype
) -> tuple[dict[Block, np.ndarray], bool]:
    """The values of each block, [rows, columns] or transposed, and whether all are finite.

    Adjacent blocks of the same rows are read together.
    """
    values, finite = {}, True
    for block in blocks:
        rows, columns = block.stop - block.start, block.right - block.left
        values[block] = aligned_empty((columns, rows) if recipe.transpose else (rows, columns), dtype)
    for joined in joined_blocks(blocks):
        within = [block for block in blocks if block[:2] == joined[:2] and joined.left <= block.left < joined.right]
        for start, piece in read_pieces(source, recipe.source, joined, recipe.start):
            piece = piece.astype(dtype, copy=False)
            finite = finite and bool(np.isfinite(piece).all())
            for block in within:
                part = piece[:, block.left - joined.left : block.right - joined.left]
                write_rows(values[block], start - block.start, part, recipe.transpose)
    return values, finite


def joined_blocks(blocks: list[Block]) -> list[Block]:
    """The blocks, with adjacent columns of the same rows joined."""
    joined: list[Block] = []
    for block in sorted(blocks):
        if joined and joined[-1][:2] == block[:2] and joined[-1].right == block.left:
            joined[-1] = joined[-1]._replace(right=block.right)
        else:
            joined.append(block)
    return joined


def read_pieces(source: Source, name: str, block: Block, offset: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows [rows, columns]) for each piece of a block.

    Args:
        offset: where the block's row 0 is in the tensor.
    """
    for start, stop in pieces(block.start, block.stop, block.right - block.left):
        piece = source.read(name, offset + start, offset + stop, columns=slice(block.left, block.right))
        yield start, piece.reshape(stop - start, -1)


def pieces(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """The ranges of rows to read at once, for rows of `width` values."""
    step = max(1, PIECE_VALUES // max(1, width))
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def write_rows(values: np.ndarray, start: int, rows: np.ndarray, transpose: bool) -> None:
    """Writes rows of a stored tensor to rows, or columns, start... of the values."""
    if not transpose:
        values[start : start + len(rows)] = rows
        return
    for i in range(0, len(rows), 64):  # strips fit the processor's cache: 5 times as fast as all at once
        strip = rows[i : i + 64]
        values[:, start + i : start + i + len(strip)] = strip.T


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned to 64 bytes: jax.device_put on a CPU then uses its memory without a copy."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + memory.size - 64].view(dtype).reshape(shape)
