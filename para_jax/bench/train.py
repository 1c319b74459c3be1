"""`para-jax bench train`: tokens per second of the training step, by what the backward pass keeps. `para-jax bench
packing`: packed rows compared with padded rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..backbone.load import load_backbone
from ..config import DataSection, ParaConfig, TrainSection, allowed_values
from ..data.batches import Batch, Bucket, Plan, collate, example_lengths, plan_buckets
from ..data.encode_records import encode_records
from ..data.examples import Example
from ..data.packing import Packed, RowShape, collate_packed, plan_packing
from ..data.records import load_records
from ..data.tokenizer import load_tokenizer
from ..model import init_adapter
from ..roofline import peak_rate
from ..training.step import state_of_one, step_of_one
from .decode import random_backbone
from .rounds import interleaved, measurement, paired, single

CONFIG: dict[str, Any] = {"total_steps": 1000}


def bench_train(
    backbone: str,
    *,
    rows: tuple[int, ...] = (8,),
    prompt: int = 48,
    completion: int = 16,
    packed: int = 1,
    random: bool = False,
    remat: tuple[str, ...] = allowed_values(TrainSection, "remat"),
    rounds: int = 5,
) -> dict:
    """Tokens per second of PARA's whole training step, by train.remat. Where the device's peak is known, also the share
    of it that the products with the backbone's weights take (2 FLOPs forward and 2 backward per weight and token).

    Args:
        rows: of a step; one number.
        packed: examples per row; 1: rows are not packed.
        random: random weights in the shape of `backbone`.
    """
    count = single(rows)
    model = random_backbone(backbone).with_layout("stacked") if random else load_backbone(backbone, layout="stacked")
    batch = random_batch(model.config.vocab_size, count, packed, prompt, completion)
    tokens = batch.tokens.size
    epoch = Epoch([Step(completion, batch, 1)], tokens)
    sides = {f"remat {name}": epoch_rate(model, epoch, remat=name) for name in remat}
    found = measurement("tokens/s", interleaved(sides, rounds))
    ratios = {
        f"{name} / {remat[0]}": paired(found["rounds"], f"remat {name}", f"remat {remat[0]}") for name in remat[1:]
    }
    peak = peak_rate(model.config, jax.devices()[:1])
    if peak:
        ratios |= {f"{name}: share of the peak": rate / peak for name, rate in found["medians"].items()}
    sizes = {"rows": count, "examples_a_row": packed, "prompt_tokens": prompt, "completion_tokens": completion}
    return found | {"ratios": ratios, "dtype": str(model.dtype)} | sizes


def random_batch(vocab: int, rows: int, packed: int, prompt: int, completion: int) -> Batch | Packed:
    """Rows of `packed` examples with `prompt` and `completion` tokens each; arrays [1, rows, ...]."""
    draw = np.random.default_rng(0)
    examples = [
        Example(*(draw.integers(0, vocab, n).tolist() for n in (prompt, completion))) for _ in range(rows * packed)
    ]
    if packed == 1:
        batch = collate(examples, Bucket(prompt + completion, completion, prompt), rows)
    else:
        shape = RowShape(packed * (prompt + completion), packed * completion, packed, packed * prompt)
        batch = collate_packed([examples[i::rows] for i in range(rows)], shape, rows)
    return jax.tree.map(lambda a: a[None], batch)


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
    full = {name: epoch.share_of_real_tokens for name, epoch in epochs.items()}
    ratios = {}
    for name in ("3 buckets", "1 bucket"):
        ratios[f"packed / {name}"] = paired(found["rounds"], "packed", name)
        ratios[f"packed / {name}, by the padding removed"] = full["packed"] / full[name]
    shapes = {name: [one.batch.tokens.shape[1:] for one in epoch.steps] for name, epoch in epochs.items()}
    return found | {"ratios": ratios, "share_of_real_tokens": full, "shapes": shapes, "row_length": length}


STEPS = 4  # that are measured of the packed side per round; the others take about as many


class Step(NamedTuple):
    """A training step that is measured."""

    completion: int
    """static: see train_step"""
    batch: Batch | Packed
    count: float
    """the steps of the epoch that are like it"""


class Epoch(NamedTuple):
    steps: list[Step]
    real: int
    """tokens of all its examples, without padding"""

    @property
    def share_of_real_tokens(self) -> float:
        return self.real / sum(step.count * step.batch.tokens.size for step in self.steps)


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


def epoch_rate(model, epoch: Epoch, *, remat: str) -> Callable[[], float]:
    """Real tokens per second of an epoch, by the time of each of its steps."""
    config = TrainSection(remat=remat)  # pyright: ignore[reportArgumentType]
    state = state_of_one(init_adapter(ParaConfig(), model.config), config)

    def tokens_per_second() -> float:
        nonlocal state
        seconds = 0.0
        for step in epoch.steps:
            begun = time.perf_counter()
            state, _ = step_of_one(state, model, step.batch, completion=step.completion, config=config, **CONFIG)
            jax.block_until_ready(state)
            seconds += step.count * (time.perf_counter() - begun)
        return epoch.real / seconds

    return tokens_per_second
