"""GGUF files: changed bytes, metadata and tensors, as a backbone and as a tokenizer."""

import random
import shutil
import struct
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from tiny_gguf import byte_level_gguf, write_gguf

from para_jax import load_backbone
from para_jax.data.examples import encode_prompt
from para_jax.data.tokenizer import load_tokenizer
from para_jax.gguf.file import GgufFile

from . import mutate
from .cases import Trial, Wrong, shared_folder
from .tokenizer_folders import TEXT

KINDS = {
    "float": lambda path: write_gguf(path),
    "q8": lambda path: write_gguf(path, kind=gguf.GGMLQuantizationType.Q8_0),
    "gemma": lambda path: write_gguf(
        path, "gemma3_text", change={"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 100.0}
    ),
    "vocabulary": byte_level_gguf,
}


@cache
def good(kind: str) -> Path:
    return KINDS[kind](shared_folder() / f"{kind}.gguf")


def model(draw: random.Random, folder: Path) -> Trial:
    """A changed file is refused by its name, or each of its tensors is the one that the gguf library reads."""
    kind = draw.choice(("float", "q8", "gemma"))
    file = changed(draw, kind, folder)

    def check(loaded):
        found = GgufFile(file)
        original, theirs = GgufFile(good(kind)), library_tensors(file)
        if theirs is None:
            return
        for name in found.shapes:
            ours, before = found.read(name), original.read(name) if name in original.shapes else None
            if before is not None and np.array_equal(ours, before):
                continue
            if not any(np.array_equal(np.sort(ours, None), held) for held in theirs if held.size == ours.size):
                raise Wrong(f"{name} holds other values than any tensor that the gguf library reads")

    return Trial(lambda: load_backbone(file), (str(file), "model."), check)


def tokenizer(draw: random.Random, folder: Path) -> Trial:
    """A changed vocabulary is refused by the file's name, or encodes a text to tokens that it has."""
    file = changed(draw, "vocabulary", folder)

    def run():
        found = load_tokenizer(file)
        return encode_prompt(found, TEXT), len(found)

    def check(result):
        ids, size = result
        if not all(0 <= id < size for id in ids):
            raise Wrong(f"ids {ids} of a vocabulary of {size}")

    return Trial(run, (str(file), "prompt"), check)


def changed(draw: random.Random, kind: str, folder: Path) -> Path:
    file = Path(shutil.copy(good(kind), folder / "m.gguf"))
    change, content = draw.random(), bytearray(file.read_bytes())
    if change < 0.04:
        mutate.file(draw, file)
    elif change < 0.5:  # the header: counts, keys, types, lengths
        end = draw.choice((64, 600, 3000))
        file.write_bytes(mutate.data(draw, bytes(content[:end])) + content[end:])
    elif change < 0.9:  # one number is another
        at = draw.randrange(4, min(len(content) - 8, 6000))
        form, number = draw.choice((("<I", 2**32 - 1), ("<Q", 2**64 - 1), ("<I", 2**31), ("<Q", 2**40), ("<f", 1e30)))
        number = draw.choice((number, 0, 1, 2, 7, 100))
        struct.pack_into(form, content, at, number)
        file.write_bytes(content)
    else:
        file.write_bytes(mutate.data(draw, bytes(content)))
    return file


def library_tensors(file: Path) -> list[np.ndarray] | None:
    """Every tensor's values in order, as the gguf library reads them (Gemma's norms also less one, as they are stored);
    None for a file that it refuses."""
    try:
        read = [gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors]
    except Exception:  # of every kind
        return None
    flat = [np.sort(array.astype(np.float32), None) for array in read]
    return flat + [array - 1 for array in flat if array.size < 1000]
