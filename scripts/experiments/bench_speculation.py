"""What speculation by prompt lookup brings: the time of the same requests with and without it, interleaved.

    python scripts/experiments/bench_speculation.py --rows 1 --tasks wikisql --wikisql shared/data/wikisql/test.jsonl

"orders": quickstart's orders, and "wikisql": questions with their table's columns, each after two solved examples.
"random": text drawn at temperature 1.5, which never repeats.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

from para_jax import AdapterBank, Engine, ParaConfig, Request, init_adapter, load_backbone, load_tokenizer
from para_jax.quickstart.examples import business_examples

TOKENS, SHOTS = 48, 2


def requests_of(kind: str, args, count: int) -> list[Request]:
    options = {"tenant": "tenant", "max_new_tokens": TOKENS}
    if kind == "random":
        texts = [f"A long story about the number {i}." for i in range(count)]
        return [Request(text, **options, temperature=1.5, seed=i, ignore_eos=True) for i, text in enumerate(texts)]
    examples = business_examples("orders", "test", count + SHOTS, 0)
    if kind == "wikisql":
        examples = [json.loads(line) for line in Path(args.wikisql).read_text().splitlines()[: count + SHOTS]]
    shots = "".join(f"{one['prompt']} {one['completion']}\n\n" for one in examples[:SHOTS])
    return [Request(shots + one["prompt"], **options, stop=("\n",)) for one in examples[SHOTS:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--drafted", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=["orders", "random"], choices=["orders", "random", "wikisql"])
    parser.add_argument("--wikisql", help="the file of its examples")
    args = parser.parse_args()
    model, tokenizer = load_backbone("smollm2-135m"), load_tokenizer("smollm2-135m")
    bank = AdapterBank.holding({"tenant": init_adapter(ParaConfig(r=12), model.config)}, model.config)
    sizes = {"slots": args.rows, "max_length": 1024}
    engines = {n: Engine(model, bank, tokenizer, **sizes, speculative_tokens=n) for n in (0, args.drafted)}
    for engine in engines.values():
        engine.warm_up()
    cost = engines[args.drafted]._decoder.verify_cost[False]
    print(f"{args.rows} rows, a pass over {args.drafted} drafted tokens costs {cost:.2f} steps")
    for kind in args.tasks:
        asked, seconds, answers = requests_of(kind, args, max(8, 2 * args.rows)), {n: [] for n in engines}, {}
        before = engines[args.drafted].speculation
        for _, (n, engine) in product(range(args.rounds), engines.items()):
            ids = [engine.submit(request) for request in asked]
            began = time.perf_counter()
            found = {answer.id: answer for answer in engine.run()}
            seconds[n].append(time.perf_counter() - began)
            assert not any(answer.error for answer in found.values()), found[ids[0]].error
            answers[n] = [found[i].tokens for i in ids]
        ratios = np.array(seconds[0]) / np.array(seconds[args.drafted])
        drafts, drafted, accepted = np.array(engines[args.drafted].speculation) - np.array(before)
        same = sum(a == b for a, b in zip(*answers.values(), strict=True))
        print(f"{kind}: {median(ratios):.2f} times as fast, each round {ratios.round(2)}")
        print(f"  {accepted} of {drafted} drafted tokens in {drafts} drafts; {same} of {len(asked)} answers the same")


if __name__ == "__main__":
    main()
