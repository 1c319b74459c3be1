import json
import re
from datetime import datetime

import pytest

from para_jax.quickstart import examples as business
from para_jax.quickstart.examples import JOBS, business_examples


def words(text):
    """What a text may share with another: words and numbers, without the ending of a plural."""
    return {word.lower().removesuffix("s") for word in re.findall(r"[A-Za-z]+|\d+", text)}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("split", business.SPLITS)
def test_the_same_seed_gives_the_same_examples_and_another_gives_others(job, split):
    made = business_examples(job, split, 30, seed=3)
    assert made == business_examples(job, split, 30, seed=3)
    assert made != business_examples(job, split, 30, seed=4)
    assert len({example["prompt"] for example in made}) == 30
    assert business_examples(job, split, 10, seed=3) == made[:10]


def test_no_list_shares_an_entry_between_the_splits():
    for entries in (
        business.NAMES,
        business.ITEMS,
        business.CITIES,
        business.QUANTITIES,
        business.DAYS,
        business.YEARS,
    ):
        assert not set(entries["train"]) & set(entries["test"])
    for frames in (business.ORDERS, business.DATES):
        assert not set(frames["train"]) & set(frames["test"])
    train, test = ({f for frames in business.ROUTING[split].values() for f in frames} for split in business.SPLITS)
    assert not train & test and business.ROUTING["train"].keys() == business.ROUTING["test"].keys()


@pytest.mark.parametrize("job", JOBS)
def test_no_held_out_name_or_value_is_seen_in_training(job):
    values = [str(v).lower() for lists in VALUES[job] for v in lists["test"]]
    train = set().union(*(words(example["prompt"]) for example in business_examples(job, "train", 400, seed=0)))
    test = set().union(*(words(example["prompt"]) for example in business_examples(job, "test", 60, seed=0)))
    assert not set(values) & train and set(values) & test


VALUES = {
    "routing": (business.NAMES, business.ITEMS),
    "orders": (business.NAMES, business.ITEMS, business.CITIES, business.QUANTITIES),
    "dates": (business.NAMES, business.DAYS, business.YEARS),
}


@pytest.mark.parametrize("job", JOBS)
def test_no_held_out_sentence_reuses_a_training_frame(job):
    frames = {"routing": business.ROUTING, "orders": business.ORDERS, "dates": business.DATES}[job]["train"]
    frames = [f for team in frames.values() for f in team] if job == "routing" else frames
    patterns = [re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(frame))) for frame in frames]
    train, test = business_examples(job, "train", 50, seed=0), business_examples(job, "test", 60, seed=0)
    assert all(any(p.search(example["prompt"]) for p in patterns) for example in train)
    assert not any(p.search(example["prompt"]) for p in patterns for example in test)


@pytest.mark.parametrize("split", business.SPLITS)
def test_the_completions_are_right(split):
    for example in business_examples("orders", split, 50, seed=0):
        order = json.loads(example["completion"])
        assert list(order) == ["item", "quantity", "city"]
        assert f"{order['quantity']} {order['item']}s" in example["prompt"] and order["city"] in example["prompt"]
    for example in business_examples("dates", split, 50, seed=0):
        date = datetime.fromisoformat(example["completion"])
        assert f"{date:{'%B'}}" in example["prompt"] and str(date.year) in example["prompt"]
        assert re.search(rf"\b{date.day}\b", example["prompt"])
    routing = business_examples("routing", split, 60, seed=0)
    assert {example["completion"] for example in routing} == business.ROUTING[split].keys()


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("split", business.SPLITS)
def test_an_example_is_short(job, split):
    for example in business_examples(job, split, 60, seed=0):  # characters; at most 48 of SmolLM2's tokens were counted
        assert len(example["prompt"]) <= 110 and len(example["completion"]) <= 65


def test_a_wrong_job_split_or_count_is_an_error():
    for job, split in (("poems", "train"), ("dates", "dev")):
        with pytest.raises(ValueError, match="routing, orders, dates.*train, test"):
            business_examples(job, split, 1, seed=0)
    with pytest.raises(ValueError, match="count 700 .*'routing'"):
        business_examples("routing", "test", 700, seed=0)
