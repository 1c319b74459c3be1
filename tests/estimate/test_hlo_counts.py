"""Counts of compiled programs. A decode step with PARA or (IA)^3 costs no more than one without adapters: no more
fusions, matrix products, collectives, or bytes beyond the factors."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import FIXTURES
from jax.sharding import NamedSharding, PartitionSpec
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
from para_jax.adapters.adapter import Adjustment
from para_jax.config import Ia3Config, LoraConfig
from para_jax.estimate.hlo_counts import collective_bytes, collectives_run, describe_program
from para_jax.estimate.hlo_loops import unknown_loops
from para_jax.estimate.hlo_parser import parse_hlo
from para_jax.model.adapted import decode_step
from para_jax.model.blocks import Lanes, Tails, prefill_blocks
from para_jax.runtime.sharding import place

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))

from tpu_compile import abstract_backbone, compile_decode, excess  # noqa: E402

ROWS, LLAMA = 4, str(FIXTURES / "llama")
SIZES = {"width": 256, "hidden_width": 768, "num_heads": 8, "num_kv_heads": 8, "head_dim": 32, "vocab_size": 512}
LAYER_KINDS = (LayerKind(rotary=RotaryConfig(dims=32)),) * 2
CONFIG = ModelConfig(model_type="llama", kinds=LAYER_KINDS, **SIZES)
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


# -------------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("config", [ParaConfig(), long(ParaConfig(scope="response")), long(IA3)], ids=str)
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


@pytest.mark.parametrize("method", [ParaConfig, long(Ia3Config)])
def test_on_a_tpu_scope_response_decodes_with_the_fusions_products_and_collectives_of_the_base(method):
    base, adapted = (describe_program(compile_decode(LLAMA, 4, of, ROWS)) for of in (None, method(scope="response")))
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

    base, para = program(replace(IA3, scope="response")), program(ParaConfig(scope="response"))
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joined(Adjustment):
    """The factors of all sites as one array [q | v | u], in which a site's part lies otherwise than its output."""

    distance: jax.Array

    def adjust(self, site, x, y):
        starts = {"q_proj": 0, "v_proj": 256, "up_proj": 512}
        return y + y * self.distance[starts[site] : starts[site] + y.shape[-1]] if site in starts else y


@pytest.mark.long
def test_the_same_check_fails_for_factors_in_one_array_over_the_mesh(model):
    mesh = make_mesh(tensor=4)
    with jax.set_mesh(mesh):
        placed = place(model, mesh, CONFIG)
        base, adapted = (prefilled(placed, config) for config in (None, ParaConfig()))
        over = NamedSharding(mesh, PartitionSpec(None, "tensor"))
        joined = [jnp.concatenate(list(factors.distance.values()), axis=1) for factors in adapted.adjustments]
        bad = adapted._replace(adjustments=tuple(Joined(jax.device_put(array, over)) for array in joined))
        assert joined[0].shape == (ROWS, 256 + 256 + 768)
        more = excess(program(placed, bad), program(placed, base), bytes_share=0.005)
    assert any("collectives" in line for line in more), more


def test_llama_2_7b_carries_1228800_bytes_of_adapter_state_per_row():
    config = load_model_config("meta-llama/Llama-2-7b-hf")
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    tenants = jax.eval_shape(lambda: stack_adapters([init_adapter(ParaConfig(), config)] * 3))

    def state(model, tenants, tokens):
        return prefill(model, pick(tenants, jnp.arange(ROWS) % 3), tokens, 4, max_length=8)[1]

    made = jax.eval_shape(state, model, tenants, jax.ShapeDtypeStruct((ROWS, 4), jnp.int32))
    assert bytes_of(made.adjustments) == ROWS * 1_228_800


# ------------------------------------------------------------------------------------------------------------- counting


MODULE = """HloModule counted, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p), metadata={op_name="calls=%inner"}
}

%fused_computation.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %turned = f32[8]{0} copy(%p)
  %nested = f32[8]{0} fusion(%turned), kind=kLoop, calls=%inner
  ROOT %d = f32[8]{0} convolution(%nested, %p), dim_labels=bf_io->bf
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %f = (f32[8]{0:T(256)}, f32[8]{0}) fusion(%x), kind=kOutput, calls=%fused_computation.1
  ROOT %t = (s32[], f32[8]{0}) tuple(%x, %f)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

%called (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%inner
}

%never (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} dot(%p, %p)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %moved = f32[8]{0} copy(%a)
  %one = f32[8]{0} call(%moved), to_apply=%called
  %two = f32[8]{0} call(%one), to_apply=%called
  %w = (s32[], f32[8]{0}) while(%two), condition=%condition, body=%body
  %start = (f32[8]{0}, f32[8]{0}) all-reduce-start(%two), to_apply=%inner
  %done = f32[8]{0} all-reduce-done(%start)
  %gathered = ((f32[8]{0}), f32[8]{0}) async-start(%done), calls=%wrapped
  %waited = f32[8]{0} async-done(%gathered), calls=%wrapped
  ROOT %g = f32[8]{0} custom-call(%waited), custom_call_target="__cublas$gemm"
}

%wrapped (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} all-gather(%p), dimensions={0}
}
"""


class Compiled:
    """What jax.stages.Compiled says, of a module written by hand."""

    def as_text(self):
        return MODULE

    def cost_analysis(self):
        return {"flops": 1.0, "bytes accessed": 2.0}

    def memory_analysis(self):
        return jax.jit(jnp.sin).lower(1.0).compile().memory_analysis()


def test_executed_instructions_are_counted_once_per_call():
    counted = describe_program(Compiled())
    assert counted.fusions == {"kLoop": 2, "kOutput": 1}  # %called twice; %nested is a part of the kernel around it
    assert counted.products == 2  # the convolution in a fusion, the library's; not the dot in what nobody calls
    assert counted.collectives == {"all-reduce": 1, "all-gather": 1}
    assert counted.copies == 1  # not the one in a fusion
    assert (counted.flops, counted.bytes_accessed) == (1.0, 2.0)


@pytest.mark.parametrize(("change", "line"), [
    ({"fusions": {"kLoop": 3, "kOutput": 1}}, ["4 fusions, base 3"]),
    ({"products": 3}, ["3 matrix products, base 2"]),
    ({"collectives": {"all-reduce": 1, "all-gather": 2}}, ["3 collectives, base 2"]),
    ({"bytes_accessed": 2.02}, ["2.02 bytes accessed, base 2"]),
    ({"bytes_accessed": 2.009, "fusions": {"kCustom": 3}, "temporaries": 10**9}, []),
])  # fmt: skip
def test_every_count_that_exceeds_the_base_is_named(change, line):
    base = describe_program(Compiled())
    assert excess(base._replace(**change), base, bytes_share=0.005) == line


def test_a_donated_argument_is_not_counted_again_as_an_output():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    double = lambda x: x * 2  # noqa: E731
    kept, donated = (describe_program(jax.jit(double, donate_argnums=d).lower(x).compile()) for d in ((), (0,)))
    assert (kept.arguments, kept.outputs, donated.outputs) == (4000, 4000, 0)
    assert kept.memory - donated.memory == 4000


def test_bytes_of_collectives_are_counted_over_all_iterations():
    text = """
HloModule m

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  ROOT %r = f32[] parameter(1)
}

%condition (c: f32[8]) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = (f32[8,2]{1,0}, pred[3]{0}) all-reduce(%p, %p), to_apply=%add
  ROOT %g = f32[8]{0} copy(%p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%x), dimensions={0}
  %d = bf16[32]{0} all-gather-done(%s)
  ROOT %w = f32[8]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert collective_bytes(text) == {"all-reduce": (64 + 3) * 5, "all-gather": 64}


# As a TPU's compiler writes it, shortened: no loop says its turns; the layers' counter is added to in a fusion, and the
# product's, inside, goes up by 2 to a bound that every turn of the layers hands on; an all-gather is in three fusions.
TPU_MODULE = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%next (i: s32[]) -> s32[] {
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} parameter(0)
  ROOT %add.2 = s32[]{:T(128)} add(%i, %one)
}

%fused_start (p: bf16[192,64]) -> (bf16[192,64], bf16[3072,64], u32[]) {
  %p = bf16[192,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[3072,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=53, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="1"}, metadata={op_name="a/while/body"}
  ROOT %custom-call.1 = (bf16[192,64]{1,0}, bf16[3072,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused_step (p: bf16[192,64]) -> bf16[3072,64] {
  %p = bf16[192,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[3072,64]{1,0} all-gather(%p), channel_id=53, dimensions={0}, frontend_attributes={chain_id="1"}
}

%fused_done (p: bf16[192,64]) -> bf16[3072,64] {
  %p = bf16[192,64]{1,0} parameter(0)
  %all-gather.3 = bf16[3072,64]{1,0} all-gather(%p), channel_id=53, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %custom-call.2 = bf16[3072,64]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%product_body (s: (u32[], u32[], bf16[1,192])) -> (u32[], u32[], bf16[1,192]) {
  %two = u32[]{:T(128)} constant(2)
  %s = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  %most = u32[]{:T(128)} get-tuple-element(%s), index=1
  %x = bf16[1,192]{1,0} get-tuple-element(%s), index=2
  %collective-permute-start = (bf16[1,192]{1,0}, bf16[1,192]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,15},{1,0}}
  %collective-permute-done = bf16[1,192]{1,0} collective-permute-done(%collective-permute-start)
  %again = u32[]{:T(128)} add(%i, %two)
  ROOT %t = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) tuple(%again, %most, %collective-permute-done)
}

%product_cond (s: (u32[], u32[], bf16[1,192])) -> pred[] {
  %s = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  %most = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %compare = pred[]{:T(512)} compare(%i, %most), direction=LT
}

%layer_body (s: (s32[], u32[], bf16[1,192])) -> (s32[], u32[], bf16[1,192]) {
  %s = (s32[]{:T(128)}, u32[]{:T(128)}, /*index=2*/bf16[1,192]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %copy.1 = s32[]{:T(128)S(6)} copy(%i)
  %eight = u32[]{:T(128)} get-tuple-element(%s), index=1
  %x = bf16[1,192]{1,0} get-tuple-element(%s), index=2
  %zero = u32[]{:T(128)} constant(0)
  %start = (bf16[192,64]{1,0}, bf16[3072,64]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%fused_start
  %between = bf16[3072,64]{1,0} fusion(%x), kind=kOutput, calls=%fused_step
  %waited = bf16[3072,64]{1,0} fusion(%x), kind=kCustom, calls=%fused_done
  %given = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) tuple(%zero, %eight, %x)
  %while.2 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) while(%given), condition=%product_cond, body=%product_body, metadata={op_name="jit(step)/while"}
  %y = bf16[1,192]{1,0} get-tuple-element(%while.2), index=2
  %again = s32[]{:T(128)} fusion(%copy.1), kind=kLoop, calls=%next
  ROOT %t = (s32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) tuple(%again, %eight, %y)
}

%layer_cond (s: (s32[], u32[], bf16[1,192])) -> pred[] {
  %last = s32[]{:T(128)} constant(LAST)
  %s = (s32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %compare = pred[]{:T(512)} compare(%i, %last), direction=LE
}

%search_body (s: (s32[], f32[])) -> (s32[], f32[]) {
  %s = (s32[]{:T(128)}, f32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[]{:T(128)} get-tuple-element(%s), index=1
  %summed = f32[]{:T(128)} all-reduce(%x), to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[]{:T(128)}) tuple(%i, %summed)
}

%search_cond (s: (s32[], f32[])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[]{:T(128)}) parameter(0)
  %x = f32[]{:T(128)} get-tuple-element(%s), index=1
  %one = f32[]{:T(128)} constant(1)
  ROOT %compare = pred[]{:T(512)} compare(%x, %one), direction=LT
}

ENTRY %main (x: bf16[1,192], w: f32[64,8], z: f32[]) -> f32[4,8] {
  %x = bf16[1,192]{1,0} parameter(0)
  %w = f32[64,8]{1,0} parameter(1)
  %z = f32[]{:T(128)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %eight = u32[]{:T(128)} constant(8)
  %given = (s32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) tuple(%one, %eight, %x)
  %while.1 = (s32[]{:T(128)}, u32[]{:T(128)}, bf16[1,192]{1,0}) while(%given), condition=%layer_cond, body=%layer_body
  %found = (s32[]{:T(128)}, f32[]{:T(128)}) tuple(%one, %z)
  %while.3 = (s32[]{:T(128)}, f32[]{:T(128)}) while(%found), condition=%search_cond, body=%search_body
  ROOT %reduced = f32[4,8]{1,0} reduce-scatter(%w), dimensions={0}, to_apply=%add
}
"""  # noqa: E501


@pytest.mark.parametrize("layers", [2, 4])
def test_loops_run_as_often_as_their_counters_say(layers):
    text = TPU_MODULE.replace("LAST", str(layers))  # from 1 to LAST
    counted = {"all-reduce": 1, "all-gather": layers, "reduce-scatter": 1, "collective-permute": 4 * layers}
    assert collectives_run(text) == counted
    assert collective_bytes(text) == {
        "all-reduce": 4,
        "all-gather": layers * 3072 * 64 * 2,
        "reduce-scatter": 64 * 8 * 4,
        "collective-permute": 4 * layers * 192 * 2,
    }
    assert unknown_loops(parse_hlo(text)) == 1  # the search, whose end depends on data


def test_on_a_tpu_every_layer_gathers_its_own_weights():
    mesh = make_mesh(fsdp=4, devices=tpu_devices("v5e:2x2"))

    def program(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def counted(layers):
        over = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp"))]
        shapes = (64, 256), (layers, 256, 256)
        given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=s) for shape, s in zip(shapes, over, strict=True)]
        text = jax.jit(program).lower(*given).compile().as_text()
        return sum(collectives_run(text).values()), sum(collective_bytes(text).values())

    (runs, size), (more, larger) = counted(6), counted(12)
    assert size >= 6 * 256 * 256 * 2 * 3 / 4 and (more, larger) == (2 * runs, 2 * size)
