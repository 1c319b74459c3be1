import pytest

from para_jax.data.tasks import TASKS

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
}


@pytest.mark.parametrize("task", TASKS)
def test_a_published_row_becomes_its_task_s_prompt_and_answer(task):
    assert TASKS[task].record(ROWS[task]) == EXPECTED[task]


def test_the_other_published_forms_of_a_label_are_read():
    boolq = {k: v for k, v in ROWS["boolq"].items() if k != "answer"}
    assert [TASKS["boolq"].record(boolq | {"label": label})[1] for label in (0, 1)] == ["no", "yes"]
    assert TASKS["boolq"].record(ROWS["boolq"] | {"answer": False})[1] == "no"
    assert TASKS["copa"].record(ROWS["copa"] | {"label": 0})[1] == "1"
    rte = {"premise": "Oslo is big.", "hypothesis": "Oslo is small.", "label": 0}  # SuperGLUE's names
    assert TASKS["rte"].record(rte) == (EXPECTED["rte"][0], "yes", ("yes",))
    assert TASKS["squad"].record(ROWS["squad"] | {"answers": ["Oslo"]})[1:] == ("Oslo", ("Oslo",))


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_among_the_choices_that_accuracy_ranks(task):
    answer = TASKS[task].record(ROWS[task])[1]
    assert (TASKS[task].metric == "accuracy") == bool(TASKS[task].choices)
    assert not TASKS[task].choices or answer in TASKS[task].choices


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_field_is_an_error_that_lists_those_there_are(task):
    for name in ROWS[task]:
        row = {k: v for k, v in ROWS[task].items() if k != name}
        with pytest.raises(ValueError, match="no field .*; the fields there are: " + ", ".join(row)):
            TASKS[task].record(row)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("boolq", {"answer": "maybe"}),
        ("copa", {"label": -1}),
        ("sst2", {"label": 0.5}),
        ("sst2", {"sentence": " "}),
        ("squad", {"question": None}),
        ("squad", {"answers": {"text": []}}),
        ("squad", {"answers": "Oslo"}),
    ],
)
def test_a_wrong_value_is_an_error_that_names_field_and_value(task, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: .* is not possible; expected"):
        TASKS[task].record(ROWS[task] | change)
