"""The training step with many tenants in the batch, compared with the step of one adapter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from measure import main

from para_jax.adapters.rows import stack_adapters
from para_jax.backbone.load import load_backbone
from para_jax.bench.rounds import interleaved, measurement, milliseconds, paired
from para_jax.bench.train import random_batch
from para_jax.config import Ia3Config, LoraConfig, ParaConfig, TrainSection
from para_jax.model.adapted import init_adapter
from para_jax.training.optimizer import learning_rates
from para_jax.training.step import init_state, train_step

METHODS = {"PARA": ParaConfig(), "(IA)^3": Ia3Config(), "LoRA": LoraConfig()}
TENANTS, PROMPT, COMPLETION, STEPS = 16, 10, 6, 1000


def bench_tenants(backbone: str, *, rows: tuple[int, ...] = (1,), rounds: int = 5) -> dict:
    """Milliseconds of a step on 16 tenants' rows of 16 tokens, by method: with all tenants in a batch, in a stack of 16
    and in one of 64; and with as many rows of one tenant, as in a run of one adapter.

    Args:
        rows: of each tenant; sizes such as 1,4.
    """
    model = load_backbone(backbone, layout="stacked")
    measured: list[dict[str, float]] = [{} for _ in range(rounds)]
    ratios = {}
    for method, config in METHODS.items():
        for each in rows:
            where = f"{method}, {TENANTS} x {each} rows"
            sides = sides_of(model, config, each)
            for found, more in zip(measured, interleaved(sides, rounds), strict=True):
                found |= {f"{where}, {side}": value for side, value in more.items()}
            for side, base in (("tenants", "one tenant"), ("of 64", "one tenant")):
                ratios[f"{where}: {side} / {base}"] = paired(measured, f"{where}, {side}", f"{where}, {base}")
    return measurement("ms", measured) | {
        "ratios": ratios,
        "row_tokens": PROMPT + COMPLETION,
        "dtype": str(model.dtype),
    }


def sides_of(model, config, each: int) -> dict[str, Callable[[], float]]:
    """The sides that are compared. Methods and sizes come one after another, so their states need not fit at once."""
    batch = random_batch(model.config.vocab_size, TENANTS * each, 1, PROMPT, COMPLETION)
    return {
        "one tenant": tenants_step(model, config, batch, 1, 1),
        "tenants": tenants_step(model, config, batch, TENANTS, TENANTS),
        "of 64": tenants_step(model, config, batch, TENANTS, 64),
    }


def tenants_step(model, config, batch, groups: int, stack: int) -> Callable[[], float]:
    section = TrainSection()
    adapters = stack_adapters([init_adapter(config, model.config)] * stack).adapters
    state, rates = init_state(adapters, section), learning_rates([section] * stack, [STEPS] * stack)
    index = np.arange(groups, dtype=np.int32)[None]

    def step():
        nonlocal state
        state, _ = train_step(state, model, batch, index, rates, completion=COMPLETION, config=section)
        return state

    return milliseconds(step)


if __name__ == "__main__":
    main(bench_tenants)
