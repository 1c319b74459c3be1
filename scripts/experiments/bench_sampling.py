"""The cost of choosing the next tokens in the engine's step, by the rows' settings."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from measure import main

from para_jax.backbone.load import load_model_config
from para_jax.bench.rounds import interleaved, measurement, milliseconds, paired, single
from para_jax.inference.draw import row_keys, sample

#: Temperature, top_k and top_p of the rows that sample.
SETTINGS = {
    "temperature 0.7": (0.7, 0, 1.0),
    "temperature 0.7, top_p 0.9": (0.7, 0, 0.9),
    "temperature 0.7, top_k 50": (0.7, 50, 1.0),
}


def bench_sampling(backbone: str, *, rows: tuple[int, ...] = (8,), rounds: int = 20) -> dict:
    """Milliseconds to draw one token per row: all rows greedy, one row sampled, all rows sampled. The logits are random
    and have the backbone's vocabulary; no weights are loaded.

    Args:
        rows: one number.
    """
    count, vocab = single(rows), load_model_config(backbone).vocab_size
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (count, vocab)), jnp.float32)
    program = jax.jit(lambda logits, seeds, *how: sample(logits, row_keys(seeds, 0), *how))

    def drawn(sampled: int, temperature: float, top_k: int, top_p: float) -> Callable[[], float]:
        heat = np.where(np.arange(count) < sampled, temperature, 0).astype(np.float32)
        how = heat, np.full(count, top_k, np.int32), np.full(count, top_p, np.float32)
        return milliseconds(lambda: program(logits, np.arange(count, dtype=np.uint32), *how))

    sides = {"all greedy": drawn(0, 0.0, 0, 1.0)}
    for name, settings in SETTINGS.items():
        sides |= {f"one row of {name}": drawn(1, *settings), f"all rows of {name}": drawn(count, *settings)}
    found = measurement("ms", interleaved(sides, rounds))
    ratios = {f"{name} / all greedy": paired(found["rounds"], name, "all greedy") for name in list(sides)[1:]}
    return found | {"ratios": ratios, "rows": count, "vocabulary": vocab}


if __name__ == "__main__":
    main(bench_sampling)
