"""Scaling on Ray: evaluation and generation by 1 and 2 workers, each pinned to a core of its own, next to one process
that is pinned to a core.

    python scripts/bench_ray.py --output results/bench_ray.json

It needs two idle cores. All shards are equally large, and the sides take turns. Each worker's first shard, in which it
loads the model and JAX traces the programs, counts as its start. The compilation cache is on and filled.
"""

import argparse
import fcntl
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median

from para_jax.ray import jobs
from para_jax.ray.workers import EvaluationWorker, GenerationWorker

WORDS = "stapler lamp chair mouse cable desk phone tray clock fan mug rack late broken lost wrong new old blue".split()
SIDES = {"one process": 0, "1 worker": 1, "2 workers": 2}


class Pinned:
    """A worker that takes a core which no other worker has, and notes when each shard began and ended."""

    def __init__(self, *given):
        cores = Path(os.environ["BENCH_RAY_CORES"])
        for core in os.environ["BENCH_RAY_USE"].split(","):
            self.core = (cores / core).open("w")
            try:
                fcntl.flock(self.core, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), {int(core)})
            break
        super().__init__(*given)

    def __call__(self, batch):
        begun = time.time()
        row = super().__call__(batch)
        times = {"worker": os.getpid(), "shard": row["index"][0], "begun": begun, "ended": time.time()}
        output = Path(str(batch["output"][0]))
        output.with_name(f"{output.name}.times").write_text(json.dumps(times))
        return row


class PinnedEvaluation(Pinned, EvaluationWorker):
    pass


class PinnedGeneration(Pinned, GenerationWorker):
    pass


def benchmark(args) -> dict:
    import ray

    from para_jax.devices import library_versions

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args)
        (folder / "cores").mkdir()
        os.environ |= {"BENCH_RAY_CORES": str(folder / "cores"), "BENCH_RAY_USE": ",".join(map(str, args.cores))}
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        os.environ["RAY_worker_niceness"] = "0"  # as the one process
        jobs.EvaluationWorker, jobs.GenerationWorker = PinnedEvaluation, PinnedGeneration
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
        kinds, rounds = {"evaluation": evaluation, "generation": generation}, []
        for number in range(-1, args.rounds):  # -1 fills the compilation cache
            for kind, call in kinds.items():
                for side, workers in SIDES.items():
                    if number < 0 and workers:
                        continue
                    output = folder / f"{kind}-{number}-{workers}"
                    begun = time.time()
                    call(folder, output, args, workers)
                    if number >= 0:
                        rounds.append({"kind": kind, "side": side, "round": number} | measured(output, begun))
                        print(rounds[-1], flush=True)
        ray.shutdown()
    found = {kind: summary([one for one in rounds if one["kind"] == kind]) for kind in kinds}
    return {"efficiency": found, "rounds": rounds, "versions": library_versions() | {"ray": ray.__version__}}


def prepare(folder: Path, args) -> None:
    """Adapters whose hashes spread them evenly over the shards, a task, and requests."""
    from para_jax import ParaConfig, init_adapter, load_model_config, save_adapter
    from para_jax.adapters.preview import previews
    from para_jax.shards import Shard

    config, held, seed = load_model_config(args.backbone), Counter(), 0
    while sum(held.values()) < args.shards * args.adapters:
        place = folder / "tenants" / f"t{seed}"
        save_adapter(init_adapter(ParaConfig(r=8), config, seed=seed), place)
        digest = previews([str(place)], config)[0].digest
        shard = next(index for index in range(args.shards) if Shard(index, args.shards).has_content(digest))
        if held[shard] < args.adapters:
            held[shard] += 1
        else:
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
        seed += 1
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=24)) + " ->", "completion": " billing"} for _ in range(args.rows)]
    (folder / "task").mkdir()
    (folder / "task" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = sorted(path.name for path in (folder / "tenants").iterdir())
    lines = [{"prompt": " ".join(draw.choices(WORDS, k=24)), "tenant": names[i % len(names)]}
             for i in range(args.shards * args.lines)]  # fmt: skip
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(folder: Path, output: Path, args, workers: int) -> None:
    options = {"backbone": args.backbone, "adapters": [f"{folder}/tenants/*"], "tasks": [f"{folder}/task:loss"]}
    options |= {"rows": args.rows, "allow_cpu": True}
    if workers:
        jobs.evaluate_on_ray(output=output, shards=args.shards, workers=workers, **options)
    else:
        one_process("evaluate", output, args.shards, options)


def generation(folder: Path, output: Path, args, workers: int) -> None:
    options = {"backbone": args.backbone, "adapters": [f"{folder}/tenants/*"], "max_new_tokens": args.tokens}
    options |= {"slots": 8, "max_length": 128, "allow_cpu": True}
    if workers:
        jobs.generate_on_ray(folder / "in.jsonl", output=output, shards=args.shards, workers=workers, **options)
    else:
        one_process("generate", output, args.shards, options | {"input": folder / "in.jsonl"})


def one_process(command: str, output: Path, shards: int, options: dict) -> None:
    """Answers all shards in a new process that is pinned as a worker is."""
    line = [__file__, "one", command, str(output), str(shards), *jobs.arguments(command, [], [], options)]
    subprocess.run([sys.executable, *line], check=True, stderr=subprocess.DEVNULL)


def one(command: str, output: str, shards: str, *line: str) -> None:
    kind = PinnedEvaluation if command == "evaluate" else PinnedGeneration
    worker, folder = kind(line, os.getcwd(), int(shards)), Path(output + ".shards")
    folder.mkdir()
    for index in range(int(shards)):
        error = worker({"index": [index], "output": [str(folder / str(index))]})["error"][0]
        if error:
            sys.exit(error)


def measured(output: Path, begun: float) -> dict:
    """How fast the shards were answered, apart from each worker's first one, and how long a worker took to start."""
    files = output.with_name(f"{output.name}.shards").glob("*.times")
    shards = sorted((json.loads(file.read_text()) for file in files), key=lambda one: one["begun"])
    first = {}
    for shard in shards:
        first.setdefault(shard["worker"], shard)
    later = [shard for shard in shards if shard not in first.values()]
    seconds = max(shard["ended"] for shard in later) - min(shard["begun"] for shard in later)
    started = mean(shard["ended"] for shard in first.values()) - begun
    return {"shards_per_second": len(later) / seconds, "start": started, "whole": time.time() - begun}


def summary(rounds: list[dict]) -> dict:
    """Medians over the rounds. An efficiency compares sides of the same round."""
    sides = {side: [one for one in rounds if one["side"] == side] for side in SIDES}
    found = {side: {name: median(one[name] for one in held) for name in ("shards_per_second", "start", "whole")}
             for side, held in sides.items()}  # fmt: skip
    for side, workers in (("1 worker", 1), ("2 workers", 2)):
        pairs = zip(sides[side], sides["one process"], strict=True)
        ratios = [one["shards_per_second"] / base["shards_per_second"] / workers for one, base in pairs]
        found[side] |= {"efficiency": median(ratios), "of the rounds": ratios}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=1, help="per shard")
    parser.add_argument("--rows", type=int, default=16, help="contexts of the task, and rows of a batch")
    parser.add_argument("--lines", type=int, default=8, help="requests per shard")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    args = parser.parse_args()
    found = {"command": shlex.join(["python", *sys.argv]), **benchmark(args)}
    print(json.dumps(found["efficiency"], indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main()
