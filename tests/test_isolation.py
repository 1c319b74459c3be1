"""Isolation: what a row computes depends on its own tokens and its own tenant, never on who else is in the batch, in
which place it stands, or who stood there before. Bit for bit, in batches of one shape, with strong adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, prompts, strong

from para_jax import (
    AdapterBank,
    Ia3Config,
    LoraConfig,
    ParaConfig,
    decode,
    init_adapter,
    load_backbone,
    pick,
    prefill,
    stack_adapters,
)
from para_jax.config import SITES

BATCH, PROMPT, STEPS = 4, 8, 3
CONFIGS = {
    "A": ParaConfig(r=4),
    "B": ParaConfig(r=6, target_modules=("q_proj", "up_proj")),
    "ia3": Ia3Config(target_modules=("v_proj", "down_proj")),
    "lora": LoraConfig(r=4, target_modules=SITES),
}


@pytest.fixture(scope="module")
def model():
    return backbone("qwen3")


@pytest.fixture(scope="module")
def tenants(model):
    return {name: strong(init_adapter(config, model.config), i) for i, (name, config) in enumerate(CONFIGS.items())}


@pytest.fixture(scope="module", params=["factors", "lora"])
def bank(request, model, tenants):
    """A bank of PARA and (IA)^3, and one where LoRA may join."""
    methods, names = ("para", "ia3"), ["A", "B", "ia3"]
    if request.param == "lora":
        methods, names = (*methods, "lora"), [*names, "lora"]
    made = AdapterBank(model.config, max_r=6, methods=methods, sites=SITES)
    for name in names:
        made.add(name, tenants[name])
    return made


def run(model, adapters, tokens, lengths):
    """The logits of prefill and of a few decoded steps, [steps, batch, vocab]."""
    logits, state = prefill(model, adapters, tokens[:, :PROMPT], lengths, max_length=16)
    steps = [logits]
    for i in range(STEPS):
        logits, state = decode(model, state, tokens[:, PROMPT + i])
        steps.append(logits)
    return np.stack(steps)


def batch(model, seed):
    """Random tokens and prompt lengths."""
    lengths = np.random.default_rng(seed).integers(2, PROMPT + 1, BATCH).astype(np.int32)
    return prompts(model, BATCH, PROMPT + STEPS, seed=seed), lengths


@pytest.mark.long
def test_a_row_is_the_same_bits_in_any_mix_and_any_place(model, bank):
    own, own_lengths = batch(model, 100)
    names = [*bank.names, None]
    for name in names:
        found = []
        for seed in range(6):
            rng = np.random.default_rng(seed)
            tokens, lengths = batch(model, seed)
            place, mix = seed % BATCH, [names[i] for i in rng.integers(0, len(names), BATCH)]
            mix = [None] * BATCH if seed == 0 else mix  # once alone among rows of the base model
            mix[place], tokens[place], lengths[place] = name, own[0], own_lengths[0]
            found.append(run(model, bank.rows(mix), tokens, lengths)[:, place])
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)
        base = run(model, None, own, own_lengths)[:, 0]
        assert (abs(found[0] - base).max() > 0.1) == (name is not None)
        if name is None:
            np.testing.assert_array_equal(found[0], base)


def test_permuting_rows_permutes_outputs(model, bank):
    tokens, lengths = batch(model, 1)
    names = [bank.names[0], None, *bank.names[-2:]]
    straight = run(model, bank.rows(names), tokens, lengths)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        permuted = run(model, bank.rows([names[i] for i in order]), tokens[order], lengths[order])
        np.testing.assert_array_equal(straight[:, order], permuted)


@pytest.mark.long
def test_one_tenant_after_another_in_one_place_equals_fresh_runs(model, tenants, bank):
    tokens, lengths = batch(model, 2)
    rest = [None, "ia3", "B"]
    used = {name: run(model, bank.rows([name, *rest]), tokens, lengths) for name in ("A", None, "B")}
    jax.clear_caches()
    for name, found in used.items():
        fresh = AdapterBank(model.config, max_r=6, methods=bank.methods, sites=SITES)
        for held in bank.names:
            fresh.add(held, tenants[held])
        np.testing.assert_array_equal(found, run(model, fresh.rows([name, *rest]), tokens, lengths))
    assert abs(used["A"][:, 0] - used["B"][:, 0]).max() > 0.1
    np.testing.assert_array_equal(used["A"][:, 1:], used[None][:, 1:])


@pytest.mark.parametrize("method", ["A", "ia3", "lora"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_hostile_row_leaves_its_neighbours_bits_alone(model, tenants, method, value):
    good = tenants[method]
    hostile = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), good)
    stack = stack_adapters([good, hostile])
    tokens, lengths = batch(model, 3)
    calm = run(model, pick(stack, np.array([0, 0, -1, 0])), tokens, lengths)
    troubled = run(model, pick(stack, np.array([0, 1, -1, 0])), tokens, lengths)
    np.testing.assert_array_equal(calm[:, [0, 2, 3]], troubled[:, [0, 2, 3]])
    assert np.isfinite(calm).all() and not np.array_equal(calm[:, 1], troubled[:, 1], equal_nan=True)


def test_a_base_row_beside_a_hostile_first_tenant_is_the_backbone(model, tenants):
    hostile = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), tenants["A"])
    tokens, lengths = batch(model, 4)
    found = run(model, pick(stack_adapters([hostile, tenants["A"]]), np.array([-1, -1, 1, -1])), tokens, lengths)
    base = run(model, None, tokens, lengths)
    np.testing.assert_array_equal(found[:, [0, 1, 3]], base[:, [0, 1, 3]])


@pytest.mark.long
def test_gradients_of_a_tenant_do_not_meet_its_neighbours(model, tenants):
    """A hostile neighbour's own gradient may be anything; the others keep their bits."""
    from para_jax import forward

    good, other = tenants["A"], strong(tenants["A"], 9)
    hostile = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), good)
    tokens, lengths = batch(model, 5)
    index = np.array([0, 1, -1, 0])

    def gradient(neighbour):
        def loss(stack):
            return jnp.where(index == 1, 0.0, forward(model, pick(stack, index), tokens, lengths).sum((1, 2))).sum()

        return jax.tree.leaves(jax.grad(loss)(stack_adapters([good, neighbour])))

    for calm, troubled in zip(gradient(other), gradient(hostile), strict=True):
        assert np.abs(calm[0]).max() > 0
        np.testing.assert_array_equal(calm[0], troubled[0])


@pytest.mark.slow
def test_a_row_of_the_real_model_is_the_same_bits_in_any_place():
    model = load_backbone("smollm2-135m")
    made = {name: strong(init_adapter(ParaConfig(), model.config), i, scale=0.01) for i, name in enumerate("AB")}
    bank = AdapterBank.holding(made, model.config)
    tokens, lengths = batch(model, 6)
    straight = run(model, bank.rows(["A", None, "B", "A"]), tokens, lengths)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        names = [["A", None, "B", "A"][i] for i in order]
        np.testing.assert_array_equal(straight[:, order], run(model, bank.rows(names), tokens[order], lengths[order]))
