import errno
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_gguf import hugging_face, write_gguf

import para_jax.backbone.gguf.convert
from para_jax.backbone.gguf.convert import convert_gguf


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_converted_folder_holds_the_model_for_transformers(tmp_path, monkeypatch, family):
    monkeypatch.setattr(para_jax.backbone.gguf.convert, "PIECE_BYTES", 4096)
    config, weights = hugging_face(family)
    saved = []
    convert_gguf(
        write_gguf(tmp_path / "m.gguf", family), tmp_path / "new" / "hf", SimpleNamespace(save_pretrained=saved.append)
    )
    folder = tmp_path / "new" / "hf"
    assert len(saved) == 1 and sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    read = load_file(folder / "model.safetensors")
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(read[name], weight, atol=1e-6)

    from transformers import AutoConfig

    made = AutoConfig.from_pretrained(folder)
    assert (made.model_type, made.hidden_size, made.num_key_value_heads) == (config["model_type"], 64, 2)
    assert made.eos_token_id == 2


def test_the_current_folder_and_a_linked_one_take_a_model(tmp_path, monkeypatch):
    file, saved = write_gguf(tmp_path / "m.gguf"), SimpleNamespace(save_pretrained=lambda path: None)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "here")
    for given, folder in ((".", "here"), (tmp_path / "link", "there")):
        convert_gguf(file, given, saved)
        assert (tmp_path / folder / "model.safetensors").is_file()


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    file, left = write_gguf(tmp_path / "m.gguf"), tmp_path / ".hf.0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_text("part")
    convert_gguf(file, tmp_path / "hf", SimpleNamespace(save_pretrained=lambda path: None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_a_failed_conversion_leaves_nothing(tmp_path):
    file, folder = write_gguf(tmp_path / "m.gguf"), tmp_path / "hf"

    def full_disk(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{folder}'"):
        convert_gguf(file, folder, SimpleNamespace(save_pretrained=full_disk))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="hf .*not an empty folder"):
        convert_gguf(file, folder, SimpleNamespace(save_pretrained=lambda path: None))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
