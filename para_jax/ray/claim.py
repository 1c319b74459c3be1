"""The file next to the shards of an output that says which call they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..io import atomic
from ..io.checks import printable
from ..io.storage.bucket import Place
from ..runs.folder import locked

CALL_FILE = "call.txt"
#: The ending of the file that counts the workers of a shard in this call.
TRIES = ".tries"


@contextmanager
def claimed(output: Place, folder: Place, call: Sequence[str], shards: int) -> Iterator[None]:
    """Begins a call, or continues it. No other process may do so during the block. A bucket has no lock; there the
    launcher sees to it.

    Args:
        folder: of the shards.
        call: its options, one by one.

    Raises ValueError, naming the output, if it holds anything else, if its shards belong to another call, or if another
    process is at work.
    """
    file, now = folder / CALL_FILE, [json.dumps(part) for part in (f"shards={shards}", *call)]
    if not file.is_file() and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise ValueError(f"output {output}: it is there already; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        before = file.read_bytes().decode().splitlines() if file.is_file() else now
        if before != now:
            gone, new = set(before) - set(now), set(now) - set(before)
            then, given = (printable(" ".join(sorted(parts)), 100) or "nothing" for parts in (gone, new))
            raise ValueError(
                f"output {output}: {folder} has its shards, of another call: {then} then, {given} now. Give the same, "
                "or choose another output"
            )
        atomic.write_text(file, "\n".join(now) + "\n")
        for tries in folder.glob(f"*{TRIES}"):
            tries.unlink(missing_ok=True)
        yield
