"""lm-eval's tasks: recorded, answered and scored as lm-eval scores them."""

import json
import random

import datasets
import pytest
from lm_eval.api.instance import Instance
from tiny_harness import WRITE, command, lines, results

from para_jax import ParaLM, load_model_config, load_tokenizer
from para_jax.cli import main
from para_jax.evaluation.harness.tasks import load_tasks, record, replay
from para_jax.evaluation.options import EvalOptions
from para_jax.evaluation.questions import Scored
from para_jax.evaluation.task_questions import read_tasks


def test_a_task_that_draws_while_it_is_loaded_draws_as_on_lm_evals_command_line(
    folder, tmp_path, monkeypatch, few_files
):
    """GPQA shuffles its answers so, and `datasets` keeps them. Machine and earlier tasks make no difference."""
    drawing = WRITE.format(file=folder / "tasks" / "data.jsonl") + "process_docs: !function drawing.drawn\n"
    for name in ("tiny_write", "tiny_second"):
        (tmp_path / f"{name}.yaml").write_text(drawing.replace("tiny_write", name))
    code = "import random\n\ndef drawn(docs):\n    return docs.map(lambda doc: {'drawn': random.random()})\n"
    (tmp_path / "drawing.py").write_text(code)

    def draws(cache, *names):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / cache)
        made = load_tasks(names, tmp_path, limit=None, fewshot=None, chat=False)
        return [doc["drawn"] for doc in made[-1].loaded["tasks"][names[-1]].test_docs()]

    generator = random.Random(0)
    wanted = [generator.random() for _ in range(6)]
    assert draws("one", "tiny_write") == draws("another", "tiny_second", "tiny_write") == wanted


def test_a_task_that_is_always_asked_without_examples_says_so(folder, tmp_path, capsys, few_files):
    """As in lm-eval, --num-fewshot does not change a task that has num_fewshot: 0."""
    (tmp_path / "zero.yaml").write_text((folder / "tasks" / "other.yaml").read_text().replace("tiny_other", "zero"))
    (tmp_path / "one.yaml").write_text((folder / "tasks" / "pick.yaml").read_text().replace("tiny_pick", "one"))

    def shots(fewshot):
        made = load_tasks(["zero", "one"], tmp_path, limit=None, fewshot=fewshot, chat=False)
        return [task.get_config("num_fewshot") for one in made for task in one.loaded["tasks"].values()]

    assert (shots(None), shots(0)) == ([0, 1], [0, 0])
    assert "fewshot" not in capsys.readouterr().err
    assert shots(2) == [0, 2]
    assert capsys.readouterr().err.count("task zero: --num-fewshot 2 is not used") == 1


def test_log_likelihoods_that_are_no_numbers_are_said(folder, capsys):
    """lm-eval's argmax takes the first of them, which may be right by chance."""
    (task,) = load_tasks(["tiny_pick"], folder / "tasks", limit=2, fewshot=None, chat=False)
    tokenizer = load_tokenizer(folder / "backbone")
    asked = record(task, tokenizer, 100, sampling_seed=0)
    answers = dict.fromkeys(asked, Scored(-1.0, False)) | dict.fromkeys(asked[:2], Scored(float("nan"), False))
    assert "samples" not in replay(task, tokenizer, 100, answers.get, sampling_seed=0)
    assert "task tiny_pick: 2 log-likelihoods are not numbers" in capsys.readouterr().err
    replay(task, tokenizer, 100, dict.fromkeys(asked, Scored(-1.0, False)).get, sampling_seed=0)
    assert capsys.readouterr().err == ""


def test_what_a_task_of_lm_eval_is_scored_by_covers_its_config_and_documents(folder, tmp_path, few_files):
    """Shards with other documents don't belong together. One task given twice is refused: its scores have one name."""
    pick, data = (folder / "tasks" / "pick.yaml").read_text(), folder / "tasks" / "data.jsonl"
    (tmp_path / "pick.yaml").write_text(pick)
    (tmp_path / "few.yaml").write_text("group: few\ntask:\n  - task: tiny_pick\n    num_fewshot: 0\n")
    options = EvalOptions(include_path=tmp_path, limit=2)
    given = load_tokenizer(folder / "backbone"), load_model_config(folder / "backbone"), options
    with pytest.raises(ValueError, match="tiny_pick is given more than once"):
        read_tasks(["tiny_pick", "few"], *given)
    found = [read_tasks(["tiny_pick"], *given)[0].scored_by for _ in range(2)]
    assert found[0] == found[1] != ""
    (tmp_path / "data.jsonl").write_text(data.read_text().replace('"label": 0', '"label": 1'))
    (tmp_path / "pick.yaml").write_text(pick.replace(str(data), str(tmp_path / "data.jsonl")))
    assert read_tasks(["tiny_pick"], *given)[0].scored_by != found[0]


def test_a_second_round_and_unknown_requests_are_refused_with_the_task(folder, monkeypatch):
    (task,) = load_tasks(["tiny_pick"], folder / "tasks", limit=2, fewshot=None, chat=False)
    tokenizer = load_tokenizer(folder / "backbone")
    asked = record(task, tokenizer, 100, sampling_seed=0)
    assert len(asked) == 6 and len({one.context for one in asked}) == 2
    known = dict.fromkeys(asked[1:], Scored(-1.0, False))
    with pytest.raises(ValueError, match="task tiny_pick: asks a second round of requests"):
        replay(task, tokenizer, 100, known.get, sampling_seed=0)
    known[asked[0]] = Scored(-9.0, False)
    found = replay(task, tokenizer, 100, known.get, sampling_seed=0, samples=True)
    assert found["samples"]["tiny_pick"][0]["resps"] == [[(value, "False")] for value in ("-9.0", "-1.0", "-1.0")]
    monkeypatch.setattr(Instance, "__post_init__", lambda self: setattr(self, "request_type", "generate_rounds"))
    with pytest.raises(ValueError, match="task tiny_pick: requests of type generate_rounds"):
        record(task, tokenizer, 100, sampling_seed=0)


@pytest.mark.long
@pytest.mark.parametrize(("named", "members"), [("tiny_group", ["tiny_pick", "tiny_other"]), ("tiny_tag", ["labels"])])
def test_groups_and_tags_score_as_lm_eval_scores_them(folder, engine, harness, tmp_path, named, members, request):
    if named == "tiny_tag":
        request.getfixturevalue("few_files")
    assert main(command(folder, tmp_path, "--limit", "4", tasks=[named])) == 0
    for name, found in results(tmp_path).items():
        theirs = harness(ParaLM(engine, None if name == "base" else name), named, limit=4)
        assert set(found["results"]) == {*members, *(["tiny_group"] if named == "tiny_group" else [])}
        for task, values in found["results"].items():
            assert values["acc,none"] == theirs["results"][task]["acc,none"]
    assert all(f" {task} acc |" in (tmp_path / "table.md").read_text() for task in found["results"])


@pytest.mark.long
def test_two_tasks_that_sample_after_the_same_prompts_get_their_own_answers(
    folder, engine, harness, tmp_path, few_files
):
    assert main(command(folder, tmp_path, "--limit", "4", tasks=["tiny_samples"])) == 0
    drawn = {one["text"] for one in map(json.loads, lines(tmp_path)) if "text" in one}
    samples = harness(ParaLM(engine, "A"), "tiny_samples", limit=4)["samples"]
    first, second = ([one["resps"][0][0] for one in samples[task]] for task in ("tiny_draw", "tiny_redraw"))
    assert len(first) == 4 and all(a != b for a, b in zip(first, second, strict=True))
    assert {*first, *second} <= drawn
