import struct

import gguf
import numpy as np
import pytest
from tiny_gguf import hugging_face, write_gguf

from para_jax import load_backbone
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.backbone.gguf.file import GgufFile

Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize("family", ["llama", "smollm2", "gemma3_text"])
def test_a_gguf_model_reads_back_as_the_same_hugging_face_model(tmp_path, family):
    config, weights = hugging_face(family)
    change = {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 100.0} if family == "gemma3_text" else {}
    file = GgufFile(write_gguf(tmp_path / "m.gguf", family, change=change))
    assert file.shapes == {name: weight.shape for name, weight in weights.items()}
    for name, weight in weights.items():
        assert file.read(name).dtype == np.float32
        np.testing.assert_allclose(file.read(name), weight, atol=1e-6)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    not_said = {"attention_dropout", "initializer_range", "use_cache", "pad_token_id", "attn_logit_softcapping"}
    not_said |= {
        "pretraining_tp",
        "query_pre_attn_scalar",
    }  # llama.cpp takes the head's width, the fixture another number
    eos = {"bos_token_id": 1, "eos_token_id": 2}
    expected = {
        k: v for k, v in ({"head_dim": head_dim, "rope_scaling": None} | config | eos).items() if k not in not_said
    }
    assert {key: file.config[key] for key in expected} == expected


def test_reading_rows_dequantises_only_those_rows(tmp_path, monkeypatch):
    file = GgufFile(write_gguf(tmp_path / "m.gguf", kind=Q8))
    whole = {name: file.read(name) for name in file.shapes}
    for name, weight in hugging_face("llama")[1].items():
        np.testing.assert_allclose(whole[name], weight, atol=0.01)  # Q8_0 rounds by 1/254 of a block's largest
    counted, dequantise = [], gguf.quants.dequantize
    monkeypatch.setattr(
        gguf.quants, "dequantize", lambda data, kind: counted.append(len(data)) or dequantise(data, kind)
    )
    for name in [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.self_attn.k_proj.weight",
    ]:
        np.testing.assert_array_equal(file.read(name, 5, 19), whole[name][5:19])
        np.testing.assert_array_equal(file.read(name, 28), whole[name][28:])
        assert counted == [14, len(whole[name]) - 28]
        counted.clear()


def test_biases_are_read_with_the_rows_of_their_matrices(tmp_path):
    rng, widths = np.random.default_rng(0), {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}
    biases = {
        f"model.layers.{i}.self_attn.{name}.bias": rng.normal(size=width).astype(np.float32)
        for i in range(3)
        for name, width in widths.items()
    }
    file = GgufFile(write_gguf(tmp_path / "m.gguf", tensors=biases))
    assert file.config["attention_bias"] and not file.config["mlp_bias"]
    for name, bias in biases.items():
        np.testing.assert_array_equal(file.read(name), bias)
        np.testing.assert_array_equal(file.read(name, 3, 20), bias[3:20])


def llama3_factors(config, positions):
    """The divisors of the frequencies as convert_hf_to_gguf.py computes them for factor 8, low 1, high 4."""
    made = []
    for i in range(0, 16, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / 16)
        smooth = (positions / wavelength - 1) / 3
        made.append(1 if smooth > 1 else 8 if smooth < 0 else 1 / ((1 - smooth) / 8 + smooth))
    return np.array(made, np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path):
    config, _ = hugging_face("llama3")
    factors = {"raw.rope_freqs.weight": llama3_factors(config, 8192)}
    assert not np.isin(factors["raw.rope_freqs.weight"], [1, 8]).all()
    scaling = GgufFile(write_gguf(tmp_path / "a.gguf", "llama3", tensors=factors)).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = {"raw.rope_freqs.weight": llama3_factors(config, 64)}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        GgufFile(write_gguf(tmp_path / "b.gguf", "llama3", tensors=factors))


def test_linear_rope_scaling_and_a_second_end_token_are_read(tmp_path):
    change = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "tokenizer.ggml.eot_token_id": 7}
    config = GgufFile(write_gguf(tmp_path / "m.gguf", change=change)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    ("kind", "factor", "scaled"),
    [(None, 8.0, True), ("none", 8.0, False), ("linear", 1.0, False)],
)
def test_a_file_without_a_kind_of_rope_scaling_is_linear_as_in_llama_cpp(tmp_path, kind, factor, scaled):
    change = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    scaling = GgufFile(write_gguf(tmp_path / "m.gguf", change=change)).config["rope_scaling"]
    assert scaling == ({"rope_type": "linear", "factor": factor} if scaled else None)


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_that_was_merged_from_parts_is_read(tmp_path, count):
    """`llama-gguf-split --merge` sets split.count to 0."""
    file = GgufFile(write_gguf(tmp_path / "m.gguf", change={"split.count": count}))
    assert file.shapes == GgufFile(write_gguf(tmp_path / "plain.gguf")).shapes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'"),
        ({"change": {"rope.dimension_count": 8}}, r"rope\.dimension_count 8 is not supported; only 16 is"),
        ({"change": {"block_count": None}}, "config.json has no num_hidden_layers"),
        ({"change": {"block_count": 4}}, r"missing: .*model\.layers\.3\."),
        ({"change": {"split.count": 3}}, "one of 3 parts"),
    ],
)
def test_unsupported_or_missing_metadata_is_named_before_a_conversion(tmp_path, change, said):
    path = write_gguf(tmp_path / "m.gguf", **change)
    for use in (load_backbone, lambda path: convert_gguf(path, tmp_path / "out", None)):
        with pytest.raises(ValueError, match=said):
            use(path)
    assert not (tmp_path / "out").exists()


def test_a_truncated_foreign_or_huge_file_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [23, *range(24, len(whole), len(whole) // 20), len(whole) - 33]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="this GGUF file can't be read"):
            GgufFile(cut)
    with cut.open("wb") as stream:  # an array of 2**35 numbers
        stream.write(struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 0, 2**35))
        stream.truncate(2**40)
    with pytest.raises(ValueError, match="cut off"):
        GgufFile(cut)
