"""abstract_backbone has the shapes, dtypes and layout of what load_backbone gives, and costs nothing. A config that is
not that of the weights is refused before any work."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import pytest
from flax import nnx
from golden_models import FIXTURES

from para_jax import load_backbone, load_model_config, make_mesh
from para_jax.backbone.load import abstract_backbone, traced
from para_jax.backbone.transformer import Transformer


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


def test_each_kind_of_layer_is_traced_once():
    config = load_model_config(FIXTURES / "gemma2")
    whole = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(traced(config)) == jax.tree.structure(whole)
    assert jax.tree.leaves(traced(config)) == jax.tree.leaves(whole)


def folder_of(tmp_path: Path, config: bytes) -> Path:
    shutil.copy(FIXTURES / "llama" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    return tmp_path


def changed(**keys) -> bytes:
    return json.dumps(json.loads((FIXTURES / "llama" / "config.json").read_text()) | keys).encode()


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 1000},
        {"vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1},
        {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2**30},
    ],
)
def test_wrong_sizes_are_refused_before_anything_is_traced(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "eval_shape", None)
    with pytest.raises(ValueError, match=f"{tmp_path}: ") as error:
        load_backbone(folder_of(tmp_path, changed(**keys)))
    assert len(str(error.value)) < 3000


def deep(levels: int) -> bytes:
    return b'{"model_type": "llama", "x": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (deep(70), "deeper than 64 levels"),
        (b'{"vocab_size": 256, "vocab_size": 256}', "'vocab_size' .*twice"),
        (b'{"model_type": "\\u001b[31m' + b"x" * 5000 + b'"}', r"model_type '\\x1b.*xxx\.\.\. is not supported"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(content, named, tmp_path):
    with pytest.raises(ValueError, match=named) as error:
        load_model_config(folder_of(tmp_path, content))
    assert str(error.value).startswith(str(tmp_path)) and str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("own", "more", "ends"),
    [(2, [9, 7], (2, 9, 7)), (None, [9], (9,)), (2, None, (2,))],
)
def test_the_end_tokens_of_a_generation_config_count_too(own, more, ends, tmp_path):
    """Qwen's chat models name <|endoftext|> only there, and transformers and vLLM stop at it."""
    folder = folder_of(tmp_path, changed(eos_token_id=own))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": more, "do_sample": True}))
    assert load_model_config(folder).eos_token_ids == load_backbone(folder).config.eos_token_ids == ends


def test_a_penalty_that_other_libraries_apply_is_named(tmp_path, capsys):
    folder = folder_of(tmp_path, changed())
    penalty = {"repetition_penalty": 1.05, "suppress_tokens": [3]}
    for settings, named in ((penalty, 2), ({"repetition_penalty": 1.0, "suppress_tokens": []}, 0)):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        load_backbone(folder)
        said = capsys.readouterr().err
        assert said.count("is not applied") == named and ("repetition_penalty 1.05" in said) == bool(named)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_only_a_bounded_part_of_a_huge_file_is_read(name, tmp_path):
    folder = folder_of(tmp_path, changed())
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with (folder / name).open("wb") as file:
        file.truncate(2**32)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{name}: larger than"):
        load_backbone(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_folder_with_the_name_of_a_known_model_is_read(tmp_path, monkeypatch):
    """As load_backbone does: a model with a larger vocabulary or fewer layers may keep its name."""
    published = load_model_config("google/gemma-2b")
    shutil.copytree(FIXTURES / "llama", tmp_path / "google" / "gemma-2b")
    monkeypatch.chdir(tmp_path)
    assert load_model_config("google/gemma-2b") == load_backbone("google/gemma-2b").config != published
