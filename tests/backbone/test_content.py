"""A hash of a backbone changes with every weight and its place."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from golden_models import backbone

from para_jax.backbone.content import FACTOR, backbone_content, bit_hash, digests_of_run


def test_one_changed_weight_is_another_backbone():
    model = backbone("llama")
    before = backbone_content(model)
    assert before == backbone_content(backbone("llama"))
    leaves, treedef = jax.tree.flatten(model)
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1e-3)
    assert backbone_content(jax.tree.unflatten(treedef, leaves)) != before


def test_a_stack_of_layers_has_the_hash_of_its_elements():
    array = np.arange(5 * 4 * 3, dtype=np.float32).reshape(5, 4, 3) ** 2
    strides = np.array([4 * 3, 3, 1], np.uint64) * FACTOR
    position = sum(np.indices(array.shape)[axis].astype(np.uint64) * strides[axis] for axis in range(3))
    mixed = (array.view(np.uint32).astype(np.uint64) + position).astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    assert int(bit_hash(jnp.asarray(array))) == int(mixed.astype(np.uint64).sum() % 2**32)


def test_other_end_tokens_train_the_same_backbone_and_another_norm_does_not():
    model = jax.tree.map(lambda leaf: leaf, backbone("llama"))  # a copy: other tests share that one
    before = digests_of_run(model)
    model.config = replace(model.config, eos_token_ids=(1, 2), pad_token_id=0)
    assert digests_of_run(model) == before
    model.config = replace(model.config, norm_eps=1e-3)
    assert {name for name, digest in digests_of_run(model).items() if digest != before[name]} == {"backbone config"}


def test_weights_that_change_places_are_another_backbone():
    draw = np.random.default_rng(0)
    array = draw.normal(size=(32, 4096)).astype(jnp.bfloat16)
    for made in (array, array.astype(np.float32), draw.integers(-128, 128, (8, 4, 64)).astype(np.int8)):
        seen = [made, made[::-1], made[:, ::-1], np.roll(made, 1), np.roll(made, len(made) // 2, axis=0)]
        assert len({int(bit_hash(jnp.asarray(one))) for one in seen}) == len(seen)
