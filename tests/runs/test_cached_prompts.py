"""Runs with train.cache_prompts: the adapter that they would have without it, each prompt computed once, and the same
bits after a stop."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from long_cases import quick
from stopped_run import assert_same_arrays, train_interrupted
from tiny_run import losses, metrics, rows_of_text, run_config, run_folder, write_rows

from para_jax import compare_methods, train, train_tenants
from para_jax.runs import train as runs
from para_jax.training import prompt_cache
from para_jax.training.stop import Stopped

SCOPED = ("adapter.scope=response",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("cached"))


@pytest.fixture
def computed(monkeypatch):
    """How many prompts are computed in each filling of a cache."""
    real, counts = prompt_cache.computed, []

    def counting(model, prompts, *more):
        counts.append(len(prompts))
        return real(model, prompts, *more)

    monkeypatch.setattr(prompt_cache, "computed", counting)
    return counts


def config_of(folder, output, *overrides):
    return run_config(folder, *SCOPED, *overrides, f"output_dir={output}")


def with_cache(config):
    return replace(
        config, output_dir=f"{config.output_dir}-cached", train=replace(config.train, cache_prompts="memory")
    )


def assert_close(ours, theirs):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 + 1e-4 * float(np.abs(other).max()))


PACKED = ("data.packing=true", "data.max_seq_length=32", "train.per_device_batch_size=4", "adapter.summary=raw")
PASSES = ("train.per_device_batch_size=4", "train.gradient_accumulation_steps=2", "data.buckets=3")
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.per_device_batch_size=2")
CASES = ((), PACKED, MESH, PASSES, ("mesh.data=8", "train.per_device_batch_size=1"))


@pytest.mark.parametrize(
    "overrides", quick(CASES, slow=((), MESH, PASSES)), ids=("padded", "packed", "mesh", "passes", "data")
)
def test_a_run_ends_with_the_adapter_that_it_has_without(folder, tmp_path, computed, overrides):
    config = config_of(folder, tmp_path / "run", *overrides)
    plain = train(config)
    cached = with_cache(config)
    assert_close(train(cached).adapter, plain.adapter)
    np.testing.assert_allclose(losses(cached), losses(config), rtol=1e-5)
    assert computed == [20]


@pytest.mark.long
def test_tenants_with_the_same_prompts_pay_for_them_once(folder, tmp_path, computed):
    rows = rows_of_text(12, seed=5)
    for name, more in (("a", rows), ("b", rows[:6] + rows_of_text(4, seed=6)), ("c", rows + rows)):
        write_rows(tmp_path / "tenants" / name / "train.jsonl", more)
    config = config_of(
        folder, tmp_path / "run", f"data.tenants={tmp_path / 'tenants'}", "train.rows_per_tenant=4",
        "train.max_steps=null", "train.num_epochs=2", "adapter.summary=raw",
    )  # fmt: skip
    train_tenants(config)
    cached = with_cache(config)
    train_tenants(cached)
    assert computed == [16]
    for name in ("a", "b", "c"):
        of_tenant = [replace(one, output_dir=f"{one.output_dir}/{name}") for one in (cached, config)]
        np.testing.assert_allclose(*map(losses, of_tenant), rtol=1e-5)


@pytest.mark.long
def test_a_sweep_computes_the_prompts_once(folder, tmp_path, computed):
    config = config_of(
        folder, tmp_path / "run", "sweep.learning_rate=[3e-2, 1e-2]", "sweep.seed=[0, 1]", "train.max_steps=3",
        "train.per_device_batch_size=4", "train.cache_prompts=memory",
    )  # fmt: skip
    train_tenants(config)
    assert len(computed) == 1


@pytest.mark.long
def test_a_sweep_of_methods_computes_the_prompts_once(folder, tmp_path, computed):
    config = config_of(
        folder, tmp_path / "run", "sweep.method=[para, lora, ia3]", "train.max_steps=2", "train.cache_prompts=memory",
        "adapter.summary=raw",
    )  # fmt: skip
    found = compare_methods(config).methods
    assert computed == [16] and {one.ended for one in found} == {"done"}


@pytest.mark.long
def test_trials_of_rates_and_their_run_share_the_prompts(folder, tmp_path, computed):
    config = config_of(folder, tmp_path / "run", "train.learning_rate=auto", "train.cache_prompts=memory")
    train(config)
    assert computed == [20]


def test_only_the_prompts_of_the_steps_are_computed_and_none_for_a_finished_run(folder, tmp_path, computed):
    config = config_of(folder, tmp_path / "run", "train.max_steps=2", "train.cache_prompts=memory")
    train(config)
    train(config)
    assert computed == [16]


@pytest.mark.long
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_never_stopped(folder, tmp_path):
    options = ("train.cache_prompts=memory", "train.max_steps=8", "train.per_device_batch_size=3", "eval.every=2")
    whole, cut = (config_of(folder, tmp_path / name, *options) for name in ("whole", "cut"))
    expected = train(whole)
    train_interrupted(cut, at_step=6)
    assert_same_arrays(train(cut).adapter, expected.adapter)
    assert losses(cut) == losses(whole)


def test_a_signal_while_prompts_are_computed_ends_the_run_at_once_and_the_same_command_resumes(
    folder, tmp_path, monkeypatch
):
    config, real = config_of(folder, tmp_path / "run", "train.cache_prompts=memory"), prompt_cache.full_batches

    def signalled(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(prompt_cache, "full_batches", signalled)
        train(config)
    assert not metrics(config)[1:]
    assert train(config).step == 6


@pytest.mark.long
def test_a_run_may_go_on_without_its_cache(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", "train.max_steps=3", "train.cache_prompts=memory")
    train(config)
    longer = replace(config, train=replace(config.train, max_steps=6, cache_prompts="off"))
    assert train(longer).step == 6


def test_several_processes_are_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    config = config_of(folder, tmp_path / "run", "train.cache_prompts=memory")
    monkeypatch.setattr(runs, "require_same", lambda *_: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="train.cache_prompts .* has 2;"):
        train(config)
    assert not Path(config.output_dir).exists()
