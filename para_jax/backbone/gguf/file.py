"""Reads GGUF files (llama.cpp's format) as Hugging Face would store the same model: a config, and tensors by name,
dequantised a piece at a time.

The `gguf` package dequantises. The header is read here, because the package's reader keeps an array object for every
entry of the vocabulary (157 MB and 1.9 s for SmolLM2's file) and does not check lengths.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...io.untrusted import safe_name
from .config import CONFIGS, check_architecture, hugging_face_name, llama3_scaling

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT, STRING, ARRAY = 6, 8, 9
#: The maximum size of a header in bytes. Its values become Python objects of up to ten times that. The one of Gemma 3,
#: with the largest vocabulary, has 6 MB.
MAX_HEADER = 2**25
#: What llama.cpp takes for a SentencePiece vocabulary (model "llama") where the file does not say it.
SENTENCEPIECE_IDS = {f"tokenizer.ggml.{kind}_token_id": at for at, kind in enumerate(("unknown", "bos", "eos"))}
#: What reading a damaged file raises.
DAMAGE = ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError, struct.error


class Tensor(NamedTuple):
    """One tensor of the file, still quantised."""

    quantization: int
    """a GGMLQuantizationType"""
    shape: tuple[int, ...]
    """in PyTorch's orientation: (out, in)"""
    data: np.ndarray
    """bytes [rows, bytes per row], mapped from the file; a vector is one row"""


class GgufFile:
    """An open GGUF file: `.config`, `.shapes` and `.read` as for the Hugging Face model, and `.tokenizer`.

    Raises ValueError if the file is not GGUF, is truncated, or holds an unsupported model.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.metadata, tensors = read_header(np.asarray(np.memmap(self.path, np.uint8, "r")))
            if self.metadata.get("tokenizer.ggml.model") == "llama":
                self.metadata = SENTENCEPIECE_IDS | self.metadata
            self.architecture = check_architecture(self.metadata)
            factors = tensors.pop("rope_freqs.weight", None)
            self.tensors = {hugging_face_name(name, self.architecture): tensor for name, tensor in tensors.items()}
            self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
            self.config = CONFIGS[self.architecture](self.metadata, self.shapes)
            if factors is not None:
                self.config["rope_scaling"] = llama3_scaling(dequantise(factors)[0], self.config)
        except DAMAGE as error:
            raise ValueError(f"{path}: this GGUF file can't be read: {error}") from None

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The tokenizer's metadata, with the key prefixes removed: model, pre, tokens, merges, scores ..."""
        prefix = re.compile(r"tokenizer\.(ggml\.)?")
        return {prefix.sub("", key, count=1): value for key, value in self.metadata.items() if prefix.match(key)}

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows [start:stop] of a tensor, or some columns of them, as float32. Only these rows of a matrix are
        dequantised and copied."""
        tensor = self.tensors[name]
        rows = np.arange(tensor.shape[0])[start:stop]
        if self.architecture == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            rows = interleaved_rows(rows, tensor.shape[0] // heads)
        try:
            if len(tensor.shape) == 1:
                piece = dequantise(tensor)[0][rows]
            else:
                piece = dequantise(tensor._replace(data=tensor.data[rows]))[:, columns]
        except (NotImplementedError, ValueError) as error:  # of a quantisation that the package lacks
            raise ValueError(f"{self.path}: {error}") from None
        # llama.cpp stores 1 + weight of Gemma's norms.
        return piece - 1 if self.architecture == "gemma3" and name.endswith("norm.weight") else piece


# -------------------------------------------------------------------------------------------------------------- header


class Cursor:
    """Reads little-endian values in sequence; raises ValueError at the end of the data or of the longest header."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data[:MAX_HEADER].data, 0

    def bytes(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"the header is cut off at byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return str(self.bytes(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                return [self.string() for _ in range(count)]
            data = self.bytes(count * np.dtype(SCALARS[kind]).itemsize)
            return np.frombuffer(data, "<" + SCALARS[kind]).tolist()
        value = self.number(SCALARS[kind])
        return float(str(np.float32(value))) if kind == FLOAT else value  # 1e-05, not 9.999999747378752e-06


def read_header(data: np.ndarray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors, under llama.cpp's names."""
    cursor = Cursor(data)
    magic, version = bytes(cursor.bytes(4)), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin as a little-endian GGUF file of version 2 or 3 does")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [read_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return metadata, {name: map_tensor(data, name, kind, shape, start + offset) for name, kind, shape, offset in infos}


def read_tensor_info(cursor: Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, axes = cursor.string(), cursor.number("I")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def map_tensor(data: np.ndarray, name: str, kind: int, shape: tuple[int, ...], start: int) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    # A row is quantised in blocks of this many values.
    row_bytes = shape[-1] // block * block_bytes
    size = row_bytes * math.prod(shape[:-1])
    if start + size > len(data):
        raise ValueError(f"the file is cut off at byte {len(data)}, before the end of tensor {safe_name(name)}")
    return Tensor(kind, shape, data[start : start + size].reshape(-1, row_bytes))


def dequantise(tensor: Tensor) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    data = np.ascontiguousarray(tensor.data)
    return dequantize(data, GGMLQuantizationType(tensor.quantization)).astype(np.float32, copy=False)


def interleaved_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp stores the given rows of q_proj and k_proj. It interleaves the two halves that rotary rotates."""
    head, row = np.divmod(rows, head_dim)
    half, row = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * row + half
