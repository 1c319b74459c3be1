"""Reads GGUF files (llama.cpp's format) of the architectures llama and gemma3, and makes Hugging Face folders of them.

A file gives a Hugging Face config, its tensors under Hugging Face's names (dequantised a piece at a time), and what a
tokenizer is built from. The `gguf` package dequantises; the header is read here, since the package's reader keeps an
array object for every entry of the vocabulary (157 MB for SmolLM2's file) and does not check lengths.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..atomic import sync_folder
from ..config import shorten
from ..untrusted import shown

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: The most that `convert_gguf` holds of one tensor, in bytes of float32.
PIECE_BYTES = 64 * 2**20
#: Bounds on a header, since its values become Python objects of up to ten times their size: values and tensors, values
#: in all arrays together (Gemma 3, the largest vocabulary, has 1.3 million), and bytes of a text.
MAX_NAMES, MAX_ITEMS, MAX_TEXT = 2**16, 2**22, 2**20

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LINEAR_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM_NAMES = {
    "llama": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


class Tensor(NamedTuple):
    kind: int
    """a GGMLQuantizationType"""
    shape: tuple[int, ...]
    """as PyTorch has it: (out, in)"""
    data: np.ndarray
    """the bytes [rows, bytes a row], mapped from the file; a vector is one row"""


class GgufFile:
    """An open GGUF file: `.config`, `.shapes` and `.read` as Hugging Face has them, and `.tokenizer`.

    Raises ValueError for a file that is no GGUF, is cut off, or holds a model that is not computed here.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file")
        with self.path.open("rb") as stream:
            start = stream.read(24)
        if len(start) < 24 or start[:4] != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file (it does not start with GGUF)")
        try:
            self.metadata, tensors = read_header(np.asarray(np.memmap(self.path, np.uint8, "r")))
        except (ValueError, struct.error, OverflowError) as error:
            raise ValueError(f"{path}: not a whole GGUF file: {error}") from None
        try:
            self.architecture = check_architecture(self.metadata)
            factors = tensors.pop("rope_freqs.weight", None)
            self.tensors = {hugging_face_name(name, self.architecture): tensor for name, tensor in tensors.items()}
            self.config = CONFIGS[self.architecture](self.metadata, self.shapes)
            if factors is not None:
                self.config["rope_scaling"] = llama3_scaling(factors, self.config)
            check_complete(self.shapes, self.config, self.architecture)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, in PyTorch's orientation (out, in)."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The tokenizer's metadata without its prefixes: model, pre, tokens, merges, scores, chat_template ..."""
        prefix = re.compile(r"tokenizer\.(ggml\.)?")
        return {prefix.sub("", key, count=1): value for key, value in self.metadata.items() if prefix.match(key)}

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows [start:stop] of a tensor, or some columns of them, as float32; no other row is dequantised (of a matrix)
        or copied."""
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
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return piece - 1 if self.architecture == "gemma3" and name.endswith("norm.weight") else piece


def convert_gguf(file: str | Path, folder: str | Path, tokenizer) -> None:
    """Writes a float32 Hugging Face folder: a GGUF file's model, and the tokenizer that `load_tokenizer` makes of it.

    The folder appears whole or not at all; one that holds files already is refused.
    """
    source, folder = GgufFile(file), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: already there and not an empty folder; give a new one")
    unfinished = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        ids = {key: value for key, value in source.config.items() if key.endswith("_token_id")}
        (unfinished / "config.json").write_text(json.dumps(source.config, indent=2))
        (unfinished / "generation_config.json").write_text(json.dumps(ids, indent=2))
        write_safetensors(source, unfinished / "model.safetensors")
        tokenizer.save_pretrained(unfinished)
        for written in unfinished.iterdir():
            with written.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(unfinished, folder)
        sync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- header


class Cursor:
    """Reads little-endian values one after another, never past the end and within the bounds of a header."""

    def __init__(self, data: np.ndarray):
        self.data, self.at, self.items = data.data, 0, 0

    def bytes(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends at byte {len(self.data)}, inside its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.number("Q")
        if MAX_TEXT < size <= len(self.data) - self.at:
            raise ValueError(f"a text of {size} bytes; at most {MAX_TEXT} are read")
        return str(self.bytes(size), "utf-8")

    def names(self) -> int:
        """A number of values or tensors that have a name each."""
        count = self.number("Q")
        if count > MAX_NAMES:
            raise ValueError(f"{count} names in its header; at most {MAX_NAMES} are read")
        return count

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            self.items += count
            if MAX_ITEMS < self.items <= len(self.data):
                raise ValueError(f"arrays of {self.items} values; at most {MAX_ITEMS} are read")
            if kind == STRING:
                return [self.string() for _ in range(count)]
            return np.frombuffer(self.bytes(count * np.dtype(scalar(kind)).itemsize), "<" + scalar(kind)).tolist()
        value = self.number(scalar(kind))
        return float(str(np.float32(value))) if scalar(kind) == "f" else value  # 1e-05, not 9.999999747378752e-06


def scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of unknown type {kind}")
    return SCALARS[kind]


def read_header(data: np.ndarray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors, by llama.cpp's names."""
    cursor = Cursor(data)
    cursor.bytes(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} (2 and 3 are read, little-endian)")
    tensor_count, value_count = cursor.names(), cursor.names()
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"metadata {shown(key)} stands there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [read_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment {shorten(alignment)}")
    return metadata, map_tensors(data, infos, cursor.at, alignment)


def read_tensor_info(cursor: Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, axes = cursor.string(), cursor.number("I")
    if axes not in (1, 2):
        raise ValueError(f"tensor {shown(name)} has {axes} axes (1 or 2 are expected)")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def map_tensors(data: np.ndarray, infos: list, header: int, alignment: int) -> dict[str, Tensor]:
    """The tensors behind a header of so many bytes. As llama.cpp demands, each begins where the one before it ends, up
    to the alignment: at another place its numbers would be those of other tensors."""
    tensors: dict[str, Tensor] = {}
    start, expected = padded(header, alignment), 0
    for name, kind, shape, offset in infos:
        if name in tensors:
            raise ValueError(f"tensor {shown(name)} stands there twice")
        if offset != expected:
            raise ValueError(f"tensor {shown(name)} begins at byte {offset} of the data, where {expected} is expected")
        tensors[name] = map_tensor(data, name, kind, shape, start + offset)
        expected = padded(offset + tensors[name].data.size, alignment)
    return tensors


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def map_tensor(data: np.ndarray, name: str, kind: int, shape: tuple[int, ...], start: int) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGML_QUANT_SIZES:
        raise ValueError(f"tensor {shown(name)} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block or 0 in shape:
        raise ValueError(f"tensor {shown(name)} has the shape {shape}, which its type's blocks of {block} do not fill")
    row_bytes = shape[-1] // block * block_bytes
    size = row_bytes * math.prod(shape[:-1])
    if start + size > len(data):
        raise ValueError(f"it ends at byte {len(data)}, inside or before tensor {shown(name)}")
    return Tensor(kind, shape, data[start : start + size].reshape(-1, row_bytes))


def dequantise(tensor: Tensor) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.kind)
    try:
        return dequantize(np.ascontiguousarray(tensor.data), kind).astype(np.float32, copy=False)
    except NotImplementedError:
        raise ValueError(f"tensors of type {kind.name} can not be dequantised by the gguf package") from None


def interleaved_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps the given rows of q_proj and k_proj: it interleaves the two halves that rotary turns."""
    head, row = np.divmod(rows, head_dim)
    half, row = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * row + half


# -------------------------------------------------------------------------------------------------------------- config


def check_architecture(metadata: dict[str, Any]) -> str:
    architecture = str(metadata.get("general.architecture"))
    if architecture not in CONFIGS:
        raise ValueError(
            f"architecture {shorten(architecture)} is not supported; GGUF is read for " + " and ".join(CONFIGS)
        )
    if metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"one of {shorten(metadata['split.count'])} parts; merge them first (llama-gguf-split --merge)"
        )
    return architecture


def hugging_face_name(name: str, architecture: str) -> str:
    names = LINEAR_NAMES | NORM_NAMES[architecture]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in names:
        return f"model.layers.{layer[1]}.{names[layer[2]]}.{layer[3]}"
    top, _, kind = name.partition(".")
    if top in TOP_NAMES and kind == "weight":
        return f"{TOP_NAMES[top]}.weight"
    raise ValueError(f"tensor {shown(name)} has no place in a {architecture} model")


def common_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What both architectures have, as config.json says it."""
    embedding = shapes.get("model.embed_tokens.weight", (0,))
    heads, width = whole(metadata, "attention.head_count"), whole(metadata, "embedding_length")
    eos, turn_end = metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")
    return {
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": whole(metadata, "feed_forward_length"),
        "num_hidden_layers": whole(metadata, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(metadata, "attention.head_count_kv", heads),
        "head_dim": whole(metadata, "attention.key_length", width // heads),
        "max_position_embeddings": whole(metadata, "context_length"),
        "rms_norm_eps": number(metadata, "attention.layer_norm_rms_epsilon"),
        "rope_scaling": rope_scaling(metadata),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [eos, turn_end] if turn_end not in (None, eos) else eos,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def llama_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    common = common_config(metadata, shapes)
    if number(metadata, "rope.dimension_count", common["head_dim"]) != common["head_dim"]:
        raise ValueError("llama.rope.dimension_count differs from the width of a head: partial rotary is not supported")
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": number(metadata, "rope.freq_base", 10000.0),
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
    }


def gemma3_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    common = common_config(metadata, shapes)
    head_dim, is_27b = common["head_dim"], common["num_hidden_layers"] == 62  # no key says it; as llama.cpp does
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": number(metadata, "rope.freq_base", 1e6),
        "rope_local_base_freq": number(metadata, "rope.freq_base_swa", 10000.0),
        "sliding_window": number(metadata, "attention.sliding_window"),
        "sliding_window_pattern": number(metadata, "attention.sliding_window_pattern", 6),
        "query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"] if is_27b else head_dim,
        "final_logit_softcapping": number(metadata, "final_logit_softcapping", 0.0) or None,
    }


CONFIGS = {"llama": llama_config, "gemma3": gemma3_config}


def number(metadata: dict[str, Any], key: str, default: float | None = None) -> Any:
    """A number under the architecture's prefix; without a default it must be there."""
    key = f"{metadata['general.architecture']}.{key}"
    value = metadata.get(key, default)
    if type(value) not in (int, float) or not value >= 0 or (default is None and value == 0):
        raise ValueError(f"metadata {key} is {shorten(value)}; a positive number is expected")
    return value


def whole(metadata: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1 under the architecture's prefix; without a default it must be there."""
    value = number(metadata, key, default)
    if type(value) is not int or value < 1:
        raise ValueError(
            f"metadata {metadata['general.architecture']}.{key} is {shorten(value)}; a whole number is expected"
        )
    return value


def rope_scaling(metadata: dict[str, Any]) -> dict[str, Any] | None:
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {shorten(kind)} is not supported in a GGUF file (none and linear are)")
    factor = float(number(metadata, "rope.scaling.factor", number(metadata, "rope.scale_linear", 1.0)))
    return {"rope_type": "linear", "factor": factor} if kind == "linear" or factor != 1 else None


def llama3_scaling(tensor: Tensor, config: dict[str, Any]) -> dict[str, Any]:
    """The llama3 scaling that divides each frequency by the stored factors, if its settings are Llama 3.1's."""
    low, high, positions, pairs = 1.0, 4.0, 8192, config["head_dim"] // 2
    factors = dequantise(tensor)[0] if tensor.shape == (pairs,) else np.zeros(1)
    factor = float(factors.max())
    turns = positions / (2 * np.pi) * config["rope_theta"] ** -(np.arange(len(factors)) / pairs)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not factor > 0 or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ValueError("rope_freqs.weight is not the llama3 rope scaling of Llama 3.1 and later; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }


def check_complete(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], architecture: str) -> None:
    """Checks that the file has just the tensors of its model."""
    if config["num_hidden_layers"] > len(shapes):
        raise ValueError(f"{config['num_hidden_layers']} layers, but only {len(shapes)} tensors")
    attention, feed_forward = list(LINEAR_NAMES.values())[:4], list(LINEAR_NAMES.values())[4:]
    in_layer = [f"{name}.weight" for name in [*LINEAR_NAMES.values(), *NORM_NAMES[architecture].values()]]
    in_layer += [f"{name}.bias" for name in attention if config["attention_bias"]]
    in_layer += [f"{name}.bias" for name in feed_forward if config.get("mlp_bias")]
    expected = {f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in in_layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"} | {"lm_head.weight"} & shapes.keys()
    if missing := sorted(expected - shapes.keys()):
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(shapes.keys() - expected):
        raise ValueError(f"{len(extra)} tensors have no place in the model, the first is {shown(extra[0])}")
    for name, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        for i in range(config["num_hidden_layers"]):
            rows, expected_rows = (
                shapes[f"model.layers.{i}.self_attn.{name}.weight"][0],
                config[heads] * config["head_dim"],
            )
            if rows != expected_rows:
                raise ValueError(
                    f"model.layers.{i}.self_attn.{name}.weight has {rows} rows, but the metadata say {expected_rows}"
                )


# ------------------------------------------------------------------------------------------------------------- convert


def write_safetensors(source: GgufFile, path: Path) -> None:
    """Writes all tensors as float32, a piece at a time (a length, a JSON header, the bytes one after another)."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in source.shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in source.shapes.items():
            rows = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
            for start in range(0, shape[0], rows):
                out.write(np.ascontiguousarray(source.read(name, start, start + rows), "<f4").data)
