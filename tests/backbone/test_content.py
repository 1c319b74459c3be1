"""A hash of a backbone changes with every weight and its place."""

import jax
import jax.numpy as jnp
import numpy as np
from golden_models import backbone

from para_jax.backbone.content import backbone_content, bit_hash


def test_one_changed_weight_is_another_backbone():
    model = backbone("llama")
    before = backbone_content(model)
    assert before == backbone_content(backbone("llama"))
    leaves, treedef = jax.tree.flatten(model)
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1e-3)
    assert backbone_content(jax.tree.unflatten(treedef, leaves)) != before


def test_weights_that_change_places_are_another_backbone():
    draw = np.random.default_rng(0)
    array = draw.normal(size=(32, 4096)).astype(jnp.bfloat16)
    for made in (array, array.astype(np.float32), draw.integers(-128, 128, (8, 4, 64)).astype(np.int8)):
        seen = [made, made[::-1], made[:, ::-1], np.roll(made, 1), np.roll(made, len(made) // 2, axis=0)]
        assert len({int(bit_hash(jnp.asarray(one))) for one in seen}) == len(seen)
