"""abstract_backbone has the shapes, dtypes and layout of what load_backbone gives, and costs nothing."""

from math import prod

import jax
import pytest
from conftest import FIXTURES

from para_jax import load_backbone, load_model_config, make_mesh
from para_jax.backbone.load import abstract_backbone


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("layout", ["layers", "stacked"])
@pytest.mark.parametrize("sizes", [None, (1, 8, 1), (2, 2, 2)])
def test_the_abstract_backbone_is_the_shape_of_the_loaded_one(layout, quantize, sizes):
    mesh = sizes and make_mesh(*sizes)
    loaded = load_backbone(FIXTURES / "gemma3_text", mesh=mesh, layout=layout, quantize=quantize)
    abstract = abstract_backbone(load_model_config(FIXTURES / "gemma3_text"), "float32", mesh, layout, quantize)
    loaded.fingerprint = None
    assert jax.tree.structure(abstract) == jax.tree.structure(loaded)
    for mine, other in zip(jax.tree.leaves(abstract), jax.tree.leaves(loaded), strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mesh is None or mine.sharding.is_equivalent_to(other.sharding, mine.ndim)


def test_7b_weights_are_laid_out_without_memory():
    config, mesh = load_model_config("meta-llama/Llama-2-7b-hf"), make_mesh(fsdp=8)
    for quantize, least, most in ((None, 13.4e9, 13.5e9), ("int8", 6.9e9, 7.1e9)):
        leaves = jax.tree.leaves(abstract_backbone(config, "bfloat16", mesh, quantize=quantize))
        whole, part = (
            sum(prod(shape(leaf)) * leaf.dtype.itemsize for leaf in leaves)
            for shape in (lambda leaf: leaf.shape, lambda leaf: leaf.sharding.shard_shape(leaf.shape))
        )
        assert least < whole < most and part < 1.01 * whole / 8
