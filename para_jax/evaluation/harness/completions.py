"""ParaCompletions: lm-eval's `local-completions` for `para-jax serve`. This module needs lm-eval."""

from __future__ import annotations

from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI


class TokensOfContext(list):
    """The ids of a context and its continuation, with the number of those of the context."""

    context_length: int


@register_model("para-completions")
class ParaCompletions(LocalCompletionsAPI):
    """lm-eval's `local-completions`, which also tells the server where each context ends. An adapter that reads its
    prompt needs that: a score is the continuation's after a context, and the adapter must read the context alone."""

    def batch_loglikelihood_requests(self, chunks):
        inputs, lengths, keys = super().batch_loglikelihood_requests(chunks)  # pyright: ignore[reportAttributeAccessIssue]
        for i, (ids, length) in enumerate(zip(inputs, lengths, strict=True)):
            inputs[i] = TokensOfContext(ids)
            inputs[i].context_length = length
        return inputs, lengths, keys

    def _create_payload(self, messages, generate=False, **options) -> dict:
        payload = super()._create_payload(messages, generate, **options)  # pyright: ignore[reportAttributeAccessIssue]
        if not generate:
            if not all(isinstance(ids, TokensOfContext) for ids in messages):
                raise ValueError("model_args: tokenized_requests is False; a context's length needs token ids")
            payload["context_length"] = [ids.context_length for ids in messages]
        return payload
