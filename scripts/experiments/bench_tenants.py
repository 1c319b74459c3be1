"""16 tenants of 128 short examples, one epoch, trained in three ways: one run of `para-jax train data.tenants=DIR`, 16
runs of the command, and a loop over the tenants in one process that loads the backbone once.

    python scripts/experiments/bench_tenants.py --output results/bench_tenants.json

The compilation cache is on, and empty before each side's first run. Half of the 16 runs come before the other sides and
half after. Each process reports the time of its start (Python and imports), loading, compiling and steps.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np

TENANTS, EXAMPLES, ROWS, LONGEST = 16, 128, 8, 16
THINGS = "stapler lamp chair mouse cable desk phone tray clock fan mug rack".split()
STATES = "late broken lost wrong new old blue heavy empty cold loud torn".split()
TEAMS = "billing returns stock courier legal support".split()


def write_tenants(folder: Path) -> None:
    """Tenant t sends a short message to one of six teams, by a rule of its own."""
    for tenant in range(TENANTS):
        draw = np.random.default_rng(tenant)
        team = draw.integers(0, len(TEAMS), len(STATES))
        lines = []
        for _ in range(EXAMPLES):
            state, thing = int(draw.integers(len(STATES))), int(draw.integers(len(THINGS)))
            prompt = f"{STATES[state]} {THINGS[thing]} {draw.integers(10, 99)} ->"
            lines.append(json.dumps({"prompt": prompt, "completion": f" {TEAMS[team[state]]}"}) + "\n")
        (folder / f"tenant-{tenant:02}").mkdir(parents=True)
        (folder / f"tenant-{tenant:02}" / "train.jsonl").write_text("".join(lines))


def overrides(output: Path, backbone: str) -> list[str]:
    return [
        f"backbone.source={backbone}", "backbone.dtype=float32", "data.buckets=1", f"data.max_seq_length={LONGEST}",
        "train.learning_rate=3e-3", f"train.rows_per_tenant={ROWS}", "mesh.data=1", "eval.metric=loss",
        "runtime.allow_cpu=true", "logging.report_to=[]", "eval.every=1000", f"output_dir={output}",
    ]  # fmt: skip


def child(begun: float, result: Path, sections: list[list[str]]) -> None:
    """Trains with each list of overrides, loading the backbone once, and writes the time of each part."""
    from para_jax.config import load_config
    from para_jax.runs import train as runs
    from para_jax.runtime import devices

    spent = {"start": time.time() - begun, "load": 0.0, "compile": 0.0, "steps": 0.0}

    def timed(where, name, part):
        real = getattr(where, name)

        def measured(*arguments, **settings):
            started = time.monotonic()
            try:
                return real(*arguments, **settings)
            finally:
                spent[part] += time.monotonic() - started

        setattr(where, name, measured)

    @contextmanager
    def compiling(what):
        started = time.monotonic()
        yield
        spent["compile"] += time.monotonic() - started

    devices.compiling = compiling
    timed(runs, "load_backbone", "load")
    timed(runs, "fit", "steps")
    runs.load_backbone = lru_cache(runs.load_backbone)
    for section in sections:
        config = load_config(None, section)
        (runs.train_tenants if config.many else runs.train)(config)
    spent["steps"] -= spent["compile"]
    spent["all"] = time.time() - begun
    result.write_text(json.dumps(spent))


def timed_process(result: Path, sections: list[list[str]], cache: Path) -> dict[str, float]:
    given = json.dumps({"begun": time.time(), "result": str(result), "sections": sections})
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PARA_JAX_BENCH_CHILD": given}
    begun = time.monotonic()
    subprocess.run([sys.executable, __file__], env=environment, check=True, stderr=subprocess.DEVNULL)
    return json.loads(result.read_text()) | {"all": time.monotonic() - begun}


def main() -> None:
    from para_jax.io.hub import resolve_backbone
    from para_jax.io.record_file import write_record
    from para_jax.reports.inspect import new_record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m", help="a .gguf file, or smollm2-135m")
    parser.add_argument("--output", type=Path, default=Path("results/bench_tenants.json"))
    args = parser.parse_args()
    backbone = str(resolve_backbone(args.backbone))
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        write_tenants(work / "data")
        result = work / "result.json"
        alone, looped = (
            [
                [f"data.train={path}", f"train.per_device_batch_size={ROWS}", *overrides(to / path.name, backbone)]
                for path in sorted((work / "data").iterdir())
            ]
            for to in (work / "runs", work / "loop")
        )
        one = [
            f"data.tenants={work / 'data'}", f"train.per_device_batch_size={TENANTS * ROWS}",
            *overrides(work / "one", backbone),
        ]  # fmt: skip
        half = TENANTS // 2
        runs = [timed_process(result, [each], work / "cache-runs") for each in alone[:half]]
        together = timed_process(result, [one], work / "cache-one")
        loop = timed_process(result, looped, work / "cache-loop")
        runs += [timed_process(result, [each], work / "cache-runs") for each in alone[half:]]
    sums = {part: sum(run[part] for run in runs) for part in runs[0]}
    record = {
        "tenants": TENANTS, "examples": EXAMPLES, "rows_a_tenant": ROWS, "longest": LONGEST,
        "one_run": together, "sixteen_runs": sums, "median_of_the_runs": {p: median(r[p] for r in runs) for p in sums},
        "loop_in_one_process": loop,
        "ratios": {"one / sixteen": together["all"] / sums["all"], "one / loop": together["all"] / loop["all"]},
    }  # fmt: skip
    write_record(args.output, new_record(shlex.join(["python", *sys.argv]), record))
    shown = ("one_run", "sixteen_runs", "loop_in_one_process", "ratios")
    print(json.dumps({name: record[name] for name in shown}, indent=1))


if __name__ == "__main__":
    if given := os.environ.get("PARA_JAX_BENCH_CHILD"):
        asked = json.loads(given)
        child(asked["begun"], Path(asked["result"]), asked["sections"])
    else:
        main()
