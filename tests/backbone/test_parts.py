"""Over a mesh, a process reads the parts of a checkpoint that its devices hold: all of them, once, and no others."""

import json
from functools import cache
from math import prod

import jax
import numpy as np
import pytest
from golden_models import FIXTURES, backbone
from two_processes import run_two

from para_jax import load_backbone, load_model_config, make_mesh
from para_jax.backbone.load import abstract_backbone, parameter_name
from para_jax.backbone.parts import Block, joined_blocks, needed_blocks, read_blocks, stored_block
from para_jax.backbone.safetensors import Safetensors
from para_jax.backbone.weights import parameter_shapes, recipes

MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


class Counting:
    """A source that counts the bytes it reads."""

    def __init__(self, source):
        self.source, self.shapes, self.count = source, source.shapes, 0

    def read(self, *arguments, **settings):
        values = self.source.read(*arguments, **settings)
        self.count += values.nbytes
        return values


@cache
def shardings_of(folder: str, sizes):
    model = abstract_backbone(load_model_config(FIXTURES / folder), "float32", make_mesh(*sizes), "layers")
    return {parameter_name(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def indices(folder: str, sizes, devices):
    """(a parameter's name, its shape, the part of it that a device holds), for each of these devices of the mesh."""
    shapes = parameter_shapes(load_model_config(FIXTURES / folder))
    for name, sharding in shardings_of(folder, sizes).items():
        for device, index in sharding.devices_indices_map(shapes[name]).items():
            if device.id in devices:
                yield name, shapes[name], index


@cache
def read_for(folder: str, sizes, devices):
    """{parameter: {block: values}} as a process with these devices of the mesh reads them, and the bytes read."""
    config, source = load_model_config(FIXTURES / folder), Counting(Safetensors(FIXTURES / folder))
    plan, mine, found = recipes(config, source), {jax.devices()[i] for i in devices}, {}
    for name, shape in parameter_shapes(config).items():
        parts = needed_blocks(shape, plan[name].transpose, shardings_of(folder, sizes)[name], mine)
        found[name] = read_blocks(source, plan[name], parts, np.dtype(np.float32))[0]
    return found, source.count


@pytest.mark.parametrize("devices", [(5,), (2, 7), (0, 3, 5, 6)])
@pytest.mark.parametrize("sizes", MESHES)
def test_only_what_the_devices_hold_is_read(sizes, devices):
    held = {name: np.zeros(shape, bool) for name, shape, _ in indices("llama", sizes, devices)}
    for name, _, index in indices("llama", sizes, devices):
        held[name][index] = True
    assert read_for("llama", sizes, devices)[1] == 4 * sum(int(parts.sum()) for parts in held.values())


@pytest.mark.parametrize("folder", ["llama", "phi3", "smollm2", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("sizes", MESHES)
def test_the_parts_are_those_of_the_whole_parameters(folder, sizes):
    leaves = jax.tree_util.tree_leaves_with_path(backbone(folder))
    whole, devices = {parameter_name(path): np.asarray(leaf) for path, leaf in leaves}, (2, 3, 4)
    for name, shape, index in indices(folder, sizes, devices):
        block = stored_block(index, shape, name.endswith("kernel") or name == "head")
        part = read_for(folder, sizes, devices)[0][name][block]
        np.testing.assert_array_equal(part.reshape(whole[name][index].shape), whole[name][index])


def test_adjacent_columns_of_the_same_rows_are_read_together():
    cut = [Block(0, 8, 4, 6), Block(0, 8, 0, 4), Block(8, 16, 0, 4), Block(0, 8, 8, 9)]
    assert joined_blocks(cut) == [Block(0, 8, 0, 6), Block(0, 8, 8, 9), Block(8, 16, 0, 4)]


# -------------------------------------------------------------------------------------------------------- two processes

CODE = """
import json, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from para_jax import load_backbone, make_mesh
from para_jax.backbone.safetensors import Safetensors
from para_jax.backbone import load
read, counts = Safetensors.read, []
def counted(*arguments, **settings):
    values = read(*arguments, **settings)
    counts.append(values.nbytes)
    return values
Safetensors.read, load.fingerprint = counted, lambda source: None
found = {}
for quantize in (None, "int8"):
    counts.clear()
    model = load_backbone(sys.argv[3], mesh=make_mesh(1, 8, 1), layout="stacked", quantize=quantize)
    parts = [[[str(s.index), np.asarray(s.data).astype(float).tolist()] for s in leaf.addressable_shards]
             for leaf in jax.tree.leaves(model)]
    found[str(quantize)] = {"bytes": sum(counts), "parts": parts}
print(json.dumps(found))
"""


@pytest.mark.long
def test_two_processes_read_half_of_the_weights_each():
    ended = run_two("-c", CODE, "{address}", "{process}", str(FIXTURES / "llama"))
    assert [process.code for process in ended] == [0, 0], ended[0].err
    found = [json.loads(process.out) for process in ended]
    shapes = parameter_shapes(load_model_config(FIXTURES / "llama")).values()
    matrices, vectors = (sum(4 * prod(shape) for shape in shapes if len(shape) == axes) for axes in (2, 1))
    for quantize in (None, "int8"):
        alone = load_backbone(FIXTURES / "llama", mesh=make_mesh(1, 8, 1), layout="stacked", quantize=quantize)
        parts = [
            [[str(s.index), np.asarray(s.data).astype(float).tolist()] for s in leaf.addressable_shards]
            for leaf in jax.tree.leaves(alone)
        ]
        both = [process[str(quantize)] for process in found]
        assert [process["bytes"] for process in both] == [matrices / 2 + vectors] * 2
        assert [first + second for first, second in zip(*(process["parts"] for process in both), strict=True)] == parts
