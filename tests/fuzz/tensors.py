"""safetensors files: mutated ones, and a strict reading of them that shares no code with para_jax."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np

from . import mutate

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
OTHER_DTYPES = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "f32", "", "F32\n", "\x1b[31m", None, 5, [])
STRANGE_NAMES = ("", "\0", "\x1b]0;owned\x07", "a" * 5000, "lm_head.weight", "model.layers.9.mlp.up_proj.weight", "é")
Entries = list[tuple[str, dict]]


class Malformed(Exception):
    """A file that the format does not allow."""


def read(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; of a name that stands there twice, the last one. Raises Malformed unless they
    fill the file, one after another."""
    found = file.read_bytes()
    length = int.from_bytes(found[:8], "little")
    if len(found) < 8 or length > len(found) - 8:
        raise Malformed("the header's length")
    try:
        header = json.loads(found[8 : 8 + length])
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors, end = {}, 0
        for name, entry in entries:
            start, stop = entry["data_offsets"]
            if start != end or stop < start:
                raise Malformed(f"the offsets of {name!r}")
            end, dtype = stop, np.dtype(DTYPES[entry["dtype"]])
            values = np.frombuffer(found[8 + length + start : 8 + length + stop], dtype)
            tensors[name] = values.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(repr(error)) from None
    if end != len(found) - 8 - length:
        raise Malformed("bytes behind the tensors")
    return tensors


def write(file: Path, entries: Entries, content: bytes, *, length: int | None = None, metadata=None) -> None:
    """Writes a file with these header entries as they stand: names may be doubled, offsets wrong."""
    parts = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries]
    if metadata is not None:
        parts.insert(0, f'"__metadata__": {json.dumps(metadata)}')
    header = ("{" + ", ".join(parts) + "}").encode()
    size = len(header) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + header + content)


def mutated(draw: random.Random, file: Path) -> None:
    """Rewrites a good file with a header, tensors or bytes that are wrong, or stored in another good way."""
    if draw.random() < 0.15:
        return file.write_bytes(mutate.data(draw, file.read_bytes()))
    tensors = read(file)
    names, change = list(tensors), draw.choice(CHANGES)
    if change is stored_otherwise:
        stored_otherwise(draw, tensors)
        draw.shuffle(names)
    if change is values:
        values(draw, tensors)
    entries, content = laid_out({name: tensors[name] for name in names})
    if change in (stored_otherwise, values):
        return write(file, entries, content, metadata={"format": "pt"})
    length, metadata = None, {"format": "pt"}
    if change is header:
        length = draw.choice((None, 0, 1, 2**63, 2**64 - 1, 99_999_999, 8))
        metadata = draw.choice((mutate.value(draw), {"format": 5}, {"a": "b" * 100_000}, None))
    elif change is tail:
        content = draw.choice((content[: draw.randrange(len(content))], content + draw.randbytes(draw.choice((1, 64)))))
    else:
        change(draw, entries)
    write(file, entries, content, length=length, metadata=metadata)


def laid_out(tensors: dict[str, np.ndarray]) -> tuple[Entries, bytes]:
    entries, content = [], b""
    kinds = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        start, content = len(content), content + tensor.tobytes()
        about = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, len(content)]}
        entries.append((name, about))
    return entries, content


def stored_otherwise(draw: random.Random, tensors: dict[str, np.ndarray]) -> None:
    """The same tensors in another order, some of them in another dtype."""
    for name in draw.sample(list(tensors), draw.randint(0, 3)):
        tensors[name] = tensors[name].astype(DTYPES[draw.choice(list(DTYPES))])


def values(draw: random.Random, tensors: dict[str, np.ndarray]) -> None:
    name = draw.choice(list(tensors))
    tensors[name] = tensors[name].copy()
    number = draw.choice((np.nan, np.inf, -np.inf, 3.4e38, -1e30, 1e-45, 0, 1, -0.0))
    if draw.random() < 0.3:
        tensors[name][...] = number
    else:
        tensors[name].flat[draw.randrange(tensors[name].size)] = number


def offsets(draw: random.Random, entries: Entries) -> None:
    entry, other = draw.choice(entries)[1], draw.choice(entries)[1]
    start, stop = entry["data_offsets"]
    by = draw.choice((1, 4, -4, 8, stop - start, 2**40, -(2**40)))
    entry["data_offsets"] = draw.choice((
        [start + by, stop + by], [start, stop + by], [start + by, stop], list(other["data_offsets"]), [stop, start],
        [0, stop - start], [start], [float(start), float(stop)], [str(start), stop], None, [True, stop],
        mutate.value(draw),
    ))  # fmt: skip
    if draw.random() < 0.3:
        other["data_offsets"] = [start, stop]


def shape(draw: random.Random, entries: Entries) -> None:
    entry = draw.choice(entries)[1]
    old = entry["shape"]
    total = int(np.prod(old))
    entry["shape"] = draw.choice((
        old[::-1], [total], [1, *old], [*old, 1], old[:-1], [], [0, *old], [-1, *old], [float(n) for n in old],
        [2**62, *old], [-n for n in old], [str(n) for n in old], [total // 2, 2], mutate.value(draw),
    ))  # fmt: skip


def dtype(draw: random.Random, entries: Entries) -> None:
    draw.choice(entries)[1]["dtype"] = draw.choice(OTHER_DTYPES)


def names(draw: random.Random, entries: Entries) -> None:
    at, other = draw.randrange(len(entries)), draw.choice(entries)
    name, entry = entries[at]
    change = draw.choice(("rename", "double", "double", "remove", "add", "swap", "key"))
    if change == "rename":
        entries[at] = (draw.choice((*STRANGE_NAMES, name + "x", name.upper(), other[0])), entry)
    elif change == "double":
        entries.insert(draw.randint(0, len(entries)), (name, dict(draw.choice((entry, other[1])))))
    elif change == "remove":
        del entries[at]
    elif change == "add":
        entries.append((draw.choice(STRANGE_NAMES), dict(entry)))
    elif change == "swap":
        entries[at] = (other[0], entry)
        entries[entries.index(other)] = (name, other[1])
    else:
        entry[draw.choice(("shape", "x", "dtype\0"))] = mutate.value(draw)


def header(draw: random.Random, entries: Entries) -> None:
    """A wrong length or strange metadata; see `mutated`."""


def tail(draw: random.Random, entries: Entries) -> None:
    """A file that ends too early or too late; see `mutated`."""


CHANGES = (offsets, offsets, offsets, shape, dtype, names, names, values, stored_otherwise, header, tail)
