"""The programs of a run and of what comes after it, each compiled for a slice by the TPU's compiler: the training step,
evaluation, prefill and decode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config import RunConfig
from ..data.batches import Batch
from ..evaluation.likelihood import continuation_scores, together
from ..inference.generate import next_token
from ..memory import abstract_adapter, abstract_model
from ..model import _prefill
from ..sharding import with_sharding
from ..training.passes import batch_devices
from ..training.step import eval_nll
from .topology import Compiled, ask_compiler, compile_step

#: Tokens of the answers that are ranked.
ANSWER = 4


def compile_programs(config: RunConfig, mesh: Mesh, tenants: int = 1) -> dict[str, Compiled]:
    """What the compiler makes of each program, by name, for the config's longest rows:

    - train: the training step.
    - loss: the likelihood of an evaluation batch's completions.
    - prefill: the prompts of the same batch.
    - ranking: the likelihood of short answers to them.
    - decode: one more token.

    ranking and decode read prefill's caches, and are missing if prefill does not fit.
    """
    found = {"train": compile_step(config, mesh, tenants)}
    adapter, model = abstract_adapter(config, mesh), abstract_model(config, mesh)
    devices = batch_devices(mesh)
    rows, length = -(-config.eval.batch_size // devices) * devices, config.data.assumed_length
    room = length + (config.eval.max_new_tokens or 32)

    def int32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    with jax.set_mesh(mesh):
        batch = Batch(int32(rows, length), int32(rows), int32(rows))  # pyright: ignore[reportArgumentType]
        found["loss"], _ = ask_compiler(eval_nll.lower(model, adapter, batch, completion=length))
        lowered = _prefill.lower(model, adapter, int32(rows, length), int32(rows), int32(rows), room, False)
        found["prefill"], program = ask_compiler(lowered)
        if program is None:
            return found
        logits, cached = jax.tree.map(with_sharding, lowered.out_info, program.output_shardings)
        leaves, treedef = jax.tree.flatten(model)
        answers = together(ANSWER, rows)
        ranked = int32(answers), int32(answers, ANSWER), int32(answers)
        found["ranking"], _ = ask_compiler(continuation_scores.lower(treedef, leaves, logits, cached, *ranked))
        found["decode"], _ = ask_compiler(next_token.lower(treedef, leaves, cached, int32(rows), None, 1))
    return found
