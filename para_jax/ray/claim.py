"""The file next to the shards of an output that says which call they belong to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from .. import atomic
from ..config import shorten
from ..storage.bucket import Place

CALL_FILE = "call.json"
#: A call file has at most this many bytes: the names of very many adapters.
MAX_BYTES = 2**26


def claim_output(output: Place, folder: Place, line: Sequence[str], shards: int) -> None:
    """Begins a call, or goes on with it.

    Args:
        folder: of the shards.
        line: the command line with the options.

    Raises ValueError, naming the output, if it holds anything else, or if its shards belong to another call.
    """
    file, call = folder / CALL_FILE, {"shards": shards, "command": list(line)}
    if not file.is_file():
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise ValueError(f"output {output}: it is there already; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, json.dumps(call, indent=1) + "\n")
        return
    before = read_call(file)
    if before["shards"] != shards:
        raise ValueError(
            f"output {output}: {folder} has {before['shards']} shards of it; give shards={before['shards']}, or "
            "choose another output"
        )
    if before["command"] != call["command"]:
        raise ValueError(
            f"output {output}: {folder} has shards of it with other options ({difference(before['command'], line)}); "
            "give the same, or choose another output"
        )


def read_call(file: Place) -> dict:
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        found = json.loads(data)
        good = type(found["shards"]) is int and all(isinstance(part, str) for part in found["command"])
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good or len(data) > MAX_BYTES:
        raise ValueError(f"{file} does not describe a call; remove its folder, or choose another output")
    return found


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What one command line has and the other lacks, for an error."""
    gone, new = ([part for part in one if part not in other] for one, other in ((before, now), (now, before)))
    return f"{shorten(shlex.join(gone), 100)} then, {shorten(shlex.join(new), 100)} now"
