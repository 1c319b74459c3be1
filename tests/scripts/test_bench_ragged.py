"""The ragged form of LoRA computes what para_jax's own rows compute: logits, gradients and decoded tokens."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, prompts, strong

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_ragged  # noqa: E402
import ragged_lora  # noqa: E402

from para_jax import LoraConfig, init_adapter, pick, stack_adapters  # noqa: E402
from para_jax.adapters.rows import layers_first  # noqa: E402
from para_jax.bench.decode import Side, Step  # noqa: E402
from para_jax.config import SITES  # noqa: E402

CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=SITES)
INDEX = np.array([2, 0, 2, 1], np.int32)


@pytest.fixture(scope="module")
def stack():
    model = backbone("llama")
    return stack_adapters([strong(init_adapter(CONFIG, model.config, seed=i), i) for i in range(4)])


@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_logits_and_gradients_are_those_of_our_rows(stack, layout):
    """Also the zero gradient of an adapter that no row uses, and those of two rows with one adapter."""
    found = bench_ragged.differences(backbone("llama", layout), stack, INDEX, prompts(backbone("llama"), 4, 12), 8)
    assert found["logits"] < 1e-4 and found["gradient"] < 1e-4
    assert found["moved"] > 0.1 and found["largest_gradient"] > 0.1


def test_the_order_of_the_adapters_matters(stack):
    """With the index of other rows the logits differ, so the comparison can fail."""
    model, tokens = backbone("llama"), prompts(backbone("llama"), 4, 12)
    own, other = (
        bench_ragged.logits_of(model, ragged_lora.RaggedLora(layers_first(stack.adapters), i), tokens)
        for i in (INDEX, INDEX[::-1])
    )
    assert abs(own - other).max() > 0.1


def test_a_decode_step_is_that_of_our_rows(stack):
    model, side = backbone("llama"), Side("LoRA", len(INDEX), 3, pick(stack, INDEX))
    step = bench_ragged.RaggedStep(model, side, 8, stack, INDEX)
    whole, _ = step.prefill(9)
    np.testing.assert_allclose(step.ragged_logits(), whole, atol=1e-4)
    plain, _ = Step(model, Side("base", len(INDEX), 0, None), 8).prefill(9)
    assert abs(whole - plain).max() > 0.1


def test_a_timed_step_chooses_the_tokens_of_our_rows(stack):
    model, side = backbone("llama"), Side("LoRA", len(INDEX), 3, pick(stack, INDEX))
    steps = Step(model, side, 8), bench_ragged.RaggedStep(model, side, 8, stack, INDEX)
    chosen = []
    for step in steps:
        for _ in range(2):  # from the same context each time
            step(step.prefill(8)[1].cache)
            chosen.append(step.chosen.tolist())
    assert chosen[0] == chosen[1] == chosen[2] == chosen[3]


def test_the_cpu_computes_every_token_with_every_adapter(stack):
    """XLA has no ragged product on a CPU: the work grows with the adapters, used or not."""

    def flops(adapters: int) -> float:
        shapes = [(64, 16), (adapters, 16, 8)]
        given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(jax.lax.ragged_dot).lower(*given, jax.ShapeDtypeStruct((adapters,), jnp.int32))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(16) == pytest.approx(4 * flops(4), rel=0.3)
