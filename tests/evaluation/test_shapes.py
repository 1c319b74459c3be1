"""An evaluation compiles few programs, spreads its rows over all devices, and its padding changes no score."""

from functools import cache

import jax
import numpy as np
import pytest
import tiny_scores
from golden_models import FIXTURES, strong
from long_cases import long, slow
from lowering import lowered
from tiny_run import backbone_folder, run_config, strong_adapters, tokenizer, words, write_rows

from para_jax import (
    EvalOptions,
    Ia3Config,
    LoraConfig,
    ParaConfig,
    evaluate,
    init_adapter,
    load_backbone,
    make_mesh,
    stack_adapters,
    train,
    train_tenants,
)
from para_jax.cli import main
from para_jax.data.records import Record
from para_jax.evaluation import likelihood
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.likelihood import continuation_scores
from para_jax.evaluation.questions import Likelihood
from para_jax.evaluation.scoring import Tasks
from para_jax.evaluation.shapes import batch_rows, plan_shapes
from para_jax.evaluation.tasks import EvalTask, encode_task
from para_jax.inference import generate
from para_jax.inference.generate import generate_tokens, next_token
from para_jax.inference.sampling import Sampling
from para_jax.model.adapted import prefill
from para_jax.runtime.sharding import place
from para_jax.training.step import eval_nll

PROGRAMS = "_prefill", "continuation_scores", "eval_nll", "next_token"
CHOICES = ("w9", "w9 w10", "w30 w31 w32 w33")
#: Prompts that had seven padded lengths, and caches of five.
LENGTHS = (3, 14, 20, 37, 60, 75, 101, 11)


@cache
def model():
    return load_backbone(FIXTURES / "llama")


@cache
def adapter():
    return strong(init_adapter(ParaConfig(r=4), model().config), 1)


def rows_of(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {"prompt": words(draw.integers(20, 256, length)), "completion": CHOICES[i % 3]}
        for i, length in enumerate(lengths)
    ]


def records_of(lengths, seed=0):
    return [Record(row["prompt"], row["completion"], (row["completion"],), None, "") for row in rows_of(lengths, seed)]


def task_of(metric, lengths, name="t"):
    choices = CHOICES if metric == "accuracy" else ()
    return EvalTask(name, records_of(lengths), metric, choices, max_new_tokens=4)


def score(adapter, task):
    return tiny_scores.score(model(), adapter, task, tokenizer(), rows=4)


def of_evaluation(compiled):
    """The names of evaluation's programs among the compiled ones."""
    return [name for each in compiled for name in PROGRAMS if name in each]


# ------------------------------------------------------------------------------------------------------- few programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    backbone_folder(folder / "backbone")
    for to, seed in ((folder / "data", 0), (folder / "tenants" / "a", 1), (folder / "tenants" / "b", 2)):
        for i, (split, lengths) in enumerate(dict(train=LENGTHS[:2], validation=LENGTHS, test=LENGTHS[::2]).items()):
            longer = [length + 5 * i + seed for length in lengths]
            write_rows(to / f"{split}.jsonl", rows_of(longer, seed=10 * seed + i))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("tenants", [True, False], ids=["tenants", "one"])
@pytest.mark.parametrize(("metric", "most"), [slow("accuracy", 4), ("exact_match", 6)])
def test_a_run_compiles_few_programs_for_all_its_evaluations(folder, tmp_path, metric, most, tenants, compiled):
    """Validation, the test before and after, and the best adapter, which is not the last one."""
    more = [f"data.tenants={folder / 'tenants'}", "data.train=null"] if tenants else []
    config = run_config(
        folder, f"output_dir={tmp_path / 'run'}", f"eval.metric={metric}", "eval.test=true", "eval.batch_size=5",
        "data.max_seq_length=200", "train.max_steps=2", "eval.every=1", "train.learning_rate=0.5",
        f"eval.choices={list(CHOICES) if metric == 'accuracy' else []}", *more,
    )  # fmt: skip
    (train_tenants if tenants else train)(config)
    assert most // 2 <= len(of_evaluation(compiled)) <= most, compiled


@pytest.mark.long
def test_tasks_that_are_evaluated_together_share_their_programs(compiled):
    tasks = [task_of("exact_match", LENGTHS, "a"), task_of("exact_match", [n + 9 for n in LENGTHS], "b")]
    evaluate(model(), None, tasks, tokenizer=tokenizer(), options=EvalOptions(rows=3))
    assert 3 <= len(of_evaluation(compiled)) <= 6, compiled


def test_all_tenants_own_tasks_together_compile_at_most_eight_programs(tmp_path, compiled, capsys):
    """Some rank labels and some write texts of many lengths, after prompts of many lengths."""
    names, draw = [f"t{i}" for i in range(6)], np.random.default_rng(0)
    strong_adapters(tmp_path, [f"{name}/adapter" for name in names])
    for i, name in enumerate(names):
        labels = [{"completion": f"w{9 + j % 2}", "label": j % 2} for j in range(4)]
        texts = [{"completion": words(draw.integers(20, 250, 2 + 9 * j))} for j in range(4)]
        rows = [{"prompt": words(draw.integers(20, 250, 3 + 20 * i))} | end for end in (labels, texts)[i % 2]]
        write_rows(tmp_path / "data" / name / "test.jsonl", rows)
    del compiled[:]
    given = ["--backbone", str(tmp_path / "backbone"), "--adapters", *(f"{tmp_path / name}/adapter" for name in names)]
    given += ["--tasks", str(tmp_path / "data"), "--own", "--output", str(tmp_path / "out"), "--rows", "4"]
    assert main(["evaluate", *given, "--no-compilation-cache"]) == 0
    of_model = [name for name in compiled if any(one in name for one in (*PROGRAMS, "prefill_chunk", "steps"))]
    assert len(of_model) == 8 and len(capsys.readouterr().out.splitlines()) > 2 * len(names), compiled


def test_contexts_of_several_lengths_share_the_programs_of_their_continuations(compiled):
    questions = [(None, Likelihood((5,) * n, (9,) * count)) for n in (5, 20, 30, 40) for count in (1, 2)]
    Answerer(model(), None, tokenizer(), rows=3).answer(questions)
    assert sorted(of_evaluation(compiled)) == ["_prefill"] * 4 + ["continuation_scores"] * 2


# ------------------------------------------------------------------------------------------------------ the same scores


@pytest.mark.long
@pytest.mark.parametrize("metric", ["loss", "accuracy", "exact_match"])
def test_a_plan_over_more_examples_changes_no_score(metric):
    task = task_of(metric, LENGTHS[:5])
    more = Tasks(model(), tokenizer(), [task, task_of(metric, [7, 33, 90, 130])], rows=4)
    assert more.shapes != plan_shapes([encode_task(task, tokenizer())])
    alone, among = score(adapter(), task), more.scores(stack_adapters([adapter()]), {0: 0})[0]
    assert among.score == (pytest.approx(alone.score, rel=1e-5) if metric == "loss" else alone.score)
    assert among.loss == pytest.approx(alone.loss, rel=1e-5)


def test_what_is_written_does_not_depend_on_the_padding():
    prompts = [[5, 9, 77], [*range(30, 41)]]
    least = generate_tokens(model(), adapter(), prompts, Sampling(5))
    assert generate_tokens(model(), adapter(), prompts, Sampling(5), length=40, max_length=96) == least
    assert len({tuple(tokens) for tokens in least}) == 2


@pytest.mark.parametrize(
    ("metric", "config"),
    [
        long("accuracy", ParaConfig(r=4)),
        long("exact_match", ParaConfig(r=4)),
        slow("exact_match", Ia3Config()),
        long("exact_match", LoraConfig(r=4)),
    ],
)
def test_a_fresh_adapter_scores_as_the_backbone_to_the_bit(metric, config):
    """So a run scores the backbone in the adapter's programs."""
    task, fresh = task_of(metric, LENGTHS[:4]), init_adapter(config, model().config)
    base, neutral = (score(one, task) for one in (None, fresh))
    assert neutral == base and neutral.stderr == base.stderr
    assert score(strong(fresh, 1), task).loss != base.loss


# --------------------------------------------------------------------------------------------------- all devices' rows


def test_rows_are_rounded_up_to_what_the_mesh_divides():
    assert [batch_rows(n) for n in (1, 12)] == [1, 12]
    for sizes, rows in (((8, 1, 1), [8, 16, 16, 56]), ((2, 2, 2), [4, 12, 16, 52]), ((1, 1, 8), [1, 12, 16, 50])):
        with jax.set_mesh(make_mesh(*sizes)):
            assert [batch_rows(n) for n in (1, 12, 16, 50)] == rows


def on_mesh(monkeypatch, task, rows_of_batch):
    """The task's score on a mesh of 8 devices; by program FLOPs a device and a row; and bytes of cache a device and a
    row."""
    flops, cache, mesh = {}, {}, make_mesh(8)
    real = {"eval_nll": eval_nll, "next_token": next_token, "continuation_scores": continuation_scores}
    rows_of = {"eval_nll": lambda given: given[2][0], "next_token": lambda given: given[3]}

    def noted(name):
        def call(*given, **static):
            rows = len(rows_of.get(name, lambda given: given[4])(given))
            if name not in flops:
                flops[name] = lowered(real[name], given, static).compile().cost_analysis()["flops"] / rows
            return real[name](*given, **static)

        return call

    def prefilled(model, adapters, tokens, *given, **static):
        logits, state = prefill(model, adapters, tokens, *given, **static)
        cache["bytes"] = state.cache[0][0].addressable_shards[0].data.nbytes / len(tokens)
        return logits, state

    with monkeypatch.context() as patched, jax.set_mesh(mesh):
        for where, name in ((likelihood, "eval_nll"), (generate, "next_token"), (likelihood, "continuation_scores")):
            patched.setattr(where, name, noted(name))
        for where in (likelihood, generate):
            patched.setattr(where, "prefill", prefilled)
        model_there, adapter_there = (place(one, mesh, model().config) for one in (model(), adapter()))
        return tiny_scores.score(model_there, adapter_there, task, tokenizer(), rows=rows_of_batch), flops, cache


@pytest.mark.long
@pytest.mark.parametrize(("metric", "rows"), [("accuracy", 50), ("exact_match", 12)])
def test_an_evaluation_batch_of_any_size_is_spread_over_all_devices(monkeypatch, metric, rows):
    task = task_of(metric, [5, 6, 7, 8] * 5)
    alone = tiny_scores.score(model(), adapter(), task, tokenizer(), rows=16)
    first, flops, cache = on_mesh(monkeypatch, task, 16)
    assert set(flops) == {"accuracy": {"continuation_scores"}, "exact_match": {"eval_nll", "next_token"}}[metric]
    found, *costs = on_mesh(monkeypatch, task, rows)
    assert costs == [pytest.approx(flops, rel=0.02), pytest.approx(cache)]
    for one in (first, found):
        assert (one.score, one.loss) == (alone.score, pytest.approx(alone.loss, rel=1e-5))
