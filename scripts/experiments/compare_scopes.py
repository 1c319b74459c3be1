"""PARA with scope `response` next to scope `all` on validation data, as a short training run each.

    python scripts/experiments/compare_scopes.py banking77 --data DATA --output scopes.jsonl

Rows of at most 40 prompt tokens: 640 of training, read once in 80 steps of 8, and 200 of validation (with --test, the
test file). Each line of the output is one run: the mean loss per row and the exact match of the likeliest tokens, also
with another row's prompt in place of its own. A run that the output has already is not made again, so --test needs an
output of its own. results/one_pass.json has such lines. Those with two passes are of commit 7f384f63, where scope
`response` ran the last prompt token twice.
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path

import jax
import numpy as np

from para_jax import ParaConfig, init_adapter, load_backbone, load_tokenizer
from para_jax.config import TrainSection
from para_jax.data.batches import Batch, right_padded, rounded_up
from para_jax.data.examples import joined_completion
from para_jax.model.adapted import adjustments_for
from para_jax.model.tail import prompt_states
from para_jax.training.step import eval_nll, state_of_one, step_of_one

PROMPT, TRAIN, VALIDATION, ROWS, STEPS = 40, 640, 200, 8, 80
SIX = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
ADAPTERS = {
    "r12": {},
    "six": dict(target_modules=SIX, up_bias=True),
    "late": dict(target_modules=SIX, up_bias=True, r=4, late_r=28),
}
#: The maximum number of completion tokens, with the end token.
COMPLETION = {"banking77": 10, "clinc150": 8, "sst2": 2, "wikisql": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=COMPLETION)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder with TASK/train.jsonl and validation.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=["r12"])
    parser.add_argument("--scopes", nargs="+", choices=["response", "all"], default=["response", "all"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test", action="store_true", help="score the whole test file in place of validation rows")
    args = parser.parse_args()
    model, tokenizer = load_backbone("smollm2-135m", dtype="float32"), load_tokenizer("smollm2-135m")
    splits = ("train", TRAIN), (("test", None) if args.test else ("validation", VALIDATION))
    train, scored = (
        rows_of(args.data / args.task / f"{split}.jsonl", tokenizer, COMPLETION[args.task], count)
        for split, count in splits
    )
    held = [json.loads(line) for line in args.output.open()] if args.output.exists() else []
    names = "task", "adapter", "scope", "rate", "seed"
    for run in ((args.task, *each) for each in product(args.adapters, args.scopes, args.rates, args.seeds)):
        about = dict(zip(names, run, strict=True))
        if not any(about.items() <= line.items() for line in held):
            found = about | score(model, trained(model, train, **about), scored, COMPLETION[args.task])
            with args.output.open("a") as stream:
                stream.write(json.dumps(found) + "\n")
            print(found, flush=True)


def rows_of(file: Path, tokenizer, completion: int, count: int | None) -> list[tuple[list[int], list[int]]]:
    """The first rows that fit, as the ids of prompt and completion."""
    found = []
    for row in map(json.loads, file.open()):
        ids = tokenizer.encode(row["prompt"])
        answer = tokenizer.encode(joined_completion(row["prompt"], row["completion"])) + [tokenizer.eos_token_id]
        if len(ids) <= PROMPT and len(answer) <= completion:
            found.append((ids, answer))
    return found[:count]


def batch_of(rows: list, length: int | None) -> Batch:
    """One batch; without a length as short as a multiple of 16 allows, which is faster with scope `all`."""
    whole = [prompt + completion for prompt, completion in rows]
    tokens, lengths = right_padded(whole, len(rows), length or rounded_up(max(map(len, whole)), 16))
    return Batch(tokens, np.array([len(prompt) for prompt, _ in rows], np.int32), lengths)


def states_of(model, rows: list):
    return prompt_states(model, right_padded([prompt for prompt, _ in rows], len(rows), PROMPT)[0])


def trained(model, rows: list, *, task: str, adapter: str, scope: str, rate: float, seed: int):
    """The adapter after one run."""
    config = TrainSection(learning_rate=rate, max_steps=STEPS, batch_size=ROWS)
    fresh = init_adapter(ParaConfig(scope=scope, **ADAPTERS[adapter]), model.config, seed=seed)
    state, order = state_of_one(fresh, config), np.random.default_rng(seed).permutation(len(rows))
    responds, completion = scope == "response", COMPLETION[task]
    step = partial(step_of_one, config=config, total_steps=STEPS, completion=completion)
    for number in range(STEPS):
        chosen = [rows[i] for i in order[(np.arange(ROWS) + ROWS * number) % len(rows)]]
        batch, states = batch_of(chosen, PROMPT + completion if responds else None), None
        if responds:
            states = states_of(model, chosen)
        one_pass = jax.tree.map(lambda a: a[None], (batch, states))
        state, _ = step(state, model, one_pass[0], prompt=PROMPT if responds else None, states=one_pass[1])
    return jax.tree.map(lambda leaf: leaf[0], state.adapters)


def score(model, adapter, rows: list, completion: int, together: int = 20) -> dict[str, float]:
    """Means over the rows, in batches of rows of similar length."""
    rows, found = (
        sorted(rows, key=lambda row: len(row[0])),
        {"loss": [], "exact": [], "shuffled_loss": [], "shuffled_exact": []},
    )
    for start in range(0, len(rows), together):
        batch = batch_of(rows[start : start + together], PROMPT + completion)
        other = adjustments_for(model, adapter, np.roll(batch.tokens, 1, 0), np.roll(batch.prompt_length, 1))
        for name, adapters in (("", adapter), ("shuffled_", other)):
            nats, count, likeliest = jax.device_get(
                eval_nll(model, adapters, batch, completion=completion, prompt=PROMPT)
            )
            found[f"{name}loss"] += (nats / count).tolist()
            found[f"{name}exact"] += likeliest.tolist()
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


if __name__ == "__main__":
    main()
