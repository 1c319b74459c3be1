"""The tasks of a run's config: its data, choices, metrics and lengths."""

import pytest
from golden_models import FIXTURES, strong
from tiny_run import backbone_folder, rows_of_text, run_config, tokenizer, words, write_rows
from tiny_scores import score

from para_jax import ParaConfig, init_adapter, load_backbone
from para_jax.backbone.load import load_model_config
from para_jax.data.examples import Example
from para_jax.data.records import Record
from para_jax.evaluation.options import EvalOptions
from para_jax.evaluation.questions import Scored
from para_jax.evaluation.task_questions import questions_of
from para_jax.evaluation.tasks import EvalTask, check_room, encode_task, file_task, task_of_run, with_room


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    backbone_folder(folder / "backbone")
    write_rows(folder / "data" / "train.jsonl", rows_of_text(4, seed=1))
    write_rows(
        folder / "data" / "test.jsonl", [*rows_of_text(3, seed=2), {"prompt": words(range(30, 50)), "completion": "w9"}]
    )
    return folder


def test_answers_that_are_cut_name_what_cuts_them(caplog):
    records = [Record("w7", words(range(20, 29)), ("w1",), None, "x:1")] * 2
    task = EvalTask("t", records, "exact_match", max_new_tokens=8)
    examples = [Example([7] * 3, list(range(20, 30)))] * 2
    assert with_room(task, examples, 100).max_new_tokens == 8
    assert "2 of 2 expected answers have more; set eval.max_new_tokens" in caplog.text
    caplog.clear()
    assert with_room(task, examples, 7).max_new_tokens == 4
    assert "shorten the prompt of x:1 (the model has 7 positions)" in caplog.text


def test_a_run_without_a_split_has_no_task(folder):
    assert task_of_run(run_config(folder), "validation", tokenizer()) is None


def test_the_length_of_answers_to_a_file_follows_from_its_completions(folder, tmp_path, capsys):
    config = load_backbone(folder / "backbone").config
    assert config.max_positions >= 128
    rows = [{"prompt": "w20", "completion": words([9] * count)} for count in (1, 20, 3)]
    file = write_rows(tmp_path / "test.jsonl", rows)
    for limit in (1, None):  # more examples ask no question again
        task = file_task(str(file), tokenizer(), config, split="test", limit=limit)
        assert task.max_new_tokens == 32
    assert "at most 32 tokens per answer; the longest expected one has 21" in capsys.readouterr().err
    assert file_task(f"{file}:loss", tokenizer(), config, split="test", limit=None) is not None
    assert "per answer" not in capsys.readouterr().err


def test_a_run_overrides_the_choices_and_metric_of_its_task(folder, tmp_path, capsys):
    data = write_rows(tmp_path / "test.jsonl", [{"sentence": "w3", "label": 1}])

    def of(*more):
        return task_of_run(run_config(folder, f"data.test={data}", "data.task=sst2", *more), "test", tokenizer())

    assert of("eval.metric=null")[2:4] == ("accuracy", ("negative", "positive"))
    assert "warning" not in capsys.readouterr().err
    assert of("eval.metric=accuracy", "eval.choices=['no','yes']")[2:4] == ("accuracy", ("no", "yes"))
    told = "test: 1 of 1 answers are not among the choices (no, yes) and count as wrong, the first is 'positive' ("
    assert told in capsys.readouterr().err
    assert of("eval.metric=f1").metric == "f1"


def test_a_file_with_columns_of_its_own_is_scored_by_a_config(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(ValueError, match="own.jsonl:1: no field 'prompt'.*text, label, or rename a field"):
        file_task(str(file), None, None, split="test", limit=None)


def test_a_task_sets_metrics_choices_and_answer_length(folder, tmp_path):
    def of(task, *rows, more=()):
        data = write_rows(tmp_path / f"{task}.jsonl", rows)
        none = "eval.metric=null", "eval.max_new_tokens=null"
        return task_of_run(
            run_config(folder, f"data.test={data}", f"data.task={task}", *none, *more), "test", tokenizer()
        )

    spam = of("sms_spam", {"sms": "w3", "label": 1})
    assert (spam.metric, spam.choices, spam.also) == ("accuracy", ("yes", "no"), ("macro_f1", "matthews"))
    own = of("sms_spam", {"sms": "w3", "label": 1}, more=["eval.also=[f1]"])
    assert (own.metric, own.also) == ("accuracy", ("f1",))
    other = of("sms_spam", {"sms": "w3", "label": 1}, more=["eval.metric=exact_match"])
    assert (other.metric, other.also, other.ranks) == ("exact_match", (), False)
    sums = of("gsm8k", {"question": "w3", "answer": "w4 #### 5"})
    assert (sums.metric, sums.max_new_tokens, sums.ranks) == ("final_number", 320, False)
    ready = of("copa", {"prompt": "w3", "completion": "w9"})  # other answers than the task's own templates give
    assert ready.choices == ("w9", "w9 w10", "w9 w10 w11", "w9 w10 w11 w12")


def test_choices_that_differ_only_in_white_space_are_one_choice(folder, tmp_path, capsys):
    def write(split, *completions):
        rows = [{"prompt": "w20", "completion": text, "label": "1"} for text in completions]
        return write_rows(tmp_path / f"{split}.jsonl", rows)

    write("train", "w9", " w9", "w9", "w10")
    own = f"data.train={tmp_path}", f"data.test={write('test', ' w9', 'w10 ')}", "eval.metric=accuracy"
    assert task_of_run(run_config(folder, *own), "test", tokenizer()).choices == ("w10", "w9")
    model = load_model_config(folder / "backbone")
    task = file_task(str(tmp_path), tokenizer(), model, split="test", limit=None)
    assert task is not None and task.choices == ("w10", "w9")
    known = f"data.test={write('test', ' yes', 'no')}", "data.task=boolq", "eval.metric=null"
    assert task_of_run(run_config(folder, *known), "test", tokenizer()).choices == ("yes", "no")
    assert "warning" not in capsys.readouterr().err


def test_long_examples_are_skipped_cut_or_refused_as_in_training(folder):
    def of(how):
        config = run_config(folder, "data.max_seq_length=16", f"data.truncate={how}")
        return task_of_run(config, "test", tokenizer())

    assert len(of("skip").records) == len(of("skip").examples) == 3
    cut = of("left")
    assert len(cut.records) == 4 and cut.examples[3].prompt_ids == [*range(36, 50)]
    short = Record(words(range(36, 50)), "w9", ("w9",), None, "")
    cut_before = cut._replace(records=[*cut.records[:3], short], examples=None)
    model = load_backbone(FIXTURES / "llama")
    adapter = strong(init_adapter(ParaConfig(r=4), model.config))
    ours, theirs = (score(model, adapter, task, tokenizer()) for task in (cut, cut_before))
    assert ours.loss == theirs.loss
    with pytest.raises(ValueError, match="test.jsonl:4: 22 tokens .* 16"):
        of("error")


def test_examples_that_are_left_out_still_count_among_those_of_the_file(folder):
    config = run_config(folder, "data.max_seq_length=16", "data.truncate=skip")
    task, model = task_of_run(config, "test", tokenizer()), load_model_config(folder / "backbone")
    asked = questions_of(task, tokenizer(), model, EvalOptions(limit=2))
    answers = dict.fromkeys(asked.questions, Scored(-1.0, False))
    assert asked.results(answers.get)["n-samples"] == {"test": {"original": 4, "effective": 2}}


def test_one_long_prompt_shortens_no_other_answer(folder, tmp_path, capsys):
    """Its own start is cut instead, as in a file's task."""
    model = load_model_config(folder / "backbone")
    rows = [{"prompt": words([20] * (model.max_positions + 9)), "completion": "w9"}, *rows_of_text(5, seed=4)]
    write_rows(tmp_path / "test.jsonl", rows)
    longest = max(len(row["completion"].split()) for row in rows) + 1

    def of(*more):
        given = f"data.test={tmp_path / 'test.jsonl'}", "eval.metric=exact_match", "eval.max_new_tokens=null", *more
        return task_of_run(run_config(folder, *given), "test", tokenizer())

    for most in ("null", model.max_positions):
        task = of(f"data.max_seq_length={most}", "data.truncate=left")
        assert task.max_new_tokens >= longest
        assert len(task.examples[0].prompt_ids) + task.max_new_tokens == model.max_positions
        assert [len(one.prompt_ids) for one in task.examples[1:]] == [8] * 5
    rows[0]["prompt"] = words([20] * (model.max_positions - 2))
    write_rows(tmp_path / "test.jsonl", rows)
    assert "warning" not in capsys.readouterr().err
    assert of("data.max_seq_length=null").max_new_tokens == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'test.jsonl'}:1" in said and "at most 2 tokens" in said


def test_a_prompt_that_is_cut_leaves_room_for_the_longest_choice(folder, tmp_path):
    model = load_model_config(folder / "backbone")
    write_rows(tmp_path / "test.jsonl", [{"prompt": words([20] * (model.max_positions + 9)), "completion": "w9"}])
    given = "eval.metric=accuracy", "eval.choices=[w9, w10 w11 w12]", "data.max_seq_length=null", "data.truncate=left"
    task = task_of_run(run_config(folder, f"data.test={tmp_path / 'test.jsonl'}", *given), "test", tokenizer())
    check_room(model, encode_task(task, tokenizer()))


@pytest.mark.parametrize("more", [0, 1])
def test_a_prompt_that_fits_with_the_longest_answer_is_not_cut(folder, tmp_path, capsys, more):
    """Its own completion needs room too, but never next to another answer."""
    model = load_model_config(folder / "backbone")
    fits = model.max_positions - 152
    write_rows(tmp_path / "test.jsonl", [{"prompt": words([20] * (fits + more)), "completion": words([9] * 100)}])
    task = file_task(str(tmp_path), tokenizer(), model, split="test", limit=None)
    assert task.max_new_tokens == 152
    assert len(task.examples[0].prompt_ids) == fits
    assert ("1 of 1 prompts lost their start" in capsys.readouterr().err) == bool(more)


@pytest.mark.parametrize(("completion", "more"), [(600, ()), (1, ("eval.max_new_tokens=600",))])
def test_an_answer_that_leaves_no_room_for_a_prompt_is_named(folder, tmp_path, completion, more):
    write_rows(tmp_path / "test.jsonl", [{"prompt": "w8 w7", "completion": words([9] * completion)}])
    given = "eval.metric=exact_match", "data.max_seq_length=4096", "data.truncate=left", *more
    with pytest.raises(ValueError, match=r"test.jsonl:1: .* 60\d tokens .* 512 tokens.*eval.max_new_tokens"):
        task_of_run(run_config(folder, f"data.test={tmp_path / 'test.jsonl'}", *given), "test", tokenizer())


def test_answers_of_a_file_that_are_no_choices_are_named(folder, tmp_path, capsys):
    model, rows = load_model_config(folder / "backbone"), [{"prompt": "w20", "label": "1"}]
    write_rows(tmp_path / "train.jsonl", [rows[0] | {"completion": text} for text in ("w9", "w10")])
    write_rows(tmp_path / "test.jsonl", [rows[0] | {"completion": text} for text in ("w9", "w11")])
    task = file_task(str(tmp_path), tokenizer(), model, split="test", limit=None)
    assert task is not None and task.choices == ("w10", "w9")
    said = capsys.readouterr().err
    assert "1 of 2 answers are not among the choices (w10, w9)" in said and "test.jsonl:2" in said
