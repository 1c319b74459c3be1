"""Load on `para-jax serve` by inference-perf: times to the first token and between tokens at several rates of requests.

    python3.13 -m venv perf && perf/bin/pip install inference-perf
    python scripts/experiments/bench_server.py --perf perf/bin/inference-perf --rates 0.5 1 2 --seconds 60

The server runs in a process of its own with --tenants PARA adapters of random weights (scope response). Requests are
split evenly over them (`lora_traffic_split`). Each has a system prompt that all share, a question of its own, and an
answer of fixed length. Writes p50, p90 and p99 of each rate, and inference-perf's reports, to one JSON file.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import yaml

from para_jax import ParaConfig, init_adapter, load_model_config, load_tokenizer, save_adapter
from para_jax.io.record_file import write_record
from para_jax.reports.inspect import new_record

SYSTEM, QUESTION, ANSWER = 128, 24, 32  # tokens
TIMES = {
    "first token": "time_to_first_token",
    "between tokens": "inter_token_latency",
    "per token": "time_per_output_token",
    "whole": "request_latency",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perf", default="inference-perf", help="the command of an environment that has it")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--tenants", type=int, default=32, help="a power of two: inference-perf wants a sum of 1.0")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2], help="requests per second")
    parser.add_argument("--seconds", type=int, default=60, help="of each rate")
    parser.add_argument("--output", type=Path, default=Path("results/bench_server.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_tenants(folder, args)
        with (folder / "server.log").open("w") as log:
            server = start(args, folder, names, log)
            try:
                url = url_of(server)
                file = folder / "config.yaml"
                file.write_text(yaml.safe_dump(config(args, folder, url, names)))
                subprocess.run([args.perf, "--config_file", str(file)], check=True, cwd=folder)
                metrics = urlopen(f"{url}/metrics").read().decode()
            finally:
                server.terminate()
                code = server.wait(60)
        reports = {file.stem: json.loads(file.read_text()) for file in sorted((folder / "reports").glob("s*.json"))}
    found = {
        "tokens": {"system prompt": SYSTEM, "question": QUESTION, "answer": ANSWER},
        "rates": [stage(args, number, reports) for number in range(len(args.rates))],
        "server_exit_code": code,
        "metrics": [line for line in metrics.splitlines() if re.match(r"vllm:\w+(_total|_sum|_count)\b", line)],
        "reports": reports,
    }
    write_record(args.output, new_record(shlex.join(["python", *sys.argv]), found))
    for one in found["rates"]:
        print(one)


def write_tenants(folder: Path, args) -> list[str]:
    """The tokenizer for inference-perf, and the adapters' folders."""
    load_tokenizer(args.backbone).save_pretrained(folder / "tokenizer")
    model = load_model_config(args.backbone)
    names = [f"tenant-{i}" for i in range(args.tenants)]
    for i, name in enumerate(names):
        adapter, draw = init_adapter(ParaConfig(scope="response"), model, seed=i), np.random.default_rng(i)
        for weight in adapter.up.values():
            weight[...] = draw.normal(0, 0.001, weight.shape).astype(np.float32)
        save_adapter(adapter, folder / name, base_model=args.backbone)
    return names


def start(args, folder: Path, names: list[str], log) -> subprocess.Popen:
    adapters = [f"{name}={folder / name}" for name in names]
    command = [sys.executable, "-m", "para_jax.cli", "serve", "--backbone", args.backbone, "--adapters", *adapters]
    command += ["--slots", str(args.slots), "--max-length", "256", "--port", "0", "--max-logprobs", "0", "--allow-cpu"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def url_of(server: subprocess.Popen) -> str:
    """The URL that the server prints when it is ready."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return found[0]
    sys.exit("the server did not start")


def config(args, folder: Path, url: str, names: list[str]) -> dict:
    return {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "shared_prefix",
            "shared_prefix": {
                "num_unique_system_prompts": 1,
                "num_users_per_system_prompt": 64,
                "system_prompt_len": SYSTEM,
                "question_len": QUESTION,
                "output_len": ANSWER,
                "seed": 0,
            },
        },
        "load": {
            "type": "poisson",
            "stages": [{"rate": rate, "duration": args.seconds} for rate in args.rates],
            "num_workers": 1,
            "base_seed": 0,
            "lora_traffic_split": [{"name": name, "split": 1 / len(names)} for name in names],
        },
        "server": {"type": "vllm", "model_name": args.backbone, "base_url": url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
        "storage": {"local_storage": {"path": str(folder / "reports")}},
    }


def stage(args, number: int, reports: dict) -> dict:
    """A rate's percentiles, in milliseconds, from inference-perf's report."""
    report = reports[f"stage_{number}_lifecycle_metrics"]
    latency, load = report["successes"]["latency"], report["load_summary"]
    found = {
        "asked": args.rates[number],
        "sent per second": load.get("achieved_rate"),
        "answers": report["successes"]["count"],
        "failures": report["failures"]["count"],
        "tokens per second": report["successes"]["throughput"]["output_tokens_per_sec"],
    }
    for name, theirs in TIMES.items():
        values = latency[theirs]
        found[name] = {
            key: round(1e3 * values[of], 1) for key, of in {"p50": "median", "p90": "p90", "p99": "p99"}.items()
        }
    return found


if __name__ == "__main__":
    main()
