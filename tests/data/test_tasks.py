import json

import pytest

from para_jax.data.records import read_records
from para_jax.data.tasks import TASKS
from para_jax.evaluation.metrics import METRICS, measure

ROWS = {
    "boolq": {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
    "copa": {"premise": "I fell.", "choice1": "I slept.", "choice2": "I slipped.", "question": "cause", "label": 1},
    "squad": {
        "context": "Oslo is big.",
        "question": "Where?",
        "answers": {"text": ["Oslo", "in Oslo"], "answer_start": [0]},
    },
    "sst2": {"sentence": "a good film ", "label": 1},
    "rte": {"sentence1": "Oslo is big.", "sentence2": "Oslo is small.", "label": 1},
    "gsm8k": {"question": "How many?", "answer": "Two and three are 2+3=<<2+3=5>>5.\nFive.\n#### 1,005"},
    "wikisql": {
        "question": "Which city?",
        "table": {"header": ["Year", "Home  City", "Venue"]},
        "sql": {"sel": 1, "agg": 3, "conds": [[2, 0, "Old Trafford"], [0, 2, 1911]]},
    },
    "banking77": {"text": "Where is my card? ", "category": "card_arrival"},
    "sms_spam": {"sms": "You won!\n", "label": 1},
}
EXPECTED = {
    "boolq": ("Reference document:\nIce is cold.\nQuestion:\nis ice cold", "yes", ("yes",)),
    "copa": ("Premise:\nI fell.\nChoice 1: I slept.\nChoice 2: I slipped.\nQuestion:\ncause", "2", ("2",)),
    "squad": ("Context:\nOslo is big.\nQuestion:\nWhere?", "Oslo", ("Oslo", "in Oslo")),
    "sst2": ("a good film\nThe sentiment of the given sentence is:", "positive", ("positive",)),
    "rte": (
        "Premise: Oslo is big.\nHypothesis: Oslo is small.\n"
        "Does the premise entail the hypothesis? Answer yes or no.\nAnswer:",
        "no",
        ("no",),
    ),
    "gsm8k": (
        "Question: How many?\nSolve the problem step by step and end with 'The answer is' and a number.\nSolution:",
        "Two and three are 2+3=5.\nFive.\nThe answer is 1,005.",
        ("Two and three are 2+3=5.\nFive.\nThe answer is 1,005.",),
    ),
    "wikisql": (
        "Columns: home_city, venue, year\nQuestion: Which city?\nSQL:",
        "SELECT COUNT(home_city) FROM table WHERE venue = 'old trafford' AND year < '1911'",
        ("SELECT COUNT(home_city) FROM table WHERE venue = 'old trafford' AND year < '1911'",),
    ),
    "banking77": ("Customer: Where is my card?\nBanking intent:", "card arrival", ("card arrival",)),
    "sms_spam": ("Message: You won!\nIs the message spam? Answer yes or no.\nAnswer:", "yes", ("yes",)),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_published_row_becomes_its_task_s_prompt_and_answer(task):
    assert TASKS[task].record(ROWS[task]) == EXPECTED[task]


def test_the_other_published_forms_of_a_label_are_read():
    boolq = {k: v for k, v in ROWS["boolq"].items() if k != "answer"}
    assert [TASKS["boolq"].record(boolq | {"label": label})[1] for label in (0, 1)] == ["no", "yes"]
    assert TASKS["boolq"].record(ROWS["boolq"] | {"answer": False})[1] == "no"
    cells = ("0", "1", "true", "False", "True")  # of a CSV file; the last two as pandas writes them
    assert [TASKS["boolq"].record(boolq | {"answer": cell})[1] for cell in cells] == ["no", "yes", "yes", "no", "yes"]
    assert TASKS["copa"].record(ROWS["copa"] | {"label": 0})[1] == "1"
    rte = {"premise": "Oslo is big.", "hypothesis": "Oslo is small.", "label": 0}  # SuperGLUE's names
    assert TASKS["rte"].record(rte) == (EXPECTED["rte"][0], "yes", ("yes",))
    assert TASKS["squad"].record(ROWS["squad"] | {"answers": ["Oslo"]})[1:] == ("Oslo", ("Oslo",))
    lists = {"column_index": [2, 0], "operator_index": [0, 2], "condition": ["Old Trafford", "1911"]}
    wikisql = ROWS["wikisql"] | {"sql": ROWS["wikisql"]["sql"] | {"conds": lists}}
    assert TASKS["wikisql"].record(wikisql) == EXPECTED["wikisql"]
    plain = ROWS["wikisql"] | {"sql": {"sel": 0, "agg": 0, "conds": []}}
    assert TASKS["wikisql"].record(plain)[1] == "SELECT year FROM table"


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_by_its_task_s_own_metrics(task):
    _, answer, references = TASKS[task].record(ROWS[task])
    for metric in (TASKS[task].metric, *TASKS[task].also):
        assert metric == "matthews" or measure(metric, [answer], [references])[0] == 1
    assert TASKS[task].metric in METRICS


def test_rows_with_a_prompt_keep_it_under_every_task(tmp_path):
    row = {"prompt": "Is ice cold?", "completion": "of course", "label": "yes", "references": ["of course", "yes"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for task in TASKS:
        record = read_records(tmp_path / "rows.jsonl", task=task)[0]
        assert record[:4] == ("Is ice cold?", "of course", ("of course", "yes"), "yes")


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_field_is_an_error_that_lists_the_fields(task):
    for name in ROWS[task]:
        row = {k: v for k, v in ROWS[task].items() if k != name}
        with pytest.raises(ValueError, match="no field .*" + ", ".join(row)):
            TASKS[task].record(row)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("boolq", {"answer": "maybe"}),
        ("copa", {"label": -1}),
        ("sst2", {"sentence": " "}),
        ("sms_spam", {"label": "spam"}),
    ],
)
def test_a_wrong_value_names_field_and_value(task, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must "):
        TASKS[task].record(ROWS[task] | change)
