import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden_models import FIXTURES, backbone, prompts
from tiny_run import backbone_folder, rows_of_text, tokenizer, write_rows

from para_jax import Engine, Transformer, bench, devices, forward
from para_jax.bench import decode as bench_decode
from para_jax.bench import evaluate as bench_evaluate
from para_jax.bench import http as bench_http
from para_jax.bench import load as bench_load
from para_jax.bench import prefix as bench_prefix
from para_jax.bench import scopes as bench_scopes
from para_jax.bench import serve as bench_serve
from para_jax.bench import tenants as bench_tenants
from para_jax.bench import train as bench_train
from para_jax.bench.rounds import interleaved, measurement, paired
from para_jax.data.batches import plan_buckets
from para_jax.data.examples import Example
from para_jax.inference.generate import next_token
from para_jax.plots import decode_plot
from para_jax.record_file import check_record_file, write_record
from para_jax.roofline import matrix_weights

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


@pytest.mark.long
def test_loading_is_measured_in_a_new_process_against_a_limit(monkeypatch):
    measured = bench.BENCHMARKS["load"](BACKBONE, rounds=1)
    assert measured["within_limit"] and measured["limit_above_weights"] == 300
    assert 0 < measured["medians"]["weights"] < measured["medians"]["peak"] < 300
    monkeypatch.setattr(bench_load, "LOAD_LIMIT", 0)
    assert not bench.BENCHMARKS["load"](BACKBONE, rounds=1)["within_limit"]


def test_a_backbone_that_does_not_load_gives_a_one_line_error(tmp_path):
    (tmp_path / "config.json").write_bytes((FIXTURES / "smollm2" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / "smollm2" / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="^bench load: .*safetensors") as error:
        bench.BENCHMARKS["load"](str(tmp_path))
    assert "\n" not in str(error.value) and "ValueError" not in str(error.value)


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
    positive = ("medians", "cpu_medians", "share_of_read", "share_of_matrix_products")
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


@pytest.mark.parametrize("name", ["smollm2", "llama"])  # with one matrix as embedding and head, and with two
def test_the_matrix_products_of_a_step_are_those_of_its_linears_and_head(name):
    model = backbone(name)
    sizes = sum(matrix.size for matrix in bench_decode.multiplied(model))
    assert sizes == matrix_weights(model.config) + model.config.vocab_size * model.config.width
    assert bench_decode.products_test(model, 2)() > 0


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


@pytest.mark.slow
def test_the_training_step_is_measured_by_scope(monkeypatch):
    monkeypatch.setattr(bench_scopes, "METHODS", {"(IA)^3": bench_scopes.METHODS["(IA)^3"]})
    measured = bench.BENCHMARKS["scopes"](BACKBONE, rows=(2,), lengths=((4, 3), (9, 3)), rounds=2)
    sides = [f"(IA)^3, {scope}, {length}" for length in ("4 + 3", "9 + 3") for scope in bench_scopes.SCOPES]
    assert list(measured["medians"]) == sides and all(value > 0 for value in measured["medians"].values())
    ratios = measured["ratios"]
    assert ratios["(IA)^3, 9 + 3: response / all"] == paired(measured["rounds"], sides[4], sides[3])
    assert ratios["(IA)^3, 9 + 3: response with cached prompts / all"] == paired(measured["rounds"], sides[5], sides[3])


@pytest.mark.long
def test_packing_is_measured_with_the_padding_that_it_removes(tmp_path):
    backbone_folder(tmp_path / "backbone")
    data = write_rows(tmp_path / "train.jsonl", rows_of_text(40, seed=0))
    measured = bench.BENCHMARKS["packing"](str(tmp_path / "backbone"), data=str(data), length=64, rows=(2,), rounds=1)
    assert list(measured["medians"]) == ["packed", "3 buckets", "1 bucket"]
    full = measured["share_of_real_tokens"]
    assert 1 >= full["packed"] > full["1 bucket"] and full["3 buckets"] >= full["1 bucket"]
    removed = measured["ratios"]["packed / 1 bucket, by the padding removed"]
    assert removed == full["packed"] / full["1 bucket"]
    assert measured["ratios"]["packed / 1 bucket"] == paired(measured["rounds"], "packed", "1 bucket")


def test_a_rare_bucket_counts_as_often_as_an_epoch_has_it():
    """One example of a hundred is long: of five measured steps, one of them would else hold most of the tokens."""
    draw = np.random.default_rng(0)
    examples = [Example(draw.integers(3, 256, 470 if i % 100 == 0 else 20 + i % 20).tolist(), [1]) for i in range(1000)]
    buckets, real = plan_buckets(examples, 3), sum(len(one.prompt_ids) + 1 for one in examples)
    for epoch in (bench_train.packed_epoch(examples, 512, 2), bench_train.padded_epoch(examples, 3, 1024)):
        assert epoch.real == real and 5 >= len(epoch.steps) >= 3
    rows = epoch.steps[0].batch.tokens.shape[1]
    lengths = np.array([bucket.length for bucket in buckets])
    padded = lengths[np.searchsorted(lengths, [len(one.prompt_ids) + 1 for one in examples])]
    steps = sum(-(-np.count_nonzero(padded == length) // rows) * length for length in lengths)
    assert sum(one.count * one.batch.tokens.shape[2] for one in epoch.steps) == pytest.approx(steps)
    assert epoch.share_of_real_tokens == pytest.approx(real / (steps * rows))


@pytest.mark.long
def test_the_step_of_many_tenants_is_measured_against_one(monkeypatch):
    monkeypatch.setattr(bench_tenants, "METHODS", {"(IA)^3": bench_tenants.METHODS["(IA)^3"]})
    measured = bench.BENCHMARKS["tenants"](BACKBONE, rows=(1,), rounds=2)
    where = "(IA)^3, 16 x 1 rows"
    assert list(measured["medians"]) == [f"{where}, {s}" for s in ("one tenant", "tenants", "of 64")]
    assert all(value > 0 for value in measured["medians"].values()) and len(measured["rounds"]) == 2
    expected = paired(measured["rounds"], f"{where}, tenants", f"{where}, one tenant")
    assert measured["ratios"][f"{where}: tenants / one tenant"] == expected and len(measured["ratios"]) == 2


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


def test_a_backbone_with_too_few_positions_is_told_before_anything_is_served(monkeypatch):
    monkeypatch.setattr(bench_serve, "load_backbone", lambda source: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="bench serve needs 2256 positions.*smollm2 has 512"):
        bench.run("serve", BACKBONE)


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


@pytest.mark.slow
def test_shared_prefixes_are_measured_by_scope_and_with_every_tokens_answer(monkeypatch):
    sides = {name: bench_prefix.SIDES[name] for name in ("base", "PARA, response", "PARA, all")}
    # few shapes, so that the engines share programs
    small = dict(PREFIX=12, QUESTION=3, TURNS=2, SYSTEM=16, TENANTS=2, LONG=16, SIDES=sides)
    for name, value in small.items():
        monkeypatch.setattr(bench_prefix, name, value)
    model = backbone("llama")
    found = bench_prefix.bench_prefixes(model, tokenizer(), 1)
    assert len(found["medians"]) == 6 and all(value > 0 for value in found["medians"].values())
    assert "a chat, PARA, response / base" in found["ratios"]
    served = bench_prefix.bench_system_prompt(model, tokenizer(), [[3, 4], [5]], [3, 2], 2, 1)
    assert set(served["medians"]) == set(sides)
    assert set(served["ratios"]) == {"PARA, response / base", "PARA, response / PARA, all"}
    assert len(bench_prefix.bench_gaps(model, tokenizer(), 1)["medians"]) == 4


@pytest.mark.long
def test_http_is_measured_against_the_engine_with_every_token_of_the_same_work(monkeypatch, tmp_path):
    for name, value in dict(CLIENTS=3, TENANTS=2, LIGHT=2, LONGEST=32).items():
        monkeypatch.setattr(bench_http, name, value)
    work = bench_serve.Workload([[3, 4], [5], [6, 7, 8], [9]], [9, 3, 12, 5])
    monkeypatch.setattr(bench_http, "ragged", lambda requests, vocab_size: work)
    found = bench.BENCHMARKS["http"](str(backbone_folder(tmp_path / "backbone")), rows=(2,), requests=4, rounds=1)
    assert list(found["medians"]) == ["engine in process", "HTTP, 3 clients"]
    assert all(value > 0 for value in found["medians"].values())
    assert 0 < found["latencies_ms"]["HTTP, 3 clients"]["first token p50"]
    assert set(found["parts"]["first token, one request at a time"]["medians"]) == {"engine in process", "HTTP"}


def test_a_first_token_comes_with_the_round_that_takes_its_request():
    ended = [(0, 5), (3, 13), (3, 1)]  # the second has 5, 4 and 4 tokens in the rounds 1 to 3
    served = bench_serve.ServingTimes([1.0, 2.0, 4.0, 8.0], ended, [2, 1, 1, 2], [True, True, False, False])
    latencies = served.latencies()
    assert latencies["first token p50"] == 2000.0
    assert latencies["a token p50"] == pytest.approx(1000 * 6 / 12)
    assert latencies["longest gap"] == 4000.0 and served.live_while_waiting == 1.5
    idle = served._replace(live=[2, 2, 0, 2])  # nothing decodes when the third round ends
    assert idle.latencies()["longest gap"] == 1000.0


def test_sampling_is_measured_for_greedy_and_sampled_rows():
    measured = bench.BENCHMARKS["sampling"](BACKBONE, rows=(3,), rounds=2)
    assert len(measured["medians"]) == 7 and len(measured["ratios"]) == 6 and measured["rows"] == 3
    assert all(value > 0 for value in measured["medians"].values())


@pytest.mark.parametrize(("name", "options"), [
    ("train", {}), ("scopes", {}), ("sampling", {}), ("serve", {}), ("evaluate", {}),
    ("packing", {"data": "train.jsonl"}),
])  # fmt: skip
def test_a_list_of_rows_is_refused_by_name_where_one_number_is_measured(name, options, tmp_path):
    with pytest.raises(ValueError, match="--rows is 1,8.*one number"):
        bench.run(name, BACKBONE, tmp_path / "record.json", rows=(1, 8), **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("path", "named"), [
    ("folder", "--output .*folder: a folder"),
    ("file/record.json", "--output .*file/record.json: Not a directory"),
    ("record.png", "--output .*record.png.* .json"),
])  # fmt: skip
def test_a_wrong_place_for_a_record_is_found_before_anything_is_measured(path, named, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setitem(bench.BENCHMARKS, "train", lambda backbone: pytest.fail("measured"))
    with pytest.raises((ValueError, OSError), match=named):
        bench.run("train", BACKBONE, tmp_path / path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_record_goes_through_a_pipe_or_a_link_and_replaces_a_file_whole(tmp_path):
    write_record(tmp_path / "a" / "record.json", {"a": 1})
    (tmp_path / "link").symlink_to(tmp_path / "a" / "record.json")
    write_record(tmp_path / "link", {"a": 2})
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "a" / "record.json").read_text()) == {"a": 2}
    with pytest.raises(ValueError, match="link: it holds no results, and would be overwritten"):
        check_record_file("--output", tmp_path / "link")
    (tmp_path / "empty").touch()
    write_record(tmp_path / "again", {"command": "x"})
    for name in ("empty", "again", "/dev/null"):
        check_record_file("--output", tmp_path / name)
    write_record(Path("/dev/null"), {"a": 3})
    assert Path("/dev/null").is_char_device()


def test_an_unknown_benchmark_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="bench: 'speed'.* load, decode, serve, http, evaluate, train"):
        bench.run("speed", BACKBONE)


def test_options_of_decode_are_not_for_others(tmp_path):
    with pytest.raises(ValueError, match="bench load has no option context; it has rounds"):
        bench.run("load", BACKBONE, context=3)


@pytest.mark.slow
def test_a_mixed_pass_is_measured_against_a_loop_over_adapters(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(bench_evaluate, "PROMPT", 8)
    monkeypatch.setattr(bench_evaluate, "NEW", 4)
    shape = backbone("llama").config
    small = Transformer(replace(shape, kinds=shape.kinds[:1]), rngs=nnx.Rngs(0))  # it compiles eight times
    monkeypatch.setattr(bench_evaluate, "load_backbone", lambda source: small)
    folder, counts = backbone_folder(tmp_path / "backbone"), []
    real = bench_evaluate.timed

    def counting(*arguments):
        before, seconds = len(compiled), real(*arguments)
        counts.append(len(compiled) - before)
        return seconds

    monkeypatch.setattr(bench_evaluate, "timed", counting)
    measured = bench.BENCHMARKS["evaluate"](str(folder), rows=(4,), adapters=(6, 2), rounds=1)
    names = [
        f"{work}, {side}"
        for work in ("6 adapters x 2 examples", "2 adapters x 4 examples")
        for side in ("mixed", "loop")
    ]
    assert list(measured["medians"]) == list(measured["first_run"]) == names
    assert set(measured["equal_texts"].values()) == {1.0}
    first = [counts[0:2], counts[5:7]]  # of both sides, then an uncounted run of one, and a round of both
    assert min(first[0]) > 2 and first[0] == first[1]  # the second workload compiles what the first did
    assert counts[3:5] == counts[8:10] == [0, 0]
    assert measured["ratios"]["6 adapters x 2 examples: mixed / loop"] == paired(measured["rounds"], *names[:2])
