"""Tunix's models with an adapter attached compute what our own backbone computes with the same weights and adapter."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import strong
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from long_cases import slow

from para_jax import (
    Ia3Config,
    LoraConfig,
    ParaConfig,
    forward,
    init_adapter,
    load_adapter,
    pick,
    save_adapter,
    stack_adapters,
)
from para_jax.config import SITES
from para_jax.foreign import (
    FAMILIES,
    EndsWith,
    LeftPadded,
    adapter_of,
    attach,
    compare_backbones,
    detach,
    prompt_width,
    set_adapter,
)

pytest.importorskip("tunix")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from tunix.sft import utils  # noqa: E402
from tunix_models import KINDS, LAYERS, VOCAB, own_model, tunix_model, variables  # noqa: E402

METHODS = {
    "para": ParaConfig(r=4),
    "seven sites": ParaConfig(r=4, target_modules=SITES, up_bias=True),
    "mean pooler": ParaConfig(r=4, pooler="mean"),
    "response": ParaConfig(r=4, scope="response"),
    "prompt": ParaConfig(r=4, scope="prompt"),
    "one layer": ParaConfig(r=4, layers_to_transform=(1,)),
    "lora": LoraConfig(r=4, target_modules=("q_proj", "v_proj", "o_proj", "down_proj")),
    "lora response": LoraConfig(r=4, scope="response"),
    "ia3": Ia3Config(),
    "ia3 response": Ia3Config(scope="response"),
}
#: Every method on one model, and on the others what touches all of their linears.
CASES = [("llama3", method) for method in METHODS]
OTHERS = [name for name in KINDS if name not in ("llama3", "gemma4")]
CASES += [(name, "seven sites") for name in OTHERS]
CASES += [(name, "response") if name == "gemma3" else slow(name, "response") for name in OTHERS]
LENGTHS, PROMPTS, WIDTH = np.array([12, 9, 11, 7]), np.array([5, 3, 1, 6]), 8
MASK = np.arange(12) < LENGTHS[:, None]
TOKENS = np.where(MASK, np.random.default_rng(1).integers(3, VOCAB, (4, 12)), 0).astype(np.int32)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@cache
def models(name):
    model = tunix_model(name)
    return model, None if name == "gemma4" else own_model(model, name)


def inputs(mask):
    return utils.build_positions_from_mask(jnp.asarray(mask)), None, utils.make_causal_attn_mask(jnp.asarray(mask))


@nnx.jit
def run(model, tokens, mask, **ends):
    return model(tokens, *inputs(mask), **ends)[0]


def left_padded():
    """The same rows with their prompts padded on the left to WIDTH."""
    tokens, mask = np.zeros((4, 20), np.int32), np.zeros((4, 20), bool)
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens[i, WIDTH - prompt : WIDTH - prompt + length] = TOKENS[i, :length]
        mask[i, WIDTH - prompt : WIDTH - prompt + length] = True
    return tokens, mask


def assert_close(one, other, mask=MASK, atol=1e-4):
    np.testing.assert_allclose(np.asarray(one)[mask], np.asarray(other)[mask], atol=atol)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_logits_are_those_of_our_backbone(name, method):
    model, own = models(name)
    plain = run(model, TOKENS, MASK)
    adapter = init_adapter(METHODS[method], own.config)
    attach(model, adapter)
    try:
        np.testing.assert_array_equal(run(model, TOKENS, MASK, prompt_end=PROMPTS - 1)[MASK], plain[MASK])
        adapter = strong(adapter)
        set_adapter(model, adapter)
        wanted = forward(own, adapter, TOKENS, PROMPTS)
        assert np.abs(np.asarray(wanted - plain))[MASK].max() > 0.1
        assert_close(run(model, TOKENS, MASK, prompt_end=PROMPTS - 1), wanted)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), adapter, adapter_of(model))))
        if name != "gemma2":  # its sliding mask compares positions with places in the row (Tunix 0.1.7)
            tokens, mask = left_padded()
            with prompt_width(WIDTH):
                assert_close(run(model, tokens, mask)[mask], wanted[MASK], mask=...)
    finally:
        detach(model)
    assert_close(run(model, TOKENS, MASK), plain, atol=0)


@pytest.mark.parametrize("remat", ["NONE", "BLOCK", "DECODER"])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_gradients_are_those_of_our_backbone(name, remat):
    model = tunix_model(name, remat)
    own = own_model(model, name)
    adapter = strong(init_adapter(ParaConfig(r=4), own.config))
    attach(model, adapter)

    def loss(logits):
        logp = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logp, TOKENS[:, 1:, None], -1)[..., 0]
        return -jnp.where(MASK[:, 1:] & (np.arange(11) >= PROMPTS[:, None] - 1), picked, 0).sum()

    def of_model(model):
        return loss(model(TOKENS, *inputs(MASK), prompt_end=PROMPTS - 1)[0])

    grads = nnx.jit(nnx.grad(of_model, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    wanted = jax.grad(lambda adapter: loss(forward(own, adapter, TOKENS, PROMPTS)))(adapter)
    found = jax.tree.map(
        lambda *a: jnp.stack(a), *(nnx.to_pure_dict(grads)["layers"][i]["para"] for i in range(LAYERS))
    )
    wanted = nnx.to_pure_dict(nnx.state(wanted))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("method", ["para", "ia3", "lora", "response"])
def test_one_batch_mixes_tenants(method):
    model, own = models("llama3")
    stack = stack_adapters([strong(init_adapter(METHODS[method], own.config), seed=i) for i in range(3)])
    attach(model, pick(stack, [2, -1, 0, 1]))
    try:
        for index in ([2, -1, 0, 1], [-1, 0, 0, 2]):
            found = run(model, TOKENS, MASK, prompt_end=PROMPTS - 1, tenants=np.array(index))
            assert_close(found, forward(own, pick(stack, index), TOKENS, PROMPTS))
        held = run(model, TOKENS, MASK, prompt_end=PROMPTS - 1)  # the tenants of the Rows
        assert_close(held, forward(own, pick(stack, [2, -1, 0, 1]), TOKENS, PROMPTS))
        with pytest.raises(ValueError, match="tenants.*int32.4."):
            run(model, TOKENS, MASK, prompt_end=PROMPTS - 1, tenants=np.array([0, 1]))
    finally:
        detach(model)


def test_the_adapter_file_goes_both_ways_bit_for_bit(tmp_path):
    model, own = models("gemma3")
    attach(model, strong(init_adapter(ParaConfig(r=4), own.config)))
    try:
        save_adapter(adapter_of(model), tmp_path / "a")
        loaded = load_adapter(tmp_path / "a", own.config)
        found = run(model, TOKENS, MASK, prompt_end=PROMPTS - 1)
        assert_close(found, forward(own, loaded, TOKENS, PROMPTS))
        other = attach(tunix_model("gemma3"), loaded)
        np.testing.assert_array_equal(run(other, TOKENS, MASK, prompt_end=PROMPTS - 1), found)
    finally:
        detach(model)


def test_a_prompt_without_an_end_is_an_error():
    model, own = models("llama3")
    rule = EndsWith((101, 102))
    try:
        attach(model, strong(init_adapter(ParaConfig(r=4), own.config)))
        with pytest.raises(ValueError, match="prompt_end"):
            run(model, TOKENS, MASK)
        detach(model)
        attach(model, ParaConfig(r=4), prompts=LeftPadded(13))
        with pytest.raises(ValueError, match="LeftPadded.13.*12"):
            run(model, TOKENS, MASK)
        detach(model)
        attach(model, adapter := strong(init_adapter(ParaConfig(r=4), own.config)), prompts=rule)
        tokens = TOKENS.copy()
        for row, prompt in zip(tokens[:3], (5, 3, 2), strict=True):
            row[row == 102] = 7
            row[prompt - 2 : prompt] = 101, 102
        found = run(model, tokens, MASK)
        assert_close(found[:3], forward(own, adapter, tokens[:3], np.array([5, 3, 2])), MASK[:3])
        assert np.isnan(found[3]).all()  # inside a compiled program there is no other way to say it
        detach(model)
        attach(model, Ia3Config())
        assert_close(run(model, TOKENS, MASK), forward(own, None, TOKENS, None))  # it needs no prompt
    finally:
        detach(model)


def test_eight_devices_compute_what_one_computes():
    model = attach(tunix_model("llama3"), strong(init_adapter(METHODS["seven sites"], models("llama3")[1].config)))
    wanted, adapter = run(model, TOKENS, MASK, prompt_end=PROMPTS - 1), adapter_of(model)
    detach(model)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    state = nnx.state(model)
    specs = nnx.get_partition_spec(state)
    nnx.update(model, jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), state, specs))
    attach(model, adapter)
    assert model.layers[0].para.down[...].sharding.spec == PartitionSpec("fsdp", None)
    assert model.layers[0].para.up["q_proj"][...].sharding.spec == PartitionSpec(None, "tp")
    with mesh:
        assert_close(run(model, TOKENS, MASK, prompt_end=PROMPTS - 1), wanted)


def test_a_rollout_without_the_adapter_is_refused():
    from tunix.generate.mappings import MappingConfig

    model = tunix_model("qwen3")
    assert MappingConfig.build(model=model, backend="vllm_jax").to_hf_mappings
    with pytest.raises(ValueError, match="vllm_jax.*EngineRollout"):
        MappingConfig.build(model=attach(model, ParaConfig(r=4)), backend="vllm_jax")


def test_packed_rows_are_refused_by_name():
    model = attach(tunix_model("qwen3"), ParaConfig(r=4))
    with pytest.raises(ValueError, match="segment_ids.*packing"):
        model(TOKENS, inputs(MASK)[0], None, None, segment_ids=np.ones_like(TOKENS), prompt_end=PROMPTS - 1)


def test_what_attach_cannot_do_is_refused_by_name():
    model, own = models("llama3")
    with pytest.raises(ValueError, match="another backbone"):
        attach(model, init_adapter(ParaConfig(r=4), models("gemma3")[1].config))
    with pytest.raises(ValueError, match="Linear.*family"):
        attach(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), ParaConfig(r=4))
    with pytest.raises(ValueError, match="has no adapter"):
        adapter_of(model)
    attach(model, ParaConfig(r=4))
    try:
        with pytest.raises(ValueError, match="detach"):
            attach(model, ParaConfig(r=4))
        with pytest.raises(ValueError, match="r=8"):
            set_adapter(model, init_adapter(ParaConfig(r=8), own.config))
    finally:
        detach(model)


def test_a_wrong_backbone_is_told_with_a_number(capfd):
    model, own = models("llama3")
    assert compare_backbones(model, own, TOKENS[:1]) < 1e-4
    attach(model, ParaConfig(r=4), backbone=own)
    detach(model)
    assert "different" not in capfd.readouterr().err
    from dataclasses import replace

    kinds = tuple(replace(kind, rotary=replace(kind.rotary, theta=1e4)) for kind in own.config.kinds)
    other = own_model(model, "llama3")
    other.config = replace(own.config, kinds=kinds)
    other.layers = [replace_kind(layer, kind) for layer, kind in zip(other.layers, kinds, strict=True)]
    attach(model, ParaConfig(r=4), backbone=other)
    detach(model)
    assert "different functions" in capfd.readouterr().err


def replace_kind(layer, kind):
    layer.kind = kind
    return layer


@pytest.mark.parametrize("name", KINDS)
def test_a_family_names_every_site_of_its_model(name):
    model = tunix_model(name)
    before = jax.tree.structure(nnx.state(model))
    attach(model, ParaConfig(r=4, target_modules=SITES))
    assert sum(v.size for v in variables(nnx.state(model, nnx.LoRAParam))) > 0
    moved = nnx.clone(model)
    assert type(moved) is type(model) and isinstance(model, type(detach(moved)))
    assert jax.tree.structure(nnx.state(detach(model))) == before


def test_each_row_of_the_table_has_a_model_here():
    ours = {f"tunix.models.{module}.model" for module, _ in KINDS.values()}
    assert ours == {name for name in FAMILIES if name.startswith("tunix")}
