"""A mesh changes no number: eight virtual devices give the loss, the gradients and the text of one; and the largest
backbones are laid out by shapes alone. Two processes are compared with one in test_processes.py."""

from dataclasses import replace
from functools import cache
from math import prod

import jax
import numpy as np
import optax
import pytest
from golden_models import strong
from jax.sharding import AbstractMesh, AxisType
from long_cases import quick
from one_adapter import fresh_state, only, trained_step
from tiny_mesh import COMPLETION, CONFIG, LENGTH, ROWS, model

from para_jax import ParaConfig, decode, init_adapter, load_model_config, make_mesh, pick, prefill, stack_adapters
from para_jax.backbone.load import abstract_backbone
from para_jax.config import TrainSection
from para_jax.data.batches import Batch
from para_jax.runtime.sharding import place, shard_rows, tree_shardings

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
#: Adam's first moment is then the gradient itself.
TRAIN = TrainSection(adam_b1=0.0, max_grad_norm=1e9)


def adapters():
    """Three tenants whose weights are strong, in the order of their seeds."""
    made = [init_adapter(ParaConfig(r=4), CONFIG, seed=seed) for seed in range(3)]
    return [strong(adapter, seed, scale=0.5) for seed, adapter in enumerate(made)]


def batch() -> Batch:
    """8 rows, the completions of which have 1 to 6 tokens."""
    prompt_length = np.array([6, 3, 8, 5, 6, 4, 9, 7], np.int32)
    length = prompt_length + np.array([6, 5, 2, 3, 1, 1, 3, 1], np.int32)
    tokens = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    return Batch(tokens, prompt_length, length)


@cache
def loss_and_gradient(*sizes):
    mesh = make_mesh(*sizes)
    config = replace(TRAIN, per_device_batch_size=ROWS // (sizes[0] * sizes[1]))
    with jax.set_mesh(mesh):
        state = fresh_state(place(adapters()[0], mesh, CONFIG), config)
        over = jax.tree.map(lambda a: shard_rows(a[None]), batch())
        on_mesh = place(model("stacked"), mesh, CONFIG)
        state, values = trained_step(state, on_mesh, over, completion=COMPLETION, config=config, total_steps=10)
    gradient = only(optax.tree_utils.tree_get(state.optimizer, "mu"))
    return float(values["loss"]), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("sizes", quick(MESHES, (2, 2, 2), slow=((8, 1, 1), (1, 8, 1))))
def test_loss_and_gradients_are_those_of_one_device(sizes):
    (loss, gradient), (alone, expected) = loss_and_gradient(*sizes), loss_and_gradient(1, 1, 1)
    assert abs(loss - alone) < 1e-5
    for mine, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    assert min(abs(part).max() for part in expected) > 1e-3  # no part of the adapter is left out


@cache
def written(tensor: int):
    """The tokens that a batch of three tenants and the base model writes greedily, and the logits of every step."""
    mesh = make_mesh(tensor=tensor)
    with jax.set_mesh(mesh):
        on_mesh = place(model("layers"), mesh, CONFIG)
        rows = pick(place(stack_adapters(adapters()), mesh, CONFIG), np.array([0, 1, 2, -1]))
        logits, state = prefill(on_mesh, rows, batch().tokens[:4], LENGTH, max_length=32)
        steps = [np.asarray(logits)]
        for _ in range(7):
            logits, state = decode(on_mesh, state, steps[-1].argmax(axis=-1))
            steps.append(np.asarray(logits))
    return np.stack(steps, axis=1).argmax(axis=-1), np.stack(steps, axis=1)


@pytest.mark.long
def test_generation_under_tensor_parallelism_is_that_of_one_device():
    (tokens, logits), (alone, expected) = written(4), written(1)
    np.testing.assert_array_equal(tokens, alone)
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert len({tuple(row) for row in tokens}) == 4 and logits.std() > 0.1


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("source", "least", "most"), [
    ("meta-llama/Llama-2-7b-hf", 13.4e9, 13.5e9),
    ("meta-llama/Llama-2-13b-hf", 26.0e9, 26.1e9),
    ("meta-llama/Llama-2-70b-hf", 137.9e9, 138.0e9),
    ("google/gemma-2b", 5.0e9, 5.1e9),
])  # fmt: skip
def test_the_large_backbones_are_laid_out_by_shapes_alone(source, least, most):
    config = load_model_config(source)
    model = abstract_backbone(config, "bfloat16")
    whole = sum(2 * prod(leaf.shape) for leaf in jax.tree.leaves(model))
    assert least < whole < most
    for sizes in ((1, 8, 1), (4, 16, 4)):
        mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        placed = zip(jax.tree.leaves(model), jax.tree.leaves(tree_shardings(model, mesh, config)), strict=True)
        part = sum(2 * prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in placed)
        print(f"{source} on {sizes}: {whole:,} bytes, {part:,} a device")
        assert part < 1.05 * whole / (sizes[1] * sizes[2])  # norms, and Gemma's one kv head, are on all of the axis
