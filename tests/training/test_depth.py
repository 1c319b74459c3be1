"""The training step's program does not grow with the layers, so that compiling is as quick for 32 as for 8."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from golden_models import backbone

from para_jax import LoraConfig, ParaConfig, init_adapter
from para_jax.backbone.load import abstract_backbone
from para_jax.config import TrainSection
from para_jax.data.batches import Batch
from para_jax.data.packing import Packed
from para_jax.training.optimizer import learning_rates
from para_jax.training.step import state_of_one, train_step

KINDS = [
    pytest.param(family, adapter, packed, id=f"{family}, {type(adapter).__name__}, {packed=}")
    for family, adapter, packed in [
        ("llama", ParaConfig(r=4), False),
        ("llama", ParaConfig(r=4), True),
        ("llama", LoraConfig(r=4), True),
        ("gemma2", ParaConfig(r=4), True),  # two kinds of layers in turn
    ]
]


def arguments(family, adapter_config, packed, layers):
    """The abstract arguments of a step of 2 x 2 rows of 16 tokens, and its static ones."""
    config = backbone(family).config
    config = replace(
        config, kinds=(config.kinds * layers)[:layers] if family == "llama" else config.kinds[:2] * (layers // 2)
    )
    model = abstract_backbone(config, jnp.float32, None, layout="stacked")
    train = TrainSection()
    state = jax.eval_shape(lambda: state_of_one(init_adapter(adapter_config, config), train))
    whole, one = (2, 2, 16), (2, 2)
    shapes = (whole, whole, (*one, 3), (*one, 3), (*one, 3), (*one, 8)) if packed else (whole, one, one)
    batch = (Packed if packed else Batch)(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    index = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    return (state, model, batch, index, learning_rates([train], [10])), dict(completion=8, config=train)


def equations(jaxpr) -> int:
    """The number of equations of a program, those of the programs inside it included."""
    total = 0
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        )
        inner = [getattr(part, "jaxpr", part) for part in inner]
        total += 1 + sum(equations(part) for part in inner if hasattr(part, "eqns"))
    return total


@pytest.mark.parametrize(("family", "adapter", "packed"), KINDS)
def test_a_step_of_32_layers_has_the_equations_of_one_of_8(family, adapter, packed):
    def program(layers):
        given, static = arguments(family, adapter, packed, layers)
        return train_step.trace(*given, **static).jaxpr.jaxpr

    assert 300 < equations(program(8)) == equations(program(32))
