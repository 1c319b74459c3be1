import json
import re
from datetime import datetime

import pytest

from para_jax.quickstart import examples as business
from para_jax.quickstart.examples import JOBS, business_examples


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
