"""The memory that load_backbone takes at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
from measure import main

from para_jax.backbone.load import load_backbone
from para_jax.bench.rounds import measurement
from para_jax.io.hub import resolve_backbone

HERE = str(Path(__file__).parent)
LOAD_LIMIT = 300e6  # bytes above the weights that loading may take


def bench_load(backbone: str, *, rounds: int = 3) -> dict:
    """Megabytes of anonymous memory that load_backbone takes at its peak, and of the weights that it returns.

    Each round is a new process. The limit is the weights plus 300 MB.
    """
    code = f"import sys; sys.path.insert(0, {HERE!r}); from bench_load import measure_load; measure_load(sys.argv[1])"
    source = resolve_backbone(backbone)  # downloads happen here, not while it is measured
    measured = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True)
        if done.returncode:
            message = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(f"{source}: {message[-1].removeprefix('ValueError: ')}")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    within = all(m["peak"] - m["weights"] <= LOAD_LIMIT / 1e6 for m in measured)
    return measurement("MB", measured) | {"within_limit": within, "limit_above_weights": LOAD_LIMIT / 1e6}


def measure_load(backbone: str) -> None:
    """Loads a backbone and prints megabytes as JSON: its weights, and the peak above what the imports hold."""
    if not Path("/proc/self/status").is_file():
        raise ValueError("there is no /proc/self/status to read the memory from; run this on Linux")
    before, peak, loaded = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not loaded.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = jax.block_until_ready(load_backbone(backbone))
    finally:
        loaded.set()
        watcher.join()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    print(json.dumps({"weights": weights / 1e6, "peak": (max(peak[0], anonymous_bytes()) - before) / 1e6}))


def anonymous_bytes() -> int:
    """RssAnon of this process: its memory without mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main(bench_load)
