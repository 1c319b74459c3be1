"""`late_r`: PARA with another rank in the last third of the layers is a PARA of the larger rank with zeros in it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_folder import assert_same
from golden_models import backbone, prompts, strong
from long_cases import quick
from one_adapter import fresh_state, only, trained_step
from safetensors.numpy import load_file
from tiny_run import TRAIN

from para_jax import AdapterBank, ParaConfig, forward, init_adapter, load_adapter, save_adapter
from para_jax.adapters.adapter import count_parameters, named_leaves, with_leaves
from para_jax.data.batches import Bucket, collate
from para_jax.data.examples import Example
from para_jax.reports.inspect import folder_report, size

FORMS = [
    {"r": 2, "late_r": 5},
    {"r": 4, "late_r": 1, "activation": "relu", "summary": "rms"},
    {"r": 1, "late_r": 3, "up_bias": True, "summary": "rms", "layers_to_transform": (0, 2)},
]


def late(**options):
    """A strong adapter for three layers. The last one has another rank."""
    adapter = strong(init_adapter(ParaConfig(**options), backbone("llama").config))
    within = np.arange(adapter.config.array_r) < adapter.ranks[:, None]

    def cut(name, leaf):
        used = {"down": within[:, None], "up": within[..., None]}.get(name.split(".")[0])
        return leaf if used is None else jnp.where(used, leaf, 0)

    return with_leaves(adapter, {name: cut(name, leaf) for name, leaf in named_leaves(adapter).items()})


def rest(adapter):
    """What lies past the ranks of the layers."""
    leaves = named_leaves(adapter)
    ups = [leaf for name, leaf in leaves.items() if name.startswith("up.")]
    return [
        part for place, r in enumerate(adapter.ranks)
        for part in (leaves["down"][place, :, r:], *(up[place, r:] for up in ups))
    ]  # fmt: skip


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_fresh_one_has_the_ranks_and_no_other_values(options):
    model, config = backbone("llama").config, ParaConfig(**options)
    adapter = init_adapter(config, model, seed=3)
    layers = config.layers_to_transform or (0, 1, 2)
    assert adapter.ranks.tolist() == [options["late_r"] if i == 2 else options["r"] for i in layers]
    down = adapter.down[...]
    assert [int((abs(down[i]).max(axis=0) > 0).sum()) for i in range(len(layers))] == adapter.ranks.tolist()
    alike = [init_adapter(replace(config, r=int(r), late_r=None), model) for r in adapter.ranks]
    assert count_parameters(adapter) * len(layers) == sum(map(count_parameters, alike))


@pytest.mark.parametrize("layout", quick(["layers", "stacked"], "stacked"))
@pytest.mark.parametrize("options", quick(FORMS, FORMS[2]), ids=str)
def test_it_computes_what_one_rank_in_all_layers_does(options, layout):
    model, adapter = backbone("llama", layout), late(**options)
    normal = adapter.normal(model.config)
    assert normal.config.late_r is None and normal.config.r == adapter.config.array_r
    assert adapter.config.late_r == options["late_r"]  # it is not changed
    tokens, lengths = prompts(model, 3), np.array([3, 8, 5])
    found, expected = (forward(model, one, tokens, lengths) for one in (adapter, normal))
    np.testing.assert_array_equal(found, expected)
    assert abs(expected - forward(model, None, tokens, None)).max() > 0.1


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_saved_and_loaded_is_the_same_and_the_folder_has_each_layers_rank(tmp_path, options):
    adapter = late(**options)
    save_adapter(adapter, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = adapter.config.layers_to_transform or (0, 1, 2)
    ranks = [len(held[f"base_model.model.model.layers.{i}.para_down.weight"]) for i in layers]
    assert ranks == adapter.ranks.tolist()
    assert str(options["late_r"]) in (tmp_path / "adapter" / "README.md").read_text()
    assert_same(load_adapter(tmp_path / "adapter", backbone("llama").config), adapter)
    said = folder_report(tmp_path / "adapter")
    assert f"{count_parameters(adapter):,} values" in said
    bank = AdapterBank.holding({"a": adapter}, backbone("llama").config)
    assert f"1000 such tenants in a bank: {size(1000 * bank.nbytes)} of" in said


@pytest.mark.parametrize("options", quick(FORMS, FORMS[0]), ids=str)
def test_training_leaves_what_lies_past_a_rank_zero(options):
    model = backbone("llama", "stacked")
    config = replace(TRAIN, warmup_ratio=0.0, weight_decay=0.1)
    examples = [Example([20 + i, 30, 40], [9, 10, 2]) for i in range(4)]
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], collate(examples, Bucket(8, 3), 4))
    start = late(**options)
    state = fresh_state(start, config)
    for _ in range(3):
        state, _ = trained_step(state, model, batch, completion=3, config=config, total_steps=6)
    trained = only(state.adapters)
    assert all((np.asarray(part) == 0).all() for part in rest(trained))
    for name, leaf in named_leaves(trained).items():
        if name not in ("mean", "scale"):
            assert abs(leaf - named_leaves(start)[name]).max() > 1e-4, name
