"""Loading fills exactly the model's parameters with the checkpoint's values, and names whatever does not fit."""

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from para_jax import load_backbone
from para_jax.backbone import parts as blocks
from para_jax.backbone.families import model_config
from para_jax.backbone.safetensors import Safetensors
from para_jax.backbone.transformer import Transformer
from para_jax.backbone.weights import fingerprint, load_parameters, parameter_shapes

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDERS = sorted(folder.parent.name for folder in FIXTURES.glob("*/config.json"))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def config_of(folder: str):
    return model_config(json.loads((FIXTURES / folder / "config.json").read_text()))


def tensors_of(folder: str) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / folder / "model.safetensors")


def load(folder: str, dtype="float32"):
    return load_parameters(config_of(folder), Safetensors(FIXTURES / folder), dtype)


def load_changed(tmp_path: Path, changes: dict, folder: str = "llama"):
    """Loads a fixture with some tensors replaced, or removed if the change is None."""
    tensors = tensors_of(folder) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "model.safetensors")
    return load_parameters(config_of(folder), Safetensors(tmp_path), "float32")


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("folder", FOLDERS)
def test_loading_fills_exactly_the_models_parameters(folder):
    config = config_of(folder)
    loaded = load(folder)
    assert {name: array.shape for name, array in loaded.items()} == parameter_shapes(config)
    assert all(np.isfinite(array).all() for array in loaded.values())
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    module = {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}
    assert module == parameter_shapes(config)


def test_tied_embeddings_are_not_doubled(tmp_path):
    embedding = tensors_of("smollm2")["model.embed_tokens.weight"]
    assert "head" not in load("smollm2")
    assert "head" not in load_changed(tmp_path, {"lm_head.weight": embedding}, "smollm2")


def test_a_tied_matrix_may_have_the_name_of_the_head_alone(tmp_path):
    """As safetensors' save_model keeps it. An untied model needs both."""
    tensors = tensors_of("smollm2")
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding}, tmp_path / "model.safetensors")
    shutil.copy(FIXTURES / "smollm2" / "config.json", tmp_path)
    model = load_backbone(tmp_path)
    assert model.head is None and np.array_equal(model.embedding[...], embedding)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing: model.embed_tokens.weight"):
        load_backbone(tmp_path)


def test_a_head_next_to_tied_embeddings_is_used(tmp_path):
    """transformers unties the two in Mistral Small 3.1's config when it saves the model."""
    shutil.copy(FIXTURES / "smollm2" / "config.json", tmp_path)
    tensors = tensors_of("smollm2")
    head = tensors["model.embed_tokens.weight"] + np.float32(np.arange(64) == 63)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    model = load_backbone(tmp_path)
    assert not model.config.tied_embeddings and np.array_equal(model.head[...], head.T)


def test_shards_equal_the_single_file():
    whole, config = load("gemma"), config_of("gemma")
    shards = load_parameters(config, Safetensors(FIXTURES / "gemma" / "sharded"), "float32")
    assert list(whole) == list(shards)
    assert all(np.array_equal(whole[name], shards[name]) for name in whole)


def test_weights_are_cast_once(tmp_path):
    tensors, cast = tensors_of("llama"), load("llama", "bfloat16")
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    source = Safetensors(tmp_path)
    assert source.read(Q_PROJ).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read(Q_PROJ, 3, 9), stored[Q_PROJ][3:9])
    read = load_parameters(config_of("llama"), source, "bfloat16")
    assert all(array.dtype == ml_dtypes.bfloat16 for array in read.values())
    assert all(np.array_equal(read[name], cast[name]) for name in cast)


@pytest.mark.parametrize("values", [1, 700, 10_000])
def test_the_size_of_the_pieces_changes_nothing(values, monkeypatch):
    whole = {folder: (load(folder), fingerprint(Safetensors(FIXTURES / folder))) for folder in ("llama", "phi3")}
    monkeypatch.setattr(blocks, "PIECE_VALUES", values)
    for folder, (loaded, print_of_whole) in whole.items():
        assert all(np.array_equal(array, loaded[name]) for name, array in load(folder).items())
        assert fingerprint(Safetensors(FIXTURES / folder)) == print_of_whole


def test_memory_stays_near_the_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "PIECE_VALUES", 64 * 1024)
    config = model_config(json.loads((FIXTURES / "smollm2" / "config.json").read_text()) | {"vocab_size": 65536})
    tensors = tensors_of("smollm2") | {"model.embed_tokens.weight": np.ones((65536, 64), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    tracemalloc.start()
    loaded = load_parameters(config, Safetensors(tmp_path), "float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(array.nbytes for array in loaded.values()) <= peak < 1.1 * sum(array.nbytes for array in loaded.values())


def test_a_cpu_takes_over_the_memory_without_a_copy():
    values = blocks.aligned_empty((7, 5), np.dtype(np.float32))
    values[:] = 1
    array = jax.device_put(values, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == values.ctypes.data


def test_the_fingerprint_is_the_hash_of_the_stored_q_proj():
    q_proj = tensors_of("llama")[Q_PROJ]
    assert fingerprint(Safetensors(FIXTURES / "llama")) == hashlib.sha256(q_proj.tobytes()).hexdigest()
    fused = tensors_of("phi3")["model.layers.0.self_attn.qkv_proj.weight"]
    assert fingerprint(Safetensors(FIXTURES / "phi3")) == hashlib.sha256(fused[:64].tobytes()).hexdigest()
    prints = {fingerprint(Safetensors(FIXTURES / folder)) for folder in FOLDERS}
    assert len(prints) == len(FOLDERS)


def test_stored_rotary_frequencies_are_harmless(tmp_path):
    assert len(load_changed(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})) == 30


# --------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({Q_PROJ: None}, f"missing: {Q_PROJ}"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones(2)}, "unknown: model.layers.3.mlp.up_proj.weight"),
        ({NORM: np.ones(65, np.float32)}, rf"misshapen: {NORM} \[65\] instead of \[64\]"),
        ({NORM: np.full(64, np.nan, np.float32)}, f"NaN or infinite values: {NORM}"),
        ({NORM: np.ones(64, np.int8)}, f"{NORM} is stored as I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        load_changed(tmp_path, changes)
