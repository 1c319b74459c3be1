"""Validation data that is held out of the training data: the two parts are the whole data, in its order."""

import json

import numpy as np
import pytest

from para_jax.config import DataSection
from para_jax.data.given import with_data
from para_jax.data.records import load_records
from para_jax.data.sources import part_of


def numbered(count):
    return [(f"file:{i + 1}", {"prompt": f"p{i}", "completion": "yes"}) for i in range(count)]


def split(count, share):
    parts = (part_of(iter(numbered(count)), share, held_out=held_out) for held_out in (False, True))
    return [[int(row["prompt"][1:]) for _, row in part] for part in parts]


def written(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def section(train, **fields):
    return DataSection(train=str(train), **{"validation_split": 0.1, **fields})


def prompts(section, of):
    return [record.prompt for record in load_records(section, of) or []]


@pytest.mark.parametrize("share", [0.5, 0.45, 0.3, 0.15, 0.1, 0.01])
def test_each_row_is_in_one_part_and_the_share_holds_for_any_number_of_rows(share):
    for count in (1, 2, 7, 40, 300, 5000):
        train, held = split(count, share)
        assert sorted(train + held) == list(range(count)) and train == sorted(train)
        assert abs(len(held) - share * count) <= 1


@pytest.mark.parametrize(("share", "of_ten"), [(0.1, 1), (0.2, 2), (0.3, 3), (0.4, 4)])
def test_a_share_is_the_fraction_that_was_written(share, of_ten):
    """Not the nearest binary one: each ten rows hold exactly their share."""
    _, held = split(200, share)
    assert np.bincount(np.array(held) // 10).tolist() == [of_ten] * 20


@pytest.mark.parametrize("turns", [2, 3, 8, 10, 21, 55, 64, 89])
def test_no_pattern_of_the_data_decides(turns):
    """No class is favoured where classes alternate in a fixed order, as in generated data, nor any part of sorted
    data."""
    _, held = split(100 * turns, 0.1)
    counts = np.bincount(np.array(held) % turns, minlength=turns)
    assert counts.sum() == 10 * turns and counts.max() < 35 and (turns > 10 or counts.min() > 0)
    assert np.ptp(np.histogram(held, bins=5, range=(0, 100 * turns))[0]) <= 2


def test_rows_that_are_added_at_the_end_change_nothing_before_them():
    before, after = split(95, 0.1), split(140, 0.1)
    for few, more in zip(before, after, strict=True):
        assert more[: len(few)] == few


@pytest.mark.parametrize("kind", ["jsonl", "csv", "python"])
def test_both_parts_of_a_source_are_its_rows(kind, tmp_path):
    rows = [row for _, row in numbered(40)]
    if kind == "csv":
        file = tmp_path / "train.csv"
        file.write_text("prompt,completion\n" + "".join(f"{row['prompt']},yes\n" for row in rows))
    else:
        file = written(tmp_path / "train.jsonl", rows)
    own = with_data(DataSection(validation_split=0.1), rows) if kind == "python" else section(file)
    train, held = (load_records(own, of) or [] for of in ("train", "validation"))
    assert [len(train), len(held)] == [36, 4]
    assert [row.prompt for row in sorted([*train, *held], key=lambda r: int(str(r.prompt)[1:]))] == [
        row["prompt"] for row in rows
    ]
    everything = load_records(DataSection(train=str(file)), "train") or []
    if kind != "python":
        places = {record.prompt: record.place for record in everything}
        assert all(places[record.prompt] == record.place for record in held)
    assert load_records(own, "test") is None


def test_the_turns_of_a_conversation_stay_together(tmp_path):
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": str(i)}, *turns]} for i in range(20)]
    own = section(written(tmp_path / "train.jsonl", rows))
    train, held = ([prompt[0]["content"] for prompt in prompts(own, of)] for of in ("train", "validation"))
    assert held == ["9", "9", "13", "13"] and not set(held) & set(train)


def test_validation_data_of_its_own_comes_first(tmp_path):
    written(tmp_path / "train.jsonl", [row for _, row in numbered(20)])
    own = written(tmp_path / "validation.jsonl", [{"prompt": "own", "completion": "yes"}])
    assert len(prompts(section(tmp_path), "train")) == 20 and prompts(section(tmp_path), "validation") == ["own"]
    named = section(tmp_path / "train.jsonl", validation=str(own))
    assert len(prompts(named, "train")) == 20 and prompts(named, "validation") == ["own"]


def test_a_few_rows_are_all_trained_on(tmp_path):
    """So one tenant with little data doesn't stop a run of many."""
    few = section(written(tmp_path / "few.jsonl", [row for _, row in numbered(4)]))
    assert len(prompts(few, "train")) == 4 and load_records(few, "validation") is None
    with pytest.raises(ValueError, match="empty.jsonl has no rows"):
        prompts(section(written(tmp_path / "empty.jsonl", [])), "train")
