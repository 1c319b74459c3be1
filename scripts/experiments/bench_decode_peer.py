"""One decode step, float32 on a CPU: para_jax and transformers, and many tenants next to PEFT's mixed LoRA.

    python scripts/experiments/bench_decode_peer.py --torch-python /path/to/python-with-torch-peft-and-transformers

Sides, on the same weights and tokens: the backbone alone with 1 and 32 rows in both, PARA r=12 for 8 tenants in 32 rows
here, and LoRA r=8 on all linears for 8 tenants in 32 rows in PEFT (`adapter_names`). Each side makes one step in turn,
always from the same context; torch runs with one thread and with two, and a ratio is to the better of them. The torch
side needs the extra [bench-peft].
"""

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

from measure import options
from torch_side import PAUSE, TorchSide

from para_jax import ParaConfig, load_backbone, load_tokenizer
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.bench.decode import Side, Step, bank_of
from para_jax.bench.record import report
from para_jax.bench.rounds import interleaved, measurement, paired, random_tokens
from para_jax.io.hub import resolve_backbone
from para_jax.reports.inspect import new_record
from para_jax.runtime.devices import library_versions

ROWS, TENANTS = 32, 8
WORKER = Path(__file__).with_name("decode_worker.py")


class Torch(TorchSide):
    """Torch's decode steps."""

    def __init__(self, python: str, folder: str, tokens):
        super().__init__(python, WORKER, folder, json.dumps({"tokens": tokens.tolist(), "tenants": TENANTS}))
        self.chosen = {}

    def step(self, threads: int, rows: int, which: str) -> float:
        seconds, self.chosen[rows, which] = self.ask(threads, rows, which)
        return seconds * 1e3


def main():
    parser = options(__doc__, "results/bench_decode_peer.json")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    model = load_backbone(args.backbone, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        convert_gguf(resolve_backbone(args.backbone), folder, load_tokenizer(args.backbone))
        torch = Torch(args.torch_python, folder, random_tokens(model, ROWS, args.context + 1))
    bank = bank_of(model, ParaConfig(), TENANTS)
    tenants = bank.rows([bank.names[i % TENANTS] for i in range(ROWS)])
    steps = {f"base, {n} rows": Step(model, Side("base", n, 0, None), args.context) for n in (1, ROWS)}
    steps[f"PARA, {ROWS} rows"] = Step(model, Side("PARA", ROWS, TENANTS, tenants), args.context)

    caches = {name: step.prefill(args.context)[1].cache for name, step in steps.items()}

    def paused(name: str) -> float:
        time.sleep(PAUSE)
        wall, _, caches[name] = steps[name](caches[name])
        return wall

    peers = [(rows, which, n) for rows, which in ((1, "base"), (ROWS, "base"), (ROWS, "mixed")) for n in (1, 2)]
    sides = {name: lambda name=name: paused(name) for name in steps}
    sides |= {f"torch {w}, {r} rows, {n} threads": lambda r=r, w=w, n=n: torch.step(n, r, w) for r, w, n in peers}
    found = measurement("ms per step", interleaved(sides, args.rounds))

    def ratio(side: str, peer: str) -> float:  # to the better number of threads
        names = [f"torch {peer}, {n} threads" for n in (1, 2)]
        return paired(found["rounds"], side, min(names, key=found["medians"].__getitem__))

    more = {
        "versions": library_versions() | torch.versions,
        "ratios": {
            "base / torch, 1 row": ratio("base, 1 rows", "base, 1 rows"),
            f"base / torch, {ROWS} rows": ratio(f"base, {ROWS} rows", f"base, {ROWS} rows"),
            f"PARA / PEFT's mixed LoRA, {ROWS} rows, {TENANTS} tenants": ratio(
                f"PARA, {ROWS} rows", f"mixed, {ROWS} rows"
            ),
        },
        "same_tokens": {n: steps[f"base, {n} rows"].chosen.tolist() == torch.chosen[n, "base"] for n in (1, ROWS)},
        "context_tokens": args.context,
    }
    report(new_record(shlex.join(["python", *sys.argv]), found | more), args.output)
    print(f"the same tokens as torch: {more['same_tokens']}")


if __name__ == "__main__":
    main()
