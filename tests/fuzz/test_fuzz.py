"""Hostile input is refused by name or answered right; nothing else is possible (docs/reliability.md)."""

import pytest

from .runner import campaign, counts, failures, workers
from .schedules import stress
from .targets import TARGETS


@pytest.fixture(scope="module")
def team():
    with workers(2) as made:
        yield made


@pytest.mark.long
@pytest.mark.parametrize("target", [target for target, aim in TARGETS.items() if aim.short])
def test_a_few_cases_end_well(team, target):
    outcomes = campaign(team[:1], target, range(TARGETS[target].short))
    if failed := failures(target, outcomes):
        pytest.fail(failed, pytrace=False)


@pytest.mark.fuzz
@pytest.mark.parametrize("target", TARGETS)
def test_many_cases_end_well(team, target, request, record_property):
    cases = round(request.config.getoption("--fuzz-cases") * TARGETS[target].share)
    outcomes = campaign(team, target, range(cases))
    record_property("fuzz", {target: counts(outcomes)})
    if failed := failures(target, outcomes):
        pytest.fail(failed, pytrace=False)


@pytest.mark.fuzz
def test_a_stressed_engine_gives_every_answer_as_it_is_alone(request):
    stress(request.config.getoption("--stress-requests"))
