"""Rows that share a pool with the bytes of 8 rows of `max_length`: tokens per second, rows that decode while requests
wait, and preemptions, by the number of slots and the tokens per block.

The requests are the ragged ones of `para-jax bench serve`, each of its own tenant with PARA.
"""

from __future__ import annotations

from measure import main

from para_jax.backbone.load import load_backbone
from para_jax.bench.decode import METHODS, bank_of
from para_jax.bench.rounds import in_turns, measurement, paired
from para_jax.bench.serve import LONGEST, ragged, serve
from para_jax.data.tokenizer import load_tokenizer
from para_jax.serving.engine import Engine

ROWS = 8  # of LONGEST tokens, whose bytes the pool has


def bench_pool(
    backbone: str,
    *,
    slots: tuple[int, ...] = (16, 32),
    blocks: tuple[int, ...] = (16, 32, 64),
    requests: int = 96,
    rounds: int = 2,
) -> dict:
    """The compared sides are ROWS slots, which always fit, and each number of slots with each block size."""
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    work, bank = ragged(requests, model.config.vocab_size), bank_of(model, METHODS["PARA"], requests)
    a_token = 2 * model.config.num_layers * model.config.kv_width * model.dtype.itemsize
    engines, sides, counts = {}, {}, {}

    def measure(name: str) -> float:
        engine = engines[name]
        before, served = engine.preemptions, serve(engine, work)
        live, preempted = served.live_while_waiting, engine.preemptions - before
        counts[name] = {"rows": live, "preemptions": preempted, "rounds": len(served.rounds)}
        return served.tokens_per_second

    for count, size in [(ROWS, max(blocks)), *((count, size) for count in slots for size in blocks)]:
        name, pool = f"{count} slots, blocks of {size}", (ROWS * LONGEST + size) * a_token  # block 0 is no row's
        options = {"max_length": LONGEST, "block_size": size, "kv_cache_bytes": pool, "prefix_cache_bytes": 0}
        engines[name] = Engine(model, bank, tokenizer, slots=count, **options)
        engines[name].warm_up()
        sides[name] = lambda name=name: measure(name)
    found = measurement("tokens/s", in_turns(sides, rounds))
    base, *others = sides
    ratios = {f"{name} / {base}": paired(found["rounds"], name, base) for name in others}
    return found | {"ratios": ratios, "counts": counts, "requests": requests}


if __name__ == "__main__":
    main(bench_pool)
