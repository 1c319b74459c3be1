"""`para-jax bench train`: tokens per second of the training step, by what the backward pass keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..backbone.load import load_backbone
from ..config import ParaConfig, TrainSection, allowed_values
from ..data.batches import Batch, Bucket, collate
from ..data.examples import Example
from ..data.packing import Packed, RowShape, collate_packed
from ..model.adapted import init_adapter
from ..runtime.devices import peak_rate
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
