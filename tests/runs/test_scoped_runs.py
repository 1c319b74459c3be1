"""A run whose adapter acts on the response alone: padded equals packed, meshes and many tenants change nothing, it
resumes with the same bits, and the saved adapter has the scores that the run reported."""

from dataclasses import replace

import numpy as np
import pytest
from stopped_run import assert_same_arrays, train_interrupted
from tiny_run import losses, run_config, run_folder
from tiny_scores import score

from para_jax import load_adapter, load_backbone, train, train_tenants
from para_jax.data.tokenizer import load_tokenizer
from para_jax.evaluation.tasks import task_of_run

SCOPED = ("adapter.scope=response",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("scoped"))


@pytest.fixture(scope="module")
def whole(folder):
    config = run_config(folder, *SCOPED, f"output_dir={folder / 'whole'}")
    return config, train(config)


def test_it_learns_resumes_with_the_same_bits_and_is_what_it_says_when_loaded(whole, tmp_path):
    config, result = whole
    assert losses(config, "validation_loss")[1] < losses(config, "validation_loss")[0]
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    train_interrupted(cut, at_step=5)
    assert_same_arrays(train(cut).adapter, result.adapter)
    assert losses(cut) == losses(config)

    model, tokenizer = load_backbone(config.backbone.source), load_tokenizer(config.backbone.source)
    loaded = load_adapter(result.output_dir / "adapter", model.config)
    assert loaded.config == result.adapter.config
    task = task_of_run(config, "validation", tokenizer)
    assert score(model, loaded, task, tokenizer).loss == pytest.approx(min(losses(config, "validation_loss")), rel=1e-5)


def test_another_scope_is_another_run(whole):
    config, _ = whole
    other = replace(config, adapter=replace(config.adapter, scope="all"))
    with pytest.raises(ValueError, match="adapter.scope"):
        train(other)


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "train.gradient_accumulation_steps=2"),
        ("mesh.data=4", "mesh.fsdp=2"),
    ],
)
def test_a_mesh_equals_one_device(whole, folder, tmp_path, overrides):
    rows = 8 // (int(overrides[0][-1]) * int(overrides[1][-1]) * (2 if len(overrides) > 3 else 1))
    config = run_config(
        folder, *SCOPED, *overrides, f"train.per_device_batch_size={rows}", f"output_dir={tmp_path / 'run'}"
    )
    train(config)
    for name in ("loss", "validation_loss"):
        np.testing.assert_allclose(losses(config, name), losses(whole[0], name), rtol=1e-4)


@pytest.mark.long
def test_packed_rows_learn_the_same_first_losses(folder, tmp_path):
    """All data in one batch, so that packed and padded steps hold the same examples."""
    every = ("train.max_steps=2", "eval.every=2", "adapter.summary=raw", "data.max_seq_length=32")
    found = []
    for name, packing in (
        ("padded", ("data.packing=false", "train.per_device_batch_size=20")),
        ("packed", ("data.packing=true", "train.per_device_batch_size=12")),
    ):
        config = run_config(folder, *SCOPED, *every, *packing, f"output_dir={tmp_path / name}")
        train(config)
        found.append(losses(config) + losses(config, "validation_loss"))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.long
def test_tenants_of_a_sweep_train_as_each_alone(whole, folder, tmp_path):
    config = run_config(
        folder, *SCOPED, "sweep.learning_rate=[3e-2]", "sweep.seed=[0, 1]", "train.per_device_batch_size=16",
        "train.rows_per_tenant=8", f"output_dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    result = train_tenants(config)
    (tenant,) = [one for one in result.output_dir.iterdir() if one.name.endswith("seed-0")]
    own = replace(config, output_dir=str(tenant))
    np.testing.assert_allclose(losses(own, "validation_loss"), losses(whole[0], "validation_loss"), rtol=1e-4)
