"""A decode step with PARA or (IA)^3 costs no more than one without adapters: no more fusions, matrix products or
collectives of the compiled program, and no more bytes beyond the factors."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import FIXTURES
from long_cases import long, quick
from quick_compiler import USERS_EMITTERS
from tpu_compiler import tpu_devices

from para_jax import (
    LayerKind,
    ModelConfig,
    ParaConfig,
    RotaryConfig,
    Transformer,
    init_adapter,
    load_model_config,
    make_mesh,
    pick,
    prefill,
    stack_adapters,
)
from para_jax.config import Ia3Config, LoraConfig
from para_jax.model.adapted import decode_step
from para_jax.model.blocks import Lanes, Tails, prefill_blocks
from para_jax.runtime.sharding import place

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))

from program_counts import describe_program  # noqa: E402
from tpu_compile import abstract_backbone, compile_decode, excess  # noqa: E402

ROWS, LLAMA = 4, str(FIXTURES / "llama")
SIZES = {"width": 256, "hidden_width": 768, "num_heads": 8, "num_kv_heads": 8, "head_dim": 32, "vocab_size": 512}
LAYER_KINDS = (LayerKind(rotary=RotaryConfig(dims=32)),) * 2
CONFIG = ModelConfig(model_type="llama", kinds=LAYER_KINDS, **SIZES)
PARA = ParaConfig(scope="response")
IA3 = Ia3Config(target_modules=("q_proj", "v_proj", "up_proj"), feedforward_modules=())


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def prefilled(model, adapter_config):
    """The state after a prefill in which every row has an adapter of its own."""
    rows = None
    if adapter_config is not None:
        tenants = stack_adapters([init_adapter(adapter_config, CONFIG, seed=i) for i in range(ROWS)])
        rows = pick(tenants, np.arange(ROWS))
    return prefill(model, rows, np.ones((ROWS, 8), np.int32), 8, max_length=32)[1]


def program(model, state):
    decode = jax.jit(decode_step, donate_argnums=1)
    lowered = decode.lower(model, state, jnp.zeros(ROWS, jnp.int32))
    return describe_program(lowered.compile(compiler_options=USERS_EMITTERS))


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_costs_nothing(model, adapter_config):
    """Compares the decode steps with and without adapters, both compiled as decode is, optimisations and all."""
    base, adapted = (program(model, prefilled(model, config)) for config in (None, adapter_config))
    print(f"base    {base}\nadapted {adapted}")
    more = excess(adapted, base, bytes_share=0.005)
    assert not more, "; ".join(more)
    return base, adapted


@pytest.mark.parametrize("config", [ParaConfig(), long(PARA), long(IA3)], ids=str)
def test_decode_with_one_tenant_per_row_costs_no_more_than_the_base(model, config):
    base, adapted = check_costs_nothing(model, config)
    factors = bytes_of(prefilled(model, config).adjustments)
    assert base.products == 2 * 9 + 1 and sum(base.fusions.values()) > 10
    assert factors == adapted.arguments - base.arguments
    assert factors <= adapted.bytes_accessed - base.bytes_accessed < 1.5 * factors


@pytest.mark.parametrize("method", quick([ParaConfig, Ia3Config, LoraConfig], ParaConfig))
def test_scope_response_decodes_by_the_program_of_scope_all_and_scope_prompt_by_that_of_the_base(model, method):
    def lowered(config):
        return jax.jit(decode_step).lower(model, prefilled(model, config), jnp.zeros(ROWS, jnp.int32)).as_text()

    of_scope = {scope: lowered(method(scope=scope)) for scope in ("all", "response", "prompt")}
    assert of_scope["response"] == of_scope["all"] != of_scope["prompt"] == lowered(None)


def test_on_a_tpu_scope_response_decodes_with_the_fusions_products_and_collectives_of_the_base():
    base, adapted = (
        describe_program(compile_decode(LLAMA, 4, of, ROWS)) for of in (None, ParaConfig(scope="response"))
    )
    counts = [(found.fusions, found.products, found.collectives, found.copies) for found in (base, adapted)]
    assert counts[0] == counts[1] and base.products > 14 and base.collectives["all-reduce"] >= 4


def test_on_a_tpu_the_blocks_that_write_the_vectors_have_the_work_of_the_base_and_the_generators():
    """Next to (IA)^3 on the same sites, which reads no prompt: the same products with weights, and per layer 14 small
    fusions more, which are the generator's."""
    config, mesh = load_model_config(LLAMA), make_mesh(devices=tpu_devices("v5e:1x1"))

    def program(method):
        model = abstract_backbone(config, jnp.bfloat16, mesh, layout="layers")
        each = lambda: stack_adapters([init_adapter(method, config)] * ROWS)  # noqa: E731
        rows = jax.eval_shape(lambda: pick(each(), jnp.arange(ROWS)))
        block = jax.ShapeDtypeStruct((64, config.num_kv_heads, 16, config.head_dim), jnp.bfloat16)
        ints = lambda *shapes: (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)  # noqa: E731
        lanes = Lanes(*ints((4, 16), (4,), (4,), (4,), (ROWS, 8), (ROWS,)))
        given = ((block, block),) * config.num_layers, lanes, rows, Tails(*ints((4,), (4,), (ROWS,), (ROWS,)))
        with jax.set_mesh(mesh):
            return describe_program(jax.jit(prefill_blocks).lower(model, *given).compile())

    base, para = program(replace(IA3, scope="response")), program(PARA)
    assert (para.products, para.fusions["kOutput"]) == (base.products, base.fusions["kOutput"]) and base.products > 21
    more = sum(para.fusions.values()) - sum(base.fusions.values())
    assert 0 < more <= 14 * config.num_layers and not para.collectives


def test_the_same_check_fails_for_lora(model):
    with pytest.raises(AssertionError, match="[0-9]+ fusions, .* matrix products, .* bytes accessed, "):
        check_costs_nothing(model, LoraConfig(r=4))


@pytest.mark.long
def test_tensor_parallel_decode_with_factors_has_the_collectives_of_the_base(model):
    mesh = make_mesh(tensor=4)
    with jax.set_mesh(mesh):
        base, adapted = check_costs_nothing(place(model, mesh, CONFIG), ParaConfig())
    assert adapted.collectives == base.collectives and base.collectives["all-reduce"] == 2 * 2 + 1


def test_llama_2_7b_carries_1228800_bytes_of_adapter_state_per_row():
    config = load_model_config("meta-llama/Llama-2-7b-hf")
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    tenants = jax.eval_shape(lambda: stack_adapters([init_adapter(ParaConfig(), config)] * 3))

    def state(model, tenants, tokens):
        return prefill(model, pick(tenants, jnp.arange(ROWS) % 3), tokens, 4, max_length=8)[1]

    made = jax.eval_shape(state, model, tenants, jax.ShapeDtypeStruct((ROWS, 4), jnp.int32))
    assert bytes_of(made.adjustments) == ROWS * 1_228_800
