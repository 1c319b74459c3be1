"""The cost of Ray itself, by simulation: 10,000 adapters with 100 contexts each, in 1,000 shards, on workers without a
model that only wait. Then the same with 1 % of the tasks ending their worker halfway.

    taskset -c 0 python scripts/experiments/bench_ray_overhead.py --output results/bench_ray_overhead.json
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

import ray

from para_jax.io.record_file import write_record
from para_jax.ray import jobs


class Stub:
    """Waits as long as a shard's adapters take, and then writes down that the shard has ended. Some tasks end their
    process halfway, the first time."""

    def __init__(self, call, folder, count):
        self.seconds, self.failures = float(call[0]), float(call[1])
        self.sizes = json.loads(Path(call[2]).read_text())

    def __call__(self, batch):
        index, output = int(batch["index"][0]), Path(batch["output"][0])
        tried = output.with_suffix(".tried")
        fails = is_failure(index, self.failures) and not tried.exists()
        tried.touch()
        time.sleep(self.sizes[index] * self.seconds / (2 if fails else 1))
        if fails:
            os._exit(1)
        with output.open("a") as stream:
            stream.write(f"{os.getpid()} {time.time()} {time.process_time()}\n")
        return {"index": [index]}


def is_failure(index: int, share: float) -> bool:
    return random.Random(index).random() < share


def simulated(folder: Path, sizes: list[int], workers: int, seconds: float, failures: float) -> dict:
    """One run over all shards.

    Args:
        seconds: of an adapter with all its contexts.
        failures: the share of shards that end their first worker.
    """
    (folder / "sizes.json").write_text(json.dumps(sizes))
    outputs, line = [folder / str(index) for index in range(len(sizes))], [seconds, failures, folder / "sizes.json"]
    begun, before = time.time(), cpu_seconds()
    jobs.run_shards(Stub, list(map(str, line)), outputs, "simulating", workers, {"num_cpus": 1})
    whole, after = time.time() - begun, cpu_seconds()
    cpu = sum(after[process] - before[process] for process in before.keys() & after.keys())
    ends = [output.read_text().split() for output in outputs]
    assert all(len(end) == 3 for end in ends)  # each shard has ended, and once
    times, used = sorted(float(end[1]) - begun for end in ends), defaultdict(list)
    for process, _, seconds_used in ends:
        used[process].append(float(seconds_used))
    span, busy = times[-1] - times[0], sum(sizes) * seconds
    made = {"seconds per adapter": seconds, "whole": whole, "start": times[0], "span": span}
    made |= {"span of equal parts": busy / workers, "overhead per shard": (span * workers - busy) / len(sizes)}
    made |= {"CPU per shard, of driver and cluster": cpu / len(sizes)}
    made |= {"CPU per shard, of its worker": sum(max(one) - min(one) for one in used.values()) / len(sizes)}
    failed = sum(is_failure(index, failures) for index in range(len(sizes)))
    return made | {"shards that lost a worker": failed, "processes": len(used)}


def cpu_seconds() -> dict[int, float]:
    """CPU time of this process and of each process of the cluster."""
    parents, used = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parents[int(file.parent.name)] = int(fields[1])
        used[int(file.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    while more := {one for one, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {one: used[one] for one in ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--contexts", type=int, default=100, help="of each adapter")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5e-4, help="that a context takes")
    parser.add_argument("--failures", type=float, default=0.01)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"
    ray.init(address="local", num_cpus=args.workers, include_dashboard=False, log_to_driver=False)
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(args.adapters)]
    held = Counter(int(digest[:16], 16) % args.shards for digest in digests)
    sizes, each = [held[index] for index in range(args.shards)], args.seconds * args.contexts
    found = {"command": shlex.join(["python", *sys.argv]), "ray": ray.__version__, "workers": args.workers}
    found |= {"cores": len(os.sched_getaffinity(0)), "adapters": args.adapters, "contexts": args.contexts}
    found |= {"shards": args.shards, "adapters per shard": {"mean": mean(sizes), "largest": max(sizes)}, "seconds": {}}
    for name, given in {"no work": (0, 0), "work": (each, 0), "work and failures": (each, args.failures)}.items():
        with tempfile.TemporaryDirectory() as folder:
            found["seconds"][name] = simulated(Path(folder), sizes, args.workers, *given)
        print(name, found["seconds"][name], flush=True)
        if args.output:
            write_record(args.output, found)
    ray.shutdown()


if __name__ == "__main__":
    main()
