"""More adapters than fit the memory: they are evaluated in passes. The next pass is loaded while one is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..adapters.adapter import Adapter
from ..adapters.bank import AdapterBank


def adapters_at_once(largest: int, memory: int) -> int:
    """How many adapters of at most `largest` bytes a pass may have if a bank may take `memory` bytes. It holds those of
    two passes: one that is answered, and one that is loaded."""
    return max(1, memory // (2 * max(1, largest)))


def described_passes(bank: AdapterBank, names: Sequence[str], of: int, most: int, largest: int) -> str:
    """How many adapters there are here, of how many altogether, in how many passes, for a message."""
    passes = -(-len(names) // most)
    held = min(len(names), 2 * most) * largest
    text = (str(of) if len(names) == of else f"{len(names)} of {of}") + (" adapter" if of == 1 else " adapters")
    text += f" in {passes} passes" if passes > 1 else ""
    text += f", {held / 1e6:.1f} MB of host memory"
    return f"{text}; {bank.carried}" if bank.carried else text


def in_passes(
    bank: AdapterBank, names: Sequence[str], load: Callable[[str], Adapter], most: int
) -> Generator[tuple[str, ...]]:
    """The names in parts of at most `most`, about equally many in each. While the caller works with a part, the bank
    holds its adapters, and the next ones are loaded.

    Args:
        bank: with room for two parts.
        load: gives the adapter of a name. It runs in another thread, and what it raises is raised here.
    """
    count = max(1, -(-len(names) // most))
    cuts = [len(names) * i // count for i in range(count + 1)]
    parts = [tuple(names[start:end]) for start, end in zip(cuts[:-1], cuts[1:], strict=True)]
    ended = threading.Event()

    def add(part: Sequence[str]) -> None:
        for name in part:
            if ended.is_set():
                return
            bank.add(name, load(name))

    with ThreadPoolExecutor(1, thread_name_prefix="adapters") as pool:
        try:
            loading = [pool.submit(add, part) for part in parts[:1]]
            for i, part in enumerate(parts):
                loading[i].result()
                loading += [pool.submit(add, later) for later in parts[i + 1 : i + 2]]
                yield part
                for name in part:
                    bank.remove(name)
        finally:
            ended.set()
