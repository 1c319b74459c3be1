"""adapter_config.json in our own format: the fields of any config class are written and read back."""

from dataclasses import dataclass, field

import pytest
from golden_models import backbone

from para_jax.adapters.adapter import describe
from para_jax.adapters.formats.own import own_config, read_own_config
from para_jax.config.adapter import OPTIONAL, AdapterConfig
from para_jax.config.bounds import PositiveFloat


@dataclass(frozen=True, kw_only=True)
class AnyConfig(AdapterConfig):
    strength: float = 0.5
    gated: bool = field(default=False, metadata=OPTIONAL)
    form: str = "plain"
    alpha: PositiveFloat = 8
    r: int = 4
    target_modules: tuple[str, ...] = ("q_proj",)
    depths: tuple[int, ...] | None = None


def written(config):
    return own_config("ANY", config, describe(backbone("llama").config), "me/model", None)


@pytest.mark.parametrize(
    "config", [AnyConfig(), AnyConfig(strength=2, gated=True, target_modules=("v_proj",), depths=(1, 2))]
)
def test_what_is_written_is_read_again(config):
    found, shape = read_own_config(AnyConfig, written(config))
    assert found == config
    assert shape["num_layers"] == 3 and set(shape["site_widths"]) == set(config.target_modules)


def test_none_and_defaults_that_may_be_left_out_are_left_out():
    assert not {"depths", "gated", "scope"} & written(AnyConfig()).keys()
    assert {"depths", "gated"} <= written(AnyConfig(depths=(1,), gated=True)).keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", True),
        ("strength", float("nan")),
        ("gated", 1),
        ("r", 4.0),
        ("target_modules", [["q_proj"]]),
        ("depths", [[1]]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        read_own_config(AnyConfig, written(AnyConfig()) | {name: value})
