"""fit: trains one part of a run to its end, from a fresh state or from its checkpoint, with a loaded backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing

import jax
import jax.numpy as jnp

from ..backbone.kernel_choice import describe_attention
from ..config import ModelConfig, RunConfig
from ..data.schedule import admitted
from ..estimate.roofline import peak_rate
from ..evaluation.scoring import Tasks, share_shapes
from ..evaluation.shapes import say_evaluation
from ..io.checks import expanded
from ..io.messages import say
from ..io.storage.bucket import Place
from ..model.adapted import init_adapter
from ..runtime.processes import on_first_process, require_same
from ..runtime.sharding import even_tenants, replicated_lines, tenant_axes, tenants_shardings
from ..training.checkpoint import open_checkpoints, restore_checkpoint
from ..training.log import Log
from ..training.metrics_file import Reached
from ..training.passes import Layout
from ..training.profiler import Profiler
from ..training.prompt_cache import PromptCache
from ..training.step import TrainState, init_state
from ..training.stop import Interrupted, stop_signals
from ..training.tenants_file import read_entries
from .folder import mend_folders, run_digests
from .health import Health
from .initial import require_same_start, starts_of
from .logs import Logs, tenant_rows
from .loop import Loop
from .parts import Part
from .rows_per_step import require_same_rows
from .scoring import Scoring
from .standing import Standing, fresh_standing, reopened, require_same_tenants
from .tenants import Inputs, Tenant


def fit(
    config: RunConfig,
    model,
    inputs: Inputs,
    layout: Layout,
    mesh,
    part: Part,
    prompts: Callable[[], PromptCache | None],
    backbone: dict[str, str],
    *,
    quiet: bool = False,
) -> tuple[TrainState, Standing]:
    """The training loop of one part, with a backbone that is loaded already. The folders must be claimed.

    Args:
        prompts: computes the states of train.cache_prompts. It is called once a step is to be done.
        backbone: what a checkpoint keeps of it.
        quiet: no warnings and no scores of the base model: these are trials, and some may go wrong.
    """
    folder, (tokenizer, tenants, buckets) = part.folder, inputs
    for line in replicated_lines(model, mesh, model.config):
        say(line)
    say_attention(model, [bucket.length for bucket in buckets], mesh, packed=config.data.packing)
    with jax.set_mesh(mesh), open_checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        validation, test = tasks_of(model, tokenizer, tenants)
        run = run_digests(config, model.fingerprint, tenants)
        require_same("the data", lambda: run)  # also what the ids don't show, such as references
        run |= backbone
        state, standing, resumed = resumed_or_fresh(config, model, tenants, layout, mesh, checkpoints, run)
        log = open_log(config, folder, model, mesh, standing if resumed else None)
        on_first_process(lambda: mend_folders(config, standing, tenants, folder / "metrics.jsonl", resumed=resumed))
        others = {} if part.alone else on_first_process(lambda: read_entries(expanded(config.output_dir)))
        profiler = Profiler(config.profiler, folder)
        signals = stop_signals(config.runtime.distributed == "given", config.runtime.stopped_exit_code)
        with closing(log), closing(profiler), signals as stop:
            encoded = {tasks.split: list(tasks.encoded.values()) for tasks in (validation, test) if tasks.encoded}
            say_evaluation(encoded, config.eval.batch_size)
            health = Health([tenant.name for tenant in tenants], [tenant.config for tenant in tenants], quiet=quiet)
            if resumed and not quiet:
                require_same_rows(config, layout)
            if resumed:
                files = [tenant.folder / "metrics.jsonl" for tenant in tenants]
                on_first_process(lambda: [health.read(i, file, standing.health) for i, file in enumerate(files)])
            logs = Logs(log, tenant_rows(tenants) if config.many else [], health)
            scoring = Scoring(config, model, tenants, validation, test, logs, stop, {}, others)
            scoring.write_ended(standing)
            loop = Loop(config, model, tenants, buckets, layout, scoring, checkpoints, logs, profiler, stop)
            try:
                if resumed:
                    standing = scoring.with_kept_best(state, standing)
                    for i in range(len(tenants)):
                        health.compare_with(i, standing.records(i))
                elif config.eval.base and not quiet:  # those on test data are measured when a tenant ends
                    standing = scoring.score_backbone(state, standing, "validation", list(range(len(tenants))))
                if not all(standing.over):
                    with stop.interrupting():
                        loop = loop._replace(prompts=prompts())
                return loop.run(state, standing)
            except Interrupted:
                loop.end_stopped_run(standing)


def resumed_or_fresh(
    config: RunConfig, model, tenants: Sequence[Tenant], layout: Layout, mesh, checkpoints, run: dict[str, str]
) -> tuple[TrainState, Standing, bool]:
    """The state and the standing that a run goes on from, and whether it resumes from a checkpoint."""
    state = empty_state(config, model, layout.slots, mesh)
    restored = restore_checkpoint(checkpoints, state, Standing, run)
    state, standing = restored or (state, fresh_standing(tenants, layout, run))
    require_same_tenants(standing, tenants, layout)
    standing = reopened(standing, tenants)._replace(rows=layout.tenant_rows)
    standing = with_starts(standing, tenants, model.config)
    if restored:
        say(describe_position(standing, tenants))
    return state, standing, restored is not None


def tasks_of(model, tokenizer, tenants: Sequence[Tenant]) -> tuple[Tasks, Tasks]:
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


def with_starts(standing: Standing, tenants: Sequence[Tenant], model_config: ModelConfig) -> Standing:
    """The standing with what the tenants that wait for a slot will start from (train.init_from). Raises ValueError if
    that changed since the run began."""
    slots = admitted(standing.slots, standing.over)
    begun = [i in slots or standing.over[i] or standing.steps[i] > 0 for i in range(len(tenants))]
    waiting = {one.name: one.config for one, has in zip(tenants, begun, strict=True) if not has}
    waiting = {name: own for name, own in waiting.items() if own.train.init_from}
    starts = on_first_process(lambda: starts_of(waiting, model_config))
    for name, own in waiting.items():
        require_same_start(name, own, standing.starts, starts[name])
    return standing._replace(starts=standing.starts | starts)


def describe_position(standing: Standing, tenants: Sequence[Tenant]) -> str:
    """Where a run resumes."""
    if all(standing.over):
        return f"nothing is left to train after step {standing.step}"
    if not tenants[0].name:
        return f"resuming at step {standing.step} of {tenants[0].order.total_steps}"
    return f"resuming at step {standing.step}, with {sum(standing.over)} of {len(tenants)} tenants ended"


def open_log(config: RunConfig, folder: Place, model, mesh, standing: Standing | None) -> Log:
    """The log in a part's folder, without the rows that a run resumed from here writes again."""
    reached, ended = None, False
    if standing:
        evaluated = standing.step if config.many else standing.evaluated[0]
        reached, ended = Reached(standing.step, evaluated), all(standing.over)
    cached = config.train.cache_prompts != "off"  # then a step doesn't compute its prompts' tokens
    peak = None if cached else peak_rate(model.config, mesh.devices.flatten())
    return Log(config, folder, reached, ended=ended, peak_rate=peak)


def say_attention(model, lengths: list[int], mesh, *, packed: bool) -> None:
    """Names the kernels of training, evaluation and decoding, and why they are used."""
    platform = mesh.devices.flat[0].platform
    say(describe_attention(model.config, model.dtype, platform, model.attention, lengths, packed=packed))
