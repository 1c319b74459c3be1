"""A run of one adapter that Ctrl-C stops after a step, to compare with a run that was never stopped."""

import jax
import numpy as np
import pytest

from para_jax import train
from para_jax.runs import loop


def train_interrupted(config, *, at_step):
    """A run that Ctrl-C stops in the step with this number (from 1)."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, at_step=at_step)
        train(config)


def interrupt(monkeypatch, *, at_step):
    """Makes the step with this number (from 1) stop the run, as Ctrl-C does."""
    real, calls = loop.train_step, []

    def stopping(state, *arguments, **settings):
        calls.append(None)
        if int(state.step[0]) + 1 == at_step:
            raise KeyboardInterrupt
        return real(state, *arguments, **settings)

    monkeypatch.setattr(loop, "train_step", stopping)
    return calls


def assert_same_arrays(ours, theirs):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)
