"""The loss is the completion's alone, is what other software computes, and does not depend on how it is computed."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, golden, golden_tenants
from hlo import collective_bytes, collectives_run
from jax.sharding import NamedSharding, PartitionSpec
from long_cases import long, quick
from tpu_compiler import tpu_devices

from para_jax import load_backbone, load_model_config, make_mesh, pick, stack_adapters
from para_jax.backbone.load import abstract_backbone
from para_jax.data.batches import Batch
from para_jax.runtime.sharding import place
from para_jax.training import loss
from para_jax.training.loss import completion_nll, token_nll, token_scores

FAMILIES = ("llama", "qwen3")  # qwen3: q is scaled before a norm


@cache
def computed(family, layout="stacked", remat="dots"):
    """Each row's nats and tokens, and the gradient of their mean by both golden tenants' weights."""
    expected, stack = golden(family, "para"), stack_adapters(golden_tenants(family))
    batch, completion = golden_batch(expected)

    def mean(stack, model):
        rows = pick(stack, expected["tenant"])
        total, count = completion_nll(model, rows, batch, completion, remat=remat)
        return total.sum() / count.sum(), (total, count)

    (_, sums), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(stack, backbone_of(family, layout))
    return *map(np.asarray, sums), gradient.adapters


def backbone_of(family, layout):
    """Both layouts of a family: with_layout gives the arrays of the one to the other, so each is loaded by itself."""
    return backbone(family) if layout == "layers" else load_backbone(FIXTURES / family, layout=layout)


def golden_batch(expected):
    completion = int((expected["lengths"] - expected["prompt_lengths"]).max())
    return Batch(
        *map(jnp.asarray, (expected["input_ids"], expected["prompt_lengths"], expected["lengths"]))
    ), completion


def assert_close(ours, theirs, **tolerance):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, **tolerance)


def test_a_target_is_not_the_likeliest_where_the_logits_are_no_numbers():
    """An argmax takes the first NaN, which may be the target."""
    logits = jnp.array([[[jnp.nan] * 3, [2.0, 1.0, 0.0]]])
    nats, likeliest = token_scores(logits, jnp.zeros((1, 2), jnp.int32))
    assert np.isnan(nats[0, 0]) and likeliest.tolist() == [[False, True]]


def by_name(gradient, tenant):
    """A tenant's gradient as the golden files have it: one `up` over all sites."""
    up = np.concatenate([gradient.up[site][...] for site in gradient.config.target_modules], axis=-1)[tenant]
    down = np.asarray(gradient.down[...])[tenant]
    return {f"layers.{i}.{name}": value[i] for name, value in (("down", down), ("up", up)) for i in range(len(down))}


@pytest.mark.parametrize("family", quick(FAMILIES, "llama"))
def test_loss_and_gradients_a_tenant_are_those_of_the_independent_implementation(family):
    expected = golden(family, "para")
    total, count, gradient = computed(family)
    np.testing.assert_allclose(total.sum() / count.sum(), expected["loss"], atol=1e-5)
    for tenant in range(2):
        for name, value in by_name(gradient, tenant).items():
            assert abs(value).max() > 1e-3
            np.testing.assert_allclose(value, expected[f"grad.t{tenant}.{name}"], atol=5e-5)


@pytest.mark.parametrize("family", quick(FAMILIES, "llama"))
def test_sum_and_count_are_kept_apart_for_each_row(family):
    expected = golden(family, "para")
    total, count, _ = computed(family)
    np.testing.assert_allclose(total, expected["token_nll"].sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(count, expected["loss_mask"].sum(axis=1))
    assert len(set(count)) > 1


@pytest.mark.long
def test_the_stacked_layout_equals_the_layers():
    for ours, theirs in zip(
        jax.tree.leaves(computed("llama")), jax.tree.leaves(computed("llama", "layers")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("remat", [long("none"), "block"])
def test_what_the_backward_pass_keeps_changes_nothing(remat):
    for ours, theirs in zip(
        jax.tree.leaves(computed("llama")), jax.tree.leaves(computed("llama", remat=remat)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_recomputed_layer_keeps_its_input_only_and_dots_its_linears_outputs():
    batch, completion = golden_batch(golden("llama", "para"))
    tenant, model = golden_tenants("llama")[0], backbone("llama")

    def kept(remat, times):
        rows = jax.tree.map(lambda a: jnp.concatenate([a] * times), batch)
        of = lambda tenant: completion_nll(model, tenant, rows, completion, remat=remat)[0].sum()  # noqa: E731
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda t: jax.vjp(of, t)[1], tenant)))

    def kept_of_rows(remat):  # without the weights, which the backward pass reads too
        return kept(remat, 2) - kept(remat, 1)

    inputs = batch.tokens.size * model.config.width * model.config.num_layers
    assert inputs <= kept_of_rows("block") < kept_of_rows("dots") / 2 < kept_of_rows("none") / 4


@pytest.mark.parametrize("positions", [1, 3])
def test_the_loss_in_chunks_equals_the_loss_at_once(positions, monkeypatch):
    model, expected = backbone("gemma"), golden("gemma")
    hidden = jnp.asarray(expected["final_hidden"])[:, :7]
    targets = jnp.asarray(expected["input_ids"])[:, 1:8]
    weights = np.arange(1.0, 15.0).reshape(2, 7)

    def computed():
        def of(hidden):
            nll = token_nll(model, hidden, targets)
            return (nll * weights).sum(), nll

        return jax.jit(jax.value_and_grad(of, has_aux=True))(hidden)

    def logits_kept():
        """Whether logits wait for the backward pass."""
        backward = jax.eval_shape(lambda hidden: jax.vjp(lambda h: token_nll(model, h, targets), hidden)[1], hidden)
        return any(leaf.shape[-1:] == (model.config.vocab_size,) for leaf in jax.tree.leaves(backward))

    at_once = computed()
    assert logits_kept()
    monkeypatch.setattr(loss, "CHUNK", positions * 2 * model.config.vocab_size)
    in_chunks = computed()
    assert not logits_kept()
    assert_close(in_chunks, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "largest"), [(1 << 26, 3 * 11 * 256), (3 * 4 * 256, 3 * 4 * 256)])
def test_logits_are_made_at_completion_positions_only_and_a_chunk_at_a_time(chunk, largest, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    batch, completion = golden_batch(golden("llama", "para"))
    assert completion == 11 and batch.tokens.shape == (3, 24)
    model = backbone("llama")
    of = lambda tenant: completion_nll(model, tenant, batch, completion)[0].sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(of))(golden_tenants("llama")[0])
    shapes = [shape for shape in every_shape(program.jaxpr) if shape[-1:] == (256,) and len(shape) == 3]
    assert max(map(np.prod, shapes)) == largest


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_in_chunks_gathers_the_head_once_a_step_and_nothing_of_every_row(tied, monkeypatch):
    mesh = make_mesh(fsdp=4, devices=tpu_devices("v5e:2x2"))
    config = replace(load_model_config(FIXTURES / "llama"), width=256, vocab_size=1024, tied_embeddings=tied)
    model = abstract_backbone(config, jnp.bfloat16, mesh)
    over = NamedSharding(mesh, PartitionSpec("fsdp"))
    hidden = jax.ShapeDtypeStruct((8, 32, 256), jnp.bfloat16, sharding=over)
    targets = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=over)
    monkeypatch.setattr(loss, "CHUNK", 4 * (8 // 4) * 1024)  # 4 positions of a chip's rows

    def of(hidden, model, targets):
        return token_nll(model, hidden, targets).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.value_and_grad(of)).lower(hidden, model, targets).compile().as_text()
    assert collectives_run(text) == {"all-reduce": 1, "all-gather": 1}
    assert collective_bytes(text) == {"all-reduce": 4, "all-gather": 256 * 1024 * 2}


@pytest.mark.parametrize(("sizes", "chunks"), [long((2, 2, 1), 4), ((1, 4, 2), 2), long((8, 1, 1), 2)])
def test_a_chunk_is_counted_by_what_one_device_holds_of_the_logits(sizes, chunks, monkeypatch):
    model, mesh = backbone("llama"), make_mesh(*sizes)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, model.config.width)), jnp.float32)
    targets = jnp.arange(64).reshape(8, 8)
    at_once = token_nll(model, hidden, targets)
    monkeypatch.setattr(loss, "CHUNK", 2 * 2 * model.config.vocab_size)
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(lambda hidden: token_nll(model, hidden, targets))(hidden)
        in_chunks = jax.jit(token_nll)(place(model, mesh, model.config), hidden, targets)
    scan = next(equation for equation in program.jaxpr.eqns if equation.primitive.name == "scan")
    assert scan.params["length"] == chunks
    np.testing.assert_allclose(in_chunks, at_once, rtol=1e-5, atol=1e-5)


def every_shape(jaxpr):
    """The shapes of all values of a program, those of the programs inside it included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from every_shape(inner)


def test_a_golden_backbone_has_its_own_loss():
    expected = golden("gemma")
    batch, completion = golden_batch(expected)
    total, count = jax.jit(lambda model: completion_nll(model, None, batch, completion))(backbone("gemma"))
    np.testing.assert_allclose(total.sum() / count.sum(), expected["loss"], atol=1e-5)
