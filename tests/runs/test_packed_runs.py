"""A run with data.packing: its loss is that of its examples alone, it resumes with the same bits, and neither passes
nor meshes matter."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from stopped_run import assert_same_arrays, train_interrupted
from tiny_run import losses, rows_of_text, run_config, run_folder, words, write_rows

from para_jax import init_adapter, load_adapter, load_backbone, load_model_config, train, train_tenants
from para_jax.data.batches import Bucket, collate
from para_jax.runs.plan import plan_run
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
    plan = plan_run(config)
    (tenant,), (shape,) = plan.tenants, plan.buckets
    batch, tokens = tenant.order.batch(0, shape, plan.layout.tenant_rows)
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
    (tenant,) = plan_run(config).tenants
    said = capsys.readouterr().err
    assert (
        f"packed 20 examples into {len(tenant.order.plan.packed)} rows of 32 tokens, at most" in said
        and "padding" in said
    )


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory):
    """Data of acme alone, and next to globex, one of whose examples is longer than acme's rows."""
    folder = run_folder(tmp_path_factory.mktemp("lengths"))
    file = folder / "backbone" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 1024}))
    for to in ("alone", "both"):
        write_rows(folder / to / "acme.jsonl", rows_of_text(400, seed=1))
    write_rows(folder / "both" / "globex.jsonl", [{"prompt": words([20] * 900), "completion": "w9"}])

    def config(name: str, *more: str):
        options = "data.packing=true", "data.max_seq_length=null", "train.rows_per_tenant=2", "adapter.summary=raw"
        places = f"data.tenants={folder / name}", f"output_dir={folder / 'run' / name}"
        return run_config(folder, *options, *places, "train.max_steps=null", *more)

    return config


def test_packed_rows_of_a_tenant_do_not_depend_on_other_tenants(long_and_short):
    found = {}
    for name in ("alone", "both"):
        config = long_and_short(name)
        run = plan_run(config)
        (acme, *others), (shape,) = run.tenants, run.buckets
        total, plan = acme.order.total_steps, acme.order.plan
        found[name] = total, [plan.batch_rows(step) for step in range(2 * total)]
        assert shape.length == (904 if others else 512)
        acme.order.batch(0, shape, 2)  # the rows fit the shape that all tenants share
    assert found["both"] == found["alone"] and found["alone"][0] > 2


@pytest.mark.long
def test_a_packed_tenant_gets_the_weights_that_it_gets_alone(long_and_short):
    weights = []
    for name in ("alone", "both"):
        config = long_and_short(name, "train.max_steps=2", "train.per_device_batch_size=2")
        train_tenants(config)
        adapter = load_adapter(Path(config.output_dir) / "acme" / "adapter", load_model_config(config.backbone.source))
        weights.append(jax.tree.leaves(adapter))
    for alone, both in zip(*weights, strict=True):
        np.testing.assert_allclose(both, alone, rtol=1e-4, atol=1e-5)
