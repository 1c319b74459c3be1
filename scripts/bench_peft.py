"""A whole training step (forward, backward, AdamW), float32 on a CPU: PARA in para_jax beside PEFT on torch.

    python scripts/bench_peft.py --torch-python /path/to/python-with-torch-peft-and-transformers

PARA r=12 beside LoRA r=8 on all linears and (IA)^3 on q, v and up, on the same weights and rows (48 prompt and 16
completion tokens, loss on the completion). Each side is a process of its own (para_jax: this one) and makes one step in
turn, torch with one thread and with two; the better one counts. The torch side needs the extra [bench-peft].
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from para_jax import ParaConfig, init_adapter, load_backbone, load_tokenizer
from para_jax.config import TrainSection
from para_jax.data.batches import Batch
from para_jax.devices import describe_devices
from para_jax.gguf import convert_gguf
from para_jax.hub import resolve_backbone
from para_jax.training.step import init_state, train_step

WORKER = Path(__file__).with_name("peft_worker.py")
PAUSE = 0.4  # seconds, in which the threads of the side before stop spinning


class Ours:
    """PARA's training steps in this process."""

    def __init__(self, backbone: str, tokens: np.ndarray, prompt: int):
        self.model = load_backbone(backbone, dtype="float32", layout="stacked")
        rows, length = tokens.shape
        self.batch = Batch(tokens[None], np.full((1, rows), prompt, np.int32), np.full((1, rows), length, np.int32))
        self.static = dict(completion=length - prompt, config=TrainSection(), total_steps=1000)
        self.state = init_state(init_adapter(ParaConfig(r=12), self.model.config), TrainSection(), 1000)

    def step(self) -> tuple[float, float]:
        start = time.perf_counter()
        self.state, values = jax.block_until_ready(train_step(self.state, self.model, self.batch, **self.static))
        return time.perf_counter() - start, float(values["loss"])


class Theirs:
    """PEFT's training steps in a process of its own."""

    def __init__(self, python: str, folder: str, method: str, tokens: np.ndarray, prompt: int):
        command = [python, str(WORKER), folder, method, json.dumps({"tokens": tokens.tolist(), "prompt": prompt})]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.answer()

    def step(self, threads: int, logits: str) -> tuple[float, float]:
        print(threads, logits, file=self.process.stdin, flush=True)
        return tuple(self.answer())

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("bench_peft: the torch side ended; its message stands above")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--backbone", default="smollm2-135m", help="a .gguf file, or smollm2-135m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/bench_peft.json"))
    args = parser.parse_args()

    tokens = np.random.default_rng(0).integers(1000, 40000, (8, 64)).astype(np.int32)
    ours = Ours(args.backbone, tokens, 48)
    with tempfile.TemporaryDirectory() as folder:
        convert_gguf(resolve_backbone(args.backbone), folder, load_tokenizer(args.backbone))
        theirs = {method: Theirs(args.torch_python, folder, method, tokens, 48) for method in ("lora", "ia3")}
    sides = {"para": ours.step} | {
        f"{method} {logits} {threads}": lambda side=side, threads=threads, logits=logits: side.step(threads, logits)
        for method, side in theirs.items()
        for logits in ("plain", "kept")
        for threads in (1, 2)
    }
    losses = {name: step()[1] for name, step in sides.items()}
    rounds = []
    for _ in range(args.rounds):
        rounds.append({})
        for name, step in sides.items():
            time.sleep(PAUSE)
            rounds[-1][name] = step()[0]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "device": describe_devices(),
        "versions": {"jax": jax.__version__, **theirs["lora"].versions},
        **summary(rounds),
        "first_loss": losses,
        "rounds": rounds,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in ("seconds", "ratios", "first_loss")}, indent=2))


def summary(rounds: list[dict[str, float]]) -> dict:
    """Median seconds of each side, and the ratio of PARA's to the better of torch's thread counts."""
    seconds = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    peers = sorted({name[:-2] for name in seconds if name != "para"})
    return {
        "seconds": seconds,
        "ratios": {p: seconds["para"] / min(seconds[f"{p} 1"], seconds[f"{p} 2"]) for p in peers},
    }


if __name__ == "__main__":
    main()
