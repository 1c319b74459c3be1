"""The training step that the TPU's compiler makes for scope response: the prompts have no backward pass."""

import re
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest
from hlo import instructions_run, parse_hlo
from tiny_run import run_config, run_folder
from tpu_compiler import tpu_devices

from para_jax import make_mesh
from para_jax.backbone.load import load_model_config
from para_jax.estimate.memory import step_arguments
from para_jax.training.step import train_step

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))

from program_counts import is_product  # noqa: E402

PROMPT, COMPLETION, LENGTH = 40, 24, 56  # no other axis has one of these sizes
LINEARS = 7


def products_of_the_step(folder, scope: str) -> tuple[Counter, list]:
    """How many products with a weight run, by their number of tokens; and the sizes of the results and of the inputs of
    all other products."""
    own = f"data.max_seq_length={LENGTH}", "train.per_device_batch_size=2"
    config = run_config(run_folder(folder), *own, f"adapter.scope={scope}", "adapter.summary=raw")
    mesh, sizes = make_mesh(devices=tpu_devices("v5e:1x1")), {"prompt": PROMPT, "completion": COMPLETION}
    with jax.set_mesh(mesh):
        text = train_step.lower(*step_arguments(config, mesh), **sizes, config=config.train).compile().as_text()
    vocab = load_model_config(config.backbone.source).vocab_size
    linears, others = Counter(), []
    for one, computation, times in instructions_run(parse_hlo(text)):
        if is_product(one):
            result, *inputs = (axes(gives) for gives in (one.gives, *(computation[o].gives for o in one.operands)))
            every = result.union(*inputs)
            tokens = every & {PROMPT, COMPLETION, LENGTH}
            if vocab in every:
                continue  # the head
            if len(tokens) == 1 and tokens <= result and sum(tokens <= given for given in inputs) == 1:
                linears[tokens.pop()] += times
            else:
                others.append((result, inputs))
    return linears, others


def axes(gives: str) -> set[int]:
    """The sizes of the axes of an array's type, such as f32[2,40,64]{2,1,0}."""
    return set(map(int, re.findall(r"\d+", re.search(r"\[([\d,]*)\]", gives)[1])))


@pytest.mark.long
@pytest.mark.parametrize(("scope", "expected"), [
    ("all", {LENGTH: 2 * LINEARS}),
    ("response", {PROMPT: LINEARS, COMPLETION: 2 * LINEARS}),
])  # fmt: skip
def test_the_linear_layers_run_backward_over_the_tails_alone(scope, expected, tmp_path):
    linears, others = products_of_the_step(tmp_path, scope)
    assert linears == {tokens: 3 * count for tokens, count in expected.items()}  # three layers
    gradients_of_keys = [
        inputs for result, inputs in others if PROMPT in result and not any(PROMPT in i for i in inputs)
    ]
    assert gradients_of_keys == []
