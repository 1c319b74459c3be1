"""`para-jax bench NAME`: what loading, decoding and training cost on this machine, as a record that says how.

Sides that are compared run in turn, one measurement each a round, so that a change in the machine's load meets them
all; what counts is the median over the rounds.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from . import devices
from .adapters.rows import pick, stack_adapters
from .backbone.load import load_backbone
from .config import ParaConfig, RuntimeSection, TrainSection, one_of, require
from .data.batches import Batch
from .hub import resolve_backbone
from .inference.generate import choose, next_token
from .model import init_adapter, prefill
from .training.step import init_state, train_step

LOAD_LIMIT = 300e6  # bytes above the weights that loading may take


def run(name: str, backbone: str = "smollm2-135m", output: str | Path | None = None) -> dict:
    """One benchmark's record: medians, ratios, each round, command, device and versions. It is printed as a table, and
    written to the JSON file `output` where one is given."""
    require(name in BENCHMARKS, "bench", name, one_of(BENCHMARKS))
    devices.start(RuntimeSection(compilation_cache=False, allow_cpu=True))
    measured = BENCHMARKS[name](backbone)
    record = {
        "command": shlex.join(["para-jax", "bench", name, "--backbone", str(backbone)]),
        "device": devices.describe_devices(),
        "versions": devices.versions(),
        **measured,
    }
    print(table(measured))
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {output}")
    return record


# ------------------------------------------------------------------------------------------------------- the benchmarks


def bench_load(backbone: str, *, rounds: int = 3) -> dict:
    """Megabytes of anonymous memory that load_backbone takes at its peak, beside the weights that it gives.

    Each round is a process of its own. The limit is the weights and 300 MB.
    """
    code = "import sys; from para_jax import bench; bench.measure_load(sys.argv[1])"
    source = resolve_backbone(backbone)  # what has to be fetched is fetched here, not while it is measured
    measured = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True)
        if done.returncode:
            message = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(f"bench load: {message[-1].removeprefix('ValueError: ')}")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    within = all(m["peak"] - m["weights"] <= LOAD_LIMIT / 1e6 for m in measured)
    return summary("MB", measured) | {"within_limit": within, "limit_above_weights": LOAD_LIMIT / 1e6}


def bench_decode(backbone: str, *, batches=(1, 8), prompt: int = 48, tokens: int = 32, rounds: int = 5) -> dict:
    """Milliseconds a token of greedy decoding, by the step that generate uses: the backbone alone, with one PARA
    adapter, and with a tenant of its own in every row."""
    model = load_backbone(backbone)
    tenants = [init_adapter(ParaConfig(), model.config, seed=seed) for seed in range(max(batches))]
    stack = stack_adapters(tenants)
    sides = {}
    for rows in batches:
        mixed = pick(stack, np.arange(rows))
        for name, adapters in (("base", None), ("para", tenants[0]), ("mixed", mixed)):
            sides[f"{name}, rows {rows}"] = decode_side(model, adapters, rows, prompt, tokens)
    found = summary("ms a token", interleaved(sides, rounds))

    def ratio(side: str, base: str) -> float:  # round by round, for the machine's speed may change between rounds
        return statistics.median(measured[side] / measured[base] for measured in found["rounds"])

    ratios = {
        f"{name} / base, rows {rows}": ratio(f"{name}, rows {rows}", f"base, rows {rows}")
        for rows in batches
        for name in ("para", "mixed")
    }
    return found | {"ratios": ratios, "prompt_tokens": prompt, "new_tokens": tokens}


def bench_train(backbone: str, *, rows: int = 8, prompt: int = 48, completion: int = 16, rounds: int = 5) -> dict:
    """Tokens a second of PARA's whole training step, without and with recomputing each layer in the backward pass."""
    model = load_backbone(backbone, layout="stacked")
    sides = {f"remat {remat}": train_side(model, remat, rows, prompt, completion) for remat in ("none", "block")}
    found = summary("tokens/s", interleaved(sides, rounds))
    ratio = found["medians"]["remat block"] / found["medians"]["remat none"]
    sizes = {"rows": rows, "prompt_tokens": prompt, "completion_tokens": completion}
    return found | {"ratios": {"remat block / none": ratio}} | sizes


#: The names of `para-jax bench`; each gives {"unit", "medians", "rounds", ...} for a backbone.
BENCHMARKS: dict[str, Callable[..., dict]] = {"load": bench_load, "decode": bench_decode, "train": bench_train}


# ------------------------------------------------------------------------------------------------------------ the sides


def measure_load(backbone: str) -> None:
    """Loads a backbone and prints, as JSON, megabytes: its weights, and the peak above what the imports hold."""
    if not Path("/proc/self/status").is_file():
        raise ValueError("there is no /proc/self/status, where memory is read; expected Linux")
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


def decode_side(model, adapters, rows: int, prompt: int, tokens: int) -> Callable[[], float]:
    prompts = random_tokens(model, rows, prompt)
    leaves, treedef = jax.tree.flatten(model)

    def milliseconds() -> float:
        logits, state = prefill(model, adapters, prompts, prompt, max_length=prompt + tokens)
        token = jax.block_until_ready(choose(logits, None, 0))
        begun = time.perf_counter()
        for position in range(1, tokens + 1):
            token, state = next_token(treedef, leaves, state, token, None, position)
        jax.block_until_ready(token)
        return (time.perf_counter() - begun) / tokens * 1e3

    return milliseconds


def train_side(model, remat: str, rows: int, prompt: int, completion: int) -> Callable[[], float]:
    config, total_steps = TrainSection(remat=remat), 1000
    tokens = random_tokens(model, rows, prompt + completion)
    lengths = (np.full((1, rows), n, np.int32) for n in (prompt, prompt + completion))
    batch = Batch(tokens[None], *lengths)
    state = init_state(init_adapter(ParaConfig(), model.config), config, total_steps)

    def tokens_a_second() -> float:
        nonlocal state
        begun = time.perf_counter()
        stepped = train_step(state, model, batch, completion=completion, config=config, total_steps=total_steps)
        state, _ = jax.block_until_ready(stepped)
        return tokens.size / (time.perf_counter() - begun)

    return tokens_a_second


def random_tokens(model, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)


# --------------------------------------------------------------------------------------------------- rounds and records


def interleaved(sides: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What each side measures, round by round, after one run each that compiles."""
    for measure in sides.values():
        measure()
    return [{name: measure() for name, measure in sides.items()} for _ in range(rounds)]


def summary(unit: str, rounds: list[dict[str, float]]) -> dict:
    medians = {name: statistics.median(measured[name] for measured in rounds) for name in rounds[0]}
    return {"unit": unit, "medians": medians, "rounds": rounds}


def table(measured: dict) -> str:
    rows = [(name, f"{value:.1f} {measured['unit']}") for name, value in measured["medians"].items()]
    rows += [(name, f"{value:.2f}") for name, value in measured.get("ratios", {}).items()]
    if "within_limit" in measured:
        limit = f"within the weights + {measured['limit_above_weights']:.0f} MB"
        rows.append((limit, "yes" if measured["within_limit"] else "no"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
