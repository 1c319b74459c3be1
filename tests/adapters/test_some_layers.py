"""`layers_to_transform`: PARA with generators in some layers is PARA whose other layers make factors of one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_folder import assert_same, change_config, saved_config
from golden_models import backbone, prompts, strong
from long_cases import quick
from one_adapter import fresh_state, only, trained_step
from safetensors.numpy import load_file
from tiny_run import TRAIN

from para_jax import ParaConfig, forward, init_adapter, load_adapter, save_adapter, vectors
from para_jax.adapters.adapter import count_parameters, named_leaves, with_leaves
from para_jax.data.batches import Bucket, collate
from para_jax.data.examples import Example

LAYERS = (0, 2)  # of three
CONFIG = replace(TRAIN, warmup_ratio=0.0, max_grad_norm=1e6)  # of more layers the norm would be larger
FORMS = [
    {},
    {"summary": "rms", "pooler": "mean"},
    {"summary": "rms", "activation": "silu", "up_bias": True},
]


def some_and_all(**options):
    """A strong adapter in some layers, and one in all whose W_up is zero in the others."""
    model = backbone("llama").config
    some = strong(init_adapter(ParaConfig(r=4, layers_to_transform=LAYERS, **options), model))
    whole = init_adapter(ParaConfig(r=4, **options), model)
    held = named_leaves(some)
    spread = {name: leaf.at[jnp.array(LAYERS)].set(held[name]) for name, leaf in named_leaves(whole).items()}
    return some, with_leaves(whole, spread)


def batch():
    examples = [Example([20 + i, 30, 40], [9, 10, 2]) for i in range(4)]
    return jax.tree.map(lambda a: jnp.asarray(a)[None], collate(examples, Bucket(8, 3), 4))


@pytest.mark.parametrize("layout", quick(["layers", "stacked"], "stacked"))
@pytest.mark.parametrize("options", quick(FORMS, FORMS[2]), ids=str)
def test_it_computes_what_generators_in_all_layers_do_that_are_zero_elsewhere(options, layout):
    model, (some, whole) = backbone("llama", layout), some_and_all(**options)
    tokens, lengths = prompts(model, 3), np.array([3, 8, 5])
    found, expected = (forward(model, adapter, tokens, lengths) for adapter in (some, whole))
    np.testing.assert_array_equal(found, expected)
    assert abs(expected - forward(model, None, tokens, None)).max() > 0.1
    for factors in vectors(model, some, tokens, lengths).values():
        assert (factors[1] == 1).all() and abs(factors[jnp.array(LAYERS)] - 1).max() > 0.05


def test_a_fresh_one_starts_as_these_layers_of_a_fresh_whole_one_and_has_no_more():
    model = backbone("llama").config
    some, whole = (init_adapter(ParaConfig(layers_to_transform=layers), model, seed=3) for layers in (LAYERS, None))
    np.testing.assert_array_equal(some.down[...], whole.down[...][jnp.array(LAYERS)])
    assert count_parameters(some) * 3 == count_parameters(whole) * 2


@pytest.mark.long
def test_a_step_is_that_of_the_whole_one_in_its_layers():
    model = backbone("llama", "stacked")
    ends = []
    for adapter in some_and_all():
        state = fresh_state(adapter, CONFIG)
        state, values = trained_step(state, model, batch(), completion=3, config=CONFIG, total_steps=6)
        ends.append((only(state.adapters), float(values["loss"])))
    (some, loss), (whole, expected) = ends
    start = some_and_all()[0]
    for name, leaf in named_leaves(some).items():
        assert abs(leaf - named_leaves(start)[name]).max() > 1e-4, name
        np.testing.assert_allclose(leaf, named_leaves(whole)[name][jnp.array(LAYERS)], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_its_folder_names_its_layers_and_holds_no_others(tmp_path):
    some, _ = some_and_all(summary="rms")
    save_adapter(some, tmp_path / "adapter")
    assert saved_config(tmp_path / "adapter")["layers_to_transform"] == [0, 2]
    held = {name.split(".")[4] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    assert held == {"0", "2"}
    assert "layers 0, 2" in (tmp_path / "adapter" / "README.md").read_text()
    assert_same(load_adapter(tmp_path / "adapter", backbone("llama").config), some)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([0, 3], r"adapter_config.json: layers_to_transform \(0, 3\) .*0 to 2"),
        ([0, 1], "missing.*layers.1.para_"),
    ],
)
def test_a_folder_that_names_other_layers_than_it_holds_is_refused(tmp_path, layers, message):
    save_adapter(some_and_all()[0], tmp_path / "adapter")
    change_config(tmp_path / "adapter", layers_to_transform=layers)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "adapter", backbone("llama").config)
