"""docs/scaling.md has the tables of scripts/scale.py. The formulas agree with the package's own shapes and programs."""

import re
import subprocess
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

SCALING = (ROOT / "docs" / "scaling.md").read_text()
PAGE = SCALING.split("\n## The arithmetic\n")[1].split("\n## ")[0]
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


def test_the_sentence_about_lora(tables):
    days = [[float(text.replace(",", "")) for text in row[2:]] for row in tables["day"][1:]]
    some = [100 * (one / para - 1) for _, para, one, _ in days]
    every = [100 * (one / para - 1) for _, para, _, one in days]
    said = numbers(r"LoRA on q and v costs # to # % more than PARA, and on all sites # to # %")
    assert said == [pytest.approx(x, abs=0.7) for x in (min(some), max(some), min(every), max(every))]


def test_a_step_with_full_memory_takes_about_20_ms_on_each_chip(tables):
    assert all(18 < float(row[3]) < 25 for row in tables["speed"][1:])


def test_the_loop_over_a_queued_resource_is_a_script():
    (script,) = re.findall(r"```\n(export TPU=[^`]*\nplace=.*?)```", SCALING, re.DOTALL)
    subprocess.run(["bash", "-n", "-c", script], check=True)


def numbers(pattern):
    """The numbers of the page's one sentence that fits the pattern, in which # is a number."""
    found = re.findall(pattern.replace("#", r"([\d,.]*\d)"), re.sub(r"\s+", " ", PAGE))
    assert len(found) == 1, (pattern, found)
    found = found[0] if isinstance(found[0], tuple) else (found[0],)
    return [float(text.replace(",", "")) for text in found]


def test_the_sentences_about_host_memory():
    held = scale.BANK_BYTES * scale.adapter_values("PARA r=12", SEVEN.model)
    needed, small, fits_small, large, fits_large = numbers(
        r"10,000 PARA adapters of LLaMA-2 7B take # GB. .* one v5e chip has # GB, and 80 % of it hold about #, .* v6e "
        r"chip with its # GB about #\."
    )
    assert needed == pytest.approx(1e4 * held / 1e9, rel=0.01)
    assert fits_small == pytest.approx(0.8e9 * small / held, rel=0.02)
    assert fits_large == pytest.approx(0.8e9 * large / held, rel=0.02)


def test_the_sentence_about_answers_of_one_token():
    rows = scale.speed_table(scale.Traffic(answer=1), [SMOL])[1:]
    shares = [round(float(row[-1][:-1])) for row in rows]
    said = numbers(r"With answers of one token, it is # % for SmolLM2-135M on v5e and # % on v6e")
    assert said == shares[:2] and max(said) == max(shares)


def test_the_sentences_about_prefixes():
    assert numbers(r"Each of 10,000 tenants with its own copy of a 2,000-token prefix would need # TB") == [
        pytest.approx(1e4 * 2000 * scale.cache_bytes(SEVEN.model) / 1e12, rel=0.05)
    ]
    hours = 1e6 * scale.prefix_seconds(SEVEN, "v5e", TRAFFIC) / 3600
    assert numbers(r"that prefix adds # chip-hours to the day") == [pytest.approx(hours, rel=0.02)]


def test_the_sentences_about_merged_models_and_loading():
    assert numbers(r"a chip of its own for each of 10,000 merged models: # chip-hours") == [24e4]
    read = 1e3 * scale.weight_bytes(SEVEN.model, None) / 1e12
    assert numbers(r"1,000 workers read 1,000 times the backbone, # TB") == [pytest.approx(read, rel=0.02)]


def test_the_sentences_about_preemptions():
    """Lost share (s / 2 + r) / m, with m the time between the preemptions of a slice's hosts."""
    days, save, restart, large, small = numbers(
        r"preempted once in # days, a checkpoint every # minutes and # minutes to restart, one run on 250 hosts "
        r"\(1,000 v5e chips\) loses # % of its time, and one on 4 hosts # %"
    )
    lost = [100 * (save / 2 + restart) / (days * 24 * 60 / hosts) for hosts in (250, 4)]
    assert [large, small] == [pytest.approx(lost[0], rel=0.05), pytest.approx(lost[1], rel=0.05)]


@pytest.mark.parametrize("given", ["--prompt=0", "--prompt=-600", "--prefix=0", "--requests=-1", "--answer=many"])
def test_traffic_that_cannot_be_is_refused(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", given])
    with pytest.raises(SystemExit):
        scale.main()
    assert "whole number of at least 1" in capsys.readouterr().err
