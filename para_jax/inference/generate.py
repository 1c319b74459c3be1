"""generate: prompts of different lengths in one batch, prefilled once, then one compiled step a token.

The step takes the model as a flat list of arrays (flattening its modules anew takes about a millisecond) and donates
the state. Tokens stay on the device, and are fetched a few steps at a time to see which rows have ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.bank import AdapterBank
from ..adapters.rows import Adjustments, Rows
from ..backbone.transformer import Transformer
from ..config import require
from ..data.examples import Prompt, encode_prompt, special_stop_ids, stop_token_ids, turn_stop_ids
from ..model import decode_step, prefill, stacked_state
from ..processes import gathered
from .answer_text import AnswerText, text_of
from .sampling import draw, greedy, row_keys

#: Steps between two looks at which rows have ended.
FETCH_EVERY = 8
#: Prompts are padded to a multiple of the first, the cache to one of the second, so that few programs are compiled.
PROMPT_MULTIPLE, CACHE_MULTIPLE = 16, 32


class Sampling(NamedTuple):
    """How each row's tokens are drawn, [batch] each; see sampling.sample."""

    seeds: jax.Array | np.ndarray
    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray


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
    """What the model writes after each prompt, in one batch: the text before an end token or a stop string.

    Args:
        prompts: texts, or chat messages for the tokenizer's template.
        adapters: None, one adapter for every prompt, Rows: one a prompt, or a bank.
        tenants: with a bank, a tenant's name or None (the base model) for each prompt.
        temperature: 0 is greedy.
        top_k: draw from the k likeliest tokens only; 0: from all.
        top_p: draw from the likeliest tokens only that together have this probability.
        seed: prompt i is drawn with seed + i, whatever stands beside it.
        stop: texts that end a completion; special tokens too.

    Raises ValueError before anything is computed where an argument is wrong or a prompt too long for the model.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(
            f"prompts: {type(prompts).__name__} is not possible; expected a list of texts or of message lists"
        )
    adapters = of_tenants(adapters, tenants, len(prompts))
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop: {stop!r} is not possible; expected texts that are not empty")

    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    turns = [turn_stop_ids(tokenizer, prompt) for prompt in prompts]
    answers = [AnswerText(tokenizer, stop) for _ in prompts]
    over = [False] * len(answers)

    def ended(rows: list[list[int]]) -> list[bool]:
        for i, (answer, row) in enumerate(zip(answers, map(before_stop, rows, turns), strict=True)):
            for token in [] if over[i] else row[len(answer.pieces) :]:
                over[i] = answer.add(token)
                if over[i]:
                    break
        return over

    written = generate_tokens(
        model,
        adapters,
        ids,
        stop_ids=stop_token_ids(tokenizer, model.config.eos_token_ids)
        + special_stop_ids(tokenizer, stop)
        + (turns[0] if len(set(turns)) == 1 else ()),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        ended=ended if stop else None,
    )
    if not stop:
        return [text_of(tokenizer, before_stop(tokens, turn)) for tokens, turn in zip(written, turns, strict=True)]
    for answer, stopped in zip(answers, ended(written), strict=True):
        if not stopped:
            answer.finish()
    return [str(answer) for answer in answers]


def generate_tokens(
    model: Transformer,
    adapters: Adapter | Rows | Adjustments | None,
    prompt_ids: Sequence[list[int]],
    *,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    ended: Callable[[list[list[int]]], list[bool]] | None = None,
    length: int | None = None,
    max_length: int | None = None,
) -> list[list[int]]:
    """The token ids that follow each prompt, up to the first of `stop_ids`; the other arguments as in generate.

    Args:
        ended: which rows' tokens so far are enough; the loop stops early when all rows have ended.
        length, max_length: padded tokens of the prompts, and tokens a row that the cache holds; default: the least that
            is needed, rounded up. Calls that give the same ones share their programs.
    """
    check(model, adapters, prompt_ids, max_new_tokens, temperature, top_k, top_p, seed)
    lengths = np.array([len(ids) for ids in prompt_ids], np.int32)
    tokens = np.zeros((len(prompt_ids), length or up_to_multiple(lengths.max(), PROMPT_MULTIPLE)), np.int32)
    for row, ids in zip(tokens, prompt_ids, strict=True):
        row[: len(ids)] = ids
    needed = max(up_to_multiple(lengths.max() + max_new_tokens, CACHE_MULTIPLE), tokens.shape[1])
    max_length = max_length or needed
    logits, state = prefill(model, adapters, tokens, lengths, max_length=max_length)
    state = stacked_state(state) if model.layout == "stacked" else state
    sampling = row_sampling(len(tokens), temperature, top_k, top_p, seed) if temperature > 0 else None
    leaves, treedef = jax.tree.flatten(model)
    token = choose(logits, sampling, 0)
    written, pending = np.zeros((len(tokens), 0), np.int32), [token]
    for position in range(1, max_new_tokens + 1):
        if position % FETCH_EVERY == 0 or position == max_new_tokens:
            written, pending = np.column_stack([written, *gathered(pending)]), []
            rows = [before_stop(row, stop_ids) for row in written.tolist()]
            enough = ended(rows) if ended else [False] * len(rows)
            if all(len(row) < written.shape[1] or over for row, over in zip(rows, enough, strict=True)):
                break
        if position < max_new_tokens:
            token, state = next_token(treedef, leaves, state, token, sampling, position)
            pending.append(token)
    return rows


# ------------------------------------------------------------------------------------------------------------ programs


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_token(treedef, leaves, state, token, sampling, position):
    """Each row's next token after `token`, int32 [batch], and the next state; the given state is donated."""
    logits, state = decode_step(jax.tree.unflatten(treedef, leaves), state, token)
    return choose(logits, sampling, position), state


@jax.jit
def choose(logits, sampling: Sampling | None, position):
    """Each row's token at `position` of its completion; greedy without `sampling`."""
    if sampling is None:
        return greedy(logits)
    keys = row_keys(sampling.seeds, position)
    return draw(logits, keys, sampling.temperature, sampling.top_k, sampling.top_p)


def row_sampling(batch: int, temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
    return Sampling(
        ((seed + np.arange(batch)) % 2**32).astype(np.uint32),
        np.full(batch, temperature, np.float32),
        np.full(batch, top_k, np.int32),
        np.full(batch, top_p, np.float32),
    )


# -------------------------------------------------------------------------------------------------------------- checks


def of_tenants(adapters, tenants: Sequence[str | None] | None, prompts: int) -> Adapter | Rows | None:
    """The adapters, or the Rows of a bank's tenants, one a prompt."""
    if not isinstance(adapters, AdapterBank):
        given = "with adapters=AdapterBank(...); None without a bank"
        require(tenants is None, "tenants", tenants, f"names {given}")
        return adapters
    named = not isinstance(tenants, str) and isinstance(tenants, Sequence) and len(tenants) == prompts
    require(named, "tenants", tenants, f"a tenant's name or None (the base model) for each of {prompts} prompts")
    return adapters.rows(tenants or ())


def check(model, adapters, prompt_ids, max_new_tokens, temperature, top_k, top_p, seed) -> None:
    require(len(prompt_ids) > 0, "prompts", prompt_ids, "at least one")
    if isinstance(adapters, Rows) and adapters.batch != len(prompt_ids):
        raise ValueError(
            f"adapters: Rows for {adapters.batch} rows; expected one for each of {len(prompt_ids)} prompts"
        )
    require(
        whole(max_new_tokens) and max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a whole number, at least 1"
    )
    require(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "a number of at least 0")
    require(whole(top_k) and 0 <= top_k < 2**31, "top_k", top_k, "a whole number of at least 1, or 0: all tokens")
    require(0 < top_p <= 1, "top_p", top_p, "a probability above 0, at most 1")
    require(whole(seed) and 0 <= seed < 2**32, "seed", seed, "a whole number from 0 to 2**32 - 1")
    for i, ids in enumerate(prompt_ids):
        require(len(ids) > 0, f"prompt {i}", ids, "at least one token")
        if len(ids) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {i}: {len(ids)} tokens and max_new_tokens {max_new_tokens} are more than the model's "
                f"{model.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )


def whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def up_to_multiple(count: int, multiple: int) -> int:
    return -(-int(count) // multiple) * multiple


def before_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first of `stop_ids`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))]
