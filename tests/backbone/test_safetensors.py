"""Parts of a safetensors file are read; a truncated or inconsistent file is refused."""

import json
import shutil

import numpy as np
import pytest
from golden_models import FIXTURES
from safetensors.numpy import save_file

from para_jax.backbone.safetensors import Safetensors


def test_parts_of_a_tensor_equal_those_of_the_full_tensor(tmp_path):
    whole = np.arange(77, dtype=np.float32).reshape(11, 7)
    save_file({"first": np.ones(3, np.float16), "a": whole, "vector": whole[0].copy()}, tmp_path / "model.safetensors")
    source = Safetensors(tmp_path)
    np.testing.assert_array_equal(source.read("a"), whole)
    np.testing.assert_array_equal(source.read("a", 2, 9), whole[2:9])
    np.testing.assert_array_equal(source.read("a", 10, columns=slice(1, 4)), whole[10:, 1:4])
    np.testing.assert_array_equal(source.read("a", columns=slice(6, 7)), whole[:, 6:])
    np.testing.assert_array_equal(source.read("vector", 2, 5, columns=slice(0, 1)), whole[0, 2:5])
    assert source.read("a", 4, 4).shape == (0, 7) and source.read("a", 4, 4, columns=slice(2, 3)).shape == (0, 1)


@pytest.mark.parametrize("length", [0, 5, 8, 100, 20_000, 578_311])
def test_a_truncated_file_is_named(length, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((FIXTURES / "llama" / "model.safetensors").read_bytes()[:length])
    with pytest.raises(ValueError, match="model.safetensors.*truncated"):
        Safetensors(tmp_path)


def header(entries) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entries",
    [
        b"[" * 100_000,
        {"a": GOOD | {"shape": [5]}},
        {"a": GOOD | {"data_offsets": [-16, 0]}},
        {"a": GOOD | {"shape": [2]}, "b": GOOD | {"shape": [2]}},
        {"\x1b]0;owned\x07" * 99: GOOD | {"data_offsets": [4, 20]}},
        {"a": GOOD | {"shape": [10**400] * 1000}},
    ],
)
def test_a_bad_header_is_refused_in_a_short_printable_line(entries, tmp_path):
    """The safetensors library checks it."""
    (tmp_path / "model.safetensors").write_bytes(header(entries))
    with pytest.raises(ValueError) as error:
        Safetensors(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/model.safetensors: ") and len(str(error.value)) < 700
    assert str(error.value).isprintable()


def test_a_huge_header_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    with pytest.raises(ValueError, match="1073741824"):
        Safetensors(tmp_path)


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    square = GOOD | {"shape": [2, 2]}
    (tmp_path / "model.safetensors").write_bytes(header({"a": square}))
    source = Safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header({"a": square})[:-4])
    for columns in (slice(None), slice(1, 2)):
        with pytest.raises(ValueError, match="model.safetensors .*a"):
            source.read("a", columns=columns)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "a\\b.safetensors", "x.bin"])
def test_an_index_that_points_outside_its_folder_is_refused(shard, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "gemma" / "sharded", folder)
    shutil.copy(FIXTURES / "gemma" / "model.safetensors", tmp_path / "outside.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model.safetensors.index.json: .*"):
        Safetensors(folder)
