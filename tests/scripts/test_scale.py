"""docs/scaling.md has the tables of scripts/scale.py. The formulas agree with the package's own shapes and programs."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from golden_models import FIXTURES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import scale  # noqa: E402

from para_jax import AdapterBank, decode, init_adapter, make_mesh, prefill  # noqa: E402
from para_jax.backbone.load import abstract_backbone, load_model_config  # noqa: E402
from para_jax.estimate.memory import tree_size  # noqa: E402

PAGE = (ROOT / "docs" / "scaling.md").read_text().split("\n## The arithmetic\n")[1].split("\n## ")[0]
TRAFFIC = scale.Traffic()
TINY = str(FIXTURES / "llama")
SMOL, SEVEN, SEVENTY = scale.BACKBONES


@pytest.fixture(scope="module")
def tables():
    return scale.tables()


@pytest.mark.parametrize("name", ["chips", "tenants", "speed", "prefixes", "day"])
def test_the_page_has_the_table(tables, name):
    assert scale.markdown(tables[name]) in PAGE


def test_the_page_has_no_other_table_of_numbers(tables):
    on_page = re.findall(r"^\|(?:---\|)+$", PAGE, re.MULTILINE)
    named = [line for line in PAGE.splitlines() if line.startswith("| ") and re.search(r"\| -?[\d.,]+%? \|$", line)]
    ours = {line for table in tables.values() for line in scale.markdown(table).splitlines()}
    assert len(on_page) >= len(tables) and set(named) <= ours


# ------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("chips", [1, 2])
def test_what_a_chip_gets_of_an_adapter_is_what_a_bank_places_on_it(chips):
    model_config = load_model_config(TINY)
    bank = AdapterBank.holding({"a": init_adapter(scale.METHODS[scale.PARA], model_config)}, model_config)
    with jax.set_mesh(make_mesh(tensor=chips)):
        placed = jax.tree.leaves(bank.rows(["a"]).stacks)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in placed)
    assert on_one == scale.copied_bytes(scale.PARA, model_config, chips)


@pytest.mark.parametrize("method", scale.METHODS)
def test_a_row_s_bytes_are_those_of_the_state_that_decode_carries(method):
    """K tokens of cache, F of adjustments: one row more, and one token more, in the abstract state of a mixed batch."""
    model_config = load_model_config(TINY)
    model = abstract_backbone(model_config, jnp.bfloat16)
    adapter = init_adapter(scale.METHODS[method], model_config)
    bank = AdapterBank.holding({"a": adapter, "b": adapter}, model_config)

    def state(rows, length):
        made = bank.rows(["a", "b", "a"][:rows])
        tokens = jnp.zeros((rows, 4), int)
        return jax.eval_shape(lambda m: prefill(m, made, tokens, 4, max_length=length)[1], model)

    def cache_and_carried(rows, length):
        found = state(rows, length)
        return tree_size(found.cache), tree_size(found.adjustments)

    (cache, carried), (more, _) = cache_and_carried(2, 16), cache_and_carried(2, 17)
    assert more - cache == 2 * scale.cache_bytes(model_config)
    assert carried == 2 * scale.carried_bytes(method, model_config)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_weights_take_the_bytes_of_the_loaded_model(quantize):
    for source in (TINY, str(FIXTURES / "smollm2")):
        config = load_model_config(source)
        loaded = abstract_backbone(config, "bfloat16", quantize=quantize)
        assert scale.weight_bytes(config, quantize) == tree_size(loaded)


def test_a_step_reads_every_weight_but_the_embedding():
    assert scale.read_bytes(SMOL) == scale.weight_bytes(SMOL.model, None)  # tied: the embedding is the head
    assert scale.weight_bytes(SEVEN.model, "int8") - scale.read_bytes(SEVEN) == 2 * 32000 * 4096


def test_adapters_have_their_known_sizes():
    assert scale.adapter_values("PARA r=12", SEVEN.model) == 8_945_664  # configs/llama2-7b-boolq.yaml
    assert scale.carried_bytes("PARA r=12", SEVEN.model) == 1_228_800


def test_the_multiplications_are_those_of_the_programs():
    """By XLA's own count, which includes norms and the keys that plain attention multiplies in vain."""
    config, rows, length = replace(SMOL.model, kinds=SMOL.model.kinds[:2], vocab_size=4096), 2, 64
    model, numbers = abstract_backbone(config, jnp.float32, layout="layers"), jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    filled = jax.jit(lambda m, t, n: prefill(m, None, t, n, max_length=length))
    state = jax.eval_shape(filled, model, tokens, numbers)[1]
    counted = filled.lower(model, tokens, numbers).cost_analysis()["flops"]
    assert rows * scale.prefill_flops(config, length) == pytest.approx(counted, rel=0.05)
    counted = jax.jit(decode).lower(model, state, numbers).cost_analysis()["flops"]
    assert rows * scale.decode_flops(config, length) == pytest.approx(counted, rel=0.05)


def test_a_prefix_and_the_rest_cost_what_the_whole_prompt_costs():
    for chip in scale.CHIP:
        whole = scale.prefill_seconds(SEVEN, chip, 2512)
        parts = scale.prefill_seconds(SEVEN, chip, 2000), scale.prefill_seconds(SEVEN, chip, 512, before=2000)
        assert sum(parts) == pytest.approx(whole, rel=0.01)


def test_a_windowed_layer_sees_its_window_after_a_prefix():
    assert scale.keys_after(2000, 100, 512) == 512 and scale.keys_after(2000, 100, None) == 2050.5
    assert scale.keys_after(500, 24, 512) == pytest.approx(sum(min(i + 1, 512) for i in range(500, 524)) / 24)


def test_a_backbone_that_does_not_fit_its_chips_is_named():
    found = scale.tables(backbones=[SEVENTY._replace(chips={"v5e": 1})])
    assert [row[2] for row in found["speed"][1:]] == [scale.UNFIT]
    assert [row[2:] for row in found["day"][1:]] == [[scale.UNFIT] * 4]
    assert not any("-" in text or "nan" in text for row in found["speed"][1:] for text in row[2:])


# ------------------------------------------------------------------------------------------- the sentences


def test_lora_never_costs_less_than_para_and_the_base_model_never_more(tables):
    for _, _, *hours in tables["day"][1:]:
        base, para, some, every = (float(text.replace(",", "")) for text in hours)
        assert base <= para <= some <= every


def numbers(pattern):
    """The numbers of the page's one sentence that fits the pattern, in which # is a number."""
    found = re.findall(pattern.replace("#", r"([\d,.]*\d)"), re.sub(r"\s+", " ", PAGE))
    assert len(found) == 1, (pattern, found)
    found = found[0] if isinstance(found[0], tuple) else (found[0],)
    return [float(text.replace(",", "")) for text in found]
