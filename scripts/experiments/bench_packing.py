"""Packed rows compared with padded rows: real tokens per second of the training step on a data set."""

from __future__ import annotations

import jax
import numpy as np
from measure import main

from para_jax import load_backbone, load_tokenizer
from para_jax.bench.rounds import interleaved, measurement, paired, single
from para_jax.bench.train import Epoch, Step, epoch_rate
from para_jax.config import DataSection
from para_jax.data.batches import Plan, collate, example_lengths, plan_buckets
from para_jax.data.examples import Example
from para_jax.data.packing import collate_packed, plan_packing
from para_jax.data.records import load_records
from para_jax.data.training_data import encode_records

STEPS = 4  # that are measured of the packed side per round; the others take about as many


def bench_packing(
    backbone: str, *, data: str, length: int = 256, rows: tuple[int, ...] = (8,), remat: str = "dots", rounds: int = 5
) -> dict:
    """Real tokens per second of the training step on a data set: packed, in the default buckets, and in one bucket.
    Also the ratios of their shares of real tokens, which is what packing could bring at most.

    Args:
        data: a .jsonl file or a folder with train.jsonl.
        length: tokens of a packed row.
        rows: packed rows of a step; one number. Padded steps have the rows that hold as many tokens.
    """
    count = single(rows)
    section = DataSection(train=data, max_seq_length=length, truncate="skip")
    examples = encode_records(load_records(section, "train") or [], load_tokenizer(backbone), section).examples
    if not examples:
        raise ValueError(f"--data {data} has no training examples of at most {length} tokens; raise --length")
    model = load_backbone(backbone, layout="stacked")
    epochs = {"packed": packed_epoch(examples, length, count)}
    for name, buckets in (("3 buckets", section.buckets), ("1 bucket", 1)):
        epochs[name] = padded_epoch(examples, buckets, length * count)
    sides = {name: epoch_rate(model, epoch, remat=remat) for name, epoch in epochs.items()}
    found = measurement("tokens/s", interleaved(sides, rounds))
    full = {name: share_of_real_tokens(epoch) for name, epoch in epochs.items()}
    ratios = {}
    for name in ("3 buckets", "1 bucket"):
        ratios[f"packed / {name}"] = paired(found["rounds"], "packed", name)
        ratios[f"packed / {name}, by the padding removed"] = full["packed"] / full[name]
    shapes = {name: [one.batch.tokens.shape[1:] for one in epoch.steps] for name, epoch in epochs.items()}
    return found | {"ratios": ratios, "share_of_real_tokens": full, "shapes": shapes, "row_length": length}


def share_of_real_tokens(epoch: Epoch) -> float:
    return epoch.real / sum(step.count * step.batch.tokens.size for step in epoch.steps)


def packed_epoch(examples: list[Example], length: int, rows: int) -> Epoch:
    """The first steps of a run with packed rows."""
    order = plan_packing(examples, length=length, rows=rows, seed=0)
    made = [
        collate_packed([[examples[i] for i in row] for row in order.batch_rows(i)], order.shape, rows)
        for i in range(STEPS)
    ]
    count = order.batches_per_epoch / STEPS
    steps = [Step(order.shape.completion, jax.tree.map(lambda a: a[None], batch), count) for batch in made]
    return Epoch(steps, sum(example_lengths(examples)))


def padded_epoch(examples: list[Example], count: int, tokens: int) -> Epoch:
    """Steps of a run with `count` buckets: of each bucket one, or more where it has more of them. They hold about
    `tokens` tokens, padding included."""
    buckets, lengths = plan_buckets(examples, count), np.array(example_lengths(examples))
    padded = np.array([bucket.length for bucket in buckets])[np.searchsorted([b.length for b in buckets], lengths)]
    rows = max(1, round(tokens / padded.mean()))
    order = Plan(lengths.tolist(), buckets=buckets, rows=rows, seed=0)
    batches = [order.batch_indices(i) for i in range(order.batches_per_epoch)]
    steps = []
    for index, bucket in enumerate(buckets):
        of_bucket = [indices for where, indices in batches if where == index]
        measured = of_bucket[: round(STEPS * (padded == bucket.length).mean()) or 1]
        for indices in measured:
            batch = collate([examples[e] for e in indices], bucket, rows)
            count_of_each = len(of_bucket) / len(measured)
            steps.append(Step(bucket.completion, jax.tree.map(lambda a: a[None], batch), count_of_each))
    return Epoch(steps, int(lengths.sum()))


if __name__ == "__main__":
    main(bench_packing)
