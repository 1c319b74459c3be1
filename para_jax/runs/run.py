"""TrainingRun: what the steps, the scores and the end of a run share: its state, its checkpoints and its logs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..adapters.files import require_replaceable
from ..backbone.kernel_choice import describe_attention
from ..config import RunConfig
from ..data.schedule import Turn
from ..evaluation.score import Score
from ..evaluation.scoring import Tasks, share_shapes
from ..io.messages import say
from ..io.progress import Progress
from ..io.storage.bucket import BucketPath
from ..model.adapted import init_adapter
from ..runtime.devices import peak_rate
from ..runtime.processes import is_first, on_first_process
from ..runtime.sharding import replicated_lines, tenants_shardings
from ..training.checkpoint import restore_checkpoint
from ..training.log import Done, Log
from ..training.metrics_file import MetricsWriter, keep_rows
from ..training.prompt_cache import PromptCache
from ..training.step import TrainState, init_state
from ..training.stop import StopSignal
from .folder import at_once
from .standing import Standing, fresh_standing, reopen
from .tenants import Plan, Tenant


class Dispatched(NamedTuple):
    """A step whose values may still be computed."""

    done: Done
    turns: list[Turn]


class TrainingRun:
    """A run from its first step, or from its checkpoint, to its end."""

    state: TrainState
    standing: Standing
    log: Log
    resumed: bool
    batches: Any
    """of the steps to come, while no tenant ends before its last step"""
    bar: Progress
    saved: tuple
    """the `marks` of the last checkpoint"""

    def __init__(self, plan: Plan, model, checkpoints, stop: StopSignal, *, quiet: bool = False):
        self.plan, self.config, self.tenants, self.layout = plan, plan.config, plan.tenants, plan.layout
        self.model, self.checkpoints, self.stop, self.quiet = model, checkpoints, stop, quiet
        self.many = self.config.many
        self.validation, self.test = tasks_of(model, plan.tokenizer, self.tenants)
        self.base: dict[int, Score] = {}
        """the base model's scores by the id of their task, which the combinations of a sweep share"""
        self.prompts: PromptCache | None = None
        self.pending: Dispatched | None = None
        self.compiled: set[Any] = set()

    def restore(self, run: dict[str, str]) -> None:
        """Takes the state of the newest checkpoint, or a fresh one, and puts the folders into that state.

        Args:
            run: what the run is made of; see Standing.
        """
        plan, tenants = self.plan, self.tenants
        for line in replicated_lines(self.model, plan.mesh, self.model.config):
            say(line)
        lengths, platform = [bucket.length for bucket in plan.buckets], plan.mesh.devices.flat[0].platform
        of = self.model.config, self.model.dtype, platform, self.model.attention, lengths
        say(describe_attention(*of, packed=self.config.data.packing))
        self.state = empty_state(self.config, self.model, self.layout.slots, plan.mesh)
        restored = restore_checkpoint(self.checkpoints, self.state, run)
        self.standing = fresh_standing(tenants, self.layout, run)
        if restored:
            self.state, self.standing = restored[0], Standing.from_json(restored[1])
        self.resumed = restored is not None
        reopen(self.standing, tenants)  # a run may have been made longer
        if self.resumed:
            say(self.describe_position())
        self.open_logs()

    def open_logs(self) -> None:
        """Opens the logs without the rows that a run resumed from here writes again."""
        standing, config, over = self.standing, self.config, self.standing.over
        cached = config.train.cache_prompts != "off"  # then a step doesn't compute its prompts' tokens
        peak = None if cached else peak_rate(self.model.config, self.plan.mesh.devices.flatten())
        self.log = Log(config, self.plan.folder, standing.step, standing.rows, ended=all(over), peak_rate=peak)
        folders = [tenant.folder for tenant in self.tenants]
        # the next save would refuse it, perhaps hours later
        on_first_process(lambda: at_once(lambda folder: require_replaceable(folder / "adapter"), folders))
        files = [folder / "metrics.jsonl" for folder in folders] if self.many else []

        def rows_kept() -> list[int]:
            return at_once(lambda i: keep_rows(files[i], standing.tenants[i].rows, ended=over[i]), range(len(files)))

        # in a bucket only with each checkpoint: there each write takes a while
        slow = math.inf if isinstance(self.plan.folder, BucketPath) else None
        counts = on_first_process(rows_kept)
        self.rows = [MetricsWriter(file, count, slow) for file, count in zip(files, counts, strict=True)]

    def describe_position(self) -> str:
        """Where a run resumes."""
        standing = self.standing
        if all(standing.over):
            return f"nothing is left to train after step {standing.step}"
        if not self.tenants[0].name:
            return f"resuming at step {standing.step} of {self.tenants[0].order.total_steps}"
        return f"resuming at step {standing.step}, with {sum(standing.over)} of {len(self.tenants)} tenants ended"

    def write(self, tenant: int, step: int, values: dict[str, float], *, every: int = 1, show: bool = False) -> None:
        """Adds values of a tenant's own step to its log.

        Args:
            show: for the user to see too, in a run of one adapter.
        """
        if not self.many:
            self.log.write(step, values, show=show)
        elif is_first() and step % every == 0:
            self.rows[tenant].add(step, values)

    def flush(self) -> None:
        """Writes the rows that the logs keep back; see `Log.flush`."""
        self.log.flush()
        if is_first():
            at_once(MetricsWriter.flush, self.rows)


def tasks_of(model, tokenizer, tenants: list[Tenant]) -> tuple[Tasks, Tasks]:
    """The validation and the test tasks of the tenants, in shapes that both share."""
    rows = tenants[0].config.eval.batch_size  # the same for all
    limits = [tenant.config.eval.limit for tenant in tenants]
    validation = Tasks(model, tokenizer, [t.validation for t in tenants], limits, "validation", rows=rows)
    limits = [tenant.config.eval.test_limit for tenant in tenants]
    test = Tasks(model, tokenizer, [t.test for t in tenants], limits, "test", rows=rows)
    share_shapes(validation, test)
    return validation, test


def empty_state(config: RunConfig, model, slots: int, mesh) -> TrainState:
    """A stack of zeros, for tenants to be put into, laid out over the current mesh."""
    shapes = jax.eval_shape(lambda: init_adapter(config.adapter, model.config))

    def fresh():
        stack = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), shapes)
        return init_state(stack, config.train)

    shardings = tenants_shardings(jax.eval_shape(fresh), mesh, model.config)
    # A constraint, not out_shardings: then a restored state has the very layouts that a step gives, and one program.
    return jax.jit(lambda: jax.lax.with_sharding_constraint(fresh(), shardings))()
