"""The programs of a run and of what comes after it, each compiled for a slice by the TPU's compiler: the training step,
evaluation, prefill and decode. Part (1) of rehearse.py.

Command: `python scripts/rehearse.py v5e:4x4 configs/llama2-7b-boolq.yaml --no-runs`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from para_jax.adapters.methods import has_plain_prompts
from para_jax.adapters.rows import Rows, Stack
from para_jax.config import RunConfig
from para_jax.data.batches import Batch, rounded_up
from para_jax.estimate.longest_row import longest_split
from para_jax.estimate.memory import abstract_adapter, abstract_model, step_arguments
from para_jax.estimate.topology import Compiled, ask_compiler, compile_step
from para_jax.evaluation.likelihood import continuation_scores, together
from para_jax.inference.generate import next_token
from para_jax.model.adapted import _prefill, prefill_after
from para_jax.model.tail import prompt_states
from para_jax.runtime.sharding import with_sharding
from para_jax.training.passes import batch_devices
from para_jax.training.step import eval_nll

#: Tokens of the answers that are ranked.
ANSWER = 4


def compile_programs(config: RunConfig, mesh: Mesh, tenants: int = 1) -> dict[str, Compiled]:
    """What the compiler makes of each program, by name, for the config's longest rows:

    - train: the training step.
    - prompts: the prompts of an evaluation batch, where the adapters share them.
    - loss: the likelihood of such a batch's completions.
    - prefill: the prompts of the same batch, or what the adapters add to those that they share.
    - ranking: the likelihood of short answers to them.
    - decode: one more token.

    What follows prompts or prefill reads their results, and is missing if these do not fit.
    """
    found = {"train": compile_step(config, mesh, tenants)}
    rows, length = rounded_up(config.eval.batch_size, batch_devices(mesh)), config.data.assumed_length
    adapters, model = abstract_adapters(config, mesh, tenants, rows), abstract_model(config, mesh)
    room, states = length + (config.eval.max_new_tokens or 32), None
    with jax.set_mesh(mesh):
        if shares_prompts(config, tenants):
            lowered = prompt_states.lower(model, int32(rows, length))
            found["prompts"] = prompts = ask_compiler(lowered)
            if prompts.program is None:
                return found
            states = results_of(lowered, prompts.program)._replace(row=int32(rows))
        batch = Batch(int32(rows, length), int32(rows), int32(rows))
        prompt, completion = longest_split(config)
        lowered = eval_nll.lower(model, adapters, batch, states, completion=completion, prompt=prompt)
        found["loss"] = ask_compiler(lowered)
        given = model, adapters, int32(rows, length), int32(rows)
        if states is None:
            lowered = _prefill.lower(*given, int32(rows), room)
        else:
            lowered = prefill_after.lower(*given, states=states, max_length=room)
        found["prefill"] = prefilled = ask_compiler(lowered)
        if prefilled.program is None:
            return found
        logits, cached = results_of(lowered, prefilled.program)
        leaves, treedef = jax.tree.flatten(model)
        answers = together(ANSWER, rows)
        ranked = int32(answers), int32(answers, ANSWER), int32(answers)
        found["ranking"] = ask_compiler(continuation_scores.lower(treedef, leaves, logits, cached, *ranked))
        found["decode"] = ask_compiler(next_token.lower(treedef, leaves, cached, int32(rows), None, 1))
    return found


def shares_prompts(config: RunConfig, tenants: int) -> bool:
    """Whether the run's evaluations compute each prompt once for several adapters: those of a sweep have one data set.
    Whether the tenants of a folder do so depends on their data."""
    return bool(config.sweep) and tenants > 1 and has_plain_prompts(config.adapter)


def abstract_adapters(config: RunConfig, mesh: Mesh, tenants: int, rows: int) -> Any:
    """The adapters of an evaluation batch: the run's only one, or one of many for each row."""
    if tenants == 1:
        return abstract_adapter(config, mesh)
    return Rows((Stack(step_arguments(config, mesh, tenants)[0].adapters),), int32(1, rows))


def results_of(lowered: jax.stages.Lowered, program: jax.stages.Compiled) -> Any:
    """What a program gives, as abstract arrays."""
    return jax.tree.map(with_sharding, lowered.out_info, program.output_shardings)


def int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
