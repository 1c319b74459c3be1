"""A run may start from a trained adapter: its own, another run's, or PEFT's."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, strong
from tiny_run import ADAPTER, run_config, run_folder, write_tenants

from para_jax import LoraConfig, init_adapter, load_adapter, save_adapter, train, train_tenants
from para_jax.runs.initial import initial_places

#: A step that changes nothing: what is kept is what the run started from.
STILL = ("train.learning_rate=0", "train.max_steps=1", "train.weight_decay=0", "eval.every=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("initial"))


def saved(place: Path, seed=0, config=ADAPTER):
    adapter = strong(init_adapter(config, backbone("llama").config, seed=seed), seed)
    save_adapter(adapter, place)
    return adapter


def assert_kept(run: Path, adapter) -> None:
    kept = load_adapter(run / "adapter", backbone("llama").config)
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_starts_from_an_adapter_and_its_statistics(folder, tmp_path):
    adapter = saved(tmp_path / "before" / "adapter")
    for i, source in enumerate(("before", "before/adapter")):  # the run's folder, and the adapter's own
        run = tmp_path / f"run-{i}"
        train(run_config(folder, f"output_dir={run}", f"train.init_from={tmp_path / source}", *STILL))
        assert_kept(run, adapter)
    assert "Started from the adapter before/adapter." in (run / "adapter/README.md").read_text()


@pytest.mark.long
def test_a_second_run_begins_with_the_loss_that_the_first_one_ended_with(folder, tmp_path):
    """A run that has begun needs the first one's folder no more."""
    first = train(run_config(folder, f"output_dir={tmp_path / 'first'}", "train.max_steps=4", "eval.metric=loss"))
    own = f"output_dir={tmp_path / 'second'}", f"train.init_from={tmp_path / 'first'}"
    second = train(run_config(folder, *own, *STILL, "eval.metric=loss"))
    found = [run.scores["validation"]["values"]["loss"] for run in (first, second)]
    assert found[0] == found[1] < second.scores["validation_base"]["values"]["loss"]
    shutil.rmtree(tmp_path / "first")
    assert train(run_config(folder, *own, *STILL, "eval.metric=loss", "train.max_steps=2")).step == 2


def test_each_tenant_starts_from_its_own_adapter(folder, tmp_path):
    names = ("acme", "globex")
    write_tenants(tmp_path / "tenants", dict.fromkeys(names, 9))
    before = {name: saved(tmp_path / "before" / name / "adapter", i) for i, name in enumerate(names)}
    given = f"data.tenants={tmp_path / 'tenants'}", f"train.init_from={tmp_path / 'before'}", "train.rows_per_tenant=4"
    config = run_config(folder, f"output_dir={tmp_path / 'run'}", *given, *STILL)
    train_tenants(config)
    for name in names:
        assert_kept(tmp_path / "run" / name, before[name])
    shutil.rmtree(tmp_path / "before" / "globex")
    config = run_config(folder, f"output_dir={tmp_path / 'other'}", *given, *STILL)
    with pytest.raises(ValueError, match="before/globex/adapter"):
        train_tenants(config)
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_peft_s_adapter_is_trained_further(folder, tmp_path):
    place = FIXTURES / "peft" / "lora_qv_rs"
    adapter = load_adapter(place, backbone("llama").config)
    run = tmp_path / "run"
    config = run_config(folder, f"output_dir={run}", f"train.init_from={place}", *STILL)
    train(replace(config, adapter=adapter.config))
    assert_kept(run, adapter)


def test_where_a_run_looks_for_the_adapter(tmp_path, bucket):
    """An adapter's own folder, the folder of a run of one adapter, or that of a run of many, also in a bucket. PEFT
    writes several adapters side by side."""
    for root in (tmp_path, bucket / "initial"):
        for folder in ("one/adapter", "many/acme/adapter", "peft/acme"):
            (root / folder).mkdir(parents=True)
            (root / folder / "adapter_config.json").write_bytes(b"{}")
        one, many, names = root / "one", root / "many", ["acme", "globex"]
        for source in (one, one / "adapter"):
            assert initial_places(str(source), [*names, ""]) == dict.fromkeys([*names, ""], str(one / "adapter"))
        assert initial_places(str(many), names) == {name: str(many / name / "adapter") for name in names}
        assert initial_places(str(many), [""]) == {"": str(many / "adapter")}
        assert initial_places(str(root / "peft"), ["acme"]) == {"acme": str(root / "peft" / "acme")}
    assert initial_places("user/name@v1", names) == dict.fromkeys(names, "user/name@v1")
    assert initial_places(None, names) == dict.fromkeys(names)


@pytest.mark.parametrize(
    ("adapter", "source", "message"),
    [
        (replace(ADAPTER, r=2), "before", "before: r=4 there, 2 here"),
        (LoraConfig(r=4), "before", "before: method=para there, lora here"),
        (ADAPTER, "nowhere", "nowhere"),
    ],
)
def test_an_adapter_that_the_config_does_not_describe_is_refused_before_anything_is_written(
    folder, tmp_path, adapter, source, message
):
    saved(tmp_path / "before")
    config = run_config(folder, f"output_dir={tmp_path / 'run'}", f"train.init_from={tmp_path / source}")
    with pytest.raises(ValueError, match=message):
        train(replace(config, adapter=adapter))
    assert not (tmp_path / "run").exists()
