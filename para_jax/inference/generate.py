"""generate: prompts of different lengths in one batch, prefilled once, then one compiled step per token.

The step takes the model as a flat list of arrays (flattening its modules again takes about a millisecond) and donates
the state. Tokens stay on the device. A few steps' tokens are fetched at a time, to see which rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.bank import AdapterBank
from ..adapters.rows import Adjustments, Rows, row_configs
from ..adapters.scope import require_invocation
from ..backbone.transformer import Transformer
from ..data.batches import right_padded, rounded_up
from ..data.examples import Prompt, encode_prompt, special_stop_ids, stop_token_ids, turn_stop_ids
from ..io.checks import shorten
from ..model.adapted import decode_step, prefill, stacked_state
from ..runtime.processes import full_arrays
from ..runtime.sharding import on_its_mesh
from .answer_text import AnswerText
from .draw import NO_TOKEN, NO_TOKEN_MESSAGE, RowSampling, draw, greedy, row_keys, row_sampling
from .sampling import Sampling

#: Steps between two looks at which rows have ended.
FETCH_EVERY = 8
#: Prompts are padded to a multiple of the first, the cache to a multiple of the second, so that few programs are
#: compiled.
PROMPT_MULTIPLE, CACHE_MULTIPLE = 16, 32


@on_its_mesh
def generate(
    model: Transformer,
    prompts: Sequence[Prompt],
    *,
    tokenizer,
    adapters: Adapter | Rows | AdapterBank | None = None,
    tenants: Sequence[str | None] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """What the model writes after each prompt, in one batch: the text before an end token or a stop text, without the
    white space at its ends. Another number of prompts, or a longest one of another length (rounded up to 16 tokens), is
    compiled again: for many prompts use Engine.

    Args:
        prompts: texts, or chat messages for the tokenizer's template.
        adapters: None, one adapter for every prompt, Rows with one per prompt, or a bank.
        tenants: with a bank, a tenant's name or None (the base model) for each prompt.
        temperature: 0 is greedy.
        top_k: draw from the k likeliest tokens only; 0: from all.
        top_p: draw only from the likeliest tokens that together have this probability.
        seed: prompt i is drawn with seed + i, so its answer does not depend on the other prompts.
        stop: texts that end an answer, special tokens too.

    Raises ValueError, before anything is computed, for a wrong argument, for a prompt that is too long, and for one
    that does not end with its adapter's alora_invocation_tokens. Raises it later where an answer's logits are
    not finite.

    >>> prompts, tenants = ["Hello", "Hello"], ["acme", None]
    >>> texts = generate(model, prompts, tokenizer=tokenizer, adapters=bank, tenants=tenants, max_new_tokens=4)
    >>> len(texts)
    2
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is a {type(prompts).__name__}; give a list of texts or of message lists")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop)
    given, adapters = adapters, rows_of_tenants(adapters, tenants, len(prompts))
    ids = encoded_prompts(tokenizer, prompts)
    for i, (config, row) in enumerate(zip(prompt_configs(given, tenants, len(prompts)), ids, strict=False)):
        require_invocation(config, row, f"prompt {i}")
    turns = [turn_stop_ids(tokenizer, prompt) for prompt in prompts]
    stop_ids = stop_token_ids(tokenizer, model.config.eos_token_ids) + special_stop_ids(tokenizer, sampling.stop)
    if len(set(turns)) == 1:
        stop_ids += turns[0]
    answers = [AnswerText(tokenizer, tuple(sampling.stop)) for _ in prompts]
    ended = [False] * len(answers)

    def add_tokens(rows: list[list[int]]) -> list[bool]:
        """Adds the new tokens to the answers, and returns which answers a stop text has ended."""
        for i, (answer, row) in enumerate(zip(answers, rows, strict=True)):
            for token in before_stop(row, turns[i])[len(answer.pieces) :]:  # one piece per token so far
                if not ended[i]:
                    if token == NO_TOKEN:
                        raise ValueError(f"prompt {i}: {NO_TOKEN_MESSAGE}")
                    ended[i] = answer.add(token)
        return ended

    watch = add_tokens if sampling.stop else None  # a stop text may end the answers before their end tokens do
    add_tokens(generate_tokens(model, adapters, ids, sampling, stop_ids=stop_ids, ended=watch))
    for answer, over in zip(answers, ended, strict=True):
        if not over:
            answer.finish()
    return [str(answer) for answer in answers]


@on_its_mesh
def generate_tokens(
    model: Transformer,
    adapters: Adapter | Rows | Adjustments | None,
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    ended: Callable[[list[list[int]]], list[bool]] | None = None,
    length: int | None = None,
    max_length: int | None = None,
    begin: Callable | None = None,
    most: Sequence[int] | None = None,
) -> list[list[int]]:
    """The token ids that follow each prompt, up to the first of `stop_ids`. A row whose logits are not finite ends with
    NO_TOKEN.

    Args:
        sampling: of every prompt; prompt i has the seed + i. Its stop texts are ignored.
        ended: which rows' tokens so far are enough; the loop stops early when all rows have ended.
        length, max_length: padded tokens of the prompts, and tokens per row that the cache holds; default: the least
            that is needed, rounded up. Calls that give the same ones share their programs.
        begin: is called instead of `prefill`, with its arguments.
        most: the new tokens of each prompt that count, at most those of `sampling`, which is the default. A row may go
            on after them.
    """
    most = [sampling.max_new_tokens] * len(prompt_ids) if most is None else most
    check_prompts(model, adapters, prompt_ids, most)
    longest, last = max(map(len, prompt_ids)), sampling.max_new_tokens
    length = length or int(rounded_up(longest, PROMPT_MULTIPLE))
    tokens, lengths = right_padded(prompt_ids, len(prompt_ids), length)
    needed = max(rounded_up(longest + last, CACHE_MULTIPLE), length)
    logits, state = (begin or prefill)(model, adapters, tokens, lengths, max_length=max_length or needed)
    if model.layout == "stacked":
        state = stacked_state(state)
    settings = None
    if sampling.temperature > 0:
        settings = row_sampling([sampling.for_index(i) for i in range(len(tokens))])
    leaves, treedef = jax.tree.flatten(model)
    token = choose(logits, settings, 0)
    written, pending = np.zeros((len(tokens), 0), np.int32), [token]
    for position in range(1, last + 1):
        if position % FETCH_EVERY == 0 or position == last:
            written, pending = np.column_stack([written, *full_arrays(pending)]), []
            rows = [up_to_no_token(before_stop(row, stop_ids)) for row in written.tolist()]
            enough = ended(rows) if ended else [len(row) >= count for row, count in zip(rows, most, strict=True)]
            if all(len(row) < written.shape[1] or over for row, over in zip(rows, enough, strict=True)):
                break
        if position < last:
            token, state = next_token(treedef, leaves, state, token, settings, position)
            pending.append(token)
    return rows


# ------------------------------------------------------------------------------------------------------------ programs


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_token(treedef, leaves, state, token, sampling, position):
    """Each row's next token after `token`, int32 [batch], and the next state; the given state is donated."""
    logits, state = decode_step(jax.tree.unflatten(treedef, leaves), state, token)
    return choose(logits, sampling, position), state


@jax.jit
def choose(logits, sampling: RowSampling | None, position):
    """Each row's token at `position` of its answer; greedy without `sampling`."""
    if sampling is None:
        return greedy(logits)
    keys = row_keys(sampling.seeds, position)
    return draw(logits, keys, sampling.temperature, sampling.top_k, sampling.top_p)


# -------------------------------------------------------------------------------------------------------------- checks


def encoded_prompts(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of each prompt. An error names the prompt by its index."""
    ids = []
    for i, prompt in enumerate(prompts):
        try:
            ids.append(encode_prompt(tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
    return ids


def rows_of_tenants(adapters, tenants: Sequence[str | None] | None, prompts: int) -> Adapter | Rows | None:
    """The adapters as given, or the Rows of a bank's tenants, one per prompt."""
    if not isinstance(adapters, AdapterBank):
        if tenants is not None:
            raise ValueError(f"tenants is {shorten(tenants)}, but adapters is no bank; give adapters=AdapterBank(...)")
        return adapters
    if isinstance(tenants, str) or not isinstance(tenants, Sequence) or len(tenants) != prompts:
        raise ValueError(
            f"tenants is {shorten(tenants)}; give a name or None (the base model) for each of {prompts} prompts"
        )
    return adapters.rows(tenants)


def prompt_configs(adapters, tenants: Sequence[str | None] | None, prompts: int) -> Iterable[Any]:
    """The config of the adapter that answers each prompt; None for the base model."""
    if isinstance(adapters, AdapterBank):
        return [None if tenant is None else adapters.entry(tenant).config for tenant in tenants or ()]
    return row_configs(adapters, prompts)


def check_prompts(model, adapters, prompt_ids: Sequence[list[int]], most: Sequence[int]) -> None:
    """Raises ValueError for prompts that the model or the adapters cannot answer with `most` new tokens each."""
    if not len(prompt_ids):
        raise ValueError("prompts is empty; give at least one")
    for i, (ids, max_new_tokens) in enumerate(zip(prompt_ids, most, strict=True)):
        if not len(ids):
            raise ValueError(f"prompt {i} has no tokens; give at least one")
        if len(ids) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {i}: {len(ids)} tokens and max_new_tokens {max_new_tokens} are more than the model's "
                f"{model.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )


def before_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first of `stop_ids`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))]


def up_to_no_token(tokens: list[int]) -> list[int]:
    """The tokens up to the first NO_TOKEN."""
    return tokens[: tokens.index(NO_TOKEN) + 1] if NO_TOKEN in tokens else tokens
