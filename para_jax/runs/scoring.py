"""Scores of a run's adapters: which is the best so far and is kept, and what a tenant leaves when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import __version__
from ..adapters.adapter import Adapter
from ..adapters.bank import weights_hash
from ..adapters.card import score_line, training_lines
from ..adapters.files import add_test_score, load_adapter, save_adapter
from ..adapters.methods import method_of
from ..adapters.rows import Stack
from ..data.given import is_given
from ..evaluation.score import Score, describe_best, shown_score
from ..evaluation.tasks import EncodedTask
from ..io.checks import expanded, printable
from ..io.messages import say
from ..io.storage.bucket import Place
from ..model.adapted import init_adapter
from ..runtime.processes import broadcast_arrays, full_arrays, is_first, on_first_process
from ..runtime.sharding import place_tenants
from ..training.scores_file import write_entries
from ..training.step import put_adapter, tenant_of
from .notices import worse_than_base
from .report import record_of
from .run import TrainingRun
from .tenants import Tenant

#: Answers of the base model from which on a run says how to ask for fewer.
MANY_ANSWERS = 500
REMEDY = "look at these examples, or start again with a lower train.learning_rate"


class NotFinite(ValueError):
    """A run of one adapter can't continue, because its loss, gradient or weights are not finite."""


def evaluate(run: TrainingRun, due: list[int]) -> None:
    """Scores the adapters of these tenants, and keeps each where it is its best so far."""
    with run.stop.interrupting():
        found = run.validation.scores(Stack(run.state.adapters), {i: run.standing.running[i] for i in due})
    for tenant in due:
        after_score(run, tenant, found.get(tenant))


def after_score(run: TrainingRun, tenant: int, score: Score | None) -> None:
    """Notes a tenant's score; None: it has no validation data."""
    one = run.standing.tenants[tenant]
    one.evaluated = one.steps
    if score is None and run.many:  # its adapter is written once, when it ends
        return
    if score is not None:
        if not math.isfinite(score.loss):
            if not run.many:
                raise NotFinite(f"step {one.steps}: the loss of the validation data is {score.loss}; {REMEDY}")
            kept = "its best adapter is kept" if one.best_score is not None else "its last one is kept"
            say(f"{one.name}: stopped at its step {one.steps}: the validation loss is {score.loss}; {kept}")
            one.failed = run.standing.step - 1  # so it ends at once, without another step
            return
        run.write(tenant, one.steps, scores("validation", score), show=True)
        if run.many:
            shown = {f"{one.name}/{key}": value for key, value in scores("validation", score).items()}
            run.log.write(run.standing.step, shown)
        if one.best_score is not None and (score.score, -score.loss) <= (one.best_score, -one.best_loss()):
            one.since_best += 1
            return
    keep(run, tenant, one.steps, score)
    note_score(run, tenant, "validation", score)
    one.best_score, one.since_best = None if score is None else score.score, 0


def keep(run: TrainingRun, tenant: int, step: int, score: Score | None) -> None:
    """Writes the adapter in a tenant's slot into its folder, with its validation score and the base model's."""
    one, own = run.standing.tenants[tenant], run.tenants[tenant]
    base = one.scores.get("validation_base")
    card = card_lines(own, step, score, base["values"].get(score.metric) if base and score else None)
    if others := len(run.tenants) - 1:
        card.append(f"- Trained in one run with {others} other{'s' * (others > 1)}.")
    adapter = full_arrays(adapter_of(run, tenant))
    given: dict[str, Any] = dict(base_model=run.config.backbone.source, model=run.model, card=card)
    on_first_process(lambda: save_adapter(adapter, own.folder / "adapter", **given, example=example_prompt(own)))
    one.kept, one.best_step = weights_hash(adapter), step  # a resume compares the folder with this


def adapter_of(run: TrainingRun, tenant: int) -> Adapter:
    return tenant_of(run.state.adapters, jnp.int32(run.standing.running[tenant]))


def check_best(run: TrainingRun) -> None:
    """At a resume: where a tenant's folder does not hold the best adapter that the checkpoint knows, but one from steps
    that were lost, the next score begins a new search."""
    like = jax.eval_shape(tenant_of, run.state.adapters, jnp.int32(0))
    for tenant in run.standing.running:
        one, folder = run.standing.tenants[tenant], run.tenants[tenant].folder
        if one.best_score is None:
            continue
        there = on_first_process((folder / "adapter").exists)
        if not there or weights_hash(kept_adapter(folder, run.model, like)) != one.kept:
            place = folder / "adapter"
            say(f"{place} is not the best adapter so far, that of step {one.best_step}; the search begins again")
            one.forget_best()


def finish(run: TrainingRun, tenant: int, why: str) -> None:
    """Ends a tenant, and scores its best adapter on its test data."""
    one, own = run.standing.tenants[tenant], run.tenants[tenant]
    slot = jnp.int32(run.standing.running[tenant])
    steps = int(full_arrays(run.state.step)[run.standing.running[tenant]])
    if one.best_score is None and one.best_step < steps:  # the last one is the best
        keep(run, tenant, steps, None)
    test_after = None
    if own.test and on_first_process((own.folder / "adapter").exists):
        # The best adapter is tested in its slot, in the programs that scored validation. A longer run goes on from the
        # last one, also where a signal breaks this off.
        last = None if one.best_step in (one.steps, steps) else full_arrays(adapter_of(run, tenant))
        if last is not None:
            run.state = put_adapter(run.state, slot, kept_adapter(own.folder, run.model, last))
        try:
            test_after = tested(run, tenant)
        finally:
            if last is not None:
                run.state = put_adapter(run.state, slot, last)
    one.about = {
        "examples": len(own.data.examples),
        "steps": steps,
        "best_step": one.best_step,
        "best_score": one.best_score,
        "metric": own.validation.metric if own.validation else own.test.metric if own.test else None,
        "test_before": one.test_before,
        "test_after": test_after,
        "ended": why,
        "warning": None if run.quiet else worse_than_base(one.scores, own.config.train.peak_learning_rate),
    }
    one.ended = why
    if not run.many:
        return
    said = "" if one.best_score is None else f", {describe_best(one.about['metric'], one.best_score, one.best_step)}"
    ended = f"{sum(run.standing.over)} of {len(run.tenants)} tenants have ended"
    say(f"{one.name}: {steps} steps{said} ({why}; {ended})")
    if is_first():
        run.rows[tenant].flush()


def tested(run: TrainingRun, tenant: int) -> float | None:
    """The test score of the adapter in a tenant's slot, next to the base model's; None: it is not finite. The model
    card gets it too."""
    one, own = run.standing.tenants[tenant], run.tenants[tenant]
    scored = one.test_before is not None or "test_base" in one.scores  # at its end before it was made longer
    if run.config.eval.base or scored:
        score_backbone(run, "test", [tenant])
    with run.stop.interrupting():
        found = run.test.scores(Stack(run.state.adapters), {tenant: run.standing.running[tenant]})[tenant]
    run.write(tenant, one.steps, scores("test_after", found), show=True)
    line = card_score("Test", found, None if one.test_before is None else shown_score(found.metric, one.test_before))
    on_first_process(lambda: add_test_score(own.folder / "adapter", line))
    note_score(run, tenant, "test", found)
    return found.score if math.isfinite(found.score) else None


def write_ended(run: TrainingRun) -> None:
    """Writes the tenants.json of a run of many: the tenants that have ended."""
    if run.many:
        entries = {one.name: one.entry() for one in run.standing.tenants if one.ended}
        on_first_process(lambda: write_entries(run.plan.folder, entries))


def score_backbone(run: TrainingRun, split: str, asked: list[int]) -> None:
    """Scores the backbone alone on the validation or test data of these tenants, once where they share it. Scores on
    validation data at the start of a run are logged as step 0."""
    tasks, limit = (run.validation, "eval.limit") if split == "validation" else (run.test, "eval.test_limit")
    data = {i: id(getattr(run.tenants[i], split)) for i in asked if i in tasks.encoded}
    first = {one: i for i, one in data.items() if one not in run.base}
    if first:
        encoded, stack, slot = [tasks.encoded[i] for i in first.values()], Stack(run.state.adapters), -1
        whose, answers = f" of {len(first)} tenants" * (len(first) > 1), sum(map(answers_of, encoded))
        advice = f" ({answers} answers; eval.base=false skips this, {limit} scores fewer examples)"
        examples = f"{sum(len(one.examples) for one in encoded)} {split} examples{whose}"
        if len(first) > 1 or not run.many:  # there may be thousands of tenants that end one by one
            say(f"scoring {examples} with the base model{advice * (answers >= MANY_ANSWERS)} ...")
        if stack.size == 1:
            # A new adapter changes nothing, and its programs are those of all other scores.
            fresh = jax.tree.map(lambda leaf: leaf[None], init_adapter(run.config.adapter, run.model.config))
            stack, slot = place_tenants(Stack(fresh), jax.sharding.get_mesh(), run.model.config), 0
        with run.stop.interrupting():
            found = tasks.scores(stack, dict.fromkeys(first.values(), slot))
        run.base.update({one: found[i] for one, i in first.items()})
    for tenant, score in ((i, run.base[one]) for i, one in data.items()):
        one = run.standing.tenants[tenant]
        if split == "test":
            run.write(tenant, one.steps, scores("test_before", score), show=True)
            one.test_before = score.score
        elif one.steps == 0:  # later it would be a point in the middle of the adapter's curve
            run.write(tenant, 0, scores("validation", score), show=True)
        note_score(run, tenant, f"{split}_base", score)
    run.flush()


def note_score(run: TrainingRun, tenant: int, what: str, score: Score | None) -> None:
    """Keeps a score that is finite. Answers are kept in a run of one adapter only, and the validation rows where
    adapters are compared on the same data."""
    if score is not None and all(map(math.isfinite, score.values().values())):
        rows = what in ("validation", "validation_base") and not run.config.data.tenants
        run.standing.tenants[tenant].scores[what] = record_of(score, samples=not run.many, rows=rows)


def answers_of(encoded: EncodedTask) -> int:
    """How many answers a task asks for."""
    return len(encoded.examples) * (1 + encoded.task.writes) + len(encoded.ranked)


def kept_adapter(folder: Place, model, like: Adapter) -> Adapter:
    """The adapter that a run keeps in a folder."""
    return read_everywhere(lambda: load_adapter(folder / "adapter", model.config, model=model), like)


def read_everywhere(read: Callable[[], Adapter], like: Adapter) -> Adapter:
    """The adapter that `read` gives on the first process, as arrays of NumPy on all of them."""
    found: list[Adapter] = []
    on_first_process(lambda: found.append(read()))
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    return broadcast_arrays(found[0] if is_first() else empty)


def card_lines(tenant: Tenant, steps: int, found: Score | None, base: float | None) -> list[str]:
    """What an adapter's model card says about its training and its validation score."""
    config, train = tenant.config, tenant.config.data.train
    card = training_lines(
        method=method_of(config.adapter).label,
        data="data from Python" if is_given(train) else expanded(train or "").name,
        examples=len(tenant.data.examples),
        steps=steps,
        rows=tenant.order.plan.rows,
        learning_rate=config.train.peak_learning_rate,
        version=__version__,
    )
    if config.train.init_from:
        source = "/".join(config.train.init_from.split("/")[-2:])  # no path of this machine
        card.append(f"- Started from the adapter {printable(source, 300)}.")
    if config.backbone.quantize:
        card.append(f"- The backbone's weights were {config.backbone.quantize} during training.")
    if config.data.chat_template_kwargs:
        variables = printable(config.data.chat_template_kwargs, 300)
        card.append(f"- Chats have the chat template's variables {variables}: `load_tokenizer(base, {variables!r})`.")
    if found:
        card.append(card_score("Validation", found, base))
    return card


def example_prompt(tenant: Tenant) -> str | list[dict]:
    """The prompt of the model card's code, in the form that the tenant's data has: a text or messages, with the system
    message that all its chats begin with."""
    task = tenant.validation or tenant.test
    prompts = [record.prompt for record in task.records] if task else []
    if not prompts or isinstance(prompts[0], str):
        return "a prompt"
    first = prompts[0][0]
    shared = first["role"] == "system" and all(prompt[0] == first for prompt in prompts)
    return [*([first] if shared else []), {"role": "user", "content": "a prompt"}]


def card_score(split: str, found: Score, base: float | None) -> str:
    """A score as the model card shows it; `base` is that of the base model, as people read it."""
    score = shown_score(found.metric, found.score)
    return score_line(split, found.metric, score, found.stderr, found.count, found.loss, base)


def scores(name: str, found: Score) -> dict[str, float]:
    return {f"{name}_{what}": value for what, value in found.values().items()}
