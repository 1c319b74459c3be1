"""Configs of all families, in both forms, become the ModelConfigs that transformers would run; the rest is refused."""

import json
from pathlib import Path

import pytest

from para_jax.backbone.families import FAMILIES, model_config

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDERS = sorted(folder.parent.name for folder in FIXTURES.glob("*/config.json"))
VARIANTS = sorted(str(file.relative_to(FIXTURES)) for file in FIXTURES.glob("*/variants/*.json"))
SIZES = {"hidden_size": 64, "intermediate_size": 9, "num_hidden_layers": 13, "num_attention_heads": 32, "vocab_size": 9}


def read(name: str) -> dict:
    return json.loads((FIXTURES / name).read_text())


def minimal(model_type: str, **keys) -> dict:
    return {"model_type": model_type, "head_dim": 16} | SIZES | keys


def test_the_fixtures_cover_every_family():
    assert {read(f"{folder}/config.json")["model_type"] for folder in FOLDERS} == set(FAMILIES)


@pytest.mark.parametrize("folder", FOLDERS)
def test_both_forms_of_a_config_give_the_same_model(folder):
    assert model_config(read(f"{folder}/config.json")) == model_config(read(f"{folder}/config_legacy.json"))


@pytest.mark.parametrize("file", VARIANTS)
def test_a_variant_differs_from_its_family_unless_equivalent(file):
    same = model_config(read(file)) == model_config(read(f"{file.split('/')[0]}/config.json"))
    assert same == (file == "gemma/variants/legacy_act.json")


def test_windows_are_in_the_right_layers():
    def windows(name):
        return [kind.window for kind in model_config(read(name)).kinds]

    assert windows("mistral/config.json") == [8, 8, 8] and windows("phi3/config.json") == [10, 10, 10]
    assert windows("gemma2/config_legacy.json") == [6, None, 6]
    assert windows("gemma3_text/config_legacy.json") == [5, 5, None]
    assert windows("mistral/variants/no_window.json") == [None] * 3
    assert windows("ministral/variants/published.json") == windows("ministral/config.json") == [None, 8, 8]
    unused = model_config(minimal("qwen2", use_sliding_window=False, sliding_window=6, max_window_layers=1))
    assert {kind.window for kind in unused.kinds} == {None}
    assert windows("qwen2/config_legacy.json") == [None] * 3 and windows("qwen2/variants/swa.json") == [None, 6, 6]


def test_rotary_scalings_and_partial_rotary_are_read():
    llama3 = model_config(read("llama3/config_legacy.json")).kinds[0].rotary
    assert (llama3.scaling, llama3.factor, llama3.original_max_positions, llama3.theta) == ("llama3", 8.0, 64, 500000.0)
    linear = model_config(minimal("llama", rope_scaling={"type": "linear", "factor": 2})).kinds[0].rotary
    assert (linear.scaling, linear.factor) == ("linear", 2.0)
    assert model_config(read("phi3/variants/partial_rotary.json")).kinds[0].rotary.dims == 12
    gemma3 = model_config(read("gemma3_text/variants/global_linear.json")).kinds
    assert [(kind.rotary.theta, kind.rotary.scaling) for kind in gemma3[1:]] == [(100.0, "none"), (1e6, "linear")]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.5] * 8,
    "long_factor": [8.0] * 8,
}


def test_longrope_ends_at_the_original_length():
    """Beyond it transformers changes the frequencies of all positions, also of those in a cache."""
    longrope = model_config(minimal("phi3", rope_scaling=LONGROPE | {"type": "su"}, max_position_embeddings=131072))
    assert longrope.max_positions == 4096  # phi3's config has the length next to rope_scaling
    llama = model_config(minimal("llama", rope_scaling=LONGROPE, max_position_embeddings=128))
    assert llama.max_positions == 64 and llama.kinds[0].rotary.divisors == (1.5,) * 8
    assert llama.kinds[0].rotary.attention_factor == pytest.approx((1 + 1 / 6) ** 0.5)  # log 2 / log 64


def test_ministral_3_ends_where_its_queries_would_be_scaled():
    """transformers multiplies them by 1 + 0.1 log(1 + floor(position / 64))."""
    config = read("ministral3/config.json")
    assert model_config(config).max_positions == 64 and model_config(config).kinds[0].rotary.attention_factor == 1.0
    assert model_config(config | {"max_position_embeddings": 32}).max_positions == 32
    whole = {"model_type": "mistral3", "text_config": config}
    assert model_config(whole).max_positions == 64 and model_config(whole).tied_embeddings


@pytest.mark.parametrize("name", ["llama", "olmo3"])
@pytest.mark.parametrize(("given", "longest"), [(64, 160), (128, 160), (512, 512)])
def test_yarn_makes_the_original_length_longer(name, given, longest):
    """Qwen's model cards add it to a config without changing max_position_embeddings."""
    yarn = model_config(minimal(name, rope_scaling=YARN | {"factor": 2.5}, max_position_embeddings=given))
    assert yarn.max_positions == longest


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_dynamic_scaling_ends_where_it_would_begin(form):
    """Beyond max_position_embeddings transformers changes the frequencies of all positions."""
    plain = minimal("llama", max_position_embeddings=64)
    found = model_config(plain | {form: {"rope_type": "dynamic", "factor": 2.0}})
    assert found == model_config(plain) and found.max_positions == 64


def test_a_given_attention_factor_is_taken():
    for scaling in (YARN, LONGROPE):
        given = model_config(minimal("llama", rope_scaling=scaling | {"attention_factor": 1.25}))
        assert given.kinds[0].rotary.attention_factor == 1.25


def test_some_layers_of_smollm3_have_no_rotary_embedding():
    def dims(**keys):
        return [kind.rotary.dims for kind in model_config(minimal("smollm3", **keys)).kinds]

    assert dims() == [16, 16, 16, 0] * 3 + [16]
    assert dims(no_rope_layer_interval=2)[:4] == [16, 0, 16, 0]
    assert dims(no_rope_layers=[0] + [1] * 20) == [0] + [16] * 12  # transformers takes a list that is too long
    windowed = model_config(minimal("smollm3", use_sliding_window=True, sliding_window=6, no_rope_layer_interval=2))
    assert [kind.window for kind in windowed.kinds[:4]] == [None, 6, None, 6]


def test_only_full_attention_of_olmo3_is_scaled():
    sliding, full = model_config(minimal("olmo3", rope_scaling=YARN, rope_theta=9.0)).kinds[2:4]
    assert (sliding.window, sliding.rotary.scaling, sliding.rotary.theta) == (4096, "none", 9.0)
    assert (full.window, full.rotary.scaling, full.rotary.theta) == (None, "yarn", 9.0)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("inside", "next_to_it", "length"), [(None, None, 99), (64, None, 64), (None, 32, 32), (64, 32, 32)]
)
def test_the_original_length_of_llama3_is_found_where_transformers_looks(form, inside, next_to_it, length):
    given = LLAMA3 | ({"original_max_position_embeddings": inside} if inside else {})
    keys = {form: given, "max_position_embeddings": 99, "original_max_position_embeddings": next_to_it}
    assert model_config(minimal("llama", **keys)).kinds[0].rotary.original_max_positions == length


def test_of_two_forms_of_rotary_parameters_rope_scaling_counts_as_in_transformers():
    scaling, theta = {"type": "linear", "factor": 2.0}, {"rope_theta": 7.0}
    same = model_config(minimal("llama", rope_theta=7.0, rope_scaling=scaling, rope_parameters=scaling | theta))
    assert same == model_config(minimal("llama", rope_parameters=scaling | theta))
    assert same == model_config(minimal("llama", rope_scaling={}, rope_parameters=scaling | theta))


def test_missing_keys_have_transformers_defaults():
    heads = [model_config(minimal(name, head_dim=None)).head_dim for name in ("llama", "qwen3", "gemma")]
    assert heads == [2, 128, 256]
    assert [model_config(minimal(name)).num_kv_heads for name in ("llama", "mistral", "gemma2")] == [32, 8, 4]
    assert model_config(minimal("mistral", num_key_value_heads=None)).num_kv_heads == 32
    assert [model_config(minimal(name)).tied_embeddings for name in ("llama", "gemma2", "phi3")] == [False, True, False]
    assert [model_config(minimal(name)).norm_eps for name in ("llama", "phi3", "olmo2")] == [1e-6, 1e-5, 1e-5]
    gemma3 = model_config(minimal("gemma3_text"))
    assert [i for i, kind in enumerate(gemma3.kinds) if kind.window is None] == [5, 11]
    assert [kind.rotary.theta for kind in gemma3.kinds[4:6]] == [1e4, 1e6]
    assert model_config(minimal("gemma2")).attention_softcap == 50.0 and gemma3.attention_softcap is None
    assert model_config(minimal("gemma2", attn_logit_softcapping=None)).attention_softcap is None
    assert model_config(minimal("gemma3_text", attn_logit_softcapping=50.0)).attention_softcap is None  # as there


def test_null_in_a_rotary_embedding_means_that_the_key_is_missing():
    local = {"full_attention": {"rope_theta": None}, "sliding_attention": {"factor": None}}
    for name, given in (
        ("llama", {"rope_theta": None, "rope_type": "default"}),
        ("phi3", {"partial_rotary_factor": None, "rope_theta": 1e4, "rope_type": "default"}),
        ("gemma3_text", local),
    ):
        assert model_config(minimal(name, rope_parameters=given)) == model_config(minimal(name))
    scaled = YARN | dict.fromkeys(("beta_fast", "attention_factor", "mscale"))
    assert model_config(minimal("llama", rope_scaling=scaled)) == model_config(minimal("llama", rope_scaling=YARN))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_windowed_layers_need_a_window(model_type):
    with pytest.raises(ValueError, match="no sliding_window"):
        model_config(minimal(model_type, sliding_window=None))
    with pytest.raises(ValueError, match="no sliding_window"):
        model_config(minimal("qwen2", layer_types=["sliding_attention"] * 13))


ODD = (None, True, 0, -1, 0.5, 1e40, 2**31, 10**400, float("nan"), "x\x1b[31m" * 100, [], [[]], ["a"], {"a": 1})


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("form", ["config.json", "config_legacy.json"])
def test_any_value_of_any_key_gives_a_model_or_a_short_error(folder, form):
    config = read(f"{folder}/{form}")
    changed = [(config, key) for key in config]
    changed += [(nested, key) for nested in config.values() if isinstance(nested, dict) for key in nested]
    for holder, key in changed:
        was = holder[key]
        for holder[key] in ODD:
            try:
                hash(model_config(config))
            except ValueError as error:
                assert len(str(error)) < 500 and str(error).isprintable()
        holder[key] = was


def test_token_ids_may_be_a_number_a_list_or_null():
    ids = [model_config(minimal("llama", eos_token_id=value)).eos_token_ids for value in (7, [7, 8], None)]
    assert ids == [(7,), (7, 8), ()]
    assert model_config(minimal("llama", pad_token_id=-1)).pad_token_id is None


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="no vocab_size"):
        model_config({k: v for k, v in minimal("llama").items() if k != "vocab_size"})


MINISTRAL3 = {"model_type": "ministral3", "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}
GRANITE4 = {"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention"] * 13}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "rope_parameters must be a mapping without"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .* at most 1000; got 1000000000"),
        ({"model_type": "mamba"}, "'mamba'.*llama"),
        (MINISTRAL3 | {"is_causal": False}, "is_causal false"),
        (GRANITE4 | {"num_local_experts": None}, "num_local_experts .*mixture of experts"),
        (GRANITE4 | {"layer_types": ["mamba"] * 13}, "layer_types must .*'mamba'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "smollm3", "no_rope_layers": [1] * 12}, "no_rope_layers must .*0 or 1 for each layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention"] * 13}, "layer_types must .*as llama has them"),
    ],
)
def test_unsupported_config_values_are_named(keys, named):
    with pytest.raises(ValueError, match=named):
        model_config(minimal("llama") | keys)
