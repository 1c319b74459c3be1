import json

import jax
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, prompts
from tiny_run import tokenizer

from para_jax import Engine, bench, forward
from para_jax.bench import decode as bench_decode
from para_jax.bench import serve as bench_serve
from para_jax.bench import train as bench_train
from para_jax.bench.rounds import interleaved, measurement, paired
from para_jax.inference.generate import next_token
from para_jax.reports.plots import decode_plot
from para_jax.runtime import devices
from para_jax.runtime.devices import matrix_weights

BACKBONE = str(FIXTURES / "smollm2")
DECODE = dict(rows=(2,), context=4, rounds=3, bank=5)
TRAIN = dict(rows=(2,), prompt=4, completion=3, rounds=2)


def test_sides_are_measured_in_turn_and_the_first_run_does_not_count():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"}
    rounds = interleaved(sides, 3)
    assert calls == list("abababab")
    assert rounds == [{"a": 3, "b": 4}, {"a": 5, "b": 6}, {"a": 7, "b": 8}]
    assert measurement("s", rounds)["medians"] == {"a": 5, "b": 6}


@pytest.fixture(scope="module")
def decoded():
    """A record of bench decode, with one rank of LoRA, and how many steps it compiled."""
    with pytest.MonkeyPatch.context() as patch:
        few = {name: bench_decode.METHODS[name] for name in ("PARA", "(IA)^3", "LoRA r=4")}
        patch.setattr(bench_decode, "METHODS", few)
        next_token.clear_cache()  # jax forgets the oldest of all programs, perhaps other tests' steps while this counts
        return bench.BENCHMARKS["decode"](BACKBONE, **DECODE), next_token._cache_size()


@pytest.mark.long
def test_decoding_is_measured_for_every_method_with_one_tenant_and_with_many(decoded):
    measured, compiled = decoded
    sides = {(side["method"], side["tenants"]) for side in measured["sides"].values()}
    methods = {(method, n) for method in ("PARA", "(IA)^3", "LoRA r=4") for n in (1, 2)}
    assert sides == methods | {("base", 0)} and len(measured["medians"]) == 8
    assert compiled == 4, "one step for base, one for all factors, two for LoRA: with and without a gather"
    positive = ("medians", "cpu_medians")
    assert all(value > 0 for kind in positive for value in measured[kind].values())
    assert len(measured["rounds"]) == 3
    name = "PARA, 2 rows, 2 tenants"
    assert measured["ratios"][f"{name} / base"] == paired(measured["rounds"], name, "base, 2 rows")


@pytest.mark.long
def test_the_byte_ratio_is_that_of_weights_cache_and_adjustments(decoded):
    measured, _ = decoded
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(backbone("smollm2")))
    config = backbone("smollm2").config
    cache = 2 * 4 * config.num_layers * 2 * config.kv_width * 4  # rows, bytes, layers, keys and values, tokens
    factors = 2 * 4 * config.num_layers * sum(config.site_width(s) for s in ("q_proj", "v_proj", "up_proj"))
    assert measured["gigabytes"]["base, 2 rows"] * 1e9 == pytest.approx(weights + cache)
    expected = 1 + factors / (weights + cache)
    assert measured["byte_ratios"]["PARA, 2 rows, 2 tenants / base"] == pytest.approx(expected)


def test_outputs_are_checked_before_they_are_timed(monkeypatch):
    model = backbone("smollm2")
    bank = bench_decode.bank_of(model, bench_decode.METHODS["PARA"], 2)
    base = bench_decode.Step(model, bench_decode.Side("base", 2, 0, None), 4)
    para = bench_decode.Step(model, bench_decode.Side("PARA", 2, 2, bank.rows(bank.names)), 4)
    para.check(base)
    base.check(base)
    idle = bench_decode.Step(model, bench_decode.Side("PARA", 2, 2, bank.rows([None, None])), 4)
    with pytest.raises(AssertionError, match="PARA, 2 rows, 2 tenants: differs by 0.0 from base"):
        idle.check(base)


@pytest.mark.long
def test_a_picture_of_the_record_is_drawn(decoded, tmp_path):
    decode_plot(
        decoded[0] | {"command": "para-jax bench decode --backbone small", "device": "a CPU"}, tmp_path / "decode.png"
    )
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_random_weights_have_the_shape_that_is_named():
    model = bench_decode.random_backbone(BACKBONE)
    assert model.config == backbone("smollm2").config
    logits = forward(model, None, prompts(model, 1), 4)
    assert np.isfinite(logits).all() and logits.std() > 0.1


@pytest.mark.long
def test_the_training_step_is_measured_by_what_the_backward_pass_keeps(monkeypatch):
    monkeypatch.setitem(devices.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    measured = bench.BENCHMARKS["train"](BACKBONE, **TRAIN, packed=2, random=True, remat=("dots", "block"))
    assert list(measured["medians"]) == ["remat dots", "remat block"]
    assert all(value > 0 for value in measured["medians"].values()) and len(measured["rounds"]) == 2
    rate, share = measured["medians"]["remat dots"], measured["ratios"]["remat dots: share of the peak"]
    assert share == pytest.approx(rate * 4 * matrix_weights(backbone("smollm2").config) / 1e9)


@pytest.mark.long
def test_a_run_prints_a_table_and_writes_what_it_returns(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(
        bench.BENCHMARKS, "train", lambda backbone: bench_train.bench_train(backbone, **TRAIN, remat=("dots", "none"))
    )
    record = bench.run("train", BACKBONE, tmp_path / "results" / "train.json")
    assert json.loads((tmp_path / "results" / "train.json").read_text()) == record
    assert record["command"] == f"para-jax bench train --backbone {BACKBONE}"
    assert {"device", "versions", "medians", "ratios", "rounds", "unit"} <= set(record)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["remat dots", "remat none", "none / dots"]
    assert "tokens/s" in lines[0]


@pytest.mark.long
def test_every_request_is_served_to_its_length():
    model = backbone("llama")
    work = bench_serve.ragged(6, model.config.vocab_size)
    work = work._replace(prompts=[ids[:3] for ids in work.prompts], new_tokens=[1, 2, 5, 6, 9, 13])
    served = bench_serve.serve(Engine(model, None, tokenizer(), slots=2, max_length=16), work)
    assert sorted(count for _, count in served.ended) == work.new_tokens
    assert served.rounds == sorted(served.rounds)
    assert served.tokens_per_second == work.tokens / served.rounds[-1]
    latencies = served.latencies()
    assert 0 < latencies["first token p50"] <= latencies["first token p95"] <= 1e3 * served.rounds[-1]
    assert latencies["a token p50"] > 0 and latencies["longest gap"] > 0
    assert len(served.live) == len(served.waiting) == len(served.rounds) and served.live_while_waiting == 2


def test_a_first_token_comes_with_the_round_that_takes_its_request():
    ended = [(0, 5), (3, 13), (3, 1)]  # the second has 5, 4 and 4 tokens in the rounds 1 to 3
    served = bench_serve.ServingTimes([1.0, 2.0, 4.0, 8.0], ended, [2, 1, 1, 2], [True, True, False, False])
    latencies = served.latencies()
    assert latencies["first token p50"] == 2000.0
    assert latencies["a token p50"] == pytest.approx(1000 * 6 / 12)
    assert latencies["longest gap"] == 4000.0 and served.live_while_waiting == 1.5
    idle = served._replace(live=[2, 2, 0, 2])  # nothing decodes when the third round ends
    assert idle.latencies()["longest gap"] == 1000.0


@pytest.mark.parametrize("name", ["train", "serve"])
def test_a_list_of_rows_is_refused_by_name_where_one_number_is_measured(name, tmp_path):
    with pytest.raises(ValueError, match="--rows is 1,8.*one number"):
        bench.run(name, BACKBONE, tmp_path / "record.json", rows=(1, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("path", "named"), [
    ("folder", "--output .*folder: a folder"),
    ("file/record.json", "--output .*file/record.json: Not a directory"),
])  # fmt: skip
def test_a_wrong_place_for_a_record_is_found_before_anything_is_measured(path, named, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setitem(bench.BENCHMARKS, "train", lambda backbone: pytest.fail("measured"))
    with pytest.raises((ValueError, OSError), match=named):
        bench.run("train", BACKBONE, tmp_path / path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_options_of_decode_are_not_for_others(tmp_path):
    with pytest.raises(ValueError, match="bench train has no option context; it has rows"):
        bench.run("train", BACKBONE, context=3)
