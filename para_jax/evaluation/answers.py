"""One pass over questions of many adapters: likelihoods in batches that mix them, then what has to be written, by the
engine. What a journal holds is not asked again."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from ..adapters.bank import AdapterBank, Entry
from ..backbone.transformer import Transformer
from ..config import require, shorten
from ..data.examples import stop_token_ids
from ..devices import say
from ..inference.generate import up_to_multiple
from ..serving.engine import Engine
from ..serving.request import Completion, Request
from .journal import Journal
from .likelihood import likelihoods
from .questions import Answer, Asked, Generation, Likelihood, Scored, Written, key, writing_content
from .shapes import batch_rows

#: A question, and the tenant that it is for; None is the base model.
Question = tuple[str | None, Asked]


class Pass:
    """A model with a bank's tenants, and the answers that they have given."""

    def __init__(self, model: Transformer, bank: AdapterBank | None, tokenizer, backbone: str, journal: Journal):
        """
        Args:
            backbone: `backbone_content` of the model.
        """
        self.model, self.bank, self.tokenizer = model, bank, tokenizer
        self.backbone, self.journal = backbone, journal
        self.tokens = 0
        """tokens computed so far: each context once for its adapter, each continuation, and each token written"""
        self.seconds = 0.0
        """that took"""
        self.entries: dict[str | None, Entry | None] = {}
        """by tenant: the adapter that answered last"""
        self._last, self._compiled = 0.0, set()
        self._used: Engine | None = None
        self._submitted: dict[str, Generation] = {}  # to it, and not answered yet
        self._writing = writing_content(tokenizer, stop_token_ids(tokenizer, model.config.eos_token_ids))

    def answer(self, questions: Sequence[Question], *, rows: int, engine: Engine | None = None) -> list[Answer]:
        """The questions' answers; equal questions are asked once.

        Args:
            rows: of a batch, and slots of the engine that is made for what has to be written.
            engine: is used in place of that. It must have room for the questions, and serves nobody else meanwhile.

        A tenant's answers all come from the adapter that its name has at the call, whatever replaces it meanwhile.

        Raises ValueError, before anything is computed, for an unknown tenant, for what the model has no room for, and
        for a journal's answer of the wrong kind.
        """
        entries = {tenant: self._entry(tenant) for tenant in dict.fromkeys(tenant for tenant, _ in questions)}
        self.entries |= entries
        keys = [key(asked, entries[tenant], self.backbone, self._writing) for tenant, asked in questions]
        left = {k: question for k, question in zip(keys, questions, strict=True) if k not in self.journal}
        for k, (_, asked) in zip(keys, questions, strict=True):
            kind = Scored if isinstance(asked, Likelihood) else Written
            if k in self.journal and not isinstance(self.journal[k], kind):
                raise ValueError(f"{self.journal.file}: answers {k} as another question; choose another folder")
        for _, asked in left.values():
            check_room(asked, self.model, engine)
        distinct = len(set(keys))
        if self.journal.file and len(left) < distinct:
            say(f"{distinct - len(left)} of {distinct} answers are in {self.journal.file} already")
        ranked = [(k, entries[tenant], asked) for k, (tenant, asked) in left.items() if isinstance(asked, Likelihood)]
        written = [(k, tenant, asked) for k, (tenant, asked) in left.items() if isinstance(asked, Generation)]
        with tqdm(total=distinct, initial=distinct - len(left), desc="answers", disable=None) as bar:
            self._last = time.perf_counter()
            self._score(ranked, rows, bar)
            if written:
                asked_for = [asked for _, asked in questions if isinstance(asked, Generation)]
                engine = engine or self._engine(asked_for, rows)  # of the same shapes when some are answered already
                self._write(engine, written, entries, bar)
        self.journal.sync()
        return [self.journal[k] for k in keys]

    def _score(self, ranked: list[tuple[str, Entry | None, Likelihood]], rows: int, bar: tqdm) -> None:
        seen: set[tuple] = set()
        pairs = [(entry, asked) for _, entry, asked in ranked]
        for i, scored in likelihoods(self.model, self.bank, pairs, batch_rows(rows), self._compiled):
            k, entry, asked = ranked[i]
            context = (entry and entry.content, asked.context)
            self.tokens += len(asked.continuation) - 1 + (0 if context in seen else len(asked.context))
            seen.add(context)
            self._keep(k, scored, bar)

    def _write(self, engine: Engine, written: list[tuple[str, str | None, Generation]], entries: dict, bar: tqdm):
        """Keeps what the engine writes. Whatever ends this, Ctrl-C too, the engine has no request of ours then."""
        if engine is self._used:
            self._withdraw(engine)  # where that was interrupted, too
        expected = "none, for their answers would come here; take them with run()"
        require(not engine.open, "engine: open requests", engine.open, expected)
        self._used, self._submitted = engine, {}
        ordered = sorted(written, key=lambda item: (len(item[2].context), item[2].context))
        at_once = engine.queue_limit or len(ordered)
        try:
            for start in range(0, len(ordered), at_once):
                for k, tenant, asked in ordered[start : start + at_once]:
                    self._submitted[k] = asked
                    engine.submit(as_request(k, tenant, asked), entry=entries[tenant])
                for completion in engine.run():
                    self._take(completion, bar)
        finally:
            self._withdraw(engine)

    def _take(self, completion: Completion, bar: tqdm) -> None:
        asked = self._submitted.pop(str(completion.id), None)
        if asked is None:
            raise ValueError(
                f"engine: others submitted request {shorten(completion.id)} during an evaluation, and its answer is "
                "lost. Give the evaluation an engine of its own"
            )
        if completion.error is not None:
            raise ValueError(f"a request was not answered: {completion.error}")
        self.tokens += len(asked.context) + len(completion.tokens)
        self._keep(str(completion.id), Written(completion.text, len(completion.tokens)), bar)

    def _withdraw(self, engine: Engine) -> None:
        """Takes back what is not answered. If this is interrupted as well, the next call of `answer` does it."""
        for k in self._submitted:
            engine.cancel(k)
        if self._submitted:
            for _ in engine.run():
                pass
        self._used, self._submitted = None, {}

    def _keep(self, k: str, answer: Answer, bar: tqdm) -> None:
        self.journal.add(k, answer)
        bar.update()
        self.seconds += time.perf_counter() - self._last
        self._last = time.perf_counter()
        bar.set_postfix_str(f"{self.tokens / self.seconds:.0f} tokens/s", refresh=False)

    def _engine(self, asked: list[Generation], rows: int) -> Engine:
        longest = up_to_multiple(max(len(one.context) + one.max_new_tokens for one in asked), 32)
        longest = min(longest, self.model.config.max_positions)
        return Engine(self.model, self.bank, self.tokenizer, slots=rows, max_length=longest)

    def _entry(self, tenant: str | None) -> Entry | None:
        if tenant is None:
            return None
        require(self.bank is not None, "tenant", tenant, "None, for there is no bank")
        return self.bank.entry(tenant)  # pyright: ignore[reportOptionalMemberAccess]


def as_request(id: str, tenant: str | None, asked: Generation) -> Request:
    how = (asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p, asked.seed, asked.stop)
    return Request(asked.context, tenant, *how, id=id, stop_token_ids=asked.stop_ids)


def check_room(asked: Asked, model: Transformer, engine: Engine | None) -> None:
    """Raises ValueError where a question has no token, one that the model does not know, or more than there is room
    for."""
    longest, known = model.config.max_positions, model.config.vocab_size
    require(len(asked.context) >= 1, "context", asked.context, "at least one token")
    ids = asked.context
    if isinstance(asked, Likelihood):
        require(len(asked.continuation) >= 1, "continuation", asked.continuation, "at least one token")
        ids = (*ids, *asked.continuation)
        room, needed = longest, len(ids) - 1
    else:
        room, needed = engine.max_length if engine else longest, len(ids) + asked.max_new_tokens
    outside = [token for token in ids if not 0 <= token < known]
    require(not outside, "token id", outside[:1], f"0 to {known - 1}, the model's tokens")
    whose = "the engine's max_length" if engine and room == engine.max_length else "the model's positions"
    require(needed <= room, "tokens of a request", needed, f"at most {room}, {whose}")
