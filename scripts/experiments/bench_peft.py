"""A whole training step (forward, backward, AdamW), float32 on a CPU: PARA in para_jax next to PEFT on torch.

    python scripts/experiments/bench_peft.py --torch-python /path/to/python-with-torch-peft-and-transformers

PARA r=12 with scope all and response, LoRA r=8 on all linears, and (IA)^3 on q, v and up, on the same weights and rows
(48 prompt and 16 completion tokens, loss on the completion). Each side is a process of its own (para_jax: this one) and
makes one step in turn; torch runs with one thread and with one per core, and with logits at every position
("plain") and where the loss needs them ("kept"). Each ratio is to the better number of threads. The torch side needs
the extra [bench-peft].
"""

import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from measure import options
from torch_side import PAUSE, TorchSide

from para_jax import ParaConfig, init_adapter, load_backbone, load_tokenizer
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.bench.record import report
from para_jax.bench.rounds import interleaved, measurement, random_tokens
from para_jax.config import TrainSection
from para_jax.data.batches import Batch
from para_jax.io.hub import resolve_backbone
from para_jax.reports.inspect import new_record
from para_jax.runtime.devices import library_versions
from para_jax.training.step import state_of_one, step_of_one

ROWS, PROMPT, COMPLETION = 8, 48, 16
WORKER = Path(__file__).with_name("peft_worker.py")


class Para:
    """PARA's training steps, in the layout and by the function that `train` uses."""

    def __init__(self, model, scope: str, tokens: np.ndarray):
        self.model, self.config = model, TrainSection()
        lengths = (np.full((1, ROWS), n, np.int32) for n in (PROMPT, PROMPT + COMPLETION))
        self.batch = Batch(tokens[None], *lengths)
        self.state = state_of_one(init_adapter(ParaConfig(r=12, scope=scope), model.config), self.config)
        self.losses = []

    def step(self) -> float:
        time.sleep(PAUSE)
        begun = time.perf_counter()
        sizes = {"completion": COMPLETION, "prompt": PROMPT, "total_steps": 1000}
        stepped = step_of_one(self.state, self.model, self.batch, config=self.config, **sizes)
        self.state, values = jax.block_until_ready(stepped)
        seconds = time.perf_counter() - begun
        self.losses.append(float(values["loss"][0]))
        return seconds


class Peft(TorchSide):
    """PEFT's training steps."""

    def __init__(self, python: str, folder: str, method: str, tokens: np.ndarray):
        super().__init__(python, WORKER, folder, method, json.dumps({"tokens": tokens.tolist(), "prompt": PROMPT}))
        self.losses = []

    def step(self, threads: int, logits: str) -> float:
        seconds, loss = self.ask(threads, logits)
        self.losses.append(loss)
        return seconds


def main():
    parser = options(__doc__, "results/bench_peft.json")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    model = load_backbone(args.backbone, dtype="float32", layout="stacked")
    tokens = random_tokens(model, ROWS, PROMPT + COMPLETION)
    with tempfile.TemporaryDirectory() as folder:
        convert_gguf(resolve_backbone(args.backbone), folder, load_tokenizer(args.backbone))
        peers = {method: Peft(args.torch_python, folder, method, tokens) for method in ("lora", "ia3")}
    ours = {"para": Para(model, "all", tokens), "para response": Para(model, "response", tokens)}
    threads = sorted({1, len(os.sched_getaffinity(0))})
    variants = [(method, logits, n) for method in peers for logits in ("plain", "kept") for n in threads]
    sides = {f"{m} {logits} {n}": lambda m=m, logits=logits, n=n: peers[m].step(n, logits) for m, logits, n in variants}
    sides = {name: side.step for name, side in ours.items()} | sides
    found = measurement("s per step", interleaved(sides, args.rounds))
    seconds = found["medians"]
    best = {f"{m} {logits}": min(seconds[f"{m} {logits} {n}"] for n in threads) for m, logits, _ in variants}
    more = {
        "versions": library_versions() | peers["lora"].versions,
        "ratios": {f"{name} / {peer}": seconds[name] / value for name in ours for peer, value in best.items()},
        "first_loss": {name: side.losses[0] for name, side in (ours | peers).items()},
    }
    report(new_record(shlex.join(["python", *sys.argv]), found | more), args.output)
    print(f"first loss: {more['first_loss']}")


if __name__ == "__main__":
    main()
