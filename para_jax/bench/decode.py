"""`para-jax bench decode`: the cost of one decode step with many tenants, by method, compared with the plain backbone.

The step is the compiled one that generate uses. All sides have the same context and make one step each per round, in a
new random order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.bank import AdapterBank
from ..adapters.methods import method_of
from ..adapters.rows import Rows
from ..backbone.load import abstract_backbone, chosen_dtype, load_backbone, load_model_config
from ..backbone.transformer import Transformer
from ..config import SITES, Ia3Config, LoraConfig, ParaConfig
from ..data.batches import rounded_up
from ..inference.generate import CACHE_MULTIPLE, next_token
from ..model.adapted import DecodeState, decode, init_adapter, prefill
from .rounds import measurement, medians, paired, random_tokens

#: LoRA adapts all seven linears; at r = 4 it has about as many parameters as PARA at r = 12.
METHODS = {"PARA": ParaConfig(), "(IA)^3": Ia3Config(target_modules=("q_proj", "v_proj", "up_proj"))} | {
    f"LoRA r={r}": LoraConfig(r=r, lora_alpha=r, target_modules=SITES) for r in (4, 8, 16)
}


class Side(NamedTuple):
    """A method in a batch: its rows, and the number of different tenants among them."""

    method: str
    rows: int
    tenants: int
    adapters: Adapter | Rows | None
    note: str = ""

    @property
    def name(self) -> str:
        tenants = f", {self.tenants} tenant{'s' * (self.tenants > 1)}" if self.tenants else ""
        return f"{self.method}, {self.rows} row{'s' * (self.rows > 1)}{tenants}{self.note}"


def bench_decode(
    backbone: str,
    *,
    rows: tuple[int, ...] = (1, 8, 32),
    context: int = 128,
    rounds: int = 100,
    bank: int = 1000,
    random: bool = False,
) -> dict:
    """Milliseconds of one greedy decode step, wall and CPU time, of base, PARA, (IA)^3 and LoRA.

    Args:
        rows: batch sizes.
        context: tokens that each row holds.
        bank: tenants in PARA's bank.
        random: random weights in the shape of `backbone`, which need not be downloaded.
    """
    model = random_backbone(backbone) if random else load_backbone(backbone)
    largest = max(rows)
    banks = {m: bank_of(model, config, max(bank, largest) if m == "PARA" else largest) for m, config in METHODS.items()}
    single = bank_of(model, METHODS["PARA"], 1)
    order = np.random.default_rng(0)
    wall, cpu = ([{} for _ in range(rounds)] for _ in range(2))
    about: dict[str, dict] = {"ratios": {}, "byte_ratios": {}, "cpu_ratios": {}, "checked": {}}
    about |= {"gigabytes": {}, "sides": {}}
    for count in rows:
        steps: dict[str, Step] = {}
        for side in sides_of(model, banks, single, count):
            step = steps[side.name] = Step(model, side, context)
            base, *_ = steps  # the first side
            about["checked"][side.name] = step.check(steps[base])
            about["gigabytes"][side.name] = step.nbytes / 1e9
            step.side = side._replace(adapters=None)  # frees gigabytes of LoRA's matrices, which decode does not need
            about["sides"][side.name] = step.side._asdict()
        jax.clear_caches()
        cache = steps[base].prefill(context)[1].cache  # one for all sides: a step does not change its length
        for step in steps.values():
            cache = step(cache)[2]  # compiles
        for i in range(rounds):
            for name in order.permutation(list(steps)):
                wall[i][name], cpu[i][name], cache = steps[name](cache)
        for name in list(steps)[1:]:
            about["ratios"][f"{name} / base"] = paired(wall, name, base)
            about["cpu_ratios"][f"{name} / base"] = paired(cpu, name, base)
            about["byte_ratios"][f"{name} / base"] = steps[name].nbytes / steps[base].nbytes
    sizes = {"cpu_medians": medians(cpu), "context_tokens": context, "bank": bank}
    return measurement("ms", wall) | about | sizes


def sides_of(model, banks: dict[str, AdapterBank], single: AdapterBank, rows: int) -> Iterator[Side]:
    """base first; then each method with one tenant, with eight and with one per row. With one tenant, LoRA's rows share
    its matrices, and nothing is gathered."""
    yield Side("base", rows, 0, None)
    yield Side("PARA", rows, 1, single.rows(single.names * rows), " of a bank of 1")
    for method, bank in banks.items():
        if method.startswith("LoRA"):
            fresh = init_adapter(METHODS[method], model.config)
            yield Side(method, rows, 1, tenant(fresh, 0), ", no gather")
        for count in sorted({1, min(8, rows), rows} - ({1} if method.startswith("LoRA") and rows > 1 else set())):
            yield Side(method, rows, count, bank.rows([bank.names[i % count] for i in range(rows)]))


class Step:
    """The compiled decode step of a side. Every call starts from the same context."""

    def __init__(self, model, side: Side, context: int):
        self.model, self.side, self.context = model, side, context
        self.leaves, self.treedef = jax.tree.flatten(model)
        self.tokens = random_tokens(model, side.rows, context + 1)
        self.token, state = jnp.asarray(self.tokens[:, context]), self.prefill(context)[1]
        self.adjustments, self.chosen = state.adjustments, np.zeros(side.rows, np.int32)
        used = sum(leaf.nbytes for leaf in self.leaves) - (0 if model.head is None else model.embedding.nbytes)
        cached = sum(leaf.nbytes * context // leaf.shape[2] for leaf in jax.tree.leaves(state.cache))
        self.nbytes = used + cached + sum(leaf.nbytes for leaf in jax.tree.leaves(self.adjustments))

    def __call__(self, cache: tuple) -> tuple[float, float, tuple]:
        """Milliseconds of one step, wall time and CPU time of all threads, and the new cache. Donates the given one."""
        length = jnp.full(self.side.rows, self.context, jnp.int32)
        state = jax.block_until_ready(DecodeState(cache, self.adjustments, length))
        begun, cpu = time.perf_counter(), time.process_time()
        made = next_token(self.treedef, self.leaves, state, self.token, None, 1)
        jax.block_until_ready(made)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        self.chosen, self.adjustments = np.asarray(made[0]), made[1].adjustments
        return wall * 1e3, cpu * 1e3, made[1].cache

    def prefill(self, length: int):
        longest = rounded_up(self.context + 1, CACHE_MULTIPLE)
        return prefill(self.model, self.side.adapters, self.tokens, self.context, length, max_length=longest)

    def check(self, base: Step) -> dict[str, float]:
        """The largest difference of the decoded logits from the whole pass, and of the whole pass from the base model.

        Raises AssertionError if the first is more than rounding, or the second no more than that.
        """
        whole, _ = self.prefill(self.context + 1)
        decoded, _ = decode(self.model, self.prefill(self.context)[1], self.tokens[:, self.context])
        plain, _ = base.prefill(self.context + 1)
        error, effect = float(abs(decoded - whole).max()), float(abs(plain - whole).max())
        limit = 5e-3 if self.model.dtype == jnp.float32 else 0.5
        assert error < limit, f"{self.side.name}: decode differs by {error} from the whole pass"
        assert (effect > limit) == (self.side.adapters is not None), f"{self.side.name}: differs by {effect} from base"
        return {"from_whole_pass": error, "from_base": effect}


def bank_of(model, config, count: int) -> AdapterBank:
    """A bank of `count` different tenants."""
    bank = AdapterBank(
        model.config,
        capacity=count,
        max_r=method_of(config).rank(config),
        methods=(method_of(config).name,),
        sites=config.target_modules,
    )
    fresh = init_adapter(config, model.config)
    for i in range(count):
        bank.add(f"tenant {i}", tenant(fresh, i))
    return bank


def tenant(fresh: Adapter, i: int) -> Adapter:
    """Adapter number i: different from the others, and strong enough to change the logits."""
    draw = np.random.default_rng(i)
    return jax.tree.map(lambda leaf: leaf + 0.01 * draw.standard_normal(leaf.shape, np.float32), fresh)


def random_backbone(source: str) -> Transformer:
    """A backbone in the shape of `source`, with random weights."""
    model = abstract_backbone(load_model_config(source), chosen_dtype(None), layout="layers")
    leaves, treedef = jax.tree.flatten(model)

    def drawn(i: int, leaf) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)  # norms
        return leaf.shape[0] ** -0.5 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)

    return jax.tree.unflatten(treedef, [drawn(i, leaf) for i, leaf in enumerate(leaves)])
