"""TrainingRun: what the steps, the scores and the end of a run share: its state, its checkpoints and its logs."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..backbone.kernel_choice import describe_attention
from ..config import RunConfig
from ..data.schedule import Turn
from ..data.tenants import AT_ONCE
from ..estimate.roofline import peak_rate
from ..evaluation.score import Score
from ..evaluation.scoring import Tasks, share_shapes
from ..io.messages import say
from ..io.progress import Progress
from ..io.storage.bucket import BucketPath
from ..model.adapted import init_adapter
from ..runtime.processes import is_first, on_first_process, require_same
from ..runtime.sharding import even_tenants, replicated_lines, tenant_axes, tenants_shardings
from ..training.checkpoint import restore_checkpoint
from ..training.log import Done, Log
from ..training.metrics_file import MetricsWriter, Reached
from ..training.profiler import Profiler
from ..training.prompt_cache import PromptCache
from ..training.step import TrainState, init_state
from ..training.stop import StopSignal
from .folder import mend_folders
from .health import Health
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
    health: list[Health]
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
        self.profiler = Profiler(self.config.profiler, plan.folder)

    def restore(self, run: dict[str, str]) -> None:
        """Takes the state of the newest checkpoint, or a fresh one, and puts the folders into that state.

        Args:
            run: what the run is made of; see Standing.
        """
        plan, tenants = self.plan, self.tenants
        for line in replicated_lines(self.model, plan.mesh, self.model.config):
            say(line)
        lengths = [bucket.length for bucket in plan.buckets]
        say_attention(self.model, lengths, plan.mesh, packed=self.config.data.packing)
        require_same("the data", lambda: run)  # also what the ids don't show, such as references
        self.state = empty_state(self.config, self.model, self.layout.slots, plan.mesh)
        restored = restore_checkpoint(self.checkpoints, self.state, run)
        self.standing = fresh_standing(tenants, self.layout, run)
        if restored:
            self.state, self.standing = restored[0], Standing.from_json(restored[1])
        self.resumed = restored is not None
        reopen(self.standing, tenants, self.layout)
        if self.resumed:
            say(self.describe_position())
        self.health = [Health(t.name, t.config, o.health) for t, o in zip(tenants, self.standing.tenants, strict=True)]
        for one in self.health:
            one.said = self.quiet
        self.open_logs()

    def open_logs(self) -> None:
        """Opens the logs without the rows that a run resumed from here writes again."""
        standing, config = self.standing, self.config
        reached, ended = None, False
        if self.resumed:
            evaluated = standing.step if self.many else standing.tenants[0].evaluated
            reached, ended = Reached(standing.step, evaluated), all(standing.over)
        cached = config.train.cache_prompts != "off"  # then a step doesn't compute its prompts' tokens
        peak = None if cached else peak_rate(self.model.config, self.plan.mesh.devices.flatten())
        self.log = Log(config, self.plan.folder, reached, ended=ended, peak_rate=peak)
        on_first_process(lambda: mend_folders(config, standing, self.tenants, resumed=self.resumed))
        files = [tenant.folder / "metrics.jsonl" for tenant in self.tenants] if self.many else []
        # in a bucket only with each checkpoint: there each write takes a while
        self.rows = [MetricsWriter(file, math.inf if isinstance(file, BucketPath) else None) for file in files]

    def close(self) -> None:
        self.profiler.close()
        self.log.close()

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
        self.health[tenant].watch(step, values)
        if not self.many:
            self.log.write(step, values, show=show)
        elif is_first() and step % every == 0:
            self.rows[tenant].add(step, values)

    def flush(self) -> None:
        """Writes the rows that the logs keep back; see `Log.flush`."""
        self.log.flush()
        if is_first():
            with self.log.errors_named(), ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(MetricsWriter.flush, self.rows))


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

    used = math.prod(mesh.shape[axis] for axis in tenant_axes(slots, mesh.shape))
    if used < mesh.size and slots > 1:
        where = f"are spread over {used} of the" if used > 1 else "are complete on each of the"
        say(
            f"the weights of {slots} tenants {where} {mesh.size} devices, which do not divide them"
            f"{even_tenants(slots, mesh.size)}"
        )
    shardings = tenants_shardings(jax.eval_shape(fresh), mesh, model.config)
    # A constraint, not out_shardings: then a restored state has the very layouts that a step gives, and one program.
    return jax.jit(lambda: jax.lax.with_sharding_constraint(fresh(), shardings))()


def say_attention(model, lengths: list[int], mesh, *, packed: bool) -> None:
    """Names the kernels of training, evaluation and decoding, and why they are used."""
    platform = mesh.devices.flat[0].platform
    say(describe_attention(model.config, model.dtype, platform, model.attention, lengths, packed=packed))
