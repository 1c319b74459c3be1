"""The adapter folder: saved and loaded is the same bit for bit, folders of others load, bad ones are named."""

import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from adapter_folder import (
    CONFIG,
    LAYER,
    WEIGHTS,
    assert_refused,
    assert_same,
    change_config,
    change_tensors,
    saved_config,
)
from golden_models import FIXTURES, backbone, golden, strong
from safetensors.numpy import load_file, save_file
from tiny_run import tokenizer

from para_jax import (
    AdapterBank,
    Engine,
    ParaConfig,
    init_adapter,
    vectors,
)
from para_jax.adapters.files import load_adapter, read_adapter_config, save_adapter
from para_jax.adapters.preview import previews

WIDTHS = {"q_proj": 64, "v_proj": 32, "up_proj": 128}
EVERYTHING = {"pooler": "constant", "summary": "rms", "activation": "silu", "up_bias": True}


def trained(seed=1, **options):
    """A strong adapter whose every array differs from a fresh one's."""
    adapter = strong(init_adapter(ParaConfig(r=4, **options), backbone("llama").config), seed)
    if hasattr(adapter, "constant"):
        adapter.constant[...] += 0.1
    return adapter


@pytest.fixture
def folder(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, **options):
    return load_adapter(folder, backbone("llama").config, **options)


# ---------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize(
    "pooler, summary, activation",
    [("last", "raw", "gelu"), ("mean", "rms", "silu"), ("constant", "raw", "relu")],
)
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(tmp_path, pooler, summary, activation):
    adapter = trained(pooler=pooler, summary=summary, activation=activation, up_bias=activation == "gelu")
    save_adapter(adapter, tmp_path / "adapter")
    assert_same(load(tmp_path / "adapter"), adapter)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_folder_written_by_others_loads_in_its_orientation(tmp_path, dtype):
    model, expected = backbone("llama"), golden("llama", "para")
    arrays = load_file(FIXTURES / "para" / "llama" / "para_t0.safetensors")
    tensors = {}
    for i in range(3):  # nn.Linear's [out, in]
        tensors[f"{LAYER}{i}.para_down.weight"] = np.ascontiguousarray(arrays[f"layers.{i}.down"].T.astype(dtype))
        tensors[f"{LAYER}{i}.para_up.weight"] = np.ascontiguousarray(arrays[f"layers.{i}.up"].T.astype(dtype))
    save_file(tensors, tmp_path / WEIGHTS)
    shape = {"model_type": "llama", "num_layers": 3, "width": 64, "site_widths": WIDTHS}
    chosen = {"pooler": "last", "summary": "raw", "activation": "gelu"}
    config = {
        "peft_type": "PARA",
        "r": 4,
        "target_modules": ["up_proj", "v_proj", "q_proj"],
        **chosen,
        "backbone": shape,
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    loaded = load(tmp_path)
    made = vectors(model, loaded, expected["input_ids"], expected["prompt_lengths"])
    made = np.concatenate([made[site] for site in WIDTHS], axis=-1)
    first = expected["tenant"] == 0
    assert first.any() and abs(made - 1).max() > 0.1
    tolerance = 3e-5 if dtype is np.float32 else 0.2
    np.testing.assert_allclose(made[:, first], expected["vectors"][:, first], atol=tolerance, rtol=tolerance)


def test_the_file_holds_the_documented_names_and_shapes(tmp_path):
    save_adapter(trained(**EVERYTHING), tmp_path / "adapter")
    shapes = {
        "para_down.weight": (4, 64),
        "para_up.weight": (64 + 32 + 128, 4),
        "para_up.bias": (64 + 32 + 128,),
        "para_constant": (64,),
    }
    found = {name: tensor.shape for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items()}
    assert found == {f"{LAYER}{i}.{name}": shape for i in range(3) for name, shape in shapes.items()}


def test_the_config_tells_method_and_backbone_without_the_weights(tmp_path):
    model = backbone("llama")
    save_adapter(trained(summary="rms"), tmp_path / "adapter", base_model="me/model", model=model)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    found = read_adapter_config(tmp_path / "adapter")
    shape = found.backbone
    assert found.config == ParaConfig(r=4, summary="rms")
    assert shape["site_widths"] == WIDTHS
    assert shape["fingerprint"] == model.fingerprint and len(model.fingerprint) == 64
    assert found.base_model == "me/model"
    assert saved_config(tmp_path / "adapter")["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("options", [{}, EVERYTHING, EVERYTHING | {"layers_to_transform": (0, 2)}])
def test_the_config_alone_tells_the_size_of_the_weights(tmp_path, options):
    adapter = trained(**options)
    save_adapter(adapter, tmp_path / "adapter")
    found = read_adapter_config(tmp_path / "adapter")
    assert found.counts.matrices + found.counts.vectors == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert found.counts.carried == 3 * (64 + 32 + 128)


def test_the_model_card_names_library_and_base_model_whatever_its_name(tmp_path):
    name = 'evil: "x"\nlibrary_name: peft\x1b[31m #\u2028- ü'
    save_adapter(trained(), tmp_path / "adapter", base_model=name, card=["## Scores", "sst2: 0.9"])
    _, front, body = (tmp_path / "adapter" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "para_jax" and front["tags"]
    assert "base_model" not in front  # the hub takes hub ids only
    assert 'Base model: evil: "x" library_name: peft [31m # - ü.' in body
    assert "## Scores\nsst2: 0.9" in body and "load_adapter(" in body


def test_a_hub_id_goes_through_the_hub(folder, monkeypatch):
    monkeypatch.setattr("para_jax.adapters.files.resolve_adapter", {"me/adapter@v1": folder}.__getitem__)
    np.testing.assert_array_equal(load("me/adapter@v1").down[...], trained().down[...])


# -------------------------------------------------------------------------------------------------------------- saving


def test_a_full_disk_leaves_the_previous_adapter_whole(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the config fits, the weights do not
    try:
        with pytest.raises(OSError, match="adapter"):
            save_adapter(trained(2), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    np.testing.assert_array_equal(load(folder).up["q_proj"][...], trained().up["q_proj"][...])
    assert os.listdir(folder.parent) == ["adapter"]


@pytest.mark.parametrize(("at", "activation"), [(1, "gelu"), (2, "gelu"), (1, "relu"), (3, "relu")])
def test_a_kill_at_any_write_leaves_the_old_adapter_or_the_new(folder, monkeypatch, at, activation):
    """Or none, where the config changes. It is never the config of one with the weights of the other."""
    real, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == at:
            shutil.copy(source, folder / f".{WEIGHTS}.0123abcd")  # a kill leaves the temporary file
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save_adapter(trained(2, activation=activation), folder)
    if activation == "gelu":
        expected = trained(1 if at == 1 else 2)
        np.testing.assert_array_equal(load(folder).up["q_proj"][...], expected.up["q_proj"][...])
    else:
        with pytest.raises(ValueError, match="no adapter_config.json"):
            load(folder)
    save_adapter(trained(3), folder)
    assert_same(load(folder), trained(3))
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]


def test_a_folder_with_other_files_is_not_replaced(folder):
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        save_adapter(trained(2), folder)
    with pytest.raises(ValueError, match="thesis.tex"):
        save_adapter(trained(2), folder / "thesis.tex")
    assert (folder / "thesis.tex").read_text() == "years of work"


# ---------------------------------------------------------------------------------------------------- another backbone


def test_an_adapter_for_another_backbone_is_refused_with_the_difference(folder):
    with pytest.raises(ValueError, match="model_type llama, not gemma.*site_widths"):
        load_adapter(folder, backbone("gemma").config)
    change_config(folder, base_model_name_or_path="me/llama")
    for load_it in (load_adapter, lambda *given: previews([str(given[0])], *given[1:])):
        with pytest.raises(ValueError, match="for another backbone, 'me/llama': it has model_type llama, not gemma"):
            load_it(folder, backbone("gemma").config)


def test_other_weights_of_the_same_shape_give_a_warning(folder, recwarn):
    model = backbone("llama")
    save_adapter(trained(), folder, model=model)
    load(folder, model=model)
    assert not recwarn.list
    shape = saved_config(folder)["backbone"]
    change_config(folder, backbone=shape | {"fingerprint": "f" * 64})
    with pytest.warns(UserWarning, match="fingerprint .*ffff"):
        load(folder, model=model)
    bank = AdapterBank(model.config)
    Engine(model, bank, tokenizer(), slots=1, max_length=16)
    with pytest.warns(UserWarning, match="fingerprint .*ffff"):
        bank.add("mine", folder)


# --------------------------------------------------------------------------------------------------------- bad folders


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'.*PARA, LORA, IA3"),
        ({"use_dora": True, "pooler": "left out"}, "missing keys: pooler; unknown keys: use_dora"),
        ({"r": 10**12}, "r must be .*65536; got 1000000000000"),
        ({"target_modules": ["o_proj"]}, "site_widths of o_proj; got"),
        ({"backbone": {}}, "backbone must be model_type, num_layers"),
        ({"backbone": {"model_type": "llama", "num_layers": 2**31, "width": 64, "site_widths": WIDTHS}}, "num_layers"),
        ({"backbone": {"model_type": "llama", "num_layers": 4, "width": 64, "site_widths": WIDTHS}}, "4, not 3"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_name(folder, changes, message):
    change_config(folder, **changes)
    assert_refused(load, folder, message, below=700)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{LAYER}2.para_down.weight"), "missing: .*layers.2.para_down.weight"),
        (lambda t: t.update({"model.evil\x1b": np.zeros(1, np.float32)}), r"unknown: 'model.evil\\x1b'"),
        (
            lambda t: t.update({f"{LAYER}1.para_up.weight": t[f"{LAYER}1.para_up.weight"].T.copy()}),
            r"misshapen: .*layers.1.para_up.weight \[4, 224\] \(expected \[224, 4\]\)",
        ),
        (lambda t: t[f"{LAYER}0.para_up.weight"].__setitem__((5, 1), np.nan), "NaN.*layers.0.para_up"),
        (lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()}), "not of F32, F16 or BF16: .*layers.0"),
    ],
)
def test_tensors_that_are_wrong_are_refused_by_name(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_the_base_model_of_a_folder_is_one_printable_line(folder):
    change_config(folder, base_model_name_or_path="me/model\x1b]0;owned\x07\n" + "x" * 9000)
    base_model = read_adapter_config(folder).base_model
    assert base_model.startswith("me/model ]0;owned xxx") and base_model.isprintable() and len(base_model) <= 500


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_is_not_followed_and_a_pickle_is_not_read(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link"):
        load(folder)
    (folder / name).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=f"no {name}(; .*pickle.*torch.save_file|, so it is not)"):
        load(folder)
