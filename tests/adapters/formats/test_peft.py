"""LoRA and (IA)^3 in PEFT's format: its folders load, ours are the same again, and what we do not compute is named."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_folder import LAYER, WEIGHTS, assert_refused, assert_same, change_config, change_tensors, saved_config
from golden_models import FIXTURES, backbone, prompts, strong
from safetensors.numpy import load_file, save_file

from para_jax import AdapterBank, Ia3Config, LoraConfig, forward, init_adapter, load_adapter, save_adapter
from para_jax.adapters.files import copy_for_peft, read_adapter_config
from para_jax.config import SITES
from para_jax.reports.inspect import folder_report, size

PEFT = FIXTURES / "peft"


def made(config, family="llama", seed=1):
    return strong(init_adapter(config, backbone(family).config, seed=seed), seed, 0.3)


@pytest.fixture
def lora(tmp_path):
    shutil.copytree(PEFT / "lora_qv", tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def ia3(tmp_path):
    shutil.copytree(PEFT / "ia3", tmp_path / "ia3")
    return tmp_path / "ia3"


def load(folder, family="llama"):
    return load_adapter(folder, backbone(family).config)


# ---------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("family", ["llama", "phi3", "granitemoehybrid"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=SITES),
        LoraConfig(r=2, lora_alpha=0.1, target_modules=("up_proj", "o_proj")),
        Ia3Config(),
        Ia3Config(target_modules=SITES, feedforward_modules=()),
        Ia3Config(target_modules=("q_proj", "up_proj", "down_proj")),
    ],
    ids=str,
)
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(tmp_path, config, family):
    adapter = made(config, family)
    save_adapter(adapter, tmp_path / "adapter")
    assert_same(load(tmp_path / "adapter", family), adapter)


@pytest.mark.parametrize("name", ["lora_qv", "lora_all", "lora_qv_rs", "ia3"])
def test_what_peft_wrote_is_written_again_as_peft_wrote_it(tmp_path, name):
    save_adapter(load(PEFT / name), tmp_path / "again", base_model="llama")
    mine, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "again", PEFT / name))
    assert mine.keys() == theirs.keys()
    for key in mine:
        np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    mine, theirs = saved_config(tmp_path / "again"), saved_config(PEFT / name)
    assert {**mine, "target_modules": sorted(mine["target_modules"])} == {key: theirs[key] for key in mine}


def test_a_copy_has_the_revision_of_the_base_model_that_it_names(tmp_path):
    save_adapter(made(LoraConfig()), tmp_path / "one", base_model="me/model@v1")
    assert read_adapter_config(tmp_path / "one").base_model == "me/model@v1"
    for given, named in {
        "": ("me/model", "v1"),
        "me/other": ("me/other", None),
        "me/other@v2": ("me/other", "v2"),
    }.items():
        copy_for_peft(tmp_path / "one", tmp_path / "copy", base_model=given)
        held = saved_config(tmp_path / "copy")
        assert (held["base_model_name_or_path"], held.get("revision")) == named


@pytest.mark.parametrize("path", ["/home/me@company/models/m", "models@v2/m", "gs://bucket/m@v2", "../m@v2"])
def test_a_path_of_the_base_model_may_have_an_at_sign(tmp_path, path):
    """PEFT would look for the model at /home/me, and for a revision."""
    save_adapter(made(LoraConfig()), tmp_path / "one", base_model=path)
    held = saved_config(tmp_path / "one")
    assert (held["base_model_name_or_path"], "revision" in held) == (path, False)
    assert read_adapter_config(tmp_path / "one").base_model == path
    assert f'AutoTokenizer.from_pretrained("{path}")' in (tmp_path / "one" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------- phi3


def written(tmp_path, config):
    adapter = made(config, "phi3")
    save_adapter(adapter, tmp_path / "adapter")
    return adapter, load_file(tmp_path / "adapter" / WEIGHTS), saved_config(tmp_path / "adapter")


def test_sites_that_share_a_linear_of_phi3_are_blocks_of_one_pair_of_matrices(tmp_path):
    sites = ("q_proj", "v_proj", "up_proj", "down_proj")
    adapter, tensors, config = written(tmp_path, LoraConfig(r=2, lora_alpha=8, target_modules=sites))
    assert config["r"] == 6 and config["lora_alpha"] / config["r"] == adapter.config.scale == 4
    assert set(config["target_modules"]) == {"qkv_proj", "gate_up_proj", "down_proj"}
    a, b = (tensors[f"{LAYER}1.self_attn.qkv_proj.lora_{half}.weight"] for half in "AB")
    product = b @ a  # what PEFT adds to the weight of qkv_proj
    parts = np.split(product, [64, 96])
    np.testing.assert_allclose(parts[0], (adapter.a["q_proj"][1] @ adapter.b["q_proj"][1]).T, atol=1e-5)
    np.testing.assert_array_equal(parts[1], 0)
    np.testing.assert_allclose(parts[2], (adapter.a["v_proj"][1] @ adapter.b["v_proj"][1]).T, atol=1e-5)
    a, b = (tensors[f"{LAYER}2.mlp.gate_up_proj.lora_{half}.weight"] for half in "AB")
    np.testing.assert_array_equal((b @ a)[:128], 0)
    np.testing.assert_allclose((b @ a)[128:], (adapter.a["up_proj"][2] @ adapter.b["up_proj"][2]).T, atol=1e-5)
    a, b = (tensors[f"{LAYER}0.mlp.down_proj.lora_{half}.weight"] for half in "AB")
    assert a.shape == (6, 128) and b.shape == (64, 6)
    np.testing.assert_allclose(b @ a, (adapter.a["down_proj"][0] @ adapter.b["down_proj"][0]).T, atol=1e-5)


def test_matrices_of_phi3_that_are_no_blocks_are_shared_by_the_sites(tmp_path):
    """As PEFT trains them: every row of A serves q, k and v."""
    _, tensors, _ = written(tmp_path, LoraConfig(r=2, lora_alpha=6, target_modules=("q_proj", "k_proj", "v_proj")))
    rng = np.random.default_rng(0)
    dense = {name: rng.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in tensors.items()}
    save_file(dense, tmp_path / "adapter" / WEIGHTS)
    found = load(tmp_path / "adapter", "phi3")
    assert found.config == LoraConfig(r=6, lora_alpha=18, target_modules=("q_proj", "k_proj", "v_proj"))
    whole = np.concatenate([found.a[s][1] @ found.b[s][1] for s in found.config.target_modules], axis=1)
    a, b = (dense[f"{LAYER}1.self_attn.qkv_proj.lora_{half}.weight"] for half in "AB")
    np.testing.assert_allclose(whole, (b @ a).T, atol=1e-5)
    save_adapter(found, tmp_path / "again")
    assert_same(load(tmp_path / "again", "phi3"), found)


@pytest.mark.parametrize("half, place", [("B", (0, 2)), ("B", (70, 0))])
def test_one_value_outside_the_blocks_makes_them_shared(tmp_path, half, place):
    adapter, _, _ = written(tmp_path, LoraConfig(r=2))

    def change(tensors):
        tensors[f"{LAYER}2.self_attn.qkv_proj.lora_{half}.weight"][place] = 1e-30

    change_tensors(tmp_path / "adapter", change)
    found = load(tmp_path / "adapter", "phi3")
    assert adapter.config.r == 2 and found.config.r == 6
    model, tokens = backbone("phi3"), prompts(backbone("phi3"))
    np.testing.assert_allclose(forward(model, found, tokens, 7), forward(model, adapter, tokens, 7), atol=2e-5)


def test_vectors_of_phi3_are_joined_with_ones_for_what_is_no_target(tmp_path):
    adapter, tensors, config = written(tmp_path, Ia3Config(target_modules=("q_proj", "up_proj", "down_proj")))
    assert config["target_modules"] == ["qkv_proj", "gate_up_proj", "down_proj"]
    assert config["feedforward_modules"] == ["down_proj"]
    joined = tensors[f"{LAYER}1.self_attn.qkv_proj.ia3_l"]
    assert joined.shape == (128, 1) and tensors[f"{LAYER}1.mlp.down_proj.ia3_l"].shape == (1, 128)
    np.testing.assert_array_equal(joined[:64, 0], adapter.scale["q_proj"][1])
    np.testing.assert_array_equal(joined[64:], 1)
    np.testing.assert_array_equal(tensors[f"{LAYER}0.mlp.gate_up_proj.ia3_l"][128:, 0], adapter.scale["up_proj"][0])


@pytest.mark.parametrize("config", [LoraConfig(r=2), Ia3Config()], ids=["lora", "ia3"])
def test_a_fresh_adapter_of_phi3_is_the_backbone_after_loading(tmp_path, config):
    model, tokens = backbone("phi3"), prompts(backbone("phi3"))
    save_adapter(init_adapter(config, model.config), tmp_path / "adapter")
    found = load(tmp_path / "adapter", "phi3")
    assert set(config.target_modules) <= set(found.config.target_modules)
    np.testing.assert_array_equal(forward(model, found, tokens, 7), forward(model, None, tokens, 7))


def test_names_of_another_family_are_refused(tmp_path, lora):
    with pytest.raises(ValueError, match="missing: .*qkv_proj.lora_A.weight.*unknown: .*q_proj.lora_A.weight"):
        load(lora, "phi3")
    written(tmp_path, LoraConfig(r=2))
    with pytest.raises(ValueError, match="missing: .*k_proj.lora_A.weight.*unknown: .*qkv_proj.lora_A.weight"):
        load(tmp_path / "adapter")


# -------------------------------------------------------------------------------------------------- what config may say


@pytest.mark.parametrize("targets", [["query_key_value", "self_attn.q_proj", "v_proj"], r".*\.(q|v)_proj", "(((", None])
def test_the_tensors_tell_what_was_trained_whatever_target_modules_says(lora, ia3, targets):
    """A list may be written for many models, and PEFT ignores the linears that a model lacks. A pattern is not
    evaluated: it may take for ever."""
    for folder, fixture in ((lora, "lora_qv"), (ia3, "ia3")):
        change_config(folder, target_modules=targets, feedforward_modules=targets)
        assert_same(load(folder), load(PEFT / fixture))


@pytest.mark.parametrize(
    "name, message",
    [
        (f"{LAYER}0.self_attn.query_key_value", "target_modules must be .*q_proj.*query_key_value"),
        (f"{LAYER}0.self_attn.k_proj", "missing: .*layers.1.self_attn.k_proj"),
        ("base_model.model.lm_head", "unknown: base_model.model.lm_head.lora_A.weight"),
    ],
)
def test_tensors_of_what_we_do_not_adapt_are_refused(lora, name, message):
    change_tensors(lora, lambda tensors: tensors.update({f"{name}.lora_A.weight": np.ones((4, 64), np.float32)}))
    with pytest.raises(ValueError, match=message):
        load(lora)


@pytest.mark.parametrize(
    "changes",
    [
        {"a_key_of_2027": None, "another": False, "a_third": {}, "a_fourth": [], "a_fifth": "none"},
        {"lora_dropout": 0.1, "revision": "main", "auto_mapping": {"base_model_class": "X"}, "inference_mode": False},
        {"use_dora": "left out", "bias": "left out", "use_rslora": "left out", "init_lora_weights": False},
    ],
)
def test_keys_that_change_nothing_pass(lora, changes):
    change_config(lora, **changes)
    assert_same(load(lora), load(PEFT / "lora_qv"))


def test_an_adapter_of_another_architecture_is_refused(lora):
    """Whisper's encoder has a q_proj too."""
    change_tensors(
        lora,
        lambda tensors: tensors.update(
            {name.replace("model.layers", "model.encoder.layers"): tensors.pop(name) for name in list(tensors)}
        ),
    )
    for read in (load, folder_report):
        with pytest.raises(ValueError, match=r"adapter_config.json: .*base_model.model.model.encoder.layers"):
            read(lora)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "not supported: use_dora True"),
        ({"layers_to_transform": 0}, "not supported: layers_to_transform 0"),
        ({"a_key_of_2027": "yes", "init_lora_weights": "pissa"}, "a_key_of_2027 'yes', init_lora_weights 'pissa'"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'.*PARA, LORA, IA3"),
        ({"r": 8}, r"misshapen: .*q_proj.lora_A.weight \[4, 64\] \(expected \[8, 64\]\)"),
        ({"lora_alpha": 10**400}, "lora_alpha .*1000"),
    ],
)
def test_a_config_of_what_we_do_not_compute_is_refused_by_name(lora, changes, message):
    change_config(lora, **changes)
    assert_refused(load, lora, message, below=2000)


# -------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("name", ["lora_qv", "lora_all", "ia3"])
def test_the_folder_tells_the_size_of_what_is_loaded(name):
    found, adapter = read_adapter_config(PEFT / name), load(PEFT / name)
    assert found.config == adapter.config and found.base_model == "llama" and found.backbone == {"num_layers": 3}
    assert found.counts.matrices + found.counts.vectors == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    one_layer = jax.tree.map(lambda leaf: leaf[0], adapter).condition(jnp.zeros(64))
    assert found.counts.carried == 3 * sum(leaf.size for leaf in jax.tree.leaves(one_layer))


@pytest.mark.parametrize("config", [
    Ia3Config(),
    Ia3Config(target_modules=("k_proj", "up_proj", "down_proj")),
    Ia3Config(target_modules=("up_proj", "down_proj"), scope="prompt"),
    LoraConfig(r=4),
])  # fmt: skip
def test_inspect_says_what_a_bank_holds(config, tmp_path):
    save_adapter(made(config), tmp_path / "adapter")
    model, report = backbone("llama").config, folder_report(tmp_path / "adapter")
    for dtype in ("float32", "bfloat16"):
        bank = AdapterBank.holding({"a": load(tmp_path / "adapter")}, model, dtype=dtype)
        assert f"{size(1000 * bank.nbytes)} {'of host memory ' * (dtype == 'float32')}in {dtype}" in report


def test_inspect_says_what_1000_tenants_need_and_what_decode_carries():
    report = folder_report(PEFT / "lora_qv")
    assert "LoRA, r 4, lora_alpha 8.0, use_rslora False, target_modules q_proj, v_proj" in report
    assert "llama: 3 layers" in report and "2,688 values" in report
    assert "10.75 MB of host memory in float32, 5.376 MB in bfloat16" in report
    assert "10.75 kB per row in float32, 5.376 kB in bfloat16: its matrices" in report
    report = folder_report(PEFT / "ia3")
    assert "(IA)^3, target_modules k_proj, v_proj, down_proj, feedforward_modules down_proj" in report
    assert "2.304 MB of host memory in float32, 2.304 MB in bfloat16" in report
    assert "2.304 kB per row in float32, 1.152 kB in bfloat16: its factors" in report
