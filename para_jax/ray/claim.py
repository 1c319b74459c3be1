"""The files next to the shards of an output: which call they belong to, and which shards have lost workers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..io import atomic
from ..io.checks import printable
from ..io.storage.bucket import Place
from ..runs.folder import locked

CALL_FILE = "call.txt"
#: The ending of the file that says how the workers of a shard have ended in this call.
DEATHS = ".deaths"


@contextmanager
def claimed(output: Place, folder: Place, line: Sequence[str], shards: int) -> Iterator[None]:
    """As `claim_output`, and no other process may begin or continue a call of this output during the block. Raises
    ValueError, naming the folder, if one is at work already. A bucket has no lock; there the launcher sees to it."""
    require_free(output, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        claim_output(output, folder, line, shards)
        yield


def require_free(output: Place, folder: Place) -> None:
    """Raises ValueError if the output holds files and no call has begun it."""
    if (folder / CALL_FILE).is_file():
        return
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"output {output}: it is there already; choose another")


def claim_output(output: Place, folder: Place, line: Sequence[str], shards: int) -> None:
    """Begins a call, or continues it.

    Args:
        folder: of the shards.
        line: the command line with the options.

    Raises ValueError, naming the output, if it holds anything else, or if its shards belong to another call.
    """
    file, now = folder / CALL_FILE, [json.dumps(part) for part in (f"shards={shards}", *line)]
    require_free(output, folder)
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, "\n".join(now) + "\n")
        return
    before = file.read_bytes().decode().splitlines()
    if before != now:
        gone, new = set(before) - set(now), set(now) - set(before)
        then, given = (printable(" ".join(sorted(parts)), 100) or "nothing" for parts in (gone, new))
        raise ValueError(
            f"output {output}: {folder} has its shards, of another call: {then} then, {given} now. Give the same, or "
            "choose another output"
        )
    for file in folder.glob(f"*{DEATHS}"):
        file.unlink(missing_ok=True)
