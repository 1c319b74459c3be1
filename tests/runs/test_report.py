"""What a run shows: base model beside adapter, answers, and one line per tenant."""

from para_jax.data.records import Record
from para_jax.evaluation.score import Measured, Score, describe_best, prompt_text, samples_of, shown_score
from para_jax.evaluation.tasks import EvalTask
from para_jax.runs.report import choice_lines, record_of, sample_lines, score_table, tenants_table


def records(count=10):
    rows = [Record(f"what is {i} ?\nanswer:", f"right {i}", (f"right {i}",), None, "") for i in range(count)]
    task = EvalTask("test", rows)
    base = samples_of(task, ["wrong"] * count)
    mine = samples_of(task, [f"right {i}" for i in range(count)])
    also = (Measured("f1", 0.5, 0.1),)
    return {
        "validation": record_of(Score("validation", "exact_match", 0.75, 0.5, 4, 0.25), samples=True),
        "test_base": record_of(Score("test", "exact_match", 0.1, 6.0, count, 0.1, also, base), samples=True),
        "test": record_of(Score("test", "exact_match", 1.0, 0.2, count, 0.0, also, mine), samples=True),
    }


def test_base_and_adapter_are_side_by_side_with_errors_and_counts():
    found = records()
    lines = [line.split() for line in score_table(found).splitlines()]
    assert lines[0] == ["base", "adapter", "examples"]
    assert lines[1] == ["validation", "exact_match", "-", "0.7500", "±", "0.2500", "4"]
    assert lines[3] == ["test", "exact_match", "0.1000", "±", "0.1000", "1.0000", "10"]
    assert [line[1] for line in lines[3:6]] == ["exact_match", "f1", "loss"]
    assert score_table({}) == sample_lines({}) == ""


def test_the_accuracy_of_ranked_choices_says_so():
    ranked = record_of(Score("validation", "accuracy", 0.75, 0.25, 4), samples=False)
    assert "likeliest of the choices" in score_table({"validation": ranked})
    assert "choices" not in score_table(records())


def test_five_answers_are_shown_from_the_whole_file():
    lines = sample_lines(records()).splitlines()
    assert lines[0] == "5 of the 10 test examples:" and len(lines) == 1 + 5 * 4
    assert [line.split()[2] for line in lines[1::4]] == ["0", "2", "4", "6", "8"]
    assert lines[1:5] == [
        "  what is 0 ? answer:",
        "    expected  right 0",
        "    base      wrong",
        "    adapter   right 0",
    ]


def shown_prompts(prompts, expected="right"):
    """The lines with the prompts, and all other lines, of a report on as many examples."""
    rows = [Record(prompt, expected, ("right",), None, "") for prompt in prompts]
    score = Score("test", "exact_match", 1.0, 0.2, len(rows), samples=samples_of(EvalTask("t", rows), ["a\nb"] * 5))
    record = record_of(score, samples=True)
    assert [one[:2] for one in record["samples"]] == [[prompt_text(prompt), expected] for prompt in prompts]
    lines = sample_lines({"test": record}).splitlines()[1:]
    return [line[2:] for line in lines[::3]], lines[1::3] + lines[2::3]


def test_prompts_are_shown_where_they_differ_and_kept_whole():
    """The templates of most tasks begin or end with the same long instruction."""
    topics = "what is tea", "who wrote it?", "where is Chad", "why", "what is a tea house"
    head, tail = "Read the question below with care.\nQuestion: ", " Its type (a person, a place, a thing or none):"
    shown, _ = shown_prompts([head + topic + tail for topic in topics])
    assert shown == [f"...{topic}..." for topic in topics]
    chats = [[{"role": "system", "content": head * 2}, {"role": "user", "content": topic}] for topic in topics]
    assert shown_prompts(chats)[0] == [f"...{topic}" for topic in topics]
    assert shown_prompts([topic + tail * 2 for topic in topics])[0] == [f"{topic}..." for topic in topics]
    assert shown_prompts(topics)[0] == list(topics)  # short enough
    assert shown_prompts([head + tail] * 5)[0] == [" ".join((head + tail).split())] * 5  # nothing differs
    prefixes = [head + tail + " tea" * i for i in range(5)]
    assert shown_prompts(prefixes)[0] == ["...", "...tea", "...tea tea", "...tea tea tea", "...tea tea tea tea"]


def test_a_loss_is_shown_without_its_minus_sign():
    score = Score("validation", "loss", -0.25, 0.25, 4, 0.1)
    assert str(score) == "validation: loss 0.2500 ± 0.1000 on 4 examples"
    assert shown_score("loss", -0.25) == 0.25 and shown_score("matthews", -0.25) == -0.25
    assert f"{shown_score('loss', 0.0):.1f}" == f"{shown_score('loss', -0.0):.1f}" == "0.0"
    assert describe_best("loss", -0.2078, 60) == "best validation loss 0.2078 at step 60"
    assert describe_best("accuracy", 0.5833, 6) == "best validation accuracy 0.5833 at step 6"
    assert describe_best("loss", None, 0) == "no validation data"
    table = score_table({"validation": record_of(score, samples=True)})
    assert "0.2500 ± 0.1000" in table and "-0" not in table


def test_tenants_are_listed_by_name_with_the_scores_of_their_test_data():
    entry = {
        "examples": 20, "steps": 6, "best_step": 3, "best_score": -0.5, "metric": "loss", "test_before": None,
        "test_after": None, "ended": "done", "scores": {},
    }  # fmt: skip
    new = entry | {"metric": "exact_match", "best_score": 0.75, "scores": records(), "ended": "patience"}
    held = entry | {"scores": {"validation": record_of(Score("validation", "loss", -0.5, 0.5, 4), samples=False)}}
    lines = tenants_table({"new": new, "bare": entry, "held": held}).splitlines()
    assert [line.split()[0] for line in lines] == ["tenant", "bare", "held", "new"]
    assert lines[1].split() == ["bare", "loss", "-", "-", "-", "-", "-", "-", "6", "3", "-"]
    assert lines[2].split() == ["held", "loss", "-", "0.5000", "-", "-", "4", "0.5000", "6", "3", "validation"]
    of_new = ["new", "exact_match", "0.1000", "±", "0.1000", "1.0000", *["0.5000", "±", "0.1000"] * 2]
    assert lines[3].split() == [*of_new, "10", "0.2000", "6", "3", "test", "patience"]
    assert "f1" in lines[0] and "f1" not in tenants_table({"bare": entry, "held": held})


def test_the_choice_names_scores_that_are_the_same_and_those_within_noise():
    assert choice_lines("b", ["b"], [], 8) == []
    said = choice_lines("b", ["b", "a"], ["a", "c"], 8)
    assert said[0].startswith("b, a have the same score; b has the lowest loss")
    assert said[1] == "b, a, c are not told apart (differences within noise, 8 examples)"
