"""A run with data.packing: its loss is that of its examples alone, it resumes with the same bits, and neither passes
nor meshes matter."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from stopped_run import assert_same_arrays, train_interrupted
from tiny_run import losses, run_config, run_folder

from para_jax import init_adapter, load_backbone, make_mesh, train
from para_jax.data.batches import Bucket, collate
from para_jax.runs.tenants import read_inputs
from para_jax.training.passes import lay_out
from para_jax.training.step import eval_nll

PACKED = ("data.packing=true", "data.max_seq_length=32", "train.per_device_batch_size=4", "adapter.summary=raw")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def whole(folder):
    """A packed run that was never interrupted."""
    config = run_config(folder, *PACKED, f"output_dir={folder / 'whole'}")
    return config, train(config)


def test_a_packed_step_has_the_mean_loss_of_its_examples_completion_tokens(whole):
    config, _ = whole
    layout = lay_out(config, make_mesh())
    _, (tenant,), (shape,) = read_inputs(config, layout)
    batch, tokens = tenant.order.batch(0, shape, layout.tenant_rows)
    _, chosen = tenant.order.plan.batch_indices(0)
    examples = [tenant.data.examples[i] for i in chosen]
    assert len(examples) > batch.tokens.shape[0] and tokens == sum(map(len, sum(examples, ())))
    model = load_backbone(config.backbone.source)
    fresh = init_adapter(config.adapter, model.config, seed=config.seed)
    alone = jax.tree.map(np.asarray, collate(examples, Bucket(16, 6), len(examples)))
    total, count, _ = eval_nll(model, fresh, jax.tree.map(jax.numpy.asarray, alone), completion=6)
    assert losses(config)[0] == pytest.approx(float(total.sum() / count.sum()), rel=1e-5)
    assert losses(config, "tokens")[0] == count.sum()


def test_a_packed_run_learns_and_resumes_with_the_same_bits(whole, tmp_path, capsys):
    config, result = whole
    assert losses(config, "validation_loss")[1] < losses(config, "validation_loss")[0]
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    train_interrupted(cut, at_step=5)
    capsys.readouterr()
    assert_same_arrays(train(cut).adapter, result.adapter)
    assert capsys.readouterr().err.count("attention: plain (on a CPU)") == 1
    assert losses(cut) == losses(config)


@pytest.mark.long
def test_a_packed_run_in_passes_over_a_mesh_equals_one_device(whole, folder, tmp_path):
    sizes = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "train.per_device_batch_size=1")
    passes = ("train.gradient_accumulation_steps=2",)
    config = run_config(folder, *PACKED, *sizes, *passes, f"output_dir={tmp_path / 'run'}")
    train(config)
    for name in ("loss", "validation_loss"):
        np.testing.assert_allclose(losses(config, name), losses(whole[0], name), rtol=1e-4)
    assert losses(config, "tokens") == losses(whole[0], "tokens")


def test_a_packed_run_says_how_full_its_rows_are(folder, capsys):
    config = run_config(folder, *PACKED)
    _, (tenant,), _ = read_inputs(config, lay_out(config, make_mesh()))
    said = capsys.readouterr().err
    assert (
        f"packed 20 examples into {len(tenant.order.plan.packed)} rows of 32 tokens, at most" in said
        and "padding" in said
    )
