"""Turns a request into samples, or says why it cannot be served."""

from __future__ import annotations

from ..adapters.bank import AdapterBank, Entry
from ..adapters.invocation import require_invocation
from ..backbone.transformer import Transformer
from ..config import shorten
from ..data.examples import Ids, Prompt, encode_prompt, most_characters, special_stop_ids, turn_stop_ids
from .request import check_request
from .ticket import Sample, Ticket


class Admission:
    """What requests are checked against. Any thread may use it."""

    def __init__(self, model: Transformer, bank: AdapterBank | None, tokenizer, max_length: int, limits: dict):
        """
        Args:
            max_length: tokens per row, prompt and answer.
            limits: samples that may wait, by the name of the engine's argument; None: no limit.
        """
        self.bank, self.tokenizer, self.max_length, self.limits = bank, tokenizer, max_length, limits
        self.vocab_size = model.config.vocab_size
        self.most_characters = most_characters(tokenizer, max_length)

    def samples(self, ticket: Ticket, entry: Entry | None) -> list[Sample]:
        """The samples of a request. Raises ValueError for one that cannot be served.

        Args:
            entry: the adapter that answers; None: the one that the request's tenant has now.
        """
        request = ticket.request
        check_request(request)
        for name, limit in self.limits.items():
            if limit is not None and request.n > limit:
                raise ValueError(f"n: {request.n} samples are more than the engine's {name}, {limit}; ask for fewer")
        if entry is None:
            entry = self._entry(request.tenant)
        ids = self.ids(request.prompt)
        require_invocation(entry and entry.config, ids, "prompt")
        if len(ids) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt: {len(ids)} tokens and max_new_tokens {request.max_new_tokens} are more than the engine's "
                f"max_length {self.max_length}; shorten the prompt, or ask for fewer tokens"
            )
        stops = special_stop_ids(self.tokenizer, request.stop_texts) + turn_stop_ids(self.tokenizer, request.prompt)
        stops += tuple(request.stop_token_ids)
        samples = [Sample(ticket, index, ids, entry, stops) for index in range(request.n)]
        for sample in samples:
            sample.follow_text(self.tokenizer)
        return samples

    def _entry(self, tenant: str | None) -> Entry | None:
        if tenant is None:
            return None
        if self.bank is None:
            raise ValueError(f"tenant: {shorten(tenant)} is unknown, because the engine has no bank; give None")
        return self.bank.entry(tenant)

    def ids(self, prompt: Prompt | Ids) -> list[int]:
        """The token ids of a prompt. Raises ValueError for one that is none."""
        if isinstance(prompt, tuple):
            ids = list(prompt)
        else:
            ids = encode_prompt(self.tokenizer, prompt, most=self.most_characters)
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"prompt: token id {max(ids)} is not below {self.vocab_size}, the size of the model's "
                "vocabulary; use its tokenizer"
            )
        return ids
