"""The tensors of a Hugging Face folder: model.safetensors, or the shards that its index lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..io.checks import shorten
from ..io.tensor_file import MAX_HEADER_BYTES, StoredTensor, stored_tensors
from ..io.untrusted import read_json
from .text_part import text_tensors


class Safetensors:
    """The tensors in the model.safetensors of a folder, or in the shards that model.safetensors.index.json lists: those
    of the text model, if there is an image part."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.tensors = text_tensors(folder_tensors(self.path))
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows start...stop of a tensor, or some of their columns, in the stored dtype."""
        return self.tensors[name].read(start, stop, columns)


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return stored_tensors(single)
    if index.is_file():
        return sharded_tensors(folder, index)
    raise ValueError(f"{folder} has no model.safetensors and no model.safetensors.index.json; choose another folder")


def sharded_tensors(folder: Path, index: Path) -> dict[str, StoredTensor]:
    shards = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {""}
    if not all(Path(name).name == name and "\\" not in name and name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index}: its weight_map must name .safetensors files next to it; got {shorten(shards)}")
    everything: dict[str, StoredTensor] = {}
    for name in sorted(names):
        everything |= stored_tensors(folder / name)
    return everything
