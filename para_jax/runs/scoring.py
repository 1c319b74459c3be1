"""Scores of a run's adapters: which is the best so far and is kept, and what a tenant leaves when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
from ..config import RunConfig
from ..data.given import is_given
from ..evaluation.score import Score, describe_best, shown_score
from ..evaluation.scoring import Tasks
from ..evaluation.tasks import EncodedTask
from ..io.checks import expanded, printable
from ..io.messages import say
from ..io.storage.bucket import Place
from ..model.adapted import init_adapter
from ..runtime.processes import broadcast_arrays, full_arrays, is_first, on_first_process
from ..runtime.sharding import place_tenants
from ..training.step import TrainState, tenant_of
from ..training.stop import StopSignal
from ..training.tenants_file import write_entries
from .logs import Logs
from .report import record_of
from .standing import Standing
from .tenants import Tenant

#: Answers of the base model from which on a run says how to ask for fewer.
MANY_ANSWERS = 500
REMEDY = "look at these examples, or start again with a lower train.learning_rate"


class NotFinite(ValueError):
    """A run of one adapter can't continue, because its loss, gradient or weights are not finite."""


class Scoring(NamedTuple):
    """Scores adapters and keeps the best. A NamedTuple, because its parts never change."""

    config: RunConfig
    model: Any
    tenants: list[Tenant]
    validation: Tasks
    test: Tasks
    logs: Logs
    stop: StopSignal
    base: dict[int, Score]
    """the base model's scores by the id of their task, which the combinations of a sweep share"""
    others: dict[str, dict[str, Any]] = {}
    """what tenants.json said at the start, if the run has other parts"""

    def evaluate(self, state: TrainState, standing: Standing, due: list[int]) -> Standing:
        """Scores the tenants' adapters, and keeps each where it is its best so far."""
        with self.stop.interrupting():
            found = self.validation.scores(Stack(state.adapters), {tenant: standing.running[tenant] for tenant in due})
        for tenant in due:
            standing = self.after_score(state, standing, tenant, found.get(tenant))
        return standing

    def after_score(self, state: TrainState, standing: Standing, tenant: int, score: Score | None) -> Standing:
        """The standing after a tenant's adapter was scored; None: it has no validation data."""
        name, own = self.tenants[tenant].name, standing.steps[tenant]
        if score is None and self.config.many:  # its adapter is written once, when it ends
            return standing.changed(tenant, evaluated=own)
        best = standing.best_score[tenant]
        if score is not None:
            if not math.isfinite(score.loss):
                self.require_many(own, score)
                kept = "its best adapter is kept" if best is not None else "its last one is kept"
                say(f"{name}: stopped at its step {own}: the validation loss is {score.loss}; {kept}")
                return standing.changed(tenant, evaluated=own, failed=standing.step - 1)
            self.logs.write(tenant, own, scores("validation", score), show=True)
            if self.config.many:
                shown = {f"{name}/{key}": value for key, value in scores("validation", score).items()}
                self.logs.run.write(standing.step, shown)
            if best is not None and (score.score, -score.loss) <= (best, -standing.best_loss(tenant)):
                return standing.changed(tenant, evaluated=own, since_best=standing.since_best[tenant] + 1)
        base = base_score(standing, tenant, score)
        kept = self.keep(tenant, tenant_of(state.adapters, jnp.int32(standing.running[tenant])), own, score, base)
        found = None if score is None else score.score
        standing = self.with_score(standing, tenant, "validation", score).with_kept(tenant, kept)
        return standing.changed(tenant, evaluated=own, best_score=found, best_step=own, since_best=0)

    def require_many(self, step: int, score: Score) -> None:
        """Raises ValueError, in a run of one adapter, for a validation loss that is not finite."""
        if not self.config.many:
            raise NotFinite(f"step {step}: the loss of the validation data is {score.loss}; {REMEDY}")

    def keep(self, tenant: int, adapter: Adapter, step: int, score: Score | None, base: float | None = None) -> str:
        """Writes a tenant's adapter into its folder, with its validation score and the base model's. Returns a hash of
        the adapter."""
        card, whole = card_lines(self.tenants[tenant], step, score, base), full_arrays(adapter)
        if others := len(self.tenants) - 1:
            card.append(f"- Trained in one run with {others} other{'s' * (others > 1)}.")
        to, source = self.tenants[tenant].folder / "adapter", self.config.backbone.source
        given: dict[str, Any] = dict(base_model=source, model=self.model, card=card)
        on_first_process(lambda: save_adapter(whole, to, **given, example=example_prompt(self.tenants[tenant])))
        return weights_hash(whole)

    def with_kept_best(self, state: TrainState, standing: Standing) -> Standing:
        """The standing at a resume. Where a tenant's folder does not hold the best adapter that the checkpoint knows,
        but one from steps that were lost, the next score begins a new search."""
        known, like = standing.kept, jax.eval_shape(tenant_of, state.adapters, jnp.int32(0))
        for tenant in standing.running:
            name, folder = standing.names[tenant], self.tenants[tenant].folder
            if standing.best_score[tenant] is None:
                continue
            there = on_first_process((folder / "adapter").exists)
            if not there or weights_hash(self.kept(tenant, like)) != known[name]:
                step = standing.best_step[tenant]
                say(
                    f"{folder / 'adapter'} is not the best adapter so far, that of step {step}; the search begins again"
                )
                standing = standing.without_best(tenant)
        return standing

    def kept(self, tenant: int, last: Adapter) -> Adapter:
        return kept_adapter(self.tenants[tenant].folder, self.model, last)

    def replaced_for_test(self, state: TrainState, standing: Standing, tenant: int) -> Adapter | None:
        """A leaving tenant's last adapter, if another one is its best and is to be tested."""
        is_best = standing.best_score[tenant] is None or standing.best_step[tenant] == standing.steps[tenant]
        if is_best or not self.tenants[tenant].test:
            return None
        return full_arrays(tenant_of(state.adapters, jnp.int32(standing.running[tenant])))

    def finish(self, state: TrainState, standing: Standing, tenant: int, why: str) -> Standing:
        """Ends a tenant. If it has test data, its best adapter is in its slot, and is scored."""
        own, slot = self.tenants[tenant], standing.running[tenant]
        steps = int(full_arrays(state.step)[slot])
        if standing.best_score[tenant] is None and standing.best_step[tenant] < steps:  # the last one is the best
            kept = self.keep(tenant, tenant_of(state.adapters, jnp.int32(slot)), steps, None)
            standing = standing.with_kept(tenant, kept).changed(tenant, best_step=steps)
        test_after = None
        if own.test and on_first_process((own.folder / "adapter").exists):
            if self.config.eval.base or standing.has_base(tenant, "test"):  # as at its end before it was made longer
                standing = self.score_backbone(state, standing, "test", [tenant])
            standing, test_after = self.tested(state, standing, tenant)
        best = standing.best_score[tenant]
        entry = {
            "examples": len(own.data.examples),
            "steps": steps,
            "best_step": standing.best_step[tenant],
            "best_score": best,
            "metric": own.validation.metric if own.validation else own.test.metric if own.test else None,
            "test_before": standing.test_before[tenant],
            "test_after": test_after,
            "ended": why,
            "warning": self.logs.health.warning(tenant),
        }
        standing = standing.changed(tenant, ended=why)._replace(entries=standing.entries | {own.name: entry})
        if not self.config.many:
            return standing
        said = "" if best is None else f", {describe_best(entry['metric'], best, standing.best_step[tenant])}"
        ended = f"{sum(standing.over)} of {len(self.tenants)} tenants have ended"
        say(f"{own.name}: {steps} steps{said} ({why}; {ended})")
        if is_first():
            with self.logs.run.errors_named():
                self.logs.tenants[tenant].flush()
        return standing

    def tested(self, state: TrainState, standing: Standing, tenant: int) -> tuple[Standing, float | None]:
        """The standing with the test score of the adapter in a tenant's slot, and the score; None: it is not finite.
        The model card gets it too."""
        with self.stop.interrupting():
            found = self.test.scores(Stack(state.adapters), {tenant: standing.running[tenant]})[tenant]
        self.logs.write(tenant, standing.steps[tenant], scores("test_after", found), show=True)
        before = standing.test_before[tenant]
        line = card_score("Test", found, None if before is None else shown_score(found.metric, before))
        on_first_process(lambda: add_test_score(self.tenants[tenant].folder / "adapter", line))
        score = found.score if math.isfinite(found.score) else None
        return self.with_score(standing, tenant, "test", found), score

    def write_ended(self, standing: Standing) -> None:
        """Writes the tenants.json of a run of many: the tenants that have ended, a sweep's in its order."""
        if self.config.many:
            own = {name: i for i, name in enumerate(standing.names)}
            entries = {name: entry for name, entry in self.others.items() if name not in own}
            entries |= {name: standing.entry(i) for name, i in own.items() if standing.ended[i]}
            ordered = entries if self.config.sweep else dict(sorted(entries.items()))
            on_first_process(lambda: write_entries(expanded(self.config.output_dir), ordered))

    def score_backbone(self, state: TrainState, standing: Standing, split: str, asked: list[int]) -> Standing:
        """Scores the backbone alone on the validation or test data of these tenants, once where they share it. Scores
        on validation data at the start of a run are logged as step 0."""
        tasks, limit = (self.validation, "eval.limit") if split == "validation" else (self.test, "eval.test_limit")
        data = {i: id(getattr(self.tenants[i], split)) for i in asked if i in tasks.encoded}
        first = {one: i for i, one in data.items() if one not in self.base}
        if first:
            encoded, stack, slot = [tasks.encoded[i] for i in first.values()], Stack(state.adapters), -1
            whose, answers = f" of {len(first)} tenants" * (len(first) > 1), sum(map(answers_of, encoded))
            advice = f" ({answers} answers; eval.base=false skips this, {limit} scores fewer examples)"
            examples = f"{sum(len(one.examples) for one in encoded)} {split} examples{whose}"
            if len(first) > 1 or not self.config.many:  # there may be thousands of tenants that end one by one
                say(f"scoring {examples} with the base model{advice * (answers >= MANY_ANSWERS)} ...")
            if stack.size == 1:
                # A new adapter changes nothing, and its programs are those of all other scores.
                stack, slot = self.alone(init_adapter(self.config.adapter, self.model.config)), 0
            with self.stop.interrupting():
                found = tasks.scores(stack, dict.fromkeys(first.values(), slot))
            self.base.update({one: found[i] for one, i in first.items()})
        for tenant, score in ((i, self.base[one]) for i, one in data.items()):
            if split == "test":
                self.logs.write(tenant, standing.steps[tenant], scores("test_before", score), show=True)
                standing = standing.changed(tenant, test_before=score.score)
            elif standing.steps[tenant] == 0:  # later it would be a point in the middle of the adapter's curve
                self.logs.write(tenant, 0, scores("validation", score), show=True)
            standing = self.with_score(standing, tenant, f"{split}_base", score)
        self.logs.flush()
        return standing

    def alone(self, adapter: Adapter) -> Stack:
        """A stack of one adapter, on the run's mesh."""
        stack = Stack(jax.tree.map(lambda leaf: leaf[None], adapter))
        return place_tenants(stack, jax.sharding.get_mesh(), self.model.config)

    def with_score(self, standing: Standing, tenant: int, what: str, score: Score | None) -> Standing:
        """The standing with a score that is finite. Answers are kept in a run of one adapter only, and the validation
        rows where adapters are compared on the same data."""
        if score is None or not all(map(math.isfinite, score.values().values())):
            return standing
        rows = what in ("validation", "validation_base") and not self.config.data.tenants
        return standing.with_score(tenant, what, record_of(score, samples=not self.config.many, rows=rows))


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


def base_score(standing: Standing, tenant: int, found: Score | None) -> float | None:
    """The base model's score on a tenant's validation data by the metric of `found`, as people read it."""
    record = standing.records(tenant).get("validation_base")
    return record["values"].get(found.metric) if record and found else None


def card_lines(tenant: Tenant, steps: int, found: Score | None, base: float | None) -> list[str]:
    """What an adapter's model card says about its training and its validation score."""
    config = tenant.config
    card = training_lines(
        method=method_of(config.adapter).label,
        data=data_name(config.data.train),
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


def data_name(train: str | None) -> str:
    return "data from Python" if is_given(train) else expanded(train or "").name


def card_score(split: str, found: Score, base: float | None) -> str:
    """A score as the model card shows it; `base` is that of the base model, as people read it."""
    score = shown_score(found.metric, found.score)
    return score_line(split, found.metric, score, found.stderr, found.count, found.loss, base)


def scores(name: str, found: Score) -> dict[str, float]:
    return {f"{name}_{what}": value for what, value in found.values().items()}
