"""The ragged form of LoRA computes what para_jax's own rows compute: logits, gradients and decoded tokens."""

import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, prompts, strong
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import tpu_devices

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_ragged  # noqa: E402
import ragged_lora  # noqa: E402

from para_jax import LoraConfig, init_adapter, make_mesh, pick, stack_adapters  # noqa: E402
from para_jax.adapters.rows import layers_first  # noqa: E402
from para_jax.bench.decode import Side, Step  # noqa: E402

CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj", "down_proj"))
INDEX = np.array([2, 0, 2, 1], np.int32)


@pytest.fixture(scope="module")
def stack():
    model = backbone("llama")
    return stack_adapters([strong(init_adapter(CONFIG, model.config, seed=i), i) for i in range(4)])


@pytest.mark.long
def test_logits_and_gradients_are_those_of_our_rows(stack):
    """Also the zero gradient of an adapter that no row uses, and those of two rows with one adapter."""
    model = backbone("llama", "stacked")
    found = bench_ragged.largest_differences(model, stack, INDEX, prompts(model, 4, 12), 8)
    assert found["logits"] < 1e-4 and found["gradient"] < 1e-4
    assert found["moved"] > 0.1 and found["largest_gradient"] > 0.1


def test_the_order_of_the_adapters_matters(stack):
    """With the index of other rows the logits differ, so the comparison can fail."""
    model = backbone("llama", "stacked")
    tokens = prompts(model, 4, 12)
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


def flops_per_token(adapters: int, gradient: bool, devices=None) -> float:
    """By the compiler: of a ragged product of 64 tokens, or of its matrices' gradient, relative to a plain product."""
    sharding = None if devices is None else NamedSharding(make_mesh(devices=devices), PartitionSpec())
    shapes = {(64, 128): jnp.float32, (adapters, 128, 8): jnp.float32, (adapters,): jnp.int32}
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes.items()]
    summed = jax.grad(lambda x, matrices, sizes: jax.lax.ragged_dot(x, matrices, sizes).sum(), argnums=1)
    compiled = jax.jit(summed if gradient else jax.lax.ragged_dot).lower(*given).compile()
    return compiled.cost_analysis()["flops"] / (2 * 64 * 128 * 8)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_cpu_computes_every_token_with_every_adapter(gradient):
    """XLA has no ragged product on a CPU: the work grows with the adapters, used or not."""
    assert flops_per_token(16, gradient) / flops_per_token(4, gradient) == pytest.approx(4, rel=0.2)


def test_a_tpu_computes_every_token_once():
    """The gradient of the matrices by JAX 0.10 is a masked product with every adapter, by JAX 0.12 a ragged one too."""
    devices, older = tpu_devices("v5e:1x1"), version("jaxlib").startswith("0.10.")
    assert flops_per_token(16, False, devices) == pytest.approx(1, rel=0.05)
    assert flops_per_token(16, True, devices) == pytest.approx(16 if older else 1, rel=0.2)
