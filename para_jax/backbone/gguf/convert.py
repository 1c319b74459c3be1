"""Writes the model of a GGUF file as a Hugging Face folder, in float32."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np

from ...io.atomic import errors_named, folders_left, sync_folder, temporary_name
from ...io.progress import Progress
from ..families import model_config
from ..weights import recipes
from .file import GgufFile

#: At most this many bytes of a tensor, as float32, are in memory at once.
PIECE_BYTES = 64 * 2**20


def convert_gguf(file: str | Path, folder: str | Path, tokenizer) -> None:
    """Writes a float32 Hugging Face folder with the model of a GGUF file.

    The folder appears complete or not at all.

    Args:
        tokenizer: what `load_tokenizer(file)` returns; it is saved to the folder too.

    Raises ValueError if the folder already holds files.
    """
    source, folder = GgufFile(file), Path(folder).resolve()  # a link or "." can't be replaced
    recipes(model_config(source.config), source)  # raises for a file without the tensors of its model
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another")
    for left in folders_left(folder):  # of conversions that were killed: each is as large as the model
        shutil.rmtree(left, ignore_errors=True)
    unfinished = temporary_name(folder)
    unfinished.mkdir(parents=True)
    try:
        ids = {key: value for key, value in source.config.items() if key.endswith("_token_id")}
        with errors_named(folder):
            (unfinished / "config.json").write_text(json.dumps(source.config, indent=2))
            (unfinished / "generation_config.json").write_text(json.dumps(ids, indent=2))
            write_safetensors(source, unfinished / "model.safetensors")
            tokenizer.save_pretrained(unfinished)
            for written in unfinished.iterdir():
                with written.open("rb") as stream:
                    os.fsync(stream.fileno())
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_safetensors(source: GgufFile, path: Path) -> None:
    """Writes all tensors as float32, a piece at a time. The format: a length, a JSON header, then the data."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in source.shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out, Progress("converting", len(source.shapes), unit="tensor") as bar:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in source.shapes.items():
            rows = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
            for start in range(0, shape[0], rows):
                out.write(np.ascontiguousarray(source.read(name, start, start + rows), "<f4").data)
            bar.advance()
