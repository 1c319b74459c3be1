"""What is in an adapter folder, changed for tests of what is refused, and an adapter compared with the saved one."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers."


def saved_config(folder):
    return json.loads((folder / CONFIG).read_text())


def change_config(folder, **changes):
    """Changes fields of a saved config. A field with the value "left out" is removed."""
    changed = saved_config(folder) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in changed.items() if value != "left out"}))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_refused(load, folder, message, *, below, file=""):
    """`load` raises one printable ValueError with this message, of fewer characters than `below`, that begins with the
    folder or the file in it."""
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    text = str(error.value)
    assert text.startswith(str(folder / file)) and text.isprintable() and len(text) < below


def assert_same(found, adapter):
    assert (found.config, found.backbone) == (adapter.config, adapter.backbone)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_array_equal(mine, theirs)
