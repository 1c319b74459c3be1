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
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names; fetch it again")
    everything: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {shorten(shard)} is not the name of a .safetensors file next to it; fetch it again"
            )
        everything |= stored_tensors(folder / shard)
    return everything
