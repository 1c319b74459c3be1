"""`para-jax bench train`: tokens a second of the whole training step."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from ..backbone.load import load_backbone
from ..config import ParaConfig, TrainSection
from ..data.batches import Batch
from ..model import init_adapter
from ..training.step import init_state, train_step
from .rounds import interleaved, random_tokens, summary


def bench_train(backbone: str, *, rows: int = 8, prompt: int = 48, completion: int = 16, rounds: int = 5) -> dict:
    """Tokens a second of PARA's whole training step, without and with recomputing each layer in the backward pass."""
    model = load_backbone(backbone, layout="stacked")
    sides = {f"remat {remat}": train_side(model, remat, rows, prompt, completion) for remat in ("none", "block")}
    found = summary("tokens/s", interleaved(sides, rounds))
    ratio = found["medians"]["remat block"] / found["medians"]["remat none"]
    sizes = {"rows": rows, "prompt_tokens": prompt, "completion_tokens": completion}
    return found | {"ratios": {"remat block / none": ratio}} | sizes


def train_side(model, remat: str, rows: int, prompt: int, completion: int) -> Callable[[], float]:
    config, total_steps = TrainSection(remat=remat), 1000
    tokens = random_tokens(model, rows, prompt + completion)
    lengths = (np.full((1, rows), n, np.int32) for n in (prompt, prompt + completion))
    batch = Batch(tokens[None], *lengths)
    state = init_state(init_adapter(ParaConfig(), model.config), config, total_steps)

    def tokens_a_second() -> float:
        nonlocal state
        begun = time.perf_counter()
        stepped = train_step(state, model, batch, completion=completion, config=config, total_steps=total_steps)
        state, _ = jax.block_until_ready(stepped)
        return tokens.size / (time.perf_counter() - begun)

    return tokens_a_second
