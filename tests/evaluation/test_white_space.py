"""A warning where answers are right but for the white space at their ends."""

import pytest
from tiny_harness import WRITE

from para_jax import EvalOptions, load_backbone, load_tokenizer
from para_jax.evaluation.adapter_passes import find_adapters
from para_jax.evaluation.evaluate import Evaluation, run_evaluation
from para_jax.evaluation.harness.tasks import load_tasks, replay
from para_jax.evaluation.questions import Written
from para_jax.evaluation.task_questions import TaskQuestions
from para_jax.evaluation.white_space import Stripped, warn_of_white_space

FILTERS = "filter_list: [{name: bare, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"


def test_only_a_difference_of_more_than_a_few_answers_counts():
    assert Stripped.of(0.0, 7, 8) == Stripped(0.0, 0.875)
    assert Stripped.of(0.5, 2, 8) is None
    assert Stripped.of(0.0, 1, 1) == Stripped(0.0, 1.0)
    assert Stripped.of(1.0, 0, 1) is None and Stripped.of(0.0, 0, 0) is None


def test_the_warning_names_the_task_both_scores_and_the_filter(capsys, caplog):
    warn_of_white_space({"qtype": [Stripped(0.0, 0.25), Stripped(0.0, 0.875)]})
    said = capsys.readouterr().err + caplog.text
    assert "qtype: exact_match is 0.0000, and 0.8750 if white space" in said and "remove_whitespace" in said


@pytest.mark.parametrize(
    ("more", "text", "lost"),
    [("", " w9\n", Stripped(0.0, 1.0)), ("", "w9", None), ("", " w8", None), (FILTERS, " w9", None)],
)
def test_a_task_of_lm_eval_without_filters_loses_answers(folder, few_files, tmp_path, more, text, lost):
    file = folder / "tasks" / "data.jsonl"
    (tmp_path / "write.yaml").write_text((WRITE.format(file=file) + more).replace("tiny_write", "bare_write"))
    (task,) = load_tasks(["bare_write"], tmp_path, limit=None, fewshot=None, chat=False)
    tokenizer = load_tokenizer(folder / "backbone")
    found = replay(task, tokenizer, 128, lambda _: Written(text, 1), sampling_seed=0)
    assert found["white_space"] == ({} if lost is None else {"bare_write": lost})


def test_what_was_lost_to_white_space_is_collected_from_all_adapters_and_no_part_of_a_record(folder, capsys, caplog):
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    lost = iter([Stripped(0.0, 0.25), Stripped(0.0, 0.875)])
    task = TaskQuestions(("qtype",), [], lambda _: {"results": {"qtype": {}}, "white_space": {"qtype": next(lost)}})
    adapters = find_adapters({name: folder / name / "adapter" for name in "AB"}, model.config)
    found = run_evaluation(model, Evaluation([task], adapters), tokenizer, None, EvalOptions(base=False))
    assert [made["results"] for made in found.records.values()] == [{"qtype": {}}] * 2
    assert not any("white_space" in made for made in found.records.values())
    assert "and 0.8750 if white space" in capsys.readouterr().err + caplog.text
