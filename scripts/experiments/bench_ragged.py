"""LoRA for many tenants in two forms: para_jax's own, in which each row has its matrices, and that of SkyRL's JAX
backend, in which rows are sorted by adapter for `jax.lax.ragged_dot` (ragged_lora.py). PARA for comparison.

    taskset -c 0 python scripts/experiments/bench_ragged.py
    python scripts/experiments/bench_ragged.py --parts check compiled       # no times; `compiled` needs the extra [aot]

`check`: both forms give the same logits and gradients. `train`: forward and backward of 16 tenants with 1 and 4 rows
each. `decode`: one step of 32 rows with 1, 8 and 32 tenants, after 128 tokens of context. LoRA has r=8 on all linears.
In both parts the sides take turns, and each ratio is the median over the rounds. "of 64" means a stack of 64 adapters,
and the batch uses 16 of them. `compiled` asks XLA's compilers for a CPU and a TPU what the programs cost
(ragged_compiled.py): a CPU has no ragged product, so only the TPU's counts compare the forms as they are meant.
A file that exists keeps the parts that are not measured again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ragged_lora import RaggedLora, ragged_adjustments

from para_jax import LoraConfig, ParaConfig, Stack, decode, init_adapter, load_backbone, pick, stack_adapters
from para_jax.adapters.rows import Rows, layers_first
from para_jax.bench.decode import Side, Step, tenant
from para_jax.bench.record import report
from para_jax.bench.rounds import interleaved, measurement, milliseconds, paired, random_tokens
from para_jax.bench.train import random_batch
from para_jax.config import SITES
from para_jax.data.batches import Batch
from para_jax.io.record_file import write_record
from para_jax.model.residual import residual_stream
from para_jax.reports.inspect import new_record
from para_jax.training.loss import completion_nll

LORA, PARA = LoraConfig(r=8, lora_alpha=8, target_modules=SITES), ParaConfig()
TENANTS, PROMPT, COMPLETION = 16, 10, 6  # of a training batch, as in `python scripts/experiments/bench_tenants_step.py`
ROWS, CONTEXT, MOST = 32, 128, 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/bench_ragged.json"))
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for part in args.parts:
        measured = MEASURES[part](args.backbone, args.rounds)
        found[part] = new_record(shlex.join(["python", *sys.argv]), measured)
        if "medians" in measured:
            report(measured, None)
        else:
            print(json.dumps(measured, indent=1))
        write_record(args.output, found)


def check(backbone: str, rounds: int) -> dict:
    model, index = load_backbone(backbone, dtype="float32"), np.arange(8) % 5
    tokens = random_tokens(model, len(index), PROMPT + COMPLETION)
    return largest_differences(model, stack_of(model, LORA, 6), index, tokens, PROMPT)


def train(backbone: str, rounds: int) -> dict:
    model = load_backbone(backbone, dtype="float32", layout="stacked")
    measured, ratios = [{} for _ in range(rounds)], {}
    for each in (1, 4):
        ratios |= take_turns(measured, f"{TENANTS} x {each} rows: ", training_sides(model, each), "LoRA")
    return measurement("ms", measured) | {"ratios": ratios, "row_tokens": PROMPT + COMPLETION}


def decoding(backbone: str, rounds: int) -> dict:
    measured = [{} for _ in range(rounds)]
    sides = decoding_sides(load_backbone(backbone, dtype="float32"))
    ratios = take_turns(measured, f"{ROWS} rows: ", sides, "base")
    return measurement("ms", measured) | {"ratios": ratios, "context_tokens": CONTEXT}


def compiled(backbone: str, rounds: int) -> dict:
    from ragged_compiled import compiled_counts

    return compiled_counts()


MEASURES = {"check": check, "train": train, "decode": decoding, "compiled": compiled}


def take_turns(rounds: list[dict], name: str, sides: dict, base: str) -> dict[str, float]:
    """Adds what the sides measure to the rounds, and gives each side's ratio to the base."""
    for found, measured in zip(rounds, interleaved(sides, len(rounds)), strict=True):
        found |= {name + side: value for side, value in measured.items()}
    return {f"{name}{side} / {base}": paired(rounds, name + side, name + base) for side in sides if side != base}


def stack_of(model, config, count: int) -> Stack:
    """Different adapters, strong enough to change the logits."""
    fresh = init_adapter(config, model.config)
    return stack_adapters([tenant(fresh, i) for i in range(count)])


# ------------------------------------------------------------------------------------------------------------ the forms


def summed_by_rows(model, weights: Any, index: np.ndarray, batch: Batch, each: int = 1) -> jax.Array:
    """The summed loss of a batch's completions in para_jax's form. Group g of `each` rows uses adapter index[g].

    Args:
        weights: adapters whose arrays lead with (layers, adapters), as a training step has them.
    """
    distinct = len(set(index.tolist())) == len(index)
    rows = Rows((Stack(layers_first(weights)),), jnp.asarray(index, jnp.int32)[None], each, distinct=distinct)
    return completion_nll(model, rows, batch, COMPLETION)[0].sum()


def summed_ragged(model, weights: Any, index: np.ndarray, batch: Batch, each: int = 1) -> jax.Array:
    """The same in the ragged form."""
    return completion_nll(model, RaggedLora(weights, np.repeat(index, each)), batch, COMPLETION)[0].sum()


@jax.jit
def logits_of(model, adapters, tokens):
    prompt_length = jnp.full(len(tokens), PROMPT)
    return model.logits(model.final_norm(residual_stream(model, adapters, tokens, prompt_length)[0]))


def largest_differences(model, stack: Stack, index: np.ndarray, tokens: np.ndarray, prompt: int) -> dict[str, float]:
    """The largest differences of the two forms in logits and in gradients, next to what would be seen without adapters
    and to the largest gradient."""
    lengths = (jnp.full(len(tokens), n) for n in (prompt, tokens.shape[1]))
    batch, weights = Batch(jnp.asarray(tokens), *lengths), layers_first(stack.adapters)
    plain, ours, theirs = (
        np.asarray(logits_of(model, one, tokens)) for one in (None, pick(stack, index), RaggedLora(weights, index))
    )

    def gradient(summed) -> list[jax.Array]:
        of = jax.jit(jax.grad(lambda weights, model, batch: summed(model, weights, index, batch)))
        return jax.tree.leaves(of(weights, model, batch))

    by_rows, ragged = gradient(summed_by_rows), gradient(summed_ragged)
    return {
        "logits": float(abs(ours - theirs).max()),
        "moved": float(abs(ours - plain).max()),
        "gradient": max(float(abs(a - b).max()) for a, b in zip(by_rows, ragged, strict=True)),
        "largest_gradient": max(float(abs(a).max()) for a in by_rows),
    }


# ------------------------------------------------------------------------------------------------------------- training


def training_sides(model, each: int) -> dict:
    """Forward and backward, with a gradient for every adapter of the stack. The update is left out."""
    made = random_batch(model.config.vocab_size, TENANTS * each, 1, PROMPT, COMPLETION)
    batch, index = jax.tree.map(lambda a: a[0], made), np.arange(TENANTS)

    def side(summed, config, count: int):
        weights = layers_first(stack_of(model, config, count).adapters)
        compiled = jax.jit(jax.value_and_grad(lambda weights, model, batch: summed(model, weights, index, batch, each)))
        return milliseconds(lambda: compiled(weights, model, batch))

    sides = {
        "LoRA": side(summed_by_rows, LORA, TENANTS),
        "PARA": side(summed_by_rows, PARA, TENANTS),
        "ragged LoRA": side(summed_ragged, LORA, TENANTS),
    }
    if each == 1:  # with more rows the ragged form takes half a minute on a CPU
        sides[f"LoRA, of {MOST}"] = side(summed_by_rows, LORA, MOST)
        sides[f"ragged LoRA, of {MOST}"] = side(summed_ragged, LORA, MOST)
    return sides


# ------------------------------------------------------------------------------------------------------------- decoding


class RaggedStep(Step):
    """The decode step with a ragged adjustment in place of the rows' own. The prompts' caches are the same."""

    def __init__(self, model, side: Side, context: int, stack: Stack, index: np.ndarray):
        super().__init__(model, side, context)
        self.adjustments = ragged_adjustments(layers_first(stack.adapters), index, model.dtype)

    def ragged_logits(self) -> jax.Array:
        """Logits [rows, vocab] after one more token."""
        state = self.prefill(self.context)[1]._replace(adjustments=jax.tree.map(jnp.copy, self.adjustments))
        return decode(self.model, state, self.token)[0]


def decoding_sides(model) -> dict:
    """One decode step. All sides use one cache in turn, because a step does not change the context."""
    para, lora = stack_of(model, PARA, ROWS), stack_of(model, LORA, ROWS)
    steps = {"base": Step(model, Side("base", ROWS, 0, None), CONTEXT)}
    one = jax.tree.map(lambda leaf: leaf[0], lora.adapters)
    steps["LoRA, one adapter that all rows share"] = Step(model, Side("LoRA", ROWS, 1, one), CONTEXT)
    for count in (1, 8, ROWS):
        index = np.arange(ROWS) % count
        steps[f"PARA, {count} tenants"] = Step(model, Side("PARA", ROWS, count, pick(para, index)), CONTEXT)
        side = Side("LoRA", ROWS, count, pick(lora, index))
        steps[f"LoRA, {count} tenants"] = Step(model, side, CONTEXT)
        for size in sorted({count, ROWS}):
            few = Stack(jax.tree.map(lambda leaf, size=size: leaf[:size], lora.adapters))
            of = "" if size == count else f", of {ROWS}"
            steps[f"ragged LoRA, {count} tenants{of}"] = RaggedStep(model, side, CONTEXT, few, index)
    held = steps["base"].prefill(CONTEXT)[1].cache

    def turn(name: str) -> float:
        nonlocal held
        wall, _, held = steps[name](held)
        return wall

    return {name: lambda name=name: turn(name) for name in steps}


if __name__ == "__main__":
    main()
