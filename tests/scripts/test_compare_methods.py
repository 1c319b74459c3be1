"""scripts/compare_methods.py: what it trains, scores and keeps."""

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from golden_models import strong
from tiny_run import backbone_folder, rows_of_text, tokenizer, words, write_rows

from para_jax import Ia3Config, LoraConfig, ParaConfig, forward, init_adapter, load_backbone
from para_jax.data.records import Record
from para_jax.evaluation.evaluate import Tasks
from para_jax.evaluation.questions import Scored, Written
from para_jax.evaluation.tasks import EvalTask

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_cells  # noqa: E402
import compare_methods  # noqa: E402
import compare_scores  # noqa: E402
import compare_training  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, a task of labels, a task of written answers, and passages."""
    made = tmp_path_factory.mktemp("compare")
    backbone_folder(made / "backbone")
    labelled = [{"sentence": f"w{20 + i} w{30 + i}", "label": i % 2} for i in range(12)]
    draw = np.random.default_rng(0)
    passages = [{"prompt": f"Passage: {words(draw.integers(20, 256, 140))}\nQuestion: w7\nAnswer:", "completion": "w8"}]
    for split in ("train", "validation", "test"):
        write_rows(made / "data" / "sst2" / f"{split}.jsonl", labelled)
        write_rows(made / "data" / "own" / f"{split}.jsonl", rows_of_text(12, seed=len(split)))
        write_rows(made / "data" / "squad" / f"{split}.jsonl", 2 * passages)
    return made


def arguments(folder: Path, output: Path, *given: str) -> list[str]:
    sizes = "--steps 2 --rows 2 --limit 2 --test-limit 4 --seeds 2 --texts 2".split()
    return ["--backbone", str(folder / "backbone"), "--data", str(folder / "data"), "--output", str(output)] + [
        *sizes, *given,
    ]  # fmt: skip


def parsed(folder: Path, output: Path, *given: str) -> argparse.Namespace:
    return compare_methods.arguments(arguments(folder, output, *given))


@pytest.mark.long
def test_an_adapter_is_scored_with_its_own_and_with_shuffled_prompts(folder, tmp_path, caplog):
    args = parsed(folder, tmp_path)
    model = load_backbone(folder / "backbone")
    tasks = Tasks(model, tokenizer(), [compare_methods.test_task(args, "sst2")], args.test_limit)
    adapter = strong(init_adapter(ParaConfig(r=4), model.config))
    own, shuffled, again = (compare_scores.scored(tasks, [adapter], shuffle)[0] for shuffle in (None, 0, 0))
    assert own["count"] == 4 and own["metric"] == "accuracy"
    assert shuffled == again and shuffled["loss"] != own["loss"]
    rows = {name: compare_cells.unpacked(text) for name, text in own["rows"].items()}
    assert rows["score"].mean() == own["score"] and len(rows["loss"]) == 4
    with jax.log_compiles():
        (other,) = compare_scores.scored(tasks, [strong(adapter, seed=1)])
        assert other["loss"] != own["loss"] and "ompil" not in caplog.text  # the seeds of a method share their programs
        jax.jit(lambda x: x + len(caplog.text))(1.0)
        assert "ompil" in caplog.text
    for alone, mixed in zip(
        (own, other), compare_scores.scored(tasks, [adapter, strong(adapter, seed=1)]), strict=True
    ):
        assert mixed["rows"]["score"] == alone["rows"]["score"] and mixed["loss"] == pytest.approx(
            alone["loss"], abs=1e-5
        )


@pytest.mark.parametrize("values", [[0, 1, 1], [1.0], [0.25, 1, 0], [1234.5, 0.5], [0.5]])
def test_packed_rows_are_unpacked(values):
    text = compare_cells.packed(values)
    assert "\n" not in text
    np.testing.assert_allclose(compare_cells.unpacked(text), values, rtol=1e-3)


def test_a_missing_loss_stays_missing():
    assert np.isnan(compare_cells.unpacked(compare_cells.packed([None, 0.5]))).tolist() == [True, False]


# ---------------------------------------------------------------------------------------------------- files of earlier


def test_configs_are_named_as_in_the_results_so_far():
    configs = {
        "sst2-PARA-r-12": ParaConfig(r=12),
        "sst2--IA--3--response": Ia3Config(scope="response"),
        "banking77-PARA-r-12--response-w-4": ParaConfig(r=12, scope="response"),
        "banking77-PARA-r-12--layers-20-to-29": ParaConfig(r=12, layers_to_transform=tuple(range(20, 30))),
        "sst2-LoRA-r-36": LoraConfig(r=36, lora_alpha=36, target_modules=("q_proj", "v_proj", "up_proj")),
    }
    for name, config in configs.items():
        held = compare_cells.read(ROOT / "results" / "compare_methods" / f"{name}-trained.json")
        assert compare_training.form_of(config) == held["asked"]["adapter"]


def test_a_form_is_a_method_with_changed_fields_and_overrides():
    given = [
        "A:r=4,scope=response,train.up_lr_ratio=8",
        "B:method=lora,r=2,use_rslora=true",
        "C:method=ia3,scope=prompt",
    ]
    found = compare_methods.forms([*given, "D:target_modules=q_proj+up_proj"])
    assert found["A"] == (ParaConfig(r=4, scope="response"), ("train.up_lr_ratio=8",))
    sites = ParaConfig().target_modules
    assert found["B"][0] == LoraConfig(r=2, use_rslora=True, target_modules=sites)
    assert found["C"][0] == Ia3Config(scope="prompt")
    assert found["D"][0] == ParaConfig(target_modules=("q_proj", "up_proj"))


@pytest.mark.parametrize("given, message", [
    (["--also", "A"], "'A' is not NAME:FIELD=VALUE"),
    (["--also", "A:method=none"], "'none'"),
    (["--also", "A:rank=4"], "rank"),
    (["--also", "A:r=0"], "'A:r=0'"),
    (["--also", "PARA r=12:scope=response"], "'PARA r=12' has this name"),
    (["--also", "A 1:r=4", "A-1:r=8"], "'A-1': 'A 1' has this name"),
    (["--seeds", "0"], "--seeds 0"),
    (["--methods", "PARA"], "--methods PARA: choose from "),
    (["--tasks", "nowhere"], "nowhere holds no train.jsonl"),
    (["--tasks", "sst2", "--stages", "test", "--shots"], "run --stages train for (IA)^3 first"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_named(given, message, folder, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        compare_methods.main(arguments(folder, tmp_path, *given))


def test_scores_with_shuffled_prompts_are_added_where_they_are_asked_for(tmp_path):
    file, made = tmp_path / "cell.json", iter(range(9))
    make = lambda: {"test": {"rows": {}}, "made": next(made)}  # noqa: E731
    assert compare_cells.done(file, make, {})["made"] == 0 and compare_cells.done(file, make, {})["made"] == 0
    assert compare_cells.lacks(file, shuffled=True)
    with_shuffled = lambda: make() | {"shuffled": {}}  # noqa: E731
    assert compare_cells.done(file, with_shuffled, {}, shuffled=True)["made"] == 1
    assert compare_cells.done(file, with_shuffled, {}, shuffled=True)["made"] == 1


def test_scores_without_rows_are_kept_until_they_are_asked_for_again(tmp_path):
    file, made = tmp_path / "sst2-base-tested.json", []

    def make():
        made.append(1)
        return {"test": {"score": 0.5, "rows": {"score": "01"}}}

    file.write_text(json.dumps({"test": {"score": 0.4}, "asked": {"steps": "2", "test_limit": None}}))
    asked = {"steps": "2", "test_limit": 1000}
    assert compare_cells.done(file, make, asked)["test"]["score"] == 0.4 and not made
    assert compare_cells.done(file, make, asked, rescore=True)["test"]["score"] == 0.5
    assert compare_cells.done(file, make, asked, rescore=True)["asked"] == asked and len(made) == 1
    for other in (asked | {"test_limit": 10}, asked | {"steps": "3"}):
        with pytest.raises(SystemExit, match="other settings"):
            compare_cells.done(file, make, other)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]


# --------------------------------------------------------------------------------------------------------- the training


@pytest.fixture
def runs(monkeypatch):
    """The runs that were asked for, in place of training: the best rate is 3e-3, and a seed's score is its number."""
    asked = []

    def train_tenants(config):
        asked.append(config)
        for rate in config.sweep.learning_rate:
            for seed in config.sweep.seed:
                folder = Path(config.output_dir) / f"learning_rate-{rate!r}-seed-{seed}"
                (folder / "adapter").mkdir(parents=True, exist_ok=True)
                loss = abs(np.log(rate / 3e-3))
                row = {"step": config.train.max_steps, "validation_loss": loss, "validation_accuracy": seed - loss}
                (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return argparse.Namespace(output_dir=Path(config.output_dir))

    monkeypatch.setattr(compare_training, "train_tenants", train_tenants)
    return asked


def trained(file: Path) -> dict:
    return {int(seed): one["score"] for seed, one in compare_cells.read(file)["validation"].items()}


def test_rates_are_tried_until_the_best_is_not_the_last_and_then_the_seeds(folder, tmp_path, runs):
    compare_methods.main(arguments(folder, tmp_path, "--tasks", "sst2", "--stages", "train", "--methods", "PARA r=12"))
    rates, further, seeds = runs
    assert rates.sweep.learning_rate == (1e-4, 3e-4, 1e-3, 3e-3) and further.sweep.learning_rate == (1e-2,)
    assert (rates.train.max_steps, seeds.train.max_steps, seeds.train.per_device_batch_size) == (1, 2, 4)
    assert (seeds.sweep.learning_rate, seeds.sweep.seed) == ((3e-3,), (0, 1))
    assert not any(run.eval.base for run in runs)
    assert trained(tmp_path / "sst2-PARA-r-12-trained.json") == {0: 0, 1: 1}
    assert "PARA r=12" in (tmp_path / "validation.md").read_text()


@pytest.mark.long
def test_more_seeds_are_added_to_a_cell(folder, tmp_path, runs):
    given = "--tasks", "sst2", "--stages", "train", "--methods", "PARA r=12", "--seeds"
    file = tmp_path / "sst2-PARA-r-12-trained.json"
    for count, added in (("2", (0, 1)), ("4", (2, 3)), ("3", None), ("5", (4,))):
        runs.clear()
        compare_methods.main(arguments(folder, tmp_path, *given, count))
        assert (runs[-1].sweep.seed if runs else None) == added
    assert trained(file) == {seed: seed for seed in range(5)}
    of_seed = compare_training.seed_folder(tmp_path / "runs" / "sst2" / "PARA-r-12", 3e-3, 3)
    assert of_seed.is_dir() and of_seed.name == "learning_rate-0.003-seed-3"


def test_a_part_of_the_examples_is_the_first_of_them(folder, tmp_path, runs):
    given = "--tasks", "own", "--stages", "train", "--methods", "(IA)^3", "--examples", "3"
    compare_methods.main(arguments(folder, tmp_path, *given))
    data = Path(runs[-1].data.train)
    whole = (folder / "data" / "own" / "train.jsonl").read_text().splitlines()
    assert (data / "train.jsonl").read_text().splitlines() == whole[:3]
    assert (data / "validation.jsonl").read_text() == (folder / "data" / "own" / "validation.jsonl").read_text()
    found = compare_cells.read(tmp_path / "own--IA--3-trained.json")
    assert (found["examples"], found["asked"]["examples"]) == (3, "3")
    assert compare_methods.test_task(parsed(folder, tmp_path, *given), "own").records[0].place.startswith(str(folder))


def test_a_part_of_the_examples_ends_between_lines(folder, tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, and JSON may hold them as they are."""
    lines = [json.dumps({"prompt": f"w{i}\u2028w\u0085", "completion": "w1"}, ensure_ascii=False) for i in range(4)]
    for split in ("train", "validation", "test"):
        (tmp_path / "lines").mkdir(exist_ok=True)
        (tmp_path / "lines" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    args = parsed(folder, tmp_path / "out", "--examples", "3")
    args.data = tmp_path
    part = compare_training.training_data(args, "lines") / "train.jsonl"
    assert part.read_bytes().decode().split("\n") == [*lines[:3], ""]
    assert compare_training.examples_read(args, "lines") == 3


def test_what_was_trained_otherwise_is_not_tested_under_its_name(folder, tmp_path, runs):
    common = "--tasks", "sst2", "--methods", "--shots", "--stages"
    also = "--also", "A:r=4,train.up_lr_ratio=8"
    compare_methods.main(arguments(folder, tmp_path, *common, "train", *also))
    runs.clear()
    for given, message in (
        (["--also", "A:r=2,train.up_lr_ratio=8"], "trained with adapter ParaConfig(r=4"),
        (["--also", "A:r=4"], "trained with overrides ['train.up_lr_ratio=8'], not None"),
        ([*also, "--steps", "4"], "trained with steps 2, not 4"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            compare_methods.main(arguments(folder, tmp_path, *common, "test", *given))
    args, form = parsed(folder, tmp_path, *common, "test", *also), compare_methods.forms(also[1:])["A"]
    with pytest.raises(SystemExit, match="A: seed 2 is not trained"):
        compare_methods.adapter_of(args, "sst2", form[0], "A", form[1], 2, None)
    assert not runs and not list(tmp_path.glob("*-tested.json"))


# ----------------------------------------------------------------------------------------------------- what is measured


def records(completions: str) -> list[Record]:
    return [Record(f"w{i}", one, (one,), None, "") for i, one in enumerate(completions)]


@pytest.mark.parametrize("completions, count, taken", [
    ("aaabac", 4, "abca"), ("abcdef", 4, "abcd"), ("aaab", 2, "ab"), ("ab", 4, "ab"), ("aab", 0, ""),
])  # fmt: skip
def test_examples_in_the_prompt_are_balanced_and_the_first(completions, count, taken):
    found = compare_scores.balanced(records(completions), count)
    assert "".join(one.completion for one in found) == taken


def test_examples_come_before_each_prompt(folder, tmp_path):
    task = compare_methods.test_task(parsed(folder, tmp_path), "sst2")
    shown = compare_scores.with_examples(task, records("ab"), 2)
    assert [one.prompt for one in shown.records] == [f"w0 a\n\nw1 b\n\n{one.prompt}" for one in task.records]
    assert shown.choices == task.choices and shown.examples is None


def test_after_examples_an_answer_is_its_first_line(folder, tmp_path, monkeypatch):
    """The base model goes on with further examples."""
    task = compare_methods.test_task(parsed(folder, tmp_path), "sst2")._replace(metric="exact_match", choices=())
    tasks = Tasks(load_backbone(folder / "backbone"), tokenizer(), [task])
    (encoded,) = tasks.encoded.values()
    likely = [Scored(-1.0, False) for _ in task.records]
    written = [Written(f" {one.completion}\n\nw3 w4", 5) for one in task.records]
    monkeypatch.setattr(compare_scores, "answer_tasks", lambda *_: [likely + written])
    assert [compare_scores.scored(tasks, [None], one_line=one)[0]["score"] for one in (False, True)] == [0, 1]


def test_an_answer_of_several_lines_ends_at_an_empty_one():
    """As those of GSM8K in the examples."""

    def task(*completions):
        records = [Record("w3", text, (text,), None, "") for text in completions]
        return SimpleNamespace(task=EvalTask("maths", records))

    text = " 2 + 2 = 4.\nThe answer is 4.\n\nHow many"
    for encoded, wanted in ((task("a", "a\nb"), "2 + 2 = 4.\nThe answer is 4."), (task("a", "b\n"), "2 + 2 = 4.")):
        assert compare_scores.without_more(encoded, Written(text, 9)).text == wanted
    assert compare_scores.without_more(task("a"), Scored(-1.0, False)) == Scored(-1.0, False)


@pytest.mark.long
def test_forgetting_is_of_the_second_half_of_plain_text_after_its_first(folder):
    model = load_backbone(folder / "backbone")
    file = folder / "data" / "squad" / "test.jsonl"
    task = compare_scores.plain_text(file, tokenizer(), 5, 128)
    (example,) = task.examples  # the passage is there twice
    sentence = json.loads(file.read_text().splitlines()[0])["prompt"].removeprefix("Passage: ").split()
    ids = tokenizer()(" ".join(sentence[:200]))["input_ids"][:128]
    assert (list(example.prompt_ids), list(example.completion_ids)) == (ids[:64], ids[64:])
    tasks = Tasks(model, tokenizer(), [task])
    base, fresh, changed = (
        compare_scores.text_losses(tasks, adapter)
        for adapter in (
            None,
            init_adapter(ParaConfig(r=4), model.config),
            strong(init_adapter(ParaConfig(r=4), model.config)),
        )
    )
    logits = forward(model, None, np.array([ids]), 64)
    nats = -jax.nn.log_softmax(logits[0, 63:127])[np.arange(64), np.array(ids[64:])].mean()
    np.testing.assert_allclose([base[0], fresh[0]], nats, rtol=1e-4)
    assert abs(changed[0] - base[0]) > 1e-3


def test_a_passage_may_hold_what_ends_a_line_elsewhere(folder, tmp_path):
    rows = [{"prompt": f"Passage: {words(range(20, 60))}\u2028{words(range(60, 90))}\nQuestion: w7\nAnswer:"}]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n")
    assert len(compare_scores.plain_text(tmp_path / "test.jsonl", tokenizer(), 5, 16).records) == 1


def test_a_text_that_is_too_short_is_refused(folder):
    with pytest.raises(ValueError, match="no passage has 500 tokens"):
        compare_scores.plain_text(folder / "data" / "squad" / "test.jsonl", tokenizer(), 5, 500)


def test_forgetting_on_the_trained_task_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="choose another"):
        compare_methods.main(arguments(folder, tmp_path, "--tasks", "squad", "--stages", "forgetting"))
