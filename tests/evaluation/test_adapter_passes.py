"""Adapters in passes: each is held while its pass is answered, the next ones are loaded meanwhile, and no others."""

import threading

import pytest

from para_jax.evaluation.adapter_passes import in_passes

NAMES = [f"t{i}" for i in range(7)]


class Bank:
    """The part of an AdapterBank that passes use."""

    def __init__(self):
        self.held, self.most, self.changed = {}, 0, threading.Condition()

    def add(self, name, adapter):
        with self.changed:
            assert name not in self.held
            self.held[name] = adapter
            self.most = max(self.most, len(self.held))
            self.changed.notify_all()

    def remove(self, name):
        del self.held[name]

    def wait_for(self, names):
        with self.changed:
            assert self.changed.wait_for(lambda: set(names) == set(self.held), timeout=10)


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7, 99])
def test_each_name_is_in_one_pass_and_the_next_pass_is_loaded_meanwhile(most):
    bank, seen = Bank(), []
    passes = [*in_passes(Bank(), NAMES, str.upper, most)]
    assert [name for part in passes for name in part] == NAMES
    assert max(map(len, passes)) <= most and max(map(len, passes)) - min(map(len, passes)) <= 1
    for part, later in zip(in_passes(bank, NAMES, str.upper, most), [*passes[1:], ()], strict=True):
        bank.wait_for([*part, *later])
        seen += [bank.held[name] for name in part]
    assert seen == [name.upper() for name in NAMES] and bank.held == {}
    assert bank.most <= 2 * max(map(len, passes))
    assert [*in_passes(Bank(), [], str.upper, most)] == [()]


def test_an_adapter_that_can_not_be_loaded_raises_when_its_pass_comes():
    def load(name):
        if name == "t4":
            raise ValueError(f"{name} is damaged")
        return name

    seen = []
    with pytest.raises(ValueError, match="t4 is damaged"):
        for part in in_passes(Bank(), NAMES, load, 2):
            seen.append(part)
    assert ("t0",) == seen[0][:1] and "t4" not in str(seen)


def test_a_caller_that_stops_leaves_no_thread():
    loaded, before = [], set(threading.enumerate())
    passes = in_passes(Bank(), NAMES, lambda name: loaded.append(name), 1)
    next(passes)
    passes.close()
    assert len(loaded) <= 2 and set(threading.enumerate()) <= before
