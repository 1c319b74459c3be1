"""The files of compare_methods.py's output folder. A cell is a task and a method; each measurement of it is a file.

Git keeps them as two tables, `cells.parquet` and `rows.parquet`: `unpack` makes the files that are missing, and `pack`
writes the tables again.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from para_jax.io import atomic
from para_jax.runtime.devices import describe_devices, library_versions


def label(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def task_of(file: Path, method: str) -> str:
    """The task of a file of this method, or of `base`. A task's name may have hyphens, as a label has."""
    return file.name.rpartition(f"-{label(method)}-")[0]


def settings(args) -> dict:
    """The options that change a score, besides the task and the method."""
    names = ("backbone", "data", "steps", "rows", "limit", *(["examples"] if args.examples is not None else []))
    return {name: str(getattr(args, name)) for name in names}


def done(file: Path, make, asked: dict, rescore: bool = False, shuffled: bool = False) -> dict:
    """What the file holds; made and written first where there is none. Ends the script where it holds other settings'
    scores.

    Args:
        rescore: make it again if it holds a score without its rows. Such files are kept otherwise, whatever test_limit.
        shuffled: make it again if it holds no score with shuffled prompts.
    """
    if not lacks(file, rescore, shuffled):
        held = read(file)
        old = is_old(held)
        same = lambda one: {k: v for k, v in one.items() if k != "test_limit" or not old}  # noqa: E731
        if same(held["asked"]) != same(asked):
            sys.exit(f"compare_methods: {file} was made with other settings; choose another --output")
        return held
    begun = time.monotonic()
    found = make()
    about = {"asked": asked, "seconds": time.monotonic() - begun, "device": describe_devices()}
    write(file, found | about | {"versions": library_versions()})
    return read(file)


def lacks(file: Path, rescore: bool = False, shuffled: bool = False) -> bool:
    """Whether `done` would make the file."""
    if not file.exists():
        return True
    held = read(file)
    return (rescore and is_old(held)) or (shuffled and "shuffled" not in held)


def is_old(held: dict) -> bool:
    """Whether it is a score of an earlier version, without its rows."""
    return "test" in held and "rows" not in held["test"]


def write(file: Path, found: dict) -> None:
    atomic.write_text(file, json.dumps(found, indent=1) + "\n")


def read(file: Path) -> dict:
    return json.loads(file.read_text())


#: Of rows.parquet.
ROWS = pa.schema([
    *((name, pa.dictionary(pa.int32(), pa.string())) for name in ("file", "part")),
    ("score", pa.float32()), ("loss", pa.float32()),
])  # fmt: skip


def pack(output: Path) -> None:
    """Writes the tables of all files in the output folder and the folders inside it: `cells` has each file's text
    without the rows, and `rows` the score and the loss of each tested row, for paired tests."""
    cells, rows = [], [ROWS.empty_table()]
    for file in sorted(output.rglob("*.json")):
        name = file.relative_to(output)
        if "runs" in name.parts:
            continue
        found = read(file)
        for part, holder in (("test", found.get("test")), ("shuffled", found.get("shuffled")), ("forgetting", found)):
            held = holder.pop("rows", None) if holder else None
            if held is not None:
                scores, losses = (held, None) if part == "forgetting" else (held["score"], held["loss"])
                score = pa.array(unpacked(scores).astype(np.float32))
                loss = pa.nulls(len(score), pa.float32()) if losses is None else unpacked(losses).astype(np.float32)
                texts = [pa.array([text] * len(score)).dictionary_encode() for text in (str(name), part)]
                rows.append(pa.table([*texts, score, loss], ROWS))
        cells.append({"file": str(name), "record": json.dumps(found)})
    compact = dict(compression="zstd", compression_level=19)
    pq.write_table(pa.Table.from_pylist(cells), output / "cells.parquet", use_dictionary=False, **compact)
    pq.write_table(pa.concat_tables(rows).unify_dictionaries(), output / "rows.parquet", **compact)


def unpack(output: Path) -> None:
    """Makes the files that the tables hold and the folder lacks."""
    if not (output / "cells.parquet").exists():
        return
    table = pq.read_table(output / "rows.parquet")
    names = table["file"].to_numpy().astype(str)
    parts, values = table["part"].to_numpy().astype(str), [table[name].to_numpy() for name in ("score", "loss")]
    ends = np.flatnonzero((names[1:] != names[:-1]) | (parts[1:] != parts[:-1])) + 1
    rows: dict[str, dict[str, tuple[str, ...]]] = {}
    for start, end in zip([0, *ends][: len(names)], [*ends, len(names)], strict=False):
        rows.setdefault(names[start], {})[parts[start]] = tuple(packed(one[start:end]) for one in values)
    for cell in pq.read_table(output / "cells.parquet").to_pylist():
        file, found = output / cell["file"], json.loads(cell["record"])
        if file.exists():
            continue
        for part, (score, loss) in rows.get(cell["file"], {}).items():
            holder = found if part == "forgetting" else found[part]
            holder["rows"] = score if part == "forgetting" else {"score": score, "loss": loss}
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, found)


def packed(values) -> str:
    """One line of text: a digit for each value where all are 0 or 1, else numbers of four digits."""
    values = [float("nan") if value is None else float(value) for value in values]
    if set(values) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in values)
    return " ".join(f"{value:.4g}" for value in values)


def unpacked(text: str) -> np.ndarray:
    return np.array(list(text) if set(text) <= {"0", "1"} else text.split(), float)
