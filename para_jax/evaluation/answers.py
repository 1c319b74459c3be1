"""Answerer: the one path from questions to answers, for one adapter and for many.

First come the likelihoods, in batches that mix adapters, then the text to write. A question that a journal has answered
is not asked again.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from ..adapters.scope import require_invocation
from ..backbone.transformer import Transformer
from ..data.batches import rounded_up
from ..data.examples import stop_token_ids
from ..inference.content import writing_content
from ..inference.draw import NO_TOKEN_MESSAGE
from ..io.messages import say, warn
from ..io.progress import Progress
from ..runtime.sharding import mesh_of, using
from ..serving.engine import Engine
from ..training.stop import interruption_point
from .batch_adapters import Bank, version
from .journal import AnswerJournal
from .likelihood import likelihoods
from .questions import Answer, Generation, Likelihood, Pending, Question, Scored, Written, key
from .shapes import OpenShapes, PlannedShapes, batch_rows
from .writing import describe_tenant, known_answer, write_by_engine, write_in_batches

#: Questions with their answers, and the tokens that were computed for each.
Answers = Generator[tuple[Pending, Answer, int]]


class Answerer:
    """A model with a bank's tenants, and the answers they have given."""

    def __init__(
        self,
        model: Transformer,
        bank: Bank | None,
        tokenizer,
        *,
        rows: int = 16,
        prefill_tokens: int | None = None,
        shapes: PlannedShapes | None = None,
        engine: Engine | None = None,
        journal: AnswerJournal | None = None,
        backbone: str = "",
        longest: int = 0,
    ):
        """
        Args:
            bank: an AdapterBank, or a StackBank; None: the base model alone.
            rows: of a batch, and the slots of the engine that this makes when there is something to write.
            prefill_tokens: max_prefill_tokens of that engine.
            shapes: planned for the questions, which are then written in batches. This works in both layouts and on
                several hosts. None: the shapes depend on each question's length alone, and an engine writes.
            engine: used instead of an engine of our own. It must have room for the questions and no other requests.
            journal: where answers are kept; None: they are forgotten after each call.
            backbone: `backbone_content` of the model, needed for a journal on disk.
            longest: tokens that the engine we make has room for, at least. Calls with this in common get the same bits.
        """
        self.model, self.bank, self.tokenizer, self.rows = model, bank, tokenizer, rows
        self.prefill_tokens = prefill_tokens
        self.engine, self.journal, self.backbone, self.longest = engine, journal, backbone, longest
        self.shapes = shapes or OpenShapes(model.config.max_positions)
        self.tokens = 0
        """tokens of the answers so far: each context once per adapter, also where adapters share it; each continuation;
        each token written"""
        self.seconds = 0.0
        """the time that took"""
        self.entries: dict[Any, Any] = {}
        """the adapter of each tenant in the last call"""
        self._planned = shapes is not None
        self._warned: set[Any] = set()
        """the tenants with a warning that their logits are not finite"""
        ends = stop_token_ids(tokenizer, model.config.eos_token_ids)
        self.stop_ids = engine.stop_ids if engine is not None else ends
        self._writing: str | None = None

    def answer(self, questions: Sequence[tuple[Any, Question]], what: str = "scoring") -> list[Answer]:
        """The answers to questions, each for a tenant of the bank or None, the base model. Equal questions are asked
        once.

        A tenant's answers all come from the adapter that its name has at the call, even if it is replaced meanwhile.

        Args:
            what: names the work where its progress is shown.

        Raises ValueError, before anything is computed, for an unknown tenant and for a question that does not end with
        its adapter's alora_invocation_tokens.
        """
        journal = AnswerJournal() if self.journal is None else self.journal
        entries = {tenant: self._entry(tenant) for tenant in dict.fromkeys(tenant for tenant, _ in questions)}
        self.entries = entries
        asked = [self._pending(tenant, entries[tenant], question, journal) for tenant, question in questions]
        distinct = {one.key: one for one in asked}
        left = [one for one in distinct.values() if one.key not in journal]
        for one in left:
            require_invocation(one.entry and one.entry.config, one.question.context, "context")
        known = len(distinct) - len(left)
        if journal.file and known:
            say(f"{known} of {len(distinct)} answers are in {journal.file} already")
        with Progress(what, len(distinct), unit="answer", done=known) as bar:
            last = time.perf_counter()
            found = self._answers(left, list(distinct.values()), journal)
            with using(mesh_of(self.model)), closing(found):
                for one, answer, tokens in found:
                    journal.add(one.key, answer)
                    self.tokens += tokens
                    now = time.perf_counter()
                    self.seconds, last = self.seconds + now - last, now
                    bar.advance(**{"tokens/s": round(self.tokens / self.seconds)})
                    interruption_point()
        journal.sync()
        found = [journal[one.key] for one in asked]
        self._warn_of_overflow(asked, found)
        return found

    def _warn_of_overflow(self, asked: Sequence[Pending], found: Sequence[Answer]) -> None:
        """Warns once per tenant if the logits of a written answer were not finite, also if the answer comes from the
        journal."""
        for one, answer in zip(asked, found, strict=True):
            if isinstance(answer, Written) and not answer.finite and one.tenant not in self._warned:
                self._warned.add(one.tenant)
                warn(f"an answer of {describe_tenant(one.tenant)} is empty, and counts as wrong: {NO_TOKEN_MESSAGE}")

    def _answers(self, left: list[Pending], distinct: list[Pending], journal: AnswerJournal) -> Answers:
        """The answers to the questions that are left, likelihoods first: the journal has them before texts follow."""
        yield from self._scored([one for one in left if isinstance(one.question, Likelihood)])
        greedy: dict[tuple, tuple[int, ...]] = {}  # the longest first tokens that greedy decoding is known to write
        for one in distinct:
            answer = journal[one.key] if isinstance(one.question, Likelihood) else None
            if isinstance(answer, Scored) and answer.greedy:
                greedy[context_of(one)] = max(greedy.get(context_of(one), ()), one.question.continuation, key=len)
        in_batches: list[Pending] = []
        by_engine: list[Pending] = []
        for one in left:
            if isinstance(one.question, Likelihood):
                continue
            known = known_answer(self.tokenizer, one.question, greedy.get(context_of(one), ()), self.stop_ids)
            if known is not None:
                yield one, known, 0
            elif self._planned or one.question.reads is not None:
                in_batches.append(one)
            else:
                by_engine.append(one)
        yield from self._in_batches(in_batches)
        if by_engine:
            yield from self._by_engine(by_engine, distinct)

    def _scored(self, pending: list[Pending]) -> Answers:
        seen: set[tuple] = set()
        asked = [(one.entry, one.question) for one in pending]
        rows = batch_rows(self.rows)
        for i, scored in likelihoods(self.model, self.bank, asked, rows, self.shapes):
            one = pending[i]
            new = 0 if context_of(one) in seen else len(one.question.context)
            seen.add(context_of(one))
            yield one, scored, new + len(one.question.continuation) - 1

    def _in_batches(self, pending: list[Pending]) -> Answers:
        asked = [(one.entry, one.question) for one in pending]
        given = batch_rows(self.rows), self.shapes, self.stop_ids
        for i, written in write_in_batches(self.model, self.bank, self.tokenizer, asked, *given):
            yield pending[i], written, len(pending[i].question.context) + written.tokens

    def _by_engine(self, pending: list[Pending], distinct: list[Pending]) -> Answers:
        asked = [one.question for one in distinct if isinstance(one.question, Generation)]
        engine = self.engine or self._own_engine(asked)  # one of our own has the same shapes after a resume
        with closing(write_by_engine(engine, pending)) as answers:
            for one, written in answers:
                yield one, written, len(one.question.context) + written.tokens

    def _own_engine(self, questions: list[Generation]) -> Engine:
        longest = rounded_up(max(self.longest, *map(tokens_to_write, questions)), 32)
        longest = min(longest, self.model.config.max_positions)
        sizes = {"slots": self.rows, "max_length": longest, "max_prefill_tokens": self.prefill_tokens}
        return Engine(self.model, self.bank, self.tokenizer, **sizes)  # pyright: ignore

    def _entry(self, tenant: Any) -> Any:
        return None if tenant is None or self.bank is None else self.bank.entry(tenant)

    def _pending(self, tenant: Any, entry: Any, question: Question, journal: AnswerJournal) -> Pending:
        question = question if entry else question._replace(reads=None)  # the base model makes no factors
        if journal.file is None:
            return Pending((version(entry), question), tenant, entry, question)
        if self._writing is None:
            self._writing = writing_content(self.tokenizer, self.stop_ids)
        dtype = getattr(self.bank, "dtype", "float32")  # a StackBank of a run has float32
        return Pending(key(question, entry, self.backbone, self._writing, dtype), tenant, entry, question)


def context_of(one: Pending) -> tuple:
    """The adapter, the context, and the tokens that the factors are made from."""
    return version(one.entry), one.question.context, one.question.reads


def tokens_to_write(question: Generation) -> int:
    """The tokens that an engine needs for a question: its context and the longest answer."""
    return len(question.context) + question.max_new_tokens
