"""Trains the same adapters here and with Hugging Face PEFT on torch, float32 on a CPU: same initial weights, batches,
order, AdamW, schedule, clipping and loss. Then both score the same test rows.

    python scripts/experiments/compare_peft.py --torch-python PYTHON --data data/sst2    # one with torch and peft

LoRA r=9 on q, v and up, (IA)^3 with PEFT's defaults, and activated LoRA (the same LoRA, with scope `response` here).
Each case takes 60 steps of 8 rows, with the loss on the completion. The answers in --data must be single tokens. The
answer to a row is the likelier one after the prompt. A file that exists keeps the results of other cases and seeds. The
torch side (compare_peft_worker.py) needs the extra [bench-peft].

With --control the other side is this one again, with the rows of each batch in reverse order: only rounding differs.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measure import options

from para_jax import (
    Ia3Config,
    LoraConfig,
    init_adapter,
    load_adapter,
    load_backbone,
    load_tokenizer,
    prefill,
    save_adapter,
)
from para_jax.adapters.adapter import named_leaves
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.config import DataSection, TrainSection
from para_jax.data.batches import Batch, Plan, collate, example_lengths, plan_buckets
from para_jax.data.examples import Example
from para_jax.data.records import load_records
from para_jax.data.training_data import encode_records
from para_jax.io.hub import resolve_backbone
from para_jax.io.record_file import write_record
from para_jax.reports.inspect import new_record
from para_jax.training.optimizer import learning_rates
from para_jax.training.step import state_of_one, step_of_one

STEPS, ROWS, TESTED, LENGTH = 60, 8, 500, 96
WORKER = Path(__file__).with_name("compare_peft_worker.py")
LORA = LoraConfig(r=9, lora_alpha=9, target_modules=("q_proj", "v_proj", "up_proj"))
#: The learning rates are those that compare_methods.py chose for SST-2.
CASES = {"LoRA": (LORA, 3e-3), "(IA)^3": (Ia3Config(), 1e-2), "activated LoRA": (LORA, 3e-3)}


class Data(NamedTuple):
    """What both sides train on and score."""

    batches: list[tuple[Batch, int]]
    """per step: a batch, and the largest number of completion tokens in it"""
    tested: list[Example]
    answers: list[int]
    """the token of each possible answer"""


def main():
    parser = options(__doc__, "results/compare_peft.json")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--data", default="data/sst2", help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--seed", type=int, default=0, help="of the adapter's initial weights and the order of the rows"
    )
    parser.add_argument("--control", action="store_true", help="no torch: compare with the rows in reverse order")
    args = parser.parse_args()

    about = {"data": args.data, "backbone": args.backbone}
    held = about | (json.loads(args.output.read_text()) if args.output.exists() else {"cases": {}})
    for key, value in about.items():
        if held[key] != value:
            sys.exit(f"compare_peft: {args.output} holds cases of {held[key]}; choose another --output for {value}")
    cases = held["cases"]
    model, tokenizer = load_backbone(args.backbone, dtype="float32", layout="stacked"), load_tokenizer(args.backbone)
    data = load_data(args.data, tokenizer, args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        convert_gguf(resolve_backbone(args.backbone), Path(temporary) / "backbone", tokenizer)
        for name in args.cases:
            config, rate = with_invocation(*CASES[name], data) if name == "activated LoRA" else CASES[name]
            folder = Path(temporary) / name.replace(" ", "-")
            section = TrainSection(learning_rate=rate)
            hand_over(folder, init_adapter(config, model.config, seed=args.seed), data, section)
            if args.control:
                theirs, versions = our_side(model, folder, in_reverse(data), section, "theirs"), {}
            else:
                theirs, versions = torch_side(args.torch_python, Path(temporary) / "backbone", folder)
            ours = our_side(model, folder, data, section)
            found = compared(ours, theirs, [data.answers.index(e.completion_ids[0]) for e in data.tested])
            found["weights"] = distance(
                *(load_adapter(folder / of, model.config) for of in ("start", "ours", "theirs"))
            )
            cases[f"{name}, seed {args.seed}{', control' if args.control else ''}"] = {
                "learning_rate": rate,
                "torch_versions": versions,
            } | found
            record = {"steps": STEPS, "rows": ROWS, "tested": len(data.tested)} | about | {"cases": cases}
            write_record(args.output, new_record(shlex.join(["python", *sys.argv]), record))
            print(name, json.dumps({k: v for k, v in found.items() if k != "losses"}), flush=True)


# ------------------------------------------------------------------------------------------------------------- the data


def load_data(folder: str, tokenizer, seed: int, steps: int = STEPS, tested: int = TESTED) -> Data:
    section = DataSection(train=folder, max_seq_length=LENGTH, truncate="skip")
    train, test = (
        encode_records(load_records(section, s) or [], tokenizer, section).examples for s in ("train", "test")
    )
    answers = sorted({example.completion_ids[0] for example in test})
    if any(len(example.completion_ids) != 2 for example in [*train, *test]):
        sys.exit(f"compare_peft: --data {folder} has answers of several tokens; give data whose answers are one token")
    buckets = plan_buckets(train, section.buckets)
    plan = Plan(example_lengths(train), buckets=buckets, rows=ROWS, seed=seed)
    batches = []
    for i in range(steps):
        bucket, rows = plan.batch_indices(i)
        batches.append((collate([train[row] for row in rows], buckets[bucket], ROWS), buckets[bucket].completion))
    return Data(batches, list(test[:tested]), answers)


def with_invocation(config: LoraConfig, rate: float, data: Data) -> tuple[LoraConfig, float]:
    """The config as activated LoRA: its invocation is what all prompts end with."""
    prompts = [example.prompt_ids for example in data.tested]
    prompts += [tokens[:n].tolist() for batch, _ in data.batches for tokens, n in zip(*batch[:2], strict=True) if n > 1]
    window, shortest = 0, min(map(len, prompts))
    while window < shortest and len({prompt[-window - 1] for prompt in prompts}) == 1:
        window += 1
    if not window:
        sys.exit("compare_peft: the prompts end differently, and activated LoRA needs one end; leave it out of --cases")
    invocation = tuple(prompts[0][-window:])
    return replace(config, scope="response", scope_window=window, alora_invocation_tokens=invocation), rate


def hand_over(folder: Path, adapter, data: Data, section: TrainSection) -> None:
    """Writes what the torch side reads: the fresh adapter as a PEFT folder, the batches, rates and test prompts."""
    save_adapter(adapter, folder / "start")
    arrays: dict[str, Any] = {"rates": rates_of(section, len(data.batches))}
    for i, (batch, _) in enumerate(data.batches):
        arrays |= {f"{name}_{i}": values for name, values in batch._asdict().items()}
    longest = max(len(example.prompt_ids) for example in data.tested)
    arrays["prompts"] = np.stack([np.pad(e.prompt_ids, (0, longest - len(e.prompt_ids))) for e in data.tested])
    arrays["prompt_lengths"] = np.array([len(example.prompt_ids) for example in data.tested])
    arrays["answers"] = np.array(data.answers)
    adam = {"betas": (section.adam_b1, section.adam_b2), "eps": section.adam_eps, "weight_decay": section.weight_decay}
    (folder / "training.json").write_text(json.dumps({"adam": adam, "max_grad_norm": section.max_grad_norm}))
    np.savez(folder / "given.npz", **arrays)


def rates_of(section: TrainSection, steps: int) -> np.ndarray:
    """The learning rate of every step."""
    return np.asarray(learning_rates([section], [steps]).at(np.arange(steps), section.schedule), np.float64)


# ------------------------------------------------------------------------------------------------------------ the sides


class Found(NamedTuple):
    """What one side gives."""

    losses: np.ndarray
    """[steps], before each step"""
    scores: np.ndarray
    """[rows, answers], log-probabilities after training"""
    seconds: float


def our_side(model, folder: Path, data: Data, section: TrainSection, to: str = "ours") -> Found:
    """Trains from the same folder as the torch side, and writes the adapter to a folder in it."""
    begun, losses = time.perf_counter(), []
    state = state_of_one(load_adapter(folder / "start", model.config), section)
    for batch, completion in data.batches:
        passes = jax.tree.map(lambda a: a[None], batch)
        sizes = {"completion": completion, "total_steps": len(data.batches)}
        state, values = step_of_one(state, model, passes, config=section, **sizes)
        losses.append(float(values["loss"][0]))
    adapter = jax.tree.map(lambda leaf: leaf[0], state.adapters)
    save_adapter(adapter, folder / to)
    return Found(np.array(losses), scored(model, adapter, data), time.perf_counter() - begun)


def scored(model, adapter, data: Data, rows: int = 25) -> np.ndarray:
    """The log-probability of each answer after each test prompt, [rows, answers], in batches of similar length."""
    lengths = np.array([len(example.prompt_ids) for example in data.tested])
    order, scores = np.argsort(lengths, kind="stable"), np.zeros((len(lengths), len(data.answers)))
    for part in (order[i : i + rows] for i in range(0, len(order), rows)):
        tokens = np.zeros((rows, -(-lengths[part].max() // 16) * 16), np.int32)
        for row, i in zip(tokens, part, strict=False):
            row[: lengths[i]] = data.tested[i].prompt_ids
        real = np.pad(lengths[part], (0, rows - len(part)), constant_values=1)
        logits, _ = prefill(model, adapter, tokens, real, max_length=tokens.shape[1])
        likely = jax.nn.log_softmax(logits)[:, jnp.array(data.answers)]
        scores[part] = np.asarray(likely)[: len(part)]
    return scores


def in_reverse(data: Data) -> Data:
    """The same rows in each batch, the last one first."""
    return data._replace(batches=[(jax.tree.map(lambda a: a[::-1], batch), n) for batch, n in data.batches])


def torch_side(python: str, backbone: Path, folder: Path) -> tuple[Found, dict]:
    """Runs compare_peft_worker.py, which writes `theirs` and found.npz, and returns the versions that it prints."""
    said = subprocess.run([python, str(WORKER), str(backbone), str(folder)], stdout=subprocess.PIPE, text=True)
    if said.returncode:
        sys.exit("compare_peft: the torch side failed; its message stands above")
    with np.load(folder / "found.npz") as found:
        return Found(found["losses"], found["scores"], float(found["seconds"])), json.loads(
            said.stdout.splitlines()[-1]
        )


# ------------------------------------------------------------------------------------------------------- the comparison


def compared(ours: Found, theirs: Found, right: list[int]) -> dict:
    """How far the two sides are apart.

    Args:
        right: the index of each test row's right answer.
    """
    relative = abs(ours.losses - theirs.losses) / theirs.losses
    rows, chosen = np.arange(len(right)), [side.scores.argmax(axis=1) for side in (ours, theirs)]
    accuracy = [float((answers == right).mean()) for answers in chosen]
    return {
        "largest_difference": float(abs(ours.losses - theirs.losses).max()),
        "largest_relative_difference": float(relative.max()),
        "at_step": int(relative.argmax()) + 1,
        "first_steps": float(relative[:10].max()),
        "median_relative_difference": float(np.median(relative)),
        "accuracy": accuracy,
        "standard_error": float((accuracy[1] * (1 - accuracy[1]) / len(right)) ** 0.5),
        "rows_that_differ": int((chosen[0] != chosen[1]).sum()),
        "test_loss": [float(-side.scores[rows, right].mean()) for side in (ours, theirs)],
        "largest_difference_of_scores": float(abs(ours.scores - theirs.scores).max()),
        "seconds": [ours.seconds, theirs.seconds],
        "losses": {"ours": ours.losses.tolist(), "theirs": theirs.losses.tolist()},
    }


def distance(start, ours, theirs) -> float:
    """The distance of the two trained adapters, relative to how far ours moved (L2 over all weights)."""
    a, b, c = (np.concatenate([np.ravel(leaf) for leaf in named_leaves(one).values()]) for one in (start, ours, theirs))
    return float(np.linalg.norm(b - c) / np.linalg.norm(b - a))


if __name__ == "__main__":
    main()
