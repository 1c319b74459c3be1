"""The dry run for a slice compiles the run's own step, with the arguments that the run would hand over. The devices are
virtual CPU devices where the TPU's compiler would add nothing."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import jax
import jax.numpy as jnp
import pytest
from golden_models import backbone
from hlo import collective_bytes
from rehearse_programs import compile_programs
from tiny_run import run_config, run_folder
from tpu_compiler import tpu_devices

from para_jax import load_backbone, make_mesh
from para_jax.config import load_config
from para_jax.data.given import with_tenants
from para_jax.data.packing import Packed
from para_jax.estimate.memory import run_mesh
from para_jax.estimate.topology import (
    TOO_MUCH,
    compile_step,
    header,
    parsed_topology,
    shard_bytes,
    step_arguments,
    topology_report,
)
from para_jax.reports.inspect import dry_run, tenants_of
from para_jax.runs.run import empty_state
from para_jax.runtime.devices import matrix_weights
from para_jax.runtime.sharding import shard_rows
from para_jax.training.passes import lay_out

ON_7B = ("configs/llama2-7b-squad.yaml", ["mesh.data=1", "mesh.fsdp=16", "train.gradient_accumulation_steps=1"])


@pytest.fixture
def config(tmp_path):
    return run_config(run_folder(tmp_path), "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2", "data.max_seq_length=16")


@pytest.fixture
def no_libtpu(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("para_jax.estimate.topology.version", version)


def test_the_abstract_arguments_lie_as_those_of_a_run(config):
    mesh = run_mesh(config)
    state, model, batch, *_ = step_arguments(config, mesh)
    loaded = load_backbone(config.backbone.source, mesh=mesh, layout="stacked")
    with jax.set_mesh(mesh):
        real = empty_state(config, loaded, 1, mesh)
        tokens = shard_rows(jnp.zeros((1, lay_out(config, mesh).pass_rows, 16), jnp.int32))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(real.adapters))
    for made, abstract in ((real, state), (loaded, model)):
        expected = dict(jax.tree_util.tree_leaves_with_path(abstract))
        for path, leaf in jax.tree_util.tree_leaves_with_path(made):
            other = expected.pop(path)
            assert leaf.shape == other.shape
            assert leaf.ndim == 0 or other.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        assert not expected
    assert batch.tokens.shape == tokens.shape and batch.tokens.sharding.is_equivalent_to(tokens.sharding, 3)


def test_the_abstract_tenants_lie_as_those_of_a_run(config):
    config = replace(config, data=replace(config.data, tenants=config.data.train, train=None))
    mesh = run_mesh(config)
    state, model, batch, groups, rates = step_arguments(config, mesh, 24)
    loaded = load_backbone(config.backbone.source, mesh=mesh, layout="stacked")
    with jax.set_mesh(mesh):
        real = empty_state(config, loaded, 24, mesh)
    for made, abstract in zip(jax.tree.leaves(real), jax.tree.leaves(state), strict=True):
        assert made.shape == abstract.shape and made.sharding.is_equivalent_to(abstract.sharding, made.ndim)
    assert shard_bytes(state) * 8 == sum(leaf.nbytes for leaf in jax.tree.leaves(real))
    layout = lay_out(config, mesh, 24)
    assert groups.shape == (1, layout.groups) and batch.tokens.shape == (1, layout.groups * layout.rows, 16)
    assert {leaf.shape for leaf in rates} == {(24,)}


def test_the_dry_run_of_many_tenants_says_what_each_adds_to_a_chip(tmp_path, no_libtpu):
    many = ["data.tenants=" + str(tmp_path / "absent"), "train.rows_per_tenant=4", "train.tenants_at_once=64"]
    config = load_config(ON_7B[0], [*ON_7B[1], "train.per_device_batch_size=4", *many])
    shown = dry_run(config, "v5e:4x4")
    assert "tenants    64, 64 at once; 16 of 4 rows each in a pass" in shown and "ESTIMATE" in shown
    assert (
        "optimiser state 107.3 MB per tenant, 6.71 MB per tenant and chip, 0.40 GiB per chip (spread over 16 chips)"
        in shown
    )
    none = replace(config, train=replace(config.train, tenants_at_once=None))
    with pytest.raises(ValueError, match="absent.*train.tenants_at_once"):
        dry_run(none, "v5e:4x4")
    uneven = replace(config, train=replace(config.train, tenants_at_once=12))
    assert "spread over 1 chips, because 16 chips do not divide 12 tenants)" in dry_run(uneven, "v5e:4x4")
    uneven = replace(config, train=replace(config.train, tenants_at_once=50))
    assert "do not divide 50 tenants" in dry_run(uneven, "v5e:4x4")


def test_the_dry_run_says_that_it_assumes_the_length_of_rows(no_libtpu):
    config = load_config(ON_7B[0], [*ON_7B[1], "data.max_seq_length=null"])
    assert "rows of 512 tokens (assumed: data.max_seq_length=null" in dry_run(config, "v5e:4x4")
    assert "assumed" not in dry_run(replace(config, data=replace(config.data, max_seq_length=512)), "v5e:4x4")


def test_tenants_from_python_are_counted_where_they_are_here():
    config = load_config(ON_7B[0], [*ON_7B[1], "data.tenants=<python>"])
    rows = [{"prompt": "a", "completion": "b"}]
    here = replace(config, data=with_tenants(config.data, {name: rows for name in ("acme", "globex", "umbrella")}))
    assert tenants_of(here) == 3
    with pytest.raises(ValueError, match="data.tenants: the data came from Python.*train.tenants_at_once"):
        tenants_of(config)
    assert tenants_of(replace(config, train=replace(config.train, tenants_at_once=16))) == 16


@pytest.mark.long
def test_the_step_is_compiled_with_its_bytes(config):
    mesh = run_mesh(config)
    found = compile_step(config, mesh)
    state, model, batch, *_ = step_arguments(config, mesh)
    assert found.memory and found.needed == sum(found.memory)
    assert found.memory.arguments == pytest.approx(shard_bytes((state, model, batch)), rel=0.02)


@pytest.mark.long
def test_with_scope_response_the_dry_run_says_how_long_completions_may_be_and_compiles_that(config):
    config = replace(config, adapter=replace(config.adapter, scope="response"))
    config = replace(config, data=replace(config.data, max_seq_length=64), train=replace(config.train, remat="none"))
    few, any_number = (replace(config, eval=replace(config.eval, max_new_tokens=count)) for count in (8, None))
    mesh = run_mesh(config)
    shown = ["\n".join(header(one, "v5e:2x4", mesh)) for one in (few, any_number)]
    assert "rows of 64 tokens, up to 8 of them completion" in shown[0]
    assert "rows of 64 tokens, any of them completion" in shown[1]
    sizes = [compile_step(one, mesh).memory.temporaries for one in (few, any_number)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.long
def test_packed_rows_are_compiled_with_their_segments(config):
    config = replace(config, data=replace(config.data, packing=True, max_seq_length=128))
    _, _, batch, *_ = step_arguments(config, mesh := run_mesh(config))
    assert isinstance(batch, Packed) and batch.start.shape == (1, lay_out(config, mesh).pass_rows, 2)
    assert compile_step(config, mesh).fits
    shown = "\n".join(header(config, "v5e:2x4", mesh))
    assert "rows of 128 tokens" in shown and "packed, 2 examples per row" in shown and "splash (on a TPU)" in shown


@pytest.mark.parametrize(("name", "found"), [("v5e:4x4", ("v5e", 16)), ("v5p:2x2x4", ("v5p", 16)),
                                             ("v6e:1x1", ("v6e", 1))])  # fmt: skip
def test_a_slice_is_named_by_its_chips_and_their_shape(name, found):
    assert parsed_topology(name) == found


@pytest.mark.parametrize("name", ["v5e:16", "v9z:4x4", "v5e:4x-4"])
def test_another_name_is_named(name):
    with pytest.raises(ValueError, match=f"--topology .*v4, v5e, .*such as v5e:4x4; got '{name}'"):
        parsed_topology(name)


def test_what_the_compiler_says_of_too_little_memory_is_understood():
    says = "Ran out of memory in memory space hbm. Used 20.60G of 15.75G hbm. Exceeded hbm capacity by 4.85G."
    assert TOO_MUCH.search(says).groups()[:3] == ("20.60", "G", "15.75")
    says = "Program hbm requirement: arguments (25.12G) exceeds available HBM (15.75G)"
    assert TOO_MUCH.search(says).groups()[3:] == ("25.12", "G", "15.75")


def test_without_libtpu_an_estimate_says_that_it_is_one_and_how_to_get_better(no_libtpu):
    shown = topology_report(load_config(*ON_7B), "v5e:4x4")
    assert "slice      v5e:4x4: 16 chips; mesh data 1, fsdp 16, tensor 1" in shown
    assert "ESTIMATE, not compiled" in shown and "pip install 'para_jax[aot]'" in shown
    weights = 6_738_415_616 * 2 / 16 / 2**30
    assert f"arguments {weights:.1f}"[:-1] in shown  # the adapter's and optimiser's bytes are few
    assert "it should fit" in shown
    assert "too much" in topology_report(load_config(ON_7B[0], ["mesh.data=1"]), "v5e:1x1")


@pytest.mark.long
def test_the_dry_run_names_weights_that_the_mesh_can_not_split(no_libtpu):
    shown = topology_report(load_config("configs/gemma-2b-boolq.yaml", ["mesh.data=2", "mesh.tensor=8"]), "v5e:4x4")
    assert "mesh.tensor=8 does not divide kv_heads 1: not split over it" in shown
    assert "not split" not in topology_report(load_config("configs/gemma-2b-boolq.yaml"), "v5e:4x4")


def test_a_mesh_that_does_not_fill_the_slice_is_named(no_libtpu):
    with pytest.raises(ValueError, match="mesh .*16 chips.*'fsdp': 8"):
        topology_report(load_config(ON_7B[0], ["mesh.data=1", "mesh.fsdp=8"]), "v5e:4x4")


def test_the_weights_of_the_matrix_products_are_all_but_embeddings_head_and_norms():
    config = backbone("llama").config
    kernels = [layer.attention for layer in backbone("llama").layers]
    linears = [site for site in jax.tree.leaves(backbone("llama").layers) if site.ndim == 2]
    assert kernels and matrix_weights(config) == sum(leaf.size for leaf in linears)


@pytest.mark.long
def test_training_evaluation_and_serving_are_compiled_for_a_slice(config):
    mesh = make_mesh(fsdp=4, devices=tpu_devices("v5e:2x2"))
    found = compile_programs(config, mesh)
    assert list(found) == ["train", "loss", "prefill", "ranking", "decode"]
    weights = shard_bytes(step_arguments(config, mesh)[1])
    for compiled in found.values():
        assert compiled.memory and compiled.memory.arguments > weights
    gathered = {name: collective_bytes(compiled.program.as_text())["all-gather"] for name, compiled in found.items()}
    layers = step_arguments(config, mesh)[1].layers
    kernels = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers) if leaf.ndim == 3)
    assert gathered["decode"] > kernels and gathered["train"] > 1.9 * kernels  # forward and backward


@pytest.mark.long
def test_the_dry_run_tells_whether_the_step_fits(tmp_path):
    config = run_config(run_folder(tmp_path), "mesh.data=1", "mesh.fsdp=4", "data.max_seq_length=16")
    assert "it fits (arguments" in topology_report(config, "v5e:2x2")
