"""`para-jax bench decode`: the cost of one decode step with many tenants, by method, compared with the plain backbone.

The step is the compiled one that generate uses. All sides have the same context and make one step each per round, in a
new random order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from .rounds import measurement, medians, milliseconds, paired, random_tokens

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
    read, order = read_test(model), np.random.default_rng(0)
    wall, cpu, bandwidth, products = ([{} for _ in range(rounds)] for _ in range(4))
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
        multiply = products_test(model, count)
        cache = steps[base].prefill(context)[1].cache  # one for all sides: a step does not change its length
        for step in steps.values():
            cache = step(cache)[2]  # compiles
        for i in range(rounds):
            bandwidth[i][base], products[i][base] = read(), multiply()
            for name in order.permutation(list(steps)):
                wall[i][name], cpu[i][name], cache = steps[name](cache)
        for name in list(steps)[1:]:
            about["ratios"][f"{name} / base"] = paired(wall, name, base)
            about["cpu_ratios"][f"{name} / base"] = paired(cpu, name, base)
            about["byte_ratios"][f"{name} / base"] = steps[name].nbytes / steps[base].nbytes
    of_read, of_wall = [], []
    for i in range(rounds):
        gigabytes_per_second = {n: about["gigabytes"][n] / wall[i][n] * 1e3 for n in bandwidth[i]}
        of_read.append({n: rate / bandwidth[i][n] for n, rate in gigabytes_per_second.items()})
        of_wall.append({n: part / wall[i][n] for n, part in products[i].items()})
    return (
        measurement("ms", wall)
        | about
        | {
            "cpu_medians": medians(cpu),
            "context_tokens": context,
            "bank": bank,
            "read_gigabytes_a_second": medians(bandwidth),
            "share_of_read": medians(of_read),
            "matrix_products_ms": medians(products),
            "share_of_matrix_products": medians(of_wall),
        }
    )


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


def read_test(model) -> Callable[[], float]:
    """Gigabytes per second of a read of as many bytes as the weights have: a dot product on every core of a CPU, a
    compiled one on another device."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) // 4
    if jax.default_backend() == "cpu":
        cores = os.cpu_count() or 1
        parts = np.split(np.ones(size - size % cores, np.float32), cores)
        pool = ThreadPoolExecutor(cores)
        read = lambda: list(pool.map(lambda part: part @ part, parts))  # noqa: E731
    else:
        array, product = jnp.ones(size, jnp.float32), jax.jit(jnp.vdot)
        read = lambda: product(array, array).block_until_ready()  # noqa: E731

    def gigabytes_per_second() -> float:
        begun = time.perf_counter()
        read()
        return size * 4 / (time.perf_counter() - begun) / 1e9

    gigabytes_per_second()
    return gigabytes_per_second


def products_test(model, rows: int) -> Callable[[], float]:
    """Milliseconds of a step's matrix products alone: every linear and the head, for `rows` rows. The rest of a step is
    attention, norms and elementwise work."""
    matrices, head = multiplied(model), model.config.vocab_size

    @jax.jit
    def products(inputs, matrices):
        return [inputs[w.shape[1]] @ w.T if w.shape[0] == head else inputs[w.shape[0]] @ w for w in matrices]

    widths = {w.shape[1] if w.shape[0] == head else w.shape[0] for w in matrices}
    inputs = {width: jnp.ones((rows, width), model.dtype) for width in widths}
    jax.block_until_ready(products(inputs, matrices))
    return milliseconds(lambda: products(inputs, matrices))


def multiplied(model) -> list[jax.Array]:
    """The matrices that a step multiplies by: the linears and the head. A step only reads rows of an embedding that is
    not also the head."""
    looked_up = None if model.head is None else model.embedding[...]
    return [leaf for leaf in jax.tree.leaves(model) if leaf.ndim == 2 and leaf is not looked_up]
