"""adapter_config.json in our own format: the fields of any config class are written, read back and checked."""

from dataclasses import dataclass
from typing import Annotated

import pytest
from golden_models import backbone

from para_jax.adapters.adapter import describe
from para_jax.adapters.own_config import own_config, read_own_config


@dataclass(frozen=True, kw_only=True)
class AnyConfig:
    strength: float = 0.5
    gated: bool = False
    form: str = "plain"
    alpha: Annotated[float, "as LoRA's"] = 8
    r: int = 4
    target_modules: tuple[str, ...] = ("q_proj",)
    depths: tuple[int, ...] | None = None


def written(config):
    return own_config("ANY", config, describe(backbone("llama").config), "me/model", None)


@pytest.mark.parametrize(
    "config", [AnyConfig(), AnyConfig(strength=2.0, gated=True, form="x", target_modules=("v_proj",), depths=(1, 2))]
)
def test_what_is_written_is_read_again(config):
    found, shape = read_own_config(AnyConfig, written(config))
    assert found == config
    assert shape["num_layers"] == 3 and set(shape["site_widths"]) == set(config.target_modules)


def test_rank_and_sites_come_first_and_none_is_left_out():
    keys = list(written(AnyConfig()))
    assert keys[4:6] == ["r", "target_modules"] and "depths" not in keys
    assert "depths" in written(AnyConfig(depths=(1,)))


def test_a_whole_number_may_be_a_float():
    assert read_own_config(AnyConfig, written(AnyConfig()) | {"strength": 2})[0].strength == 2.0
    assert read_own_config(AnyConfig, written(AnyConfig(alpha=0.1)))[0].alpha == 0.1  # its default is a whole number


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", "2"),
        ("strength", True),
        ("strength", float("nan")),
        ("strength", 10**40),
        ("gated", 1),
        ("form", None),
        ("r", 4.0),
        ("r", True),
        ("target_modules", "q_proj"),
        ("target_modules", [["q_proj"]]),
        ("depths", [[1]]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        read_own_config(AnyConfig, written(AnyConfig()) | {name: value})
