"""Questions for a tiny backbone, a bank of strong adapters of several methods, and its answers."""

from functools import cache

import jax
import numpy as np
from golden_models import backbone, strong
from tiny_run import tokenizer

from para_jax import AdapterBank, Ia3Config, LoraConfig, ParaConfig, forward, init_adapter
from para_jax.config import SITES
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.questions import Likelihood

CONFIGS = {"A": ParaConfig(r=4), "B": ParaConfig(r=4, pooler="mean"), "C": Ia3Config(), "D": LoraConfig(r=4)}
#: Tenants of scope `response`, who share prompts.
CONFIGS |= {
    "E": ParaConfig(r=4, scope="response"),
    "F": LoraConfig(r=4, scope="response", scope_window=3),
    "G": Ia3Config(scope="response"),
    "H": ParaConfig(r=4, pooler="constant", scope="response"),
}
ROWS = 4


@cache
def bank_of(family, names="ABCD"):
    model = backbone(family)
    methods = ("para", "ia3", "lora") if {"D", "F"} & set(names) else ("para", "ia3")
    made = AdapterBank(model.config, max_r=4, methods=methods, sites=SITES)
    for name in names:
        made.add(name, strong(init_adapter(CONFIGS[name], model.config), ord(name), 0.3))
    return made


def words(draw, least, most):
    return tuple(draw.integers(3, 250, int(draw.integers(least, most))).tolist())


@cache
def asked(contexts=6, seed=0):
    """Contexts of 2 to 24 tokens, which is two padded lengths, each with 3 continuations of 1 to 4."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(contexts):
        context = words(draw, 2, 25)
        made += [Likelihood(context, words(draw, 1, 5)) for _ in range(3)]
    return made


def by_hand(family, names, tenant, one):
    """The log-probability of a continuation and whether it is greedy, from one row, padded to one shape at its end."""
    rows, context, length = bank_of(family, names).rows([tenant]), len(one.context), len(one.context + one.continuation)
    ids = np.zeros((1, 32), np.int32)
    ids[0, :length] = one.context + one.continuation
    logits = forward(backbone(family), rows, ids, context, length)[0, context - 1 : length - 1]
    chosen = np.array(one.continuation)
    nats = jax.nn.log_softmax(logits)[np.arange(len(chosen)), chosen].sum()
    return float(nats), bool((logits.argmax(axis=-1) == chosen).all())


def answers(family, questions, names="ABCD", rows=ROWS, layout="layers"):
    model = backbone(family, layout)
    return Answerer(model, bank_of(family, names), tokenizer(), rows=rows).answer(questions)
