import json

import pytest
from conftest import FIXTURES

from para_jax import bench
from para_jax.inference.generate import next_token

BACKBONE = str(FIXTURES / "smollm2")
DECODE = dict(batches=(2,), prompt=4, tokens=3, rounds=2)
TRAIN = dict(rows=2, prompt=4, completion=3, rounds=2)


def test_sides_are_measured_in_turn_and_the_first_run_does_not_count():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"}
    rounds = bench.interleaved(sides, 3)
    assert calls == list("abababab")
    assert rounds == [{"a": 3, "b": 4}, {"a": 5, "b": 6}, {"a": 7, "b": 8}]
    assert bench.summary("s", rounds)["medians"] == {"a": 5, "b": 6}


def test_loading_is_measured_in_a_process_of_its_own_against_a_limit(monkeypatch):
    measured = bench.bench_load(BACKBONE, rounds=1)
    assert measured["within_limit"] and measured["limit_above_weights"] == 300
    assert 0 < measured["medians"]["weights"] < measured["medians"]["peak"] < 300
    monkeypatch.setattr(bench, "LOAD_LIMIT", 0)
    assert not bench.bench_load(BACKBONE, rounds=1)["within_limit"]


def test_a_backbone_that_can_not_be_loaded_gives_the_error_of_the_load_in_a_line(tmp_path):
    (tmp_path / "config.json").write_bytes((FIXTURES / "smollm2" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / "smollm2" / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="^bench load: .*safetensors") as error:
        bench.bench_load(str(tmp_path))
    assert "\n" not in str(error.value) and "ValueError" not in str(error.value)


def test_decoding_is_measured_for_base_one_adapter_and_mixed_tenants_which_share_a_program():
    compiled = next_token._cache_size()
    measured = bench.bench_decode(BACKBONE, **DECODE)
    assert next_token._cache_size() - compiled == 2, "one for the base and one for all adapters"
    median = measured["medians"]
    assert list(median) == ["base, rows 2", "para, rows 2", "mixed, rows 2"]
    assert all(value > 0 for value in median.values()) and len(measured["rounds"]) == 2
    of_rounds = [of_round["mixed, rows 2"] / of_round["base, rows 2"] for of_round in measured["rounds"]]
    assert measured["ratios"]["mixed / base, rows 2"] == sum(of_rounds) / 2


def test_the_training_step_is_measured_with_and_without_remat():
    measured = bench.bench_train(BACKBONE, **TRAIN)
    assert list(measured["medians"]) == ["remat none", "remat block"]
    assert all(value > 0 for value in measured["medians"].values()) and len(measured["rounds"]) == 2


def test_a_run_prints_a_table_and_writes_what_it_returns(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.BENCHMARKS, "train", lambda backbone: bench.bench_train(backbone, **TRAIN))
    record = bench.run("train", BACKBONE, tmp_path / "results" / "train.json")
    assert json.loads((tmp_path / "results" / "train.json").read_text()) == record
    assert record["command"] == f"para-jax bench train --backbone {BACKBONE}"
    assert {"device", "versions", "medians", "ratios", "rounds", "unit"} <= set(record)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["remat none", "remat block", "remat block / none"]
    assert "tokens/s" in lines[0]


def test_an_unknown_benchmark_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="bench: 'speed' is not possible; expected one of load, decode, train"):
        bench.run("speed", BACKBONE)
