"""Scaling on Ray: evaluation and generation by 1 and 2 workers, each pinned to a core of its own, next to one process
that is pinned in the same way. With --sides also next to two processes without Ray.

    python scripts/experiments/bench_ray.py --output results/bench_ray.json

It needs two idle cores. All shards are equally large, and the sides take turns. The efficiency is that of the shards
after each worker's first one, in which it loads the model and JAX traces the programs. The compilation cache is filled.
"""

import argparse
import fcntl
import json
import os
import pickle
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, median

from para_jax import EvalOptions, load_config
from para_jax.adapters.names import named_adapters
from para_jax.cli import generate
from para_jax.io.record_file import write_record
from para_jax.ray import jobs
from para_jax.ray.workers import Evaluated, EvaluationWorker, GenerationWorker

WORDS = "stapler lamp chair mouse cable desk phone tray clock fan mug rack late broken lost wrong new old blue".split()
BASE = "one process"
#: (Processes that compute, whether they are Ray's) of each side.
SIDES = {BASE: (1, False), "two processes": (2, False), "1 worker": (1, True), "2 workers": (2, True)}


class Pinned:
    """A worker that takes a core which no other worker has, and notes when each shard began and ended."""

    def __init__(self, *args, **given):
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
        super().__init__(*args, **given)

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

    from para_jax.runtime.devices import library_versions

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        args.backbone = args.backbone or first_layers(folder / "backbone", args.layers)
        prepare(folder, args)
        (folder / "cores").mkdir()
        os.environ |= {"BENCH_RAY_CORES": str(folder / "cores"), "BENCH_RAY_USE": ",".join(map(str, args.cores))}
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["RAY_worker_niceness"] = "0"  # as the others
        jobs.EvaluationWorker, jobs.GenerationWorker = PinnedEvaluation, PinnedGeneration
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
        kinds, rounds = {"evaluation": evaluation, "generation": generation}, []
        for number in range(-1, args.rounds):  # -1 fills the compilation cache
            for kind, call in kinds.items():
                for place, side in enumerate(args.sides):
                    if number < 0 and place:
                        continue
                    output, begun = folder / f"{kind}-{number}-{place}", time.time()
                    call(folder, output, args, *SIDES[side])
                    if number >= 0:
                        rounds.append({"kind": kind, "side": side, "round": number} | measured(output, begun))
                        print(rounds[-1], flush=True)
        ray.shutdown()
    found = {kind: summary([one for one in rounds if one["kind"] == kind], args.sides) for kind in kinds}
    return {"efficiency": found, "rounds": rounds, "versions": library_versions() | {"ray": ray.__version__}}


def first_layers(folder: Path, count: int) -> str:
    """A folder with the first layers of SmolLM2-135M, which a process loads and traces sooner than all 30."""
    from safetensors.numpy import load_file, save_file

    from para_jax import load_tokenizer
    from para_jax.backbone.gguf.convert import convert_gguf
    from para_jax.io.hub import resolve_backbone

    convert_gguf(resolve_backbone("smollm2-135m"), folder, load_tokenizer("smollm2-135m"))
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    above = tuple(f"model.layers.{layer}." for layer in range(count, config["num_hidden_layers"]))
    save_file({name: one for name, one in weights.items() if not name.startswith(above)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    return str(folder)


def prepare(folder: Path, args) -> None:
    """Writes a task, requests, and adapters: as many for each shard, which their hashes decide."""
    from para_jax import ParaConfig, init_adapter, load_model_config, save_adapter
    from para_jax.adapters.preview import previews
    from para_jax.io.shards import Shard

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


def evaluation(folder: Path, output: Path, args, processes: int, on_ray: bool) -> None:
    config = load_config(None, [f"backbone.source={args.backbone}", "runtime.allow_cpu=true"])
    adapters, tasks = named_adapters([f"{folder}/tenants/*"]), [f"{folder}/task:loss"]
    options = EvalOptions(rows=args.rows)
    if on_ray:
        shards = {"shards": args.shards, "workers": processes}
        jobs.evaluate_on_ray(config, adapters, tasks, output=output, options=options, **shards)
    else:
        without_ray("evaluate", output, args.shards, processes, Evaluated(config, adapters, tasks, options))


def generation(folder: Path, output: Path, args, processes: int, on_ray: bool) -> None:
    options = {"backbone": args.backbone, "adapters": [f"{folder}/tenants/*"], "max_new_tokens": args.tokens}
    options |= {"slots": 8, "max_length": 128, "allow_cpu": True}
    if on_ray:
        jobs.generate_on_ray(folder / "in.jsonl", output=output, shards=args.shards, workers=processes, **options)
    else:
        call = jobs.command_options("generate", options | {"input": folder / "in.jsonl", "output": output})
        call.sources, call.tenants = generate.checked(call)
        without_ray("generate", output, args.shards, processes, call)


def without_ray(command: str, output: Path, shards: int, processes: int, call) -> None:
    """Answers the shards in new processes, each pinned as a worker is: the first takes shards 0, 2, ... if there are
    two. Merges them."""
    folder = output.with_name(f"{output.name}.shards")
    folder.mkdir()
    (folder / "call").write_bytes(pickle.dumps(call))
    outputs = [folder / str(index) for index in range(shards)]
    run = [sys.executable, __file__, "part", command, str(folder), str(shards), str(processes)]
    parts = [subprocess.Popen([*run, str(i)], stderr=subprocess.DEVNULL) for i in range(processes)]
    if any([part.wait() for part in parts]):
        sys.exit(f"a process of {command} failed")
    jobs.merge_folders(outputs, output) if command == "evaluate" else jobs.merge_jobs(outputs, output)


def part(command: str, folder: str, shards: str, processes: str, first: str) -> None:
    """What one of these processes does."""
    kind = PinnedEvaluation if command == "evaluate" else PinnedGeneration
    worker = kind(pickle.loads((Path(folder) / "call").read_bytes()), os.getcwd(), int(shards))
    for index in range(int(first), int(shards), int(processes)):
        error = worker({"index": [index], "output": [f"{folder}/{index}"]})["error"][0]
        if error:
            sys.exit(error)


def measured(output: Path, begun: float) -> dict:
    """Seconds of the whole call and until the workers had started, and the rate of the shards after that."""
    whole, by_worker = time.time() - begun, defaultdict(list)
    for file in output.with_name(f"{output.name}.shards").glob("*.times"):
        one = json.loads(file.read_text())
        by_worker[one["worker"]].append(one["ended"])
    ends = [sorted(held) for held in by_worker.values()]
    rate = sum((len(held) - 1) / (held[-1] - held[0]) for held in ends if len(held) > 1)
    return {"whole": whole, "start": mean(held[0] for held in ends) - begun, "shards per second": rate}


def summary(rounds: list[dict], names: list[str]) -> dict:
    """Medians over the rounds. An efficiency compares sides of the same round."""
    sides = {side: [one for one in rounds if one["side"] == side] for side in names}
    found = {side: {name: median(one[name] for one in held) for name in ("whole", "start", "shards per second")}
             for side, held in sides.items()}  # fmt: skip
    for side in names:
        processes, _ = SIDES[side]
        pairs = list(zip(sides[side], sides[BASE], strict=True))
        rates = [one["shards per second"] / base["shards per second"] / processes for one, base in pairs]
        wholes = [base["whole"] / one["whole"] / processes for one, base in pairs]
        found[side] |= {"efficiency": median(rates), "efficiency of each round": rates}
        found[side] |= {"efficiency with the start": median(wholes)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--backbone", help="default: the first --layers layers of SmolLM2-135M")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sides", nargs="+", default=[BASE, "1 worker", "2 workers"], choices=SIDES)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=1, help="per shard")
    parser.add_argument("--rows", type=int, default=16, help="contexts of the task, and rows of a batch")
    parser.add_argument("--lines", type=int, default=8, help="requests per shard")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    args = parser.parse_args()
    if BASE not in args.sides:
        parser.error(f"--sides lacks {BASE!r}, which the others are compared with")
    found = {"command": shlex.join(["python", *sys.argv]), **benchmark(args)}
    print(json.dumps(found["efficiency"], indent=1))
    if args.output:
        write_record(args.output, found)


if __name__ == "__main__":
    part(*sys.argv[2:]) if sys.argv[1:2] == ["part"] else main()
