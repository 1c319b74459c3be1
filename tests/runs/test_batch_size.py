"""train.batch_size: a step has the same rows on any number of devices, so a run has the same batches and losses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import run_config, run_folder, write_tenants

from para_jax import make_mesh, train, train_tenants
from para_jax.config import RunConfig, TrainSection, load_config
from para_jax.runs import loop, plan
from para_jax.runs.plan import plan_run
from para_jax.training.passes import lay_out, step_passes

DEVICES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("batch"))


def mesh_of(devices: int):
    return SimpleNamespace(shape={"data": devices, "fsdp": 1, "tensor": 1})


# ------------------------------------------------------------------------------------------------------------ the cut


@pytest.mark.parametrize("batch", [16, 96, 128])
@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_the_passes_are_the_fewest_equal_ones_that_hold_the_batch(batch, most):
    for devices in (1, 2, 8, 16):
        rows, count = step_passes(TrainSection(batch_size=batch, per_device_batch_size=most), mesh_of(devices))
        of_device = batch // devices
        assert rows * count == batch and rows % devices == 0 and rows // devices <= most
        assert all(of_device % fewer or of_device // fewer > most for fewer in range(1, count))


def test_both_axes_that_split_rows_count_and_tensor_does_not():
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 2})
    assert step_passes(TrainSection(batch_size=64, per_device_batch_size=4), mesh) == (32, 2)
    assert step_passes(TrainSection(per_device_batch_size=4, gradient_accumulation_steps=3), mesh) == (32, 3)


def test_passes_are_not_given_next_to_the_batch_size():
    with pytest.raises(ValueError, match=r"train.gradient_accumulation_steps .*train.batch_size \(64\).* 8"):
        TrainSection(batch_size=64, gradient_accumulation_steps=8)


def test_devices_that_do_not_divide_the_batch_are_named(folder):
    with pytest.raises(ValueError, match="train.batch_size 16 .*mesh.data x mesh.fsdp.*a multiple of 32"):
        step_passes(TrainSection(batch_size=16), mesh_of(32))
    with pytest.raises(ValueError, match="train.batch_size 12 .*a multiple of 8"):
        train(run_config(folder, "mesh.data=-1", "train.batch_size=12", f"output_dir={folder / 'none'}"))
    assert not (folder / "none").exists()


# -------------------------------------------------------------------------------------------------------- many tenants


def many(**train) -> RunConfig:
    return load_config(None, ["data.tenants=x", *(f"train.{name}={value}" for name, value in train.items())])


@pytest.mark.parametrize("rows", [1, 4, 32, 128])
@pytest.mark.parametrize("most", [1, 6, 16, 128])
def test_a_step_of_many_tenants_has_the_same_tenants_and_rows_on_any_mesh(rows, most):
    config = many(batch_size=128, rows_per_tenant=rows, per_device_batch_size=most)
    assert config.tenant_batch == rows
    for devices in (1, 2, 8, 16, 32):
        layout = lay_out(config, mesh_of(devices), 1000)
        assert layout.together == 128 // rows and layout.passes_of_tenant * layout.rows == rows
        assert layout.groups * layout.rows * layout.passes == 128
        assert layout.groups * layout.rows % devices == 0 and layout.groups * layout.rows // devices <= most


def test_few_tenants_do_not_fill_a_step_up_more_than_the_devices_ask_for():
    config = many(batch_size=128, rows_per_tenant=4, per_device_batch_size=16)
    assert [lay_out(config, mesh_of(devices), 3).together for devices in (1, 8, 32)] == [3, 4, 8]


def test_there_are_no_slots_without_tenants():
    config = many(tenants_at_once=8, rows_per_tenant=4, per_device_batch_size=32)
    layout = lay_out(config, mesh_of(1), 3)
    assert (layout.slots, layout.groups) == (3, 3)


def test_a_sweep_steps_each_combination_with_the_batch_of_a_run_of_it_alone():
    config = load_config(None, ["data.train=x", "sweep.seed=[0, 1]", "train.batch_size=128"])
    assert config.tenant_batch == 128
    own = "train.batch_size=256", "train.rows_per_tenant=128"
    wider = load_config(None, ["data.train=x", "sweep.seed=[0, 1]", *own])
    for given in ((), ("train.gradient_accumulation_steps=2",), ("train.batch_size=128",)):
        alone = load_config(None, ["data.train=x", *given])
        sweep = load_config(None, ["data.train=x", "sweep.seed=[0, 1]", *given])
        for devices in (1, 8):
            own, of_many = lay_out(alone, mesh_of(devices)), lay_out(sweep, mesh_of(devices), 2)
            assert (of_many.tenant_rows, of_many.together) == (own.tenant_rows, 1)
            assert of_many.pass_rows == own.pass_rows
    layout = lay_out(wider, mesh_of(16), 2)
    assert (layout.together, layout.passes, layout.rows) == (2, 2, 128) and wider.tenant_batch == 128


@pytest.mark.long
def test_a_sweep_on_several_devices_trains_each_combination_as_a_run_of_its_own(folder, monkeypatch):
    """Also when it continues on other devices."""
    common = f"data.train={folder / 'data' / 'train.jsonl'}", "adapter.summary=raw", "eval.metric=loss", "mesh.data=-1"
    rows = "train.per_device_batch_size=4", "train.schedule=constant"
    swept = run_config(folder, *common, *rows, f"output_dir={folder / 'swept'}", "sweep.learning_rate=[3e-2, 1e-3]")
    of_steps = lambda config, steps: replace(config, train=replace(config.train, max_steps=steps))  # noqa: E731
    on = lambda devices: monkeypatch.setattr(plan, "run_mesh", lambda *_: make_mesh(devices))  # noqa: E731
    on(2)
    train(of_steps(run_config(folder, *common, *rows, f"output_dir={folder / 'alone'}"), 3))
    train_tenants(of_steps(swept, 2))
    on(4)
    train_tenants(of_steps(swept, 3))
    np.testing.assert_allclose(losses(folder / "swept" / "learning_rate-0.03"), losses(folder / "alone"), atol=1e-5)


def test_rows_per_tenant_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"train.rows_per_tenant .*a divisor of train.batch_size \(128\).* 5"):
        many(batch_size=128, rows_per_tenant=5)


# ---------------------------------------------------------------------------------------------------------------- runs


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "validation_loss") if name in row]


def test_the_same_batch_size_is_the_same_plan_on_any_number_of_devices(folder):
    own = "train.batch_size=16", "train.per_device_batch_size=4", "train.num_epochs=3"
    runs = [plan_run(run_config(folder, *own, f"mesh.data={devices}")) for devices in DEVICES]
    cuts = [(run.layout.pass_rows, run.layout.passes) for run in runs]
    assert cuts == [(4, 4), (8, 2), (16, 1), (16, 1)]
    for step in range(6):
        batches = [run.tenants[0].order.batch(step, run.buckets[0], 16)[0] for run in runs]
        for other in batches[1:]:
            np.testing.assert_array_equal(other.tokens, batches[0].tokens)


@pytest.mark.long
def test_a_run_keeps_the_rows_of_its_steps_on_other_devices(folder, monkeypatch):
    """Otherwise batch i would hold other examples, and a run that has ended would be longer on fewer devices."""
    seen, at = [], []

    def no_step(state, model, batch, *_, **settings):
        if len(seen) == 3 and not at:
            at.append(3)
            raise KeyboardInterrupt
        seen.append(int((batch.length - batch.prompt_length).sum()))
        values = dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens", "finite"), np.ones(1, np.float32))
        return state._replace(step=state.step + 1), values

    monkeypatch.setattr(loop, "train_step", no_step)
    on = lambda devices: monkeypatch.setattr(plan, "run_mesh", lambda *_: make_mesh(devices))  # noqa: E731
    own = f"data.train={folder / 'data' / 'train.jsonl'}", f"output_dir={folder / 'moved'}", "adapter.summary=raw"
    steps = "train.per_device_batch_size=4", "train.max_steps=null", "train.num_epochs=2"
    config = run_config(folder, *own, *steps, "mesh.data=-1", "eval.every=3")
    on(2)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    on(4)
    assert train(config).step == 6
    order = plan_run(config).tenants[0].order
    assert seen == [
        sum(len(order.examples[i].completion_ids) for i in order.plan.batch_indices(step)[1]) for step in range(6)
    ]
    on(1)
    assert train(config).step == 6 and len(seen) == 6
    on(3)
    with pytest.raises(ValueError, match="train.batch_size 8 can't be split evenly over 3 devices"):
        train(config)


@pytest.mark.long
def test_a_run_that_does_not_fit_goes_on_in_smaller_pieces(folder):
    """As docs/training.md advises: by mesh, passes, what the backward pass keeps, and an evaluation's rows."""
    own = f"data.train={folder / 'data' / 'train.jsonl'}", "adapter.summary=raw", "train.batch_size=8", "mesh.data=1"
    own += ("train.schedule=constant", "train.warmup_ratio=0", "eval.metric=loss", "eval.every=3")
    smaller = "train.per_device_batch_size=2", "train.remat=block", "eval.batch_size=2", "mesh.fsdp=4"
    train(run_config(folder, *own, f"output_dir={folder / 'large'}", "train.max_steps=6"))
    train(run_config(folder, *own, f"output_dir={folder / 'small'}", "train.max_steps=3"))
    train(run_config(folder, *own, *smaller, f"output_dir={folder / 'small'}", "train.max_steps=6"))
    np.testing.assert_allclose(losses(folder / "small"), losses(folder / "large"), atol=1e-5, rtol=0)


@pytest.mark.long
def test_a_run_of_many_tenants_has_the_same_losses_on_any_number_of_devices(folder):
    sizes = {"acme": 20, "globex": 9, "umbrella": 12}
    write_tenants(folder / "tenants", sizes)
    common = (
        f"data.tenants={folder / 'tenants'}", "adapter.summary=raw", "train.batch_size=8", "train.rows_per_tenant=4",
        "train.per_device_batch_size=2", "train.max_steps=3", "eval.metric=loss",
    )  # fmt: skip
    found = []
    for devices in (1, 4):
        own = f"mesh.data={devices}", f"output_dir={folder / f'many-{devices}'}"
        train_tenants(run_config(folder, *common, *own))
        found.append([losses(folder / f"many-{devices}" / name) for name in sizes])
    for mine, other in zip(*found, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
        assert len(mine) == 5
