"""The rules by which an attention kernel is chosen, the trial at start, and what a run says of both. No GPU is needed:
platform and compute capability are given, and a kernel is put in cuDNN's place."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone

from para_jax import forward, load_backbone
from para_jax.backbone import kernels
from para_jax.backbone.kernel_choice import AttentionChoice, attention_kernel, describe_attention
from para_jax.backbone.kernel_trial import choose_attention

H100, A100, T4 = (9, 0), (8, 0), (7, 5)
CONFIG = backbone("gemma3_text").config  # windows in some layers


@pytest.mark.parametrize(("family", "length", "dtype", "on", "capability", "name", "why"), [
    ("llama", 128, "float32", "cpu", None, "plain", "on a CPU"),
    ("llama", 128, "bfloat16", "tpu", None, "splash", "on a TPU"),
    ("llama", 120, "bfloat16", "tpu", None, "plain", "rows shorter than 128 tokens"),
    ("llama", 120, "bfloat16", "gpu", A100, "cudnn", "on a GPU"),
    ("llama", 120, "bfloat16", "gpu", T4, "plain", "compute capability 8.0, and this GPU has 7.5"),
    ("gemma2", 128, "bfloat16", "gpu", H100, "plain", "soft cap"),
    ("llama", 128, "float32", "gpu", H100, "plain", "float32"),
])  # fmt: skip
def test_auto_chooses_by_device_capability_family_and_length(family, length, dtype, on, capability, name, why):
    found = attention_kernel(backbone(family).config, length, dtype, on, AttentionChoice(), capability=capability)
    assert found[0] == name and found[1].endswith(why)


@pytest.mark.parametrize(("head_dim", "capability", "name"), [
    (128, A100, "cudnn"), (256, A100, "plain"), (256, H100, "cudnn"), (100, H100, "plain"),
])  # fmt: skip
def test_cudnn_takes_the_heads_that_the_card_allows(head_dim, capability, name):
    config = replace(backbone("llama").config, head_dim=head_dim)
    assert attention_kernel(config, 128, "bfloat16", "gpu", AttentionChoice(), capability=capability)[0] == name


@pytest.mark.parametrize(("name", "on", "capability", "says"), [
    ("cudnn", "gpu", T4, "cudnn.*7.5"), ("splash", "cpu", None, "splash.*CPU"),
])  # fmt: skip
def test_a_named_kernel_that_cannot_run_is_an_error(name, on, capability, says):
    with pytest.raises(ValueError, match=f"backbone.attention={says}.*auto or plain"):
        attention_kernel(CONFIG, 128, "bfloat16", on, AttentionChoice(name), capability=capability)


# ------------------------------------------------------------------------------------------------------------ the trial


def fails_always(length, window, segment):
    raise RuntimeError("No valid engine configs for Matmul_MUL_\nin cuda_dnn.cc(8382)")


def fails_packed(length, window, segment):
    return kernels.cudnn(length, window, segment, implementation="xla") if segment is None else fails_always(0, 0, 0)


def sees_too_much(length, window, segment):
    return kernels.plain(length, None, segment)


def sees_one_key_more(length, window, segment):
    return kernels.plain(length, window and window + 1, segment)


def tried(monkeypatch, kernel, name="auto", config=CONFIG):
    monkeypatch.setitem(kernels.KERNELS, "cudnn", kernel)
    return choose_attention(name, config, jnp.bfloat16, None, platform="gpu", capability=H100)


def test_a_kernel_that_passes_the_trial_stays(monkeypatch, capsys):
    choice = tried(monkeypatch, partial(kernels.cudnn, implementation="xla"))
    assert choice == AttentionChoice("auto") and capsys.readouterr().err == ""


@pytest.mark.parametrize(("kernel", "says"), [
    (fails_always, "RuntimeError: No valid engine configs for Matmul_MUL_"),
    (sees_too_much, "differ from plain"),
])  # fmt: skip
def test_a_failing_kernel_is_replaced_by_plain_with_a_reason(kernel, says, monkeypatch, capsys):
    choice = tried(monkeypatch, kernel)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cudnn" in said and says in said
    found = attention_kernel(CONFIG, 128, "bfloat16", "gpu", choice, capability=H100)
    assert found == ("plain", "cudnn failed a trial")
    with pytest.raises(ValueError, match="backbone.attention=cudnn.*auto or plain"):
        tried(monkeypatch, kernel, name="cudnn")


@pytest.mark.parametrize("kernel", [sees_too_much, sees_one_key_more])
def test_windows_longer_than_the_trials_rows_are_tried_too(kernel, monkeypatch, capsys):
    wide = replace(CONFIG, kinds=tuple(replace(kind, window=kind.window and 4096) for kind in CONFIG.kinds))
    assert tried(monkeypatch, kernel, config=wide).why == "cudnn failed a trial"
    assert "differ from plain" in capsys.readouterr().err


def test_a_kernel_that_fails_only_with_packed_rows_stays_in_use(monkeypatch, capsys):
    choice = tried(monkeypatch, fails_packed)
    assert capsys.readouterr().err.count("\n") == 1
    chosen = partial(attention_kernel, CONFIG, 128, "bfloat16", "gpu", choice, capability=H100)
    assert [chosen(packed=packed)[0] for packed in (False, True)] == ["cudnn", "plain"]


def test_a_loaded_model_uses_the_kernel_that_it_carries(monkeypatch):
    tokens = np.random.default_rng(0).integers(3, 200, (2, 24)).astype(np.int32)
    model = load_backbone(FIXTURES / "llama", attention="plain")
    assert model.attention == AttentionChoice("plain") == model.with_layout("stacked").attention
    model = load_backbone(FIXTURES / "llama")
    expected = forward(model, None, tokens, None)
    monkeypatch.setitem(kernels.KERNELS, "plain", fails_always)  # not traced again for the same choice
    np.testing.assert_array_equal(forward(model, None, tokens, None), expected)
    model.attention = AttentionChoice("plain")
    with pytest.raises(RuntimeError, match="No valid engine"):
        forward(model, None, tokens, None)
    with pytest.raises(ValueError, match="backbone.attention=splash"):
        load_backbone(FIXTURES / "llama", attention="splash")


# ------------------------------------------------------------------------------------------------------------- the line


def test_a_run_names_the_kernels_of_training_evaluation_and_decoding():
    said = describe_attention(CONFIG, "bfloat16", "tpu", AttentionChoice(), [256, 512])
    assert "attention: splash (on a TPU); evaluation: plain (rows shorter than 128 tokens); splash" in said
    assert "up to the longest row (on a TPU)" in said
    assert describe_attention(CONFIG, "float32", "cpu", AttentionChoice(), [64]).startswith(
        "attention: plain (on a CPU)"
    )
