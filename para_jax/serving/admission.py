"""Turns a request into samples, or says why it cannot be served."""

from __future__ import annotations

from collections.abc import Iterable

from ..adapters.bank import AdapterBank, Entry
from ..adapters.scope import require_invocation
from ..backbone.transformer import Transformer
from ..data.examples import Ids, Prompt, encode_prompt, most_characters, special_stop_ids, turn_stop_ids
from ..inference.grammar import Grammars
from ..io.checks import shorten
from .prefix_cache import PrefixCache
from .request import Request, check_request
from .ticket import Sample, Ticket


class Admission:
    """What requests are checked against. Any thread may use it."""

    def __init__(
        self,
        model: Transformer,
        bank: AdapterBank | None,
        tokenizer,
        max_length: int,
        max_logprobs: int,
        ends: Iterable[int],
        slots: int,
        cache: PrefixCache,
    ):
        """
        Args:
            max_length: tokens per row, prompt and answer.
            max_logprobs: alternatives per token; 0: no log-probabilities.
            ends: token ids that end every answer.
            slots, cache: the rows that decode together, and the blocks that they share.
        """
        self.max_logprobs, self.ends, self.slots, self.cache = max_logprobs, frozenset(ends), slots, cache
        self.bank, self.tokenizer, self.max_length = bank, tokenizer, max_length
        self.vocab_size = model.config.vocab_size
        turn = turn_stop_ids(tokenizer, [{"role": "user", "content": "a"}]) if tokenizer.chat_template else ()
        self.grammars = Grammars(tokenizer, self.vocab_size, {*ends, *turn})
        self.most_characters = most_characters(tokenizer, max_length)

    def samples(self, ticket: Ticket, entry: Entry | None) -> list[Sample]:
        """The samples of a request. Raises ValueError for one that cannot be served.

        Args:
            entry: the adapter that answers; None: the one that the request's tenant has now.
        """
        request = ticket.request
        check_request(request)
        if entry is None:
            entry = self._entry(request.tenant)  # fixed now: a later replacement does not change it
        elif self.bank is None or not self.bank.takes(entry):
            raise ValueError(f"entry: {shorten(entry)} does not fit the engine's bank; give bank.entry(name)")
        ids = self._ids(request.prompt)
        self._check_logprobs(request, ids, entry)
        require_invocation(entry and entry.config, ids[: request.context_length], "prompt")
        if len(ids) + int(request.max_new_tokens) > self.max_length:  # an int8 of NumPy would overflow
            raise ValueError(
                f"prompt: {len(ids)} tokens and max_new_tokens {request.max_new_tokens} are more than the engine's "
                f"max_length {self.max_length}; shorten the prompt, or ask for fewer tokens"
            )
        stops = special_stop_ids(self.tokenizer, request.stop_texts) + tuple(request.stop_token_ids)
        stops += () if request.ignore_eos else turn_stop_ids(self.tokenizer, request.prompt)
        stops += () if request.structured_outputs is None else self.grammars.ends
        self._check_beams(request, ids, {*stops, *(() if request.ignore_eos else self.ends)})
        samples = [Sample(ticket, index, ids, entry, stops) for index in range(request.n)]
        guide = None if request.structured_outputs is None else self.grammars.guide(request.structured_outputs)
        for sample in samples:
            sample.follow_text(self.tokenizer)
            sample.guide = guide and guide.copy()
        return samples

    def _check_beams(self, request: Request, ids: list[int], ends: set[int]) -> None:
        beams, prompt = request.num_beams, len(ids)
        if beams == 1:
            return
        if beams > self.slots:
            raise ValueError(f"num_beams is {beams}; give at most the engine's slots, {self.slots}")
        if beams > (most := max(self.max_logprobs - len(ends), 1)):
            raise ValueError(
                f"num_beams is {beams}; give at most {most}, the engine's max_logprobs {self.max_logprobs} without "
                f"{len(ends)} end tokens"
            )
        whole = prompt // self.cache.size
        blocks = whole + 1 + beams * (self.cache.blocks_of(prompt + request.max_new_tokens - 1) - whole)
        if blocks > self.cache.blocks:
            raise ValueError(
                f"num_beams: {beams} answers of {request.max_new_tokens} tokens need {blocks} blocks of the KV cache, "
                f"which has {self.cache.blocks}; ask for fewer tokens or beams"
            )

    def _check_logprobs(self, request: Request, ids: list[int], entry: Entry | None) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(request, name)
            if asked is not None and not 0 <= asked <= self.max_logprobs > 0:
                raise ValueError(f"{name} is {asked}; give at most the engine's max_logprobs, {self.max_logprobs}")
        if request.prompt_logprobs is None:
            return
        context = request.context_length
        if context is None:
            if entry is not None and self.bank is not None and self.bank.depends_on_prompt_end(entry):
                raise ValueError(
                    f"context_length is missing: the adapter of tenant {shorten(request.tenant)} depends on where its "
                    "prompt ends; say how many of these tokens are the prompt"
                )
        elif context > len(ids):
            raise ValueError(f"context_length is {context}; give at most {len(ids)}, the tokens of the prompt")
        elif context < len(ids) and request.max_new_tokens > 1:
            raise ValueError(
                f"context_length is {context} of {len(ids)} tokens, so at most one more can be drawn; give "
                "max_new_tokens 0 or 1, or leave context_length out"
            )

    def _entry(self, tenant: str | None) -> Entry | None:
        if tenant is None:
            return None
        if self.bank is None:
            raise ValueError(f"tenant: {shorten(tenant)} is unknown, because the engine has no bank; give None")
        return self.bank.entry(tenant)

    def _ids(self, prompt: Prompt | Ids) -> list[int]:
        if isinstance(prompt, tuple):
            ids = list(prompt)
        else:
            ids = encode_prompt(self.tokenizer, prompt, most=self.most_characters, may_be_blank=True)
        if not ids or not 0 <= min(ids) <= max(ids) < self.vocab_size:  # JAX would take the nearest id that there is
            raise ValueError(
                f"prompt: give token ids from 0 to {self.vocab_size - 1}, the model's vocabulary; "
                f"got {shorten(sorted(ids)[-1:])}; use its tokenizer"
            )
        return ids
