"""Weights: from a checkpoint in Hugging Face's names to the Transformer's parameters, piece by piece to spare memory.

A source of weights is anything with `shapes` (tensor shapes by name) and `read(name, start, stop)` (rows of the first
axis as a NumPy array): Safetensors here, and GGUF files. Linear weights come as [out, in] and leave as [in, out].
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ..config import FUSED, SITES, ModelConfig

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
#: The values read at a time: 64 MB of float64, 32 MB of float32, 16 MB of bfloat16.
PIECE_VALUES = 8 * 2**20


@runtime_checkable
class Source(Protocol):
    """Where weights come from."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


class Recipe(NamedTuple):
    """How a parameter is made: rows `start`... of the tensor `source`, which has `shape`, perhaps transposed."""

    source: str
    shape: tuple[int, ...]
    start: int = 0
    transpose: bool = False


def load_parameters(
    config: ModelConfig, source: Source, dtype: Any, shardings: dict[str, jax.sharding.Sharding] | None = None
) -> dict[str, jax.Array]:
    """The Transformer's parameters by path ("layers.0.attention.q_proj.kernel"), each as `parameter_shapes` has it.

    The peak is the loaded weights and about 100 MB, on accelerators one tensor and that. Raises ValueError naming
    tensors that are missing, unknown, misshapen or not finite.
    """
    plan = recipes(config, source.shapes)
    if config.tied_embeddings and "lm_head.weight" in source.shapes:
        require_equal(source, "lm_head.weight", plan["embedding"].source)
    loaded, broken = {}, []
    for name, shape in parameter_shapes(config).items():
        values, finite = read_parameter(source, plan[name], shape, jnp.dtype(dtype))
        if finite:
            loaded[name] = jax.block_until_ready(jax.device_put(values, shardings and shardings[name]))
        else:
            broken.append(plan[name].source)
    if broken:
        raise ValueError(f"checkpoint: tensors with NaN or infinite values: {some(broken)}")
    return loaded


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the Transformer, by path."""
    layer = layer_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, config.width)}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm.weight"] = (config.width,)
    return shapes if config.tied_embeddings else shapes | {"head": (config.width, config.vocab_size)}


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    biases = [config.qkv_bias] * 3 + [config.output_bias] + [config.mlp_bias] * 3
    for site, bias in zip(SITES, biases, strict=True):
        part = "feedforward" if site in ("gate_proj", "up_proj", "down_proj") else "attention"
        shapes[f"{part}.{site}.kernel"] = (config.site_input_width(site), config.site_width(site))
        if bias:
            shapes[f"{part}.{site}.bias"] = (config.site_width(site),)
    if config.qk_norm != "none":
        head = config.qk_norm == "head"
        shapes["attention.q_norm.weight"] = (config.head_dim if head else config.q_width,)
        shapes["attention.k_norm.weight"] = (config.head_dim if head else config.kv_width,)
    names = ("input_norm", "pre_feedforward_norm") if config.pre_norm else ()
    names += ("post_attention_norm", "post_feedforward_norm") if config.post_norm else ()
    return shapes | {f"{name}.weight": (config.width,) for name in names}


def recipes(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """How each parameter is made of the tensors of a checkpoint with these shapes; raises ValueError if it can't be."""
    fused = [joint for joint in FUSED if any(f".{joint}." in name for name in shapes)]
    plan = {name: recipe(config, name, shape, fused) for name, shape in parameter_shapes(config).items()}
    expected = {recipe.source: recipe.shape for recipe in plan.values()}
    tied_head = {"lm_head.weight": expected["model.embed_tokens.weight"]} if config.tied_embeddings else {}
    known = expected | {name: shape for name, shape in tied_head.items() if name in shapes}
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unknown": [name for name in shapes if name not in known and not name.endswith("rotary_emb.inv_freq")],
        "misshapen": [
            f"{name} {list(shapes[name])} (expected {list(shape)})"
            for name, shape in known.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"checkpoint: the tensors do not fit the config (model_type {config.model_type}). {listed}")
    return plan


def recipe(config: ModelConfig, name: str, shape: tuple[int, ...], fused: list[str]) -> Recipe:
    """The recipe of one parameter, which may be a part of one of the `fused` tensors."""
    source = source_name(config, name)
    rows, start = shape[-1], 0
    for joint in fused:
        for i, part in enumerate(FUSED[joint]):
            if f".{part}." in source:
                start = sum(map(config.site_width, FUSED[joint][:i]))
                rows = sum(map(config.site_width, FUSED[joint]))
                source = source.replace(part, joint)
                break
    transpose = name == "head" or name.endswith(".kernel")
    if transpose:
        return Recipe(source, (rows, shape[0]), start, True)
    return Recipe(source, (rows,) if len(shape) == 1 else shape, start)


def source_name(config: ModelConfig, name: str) -> str:
    """Hugging Face's name of a parameter."""
    if name == "head":
        return "lm_head.weight"
    # What Llama calls post_attention_layernorm is the norm before the feed-forward.
    before_feedforward = "pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm"
    for ours, theirs in (
        ("embedding", "embed_tokens.weight"),
        ("final_norm", "norm"),
        (".attention.", ".self_attn."),
        (".feedforward.", ".mlp."),
        (".kernel", ".weight"),
        (".input_norm", ".input_layernorm"),
        (".post_attention_norm", ".post_attention_layernorm"),
        (".pre_feedforward_norm", f".{before_feedforward}"),
        (".post_feedforward_norm", ".post_feedforward_layernorm"),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"


def fingerprint(source: Source) -> str:
    """The sha256 of the first q_proj's bytes as stored (GGUF: of its float32 values), which tells backbones apart."""
    prefix = "model.layers.0.self_attn."
    name, rows = f"{prefix}q_proj.weight", None
    if name not in source.shapes and {f"{prefix}qkv_proj.weight", f"{prefix}o_proj.weight"} <= set(source.shapes):
        name, rows = f"{prefix}qkv_proj.weight", source.shapes[f"{prefix}o_proj.weight"][1]
    if name not in source.shapes:
        raise ValueError(f"checkpoint: no tensor {name}")
    digest = hashlib.sha256()
    for start, stop in pieces(source.shapes[name], rows):
        digest.update(np.ascontiguousarray(source.read(name, start, stop)).view(np.uint8).data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ piece by piece


def pieces(shape: tuple[int, ...], rows: int | None = None) -> Iterator[tuple[int, int]]:
    """The ranges in which (the first) rows of a tensor are read."""
    rows = shape[0] if rows is None else rows
    step = max(1, PIECE_VALUES // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def read_parameter(source: Source, recipe: Recipe, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """A parameter's values, and whether all of them are finite."""
    values, finite = aligned_empty(shape, dtype), True
    for start, stop in pieces(recipe.shape, shape[-1] if recipe.transpose else shape[0]):
        piece = source.read(recipe.source, recipe.start + start, recipe.start + stop).astype(dtype, copy=False)
        finite = finite and bool(np.isfinite(piece).all())
        if not recipe.transpose:
            values[start:stop] = piece
            continue
        for i in range(0, stop - start, 64):  # strips that stay in the processor's cache: 5 times as fast as at once
            values[:, start + i : min(start + i + 64, stop)] = piece[i : i + 64].T
    return values, finite


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that jax.device_put takes over on a CPU without a copy, which it does from an alignment of 64 bytes on."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + memory.size - 64].view(dtype).reshape(shape)


def require_equal(source: Source, name: str, other: str) -> None:
    for start, stop in pieces(source.shapes[name]):
        if not np.array_equal(source.read(name, start, stop), source.read(other, start, stop)):
            raise ValueError(f"checkpoint: {name} differs from {other}, but config.json says tie_word_embeddings")


def some(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (f" ... ({len(names)} in all)" if len(names) > 5 else "")


# --------------------------------------------------------------------------------------------------------- safetensors


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Safetensors:
    """The tensors of a folder's model.safetensors, or of the shards that its model.safetensors.index.json names."""

    def __init__(self, folder: str | Path):
        self.entries = folder_entries(Path(folder))
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start...stop of a tensor, in the dtype in which it is stored."""
        file, dtype, shape, offset = self.entries[name]
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        start, stop, _ = slice(start, stop).indices(shape[0])
        row = math.prod(shape[1:])
        count = max(0, stop - start) * row
        values = np.fromfile(file, DTYPES[dtype], count, offset=offset + start * row * DTYPES[dtype].itemsize)
        if values.size != count:
            raise ValueError(f"{file}: truncated in {name}; fetch the file again")
        return values.reshape(-1, *shape[1:])


def folder_entries(folder: Path) -> dict[str, Entry]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return file_entries(single)
    if index.is_file():
        return sharded_entries(folder, index)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder}: weights only as a pickle ({some(pickles)}), which could run code and is not read;\n"
            "if you trust it, convert it: transformers.AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def sharded_entries(folder: Path, index: Path) -> dict[str, Entry]:
    found = read_json(index, index.read_bytes())
    shards = found.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index}: no weight_map from tensor names to file names")
    files = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {shard!r} is not the name of a .safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: the shard {shard} is missing; fetch it again")
        files[shard] = file_entries(folder / shard)
    for name, shard in shards.items():
        if name not in files[shard]:
            raise ValueError(f"{folder / shard}: no tensor {name}, which {index.name} expects there")
    everything = {name: entry for entries in files.values() for name, entry in entries.items()}
    return everything | {name: files[shard][name] for name, shard in shards.items()}


def file_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{file}: truncated, or not a safetensors file ({size} bytes); fetch it again")
        header = read_json(file, stream.read(length))
    header.pop("__metadata__", None)
    return {name: file_entry(file, name, value, 8 + length, size) for name, value in header.items()}


def file_entry(file: Path, name: str, value: Any, data: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{file}: bad header: tensor {name}") from None
    if not sound or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{file}: bad header: tensor {name}")
    if data + end > size:
        raise ValueError(f"{file}: truncated: {name} ends at byte {data + end}, the file at {size}; fetch it again")
    return Entry(file, dtype, shape, data + begin)


def read_json(file: Path, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: bad header: not a JSON mapping")
    return value
