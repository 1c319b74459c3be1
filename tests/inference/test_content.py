"""A hash of content changes with everything that an answer depends on, and with nothing else."""

from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
from golden_models import backbone
from tiny_run import tokenizer

from para_jax.inference.content import backbone_content, bit_hash, writing_content


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


def test_what_is_written_depends_on_the_tokenizer_and_the_stop_tokens():
    one, other = deepcopy(tokenizer()), deepcopy(tokenizer())
    other.add_tokens(["another"])
    made = {writing_content(one, (2,)), writing_content(one, (2, 3)), writing_content(other, (2,))}
    one(["w5", "w5 w6"], padding=True, truncation=True, max_length=2)
    assert len(made) == 3 and writing_content(one, (2,)) in made


def test_what_is_written_depends_on_which_tokens_are_special():
    one, other = deepcopy(tokenizer()), deepcopy(tokenizer())
    other.pad_token = "w5"
    assert writing_content(one, (2,)) != writing_content(other, (2,))
