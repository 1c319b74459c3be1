"""generate: prompts of different lengths in one batch, prefilled once, then one compiled step per token.

The step takes the model as a flat list of arrays (flattening its modules again takes about a millisecond) and donates
the state. Tokens stay on the device. A few steps' tokens are fetched at a time, to see which rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.bank import AdapterBank
from ..adapters.rows import Adjustments, Rows, row_configs
from ..adapters.scope import require_invocation
from ..backbone.transformer import Transformer
from ..data.batches import right_padded, rounded_up
from ..data.examples import Prompt, encode_prompt, special_stop_ids, stop_token_ids, turn_stop_ids
from ..io.checks import shorten
from ..model.adapted import StackedState, decode_step, prefill, stacked_state
from ..runtime.processes import full_arrays
from ..runtime.sharding import on_its_mesh
from .answer_text import AnswerText
from .beams import BeamSearch
from .draw import NO_TOKEN, NO_TOKEN_MESSAGE, RowSampling, draw, greedy, only_allowed, row_keys, row_sampling
from .grammar import Grammars, Guide
from .logprobs import logprobs_of
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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    structured_outputs: dict | None = None,
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
        num_beams: beams of a beam search; 1: none. It takes no temperature and no stop texts.
        length_penalty: a beam's score is the sum of its log-probabilities / length**length_penalty.
        structured_outputs: what every answer must be, as in Request: {"json": schema}, {"regex": pattern}, ... An
            answer that max_new_tokens cuts is the beginning of one.

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
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop, num_beams, length_penalty)
    given, adapters = adapters, rows_of_tenants(adapters, tenants, len(prompts))
    ids = encoded_prompts(tokenizer, prompts)
    for i, (config, row) in enumerate(zip(prompt_configs(given, tenants, len(prompts)), ids, strict=False)):
        require_invocation(config, row, f"prompt {i}")
    turns = [turn_stop_ids(tokenizer, prompt) for prompt in prompts]
    stop_ids = stop_token_ids(tokenizer, model.config.eos_token_ids) + special_stop_ids(tokenizer, sampling.stop)
    if len(set(turns)) == 1:
        stop_ids += turns[0]
    guides = None
    if structured_outputs is not None:
        if num_beams > 1:
            raise ValueError("structured_outputs and num_beams do not go together; leave one of them out")
        stop_ids += tuple({token for turn in turns for token in turn})
        guide = Grammars(tokenizer, model.config.vocab_size, stop_ids).guide(structured_outputs)
        guides = [guide.copy() for _ in prompts]
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

    if num_beams > 1:
        searches = beam_searches(model, adapters, ids, sampling, [{*stop_ids, *turn} for turn in turns])
        add_tokens([before_stop(search.answers[0].tokens, stop_ids) for search in searches])
    else:
        watch = add_tokens if sampling.stop else None  # a stop text may end the answers before their end tokens do
        add_tokens(generate_tokens(model, adapters, ids, sampling, stop_ids=stop_ids, ended=watch, guides=guides))
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
    guides: Sequence[Guide] | None = None,
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
        guides: what each answer must follow. Each step then waits for the tokens of the last one.
    """
    most = [sampling.max_new_tokens] * len(prompt_ids) if most is None else most
    check_prompts(model, adapters, prompt_ids, most)
    logits, state = prefilled(model, adapters, prompt_ids, sampling, length, max_length, begin)
    last, settings = sampling.max_new_tokens, None
    if sampling.temperature > 0:
        settings = row_sampling([sampling.for_index(i) for i in range(len(prompt_ids))])
    leaves, treedef = jax.tree.flatten(model)
    token = choose(logits, settings, 0, guides and allowed_tokens(guides, [[] for _ in guides]))
    written, pending = np.zeros((len(prompt_ids), 0), np.int32), [token]
    for position in range(1, last + 1):
        if guides or position % FETCH_EVERY == 0 or position == last:
            written, pending = np.column_stack([written, *full_arrays(pending)]), []
            rows = [up_to_no_token(before_stop(row, stop_ids)) for row in written.tolist()]
            enough = ended(rows) if ended else [len(row) >= count for row, count in zip(rows, most, strict=True)]
            if all(len(row) < written.shape[1] or over for row, over in zip(rows, enough, strict=True)):
                break
        if position < last:
            allowed = guides and allowed_tokens(guides, rows)
            token, state = next_token(treedef, leaves, state, token, settings, position, allowed)
            pending.append(token)
    return rows


@on_its_mesh
def beam_searches(
    model: Transformer,
    adapters: Adapter | Rows | None,
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    ends: Sequence[Collection[int]],
) -> list[BeamSearch]:
    """The beam search of each prompt, with its answers. Raises ValueError for logits that are not finite.

    Args:
        ends: ids of the tokens that end each prompt's answers.
    """
    check_prompts(model, adapters, prompt_ids, [sampling.max_new_tokens] * len(prompt_ids))
    beams, searches = sampling.num_beams, [BeamSearch(sampling, each) for each in ends]
    if isinstance(adapters, Rows):
        adapters = replace(adapters, rows_each=adapters.rows_each * beams)
    logits, state = prefilled(model, adapters, [ids for ids in prompt_ids for _ in range(beams)], sampling)
    leaves, treedef = jax.tree.flatten(model)
    top = min(max(search.most for search in searches), model.config.vocab_size)
    found = likeliest(logits, top)
    while True:
        ids, logprobs = full_arrays(found)
        tokens, parents = np.zeros(len(ids), np.int32), np.arange(len(ids))
        for i, search in enumerate(searches):
            if not search.over:
                rows = slice(i * beams, (i + 1) * beams)
                search.advance(ids[rows], logprobs[rows])
                for row, beam in enumerate(search.running, i * beams):
                    tokens[row], parents[row] = beam.tokens[-1], i * beams + beam.row
        if all(search.over for search in searches):
            return searches
        found, state = next_likeliest(treedef, leaves, state, parents, tokens, top)


def prefilled(model, adapters, prompt_ids, sampling: Sampling, length=None, max_length=None, begin=None) -> tuple:
    """Logits at the last token of each prompt, and the state with which decode_step continues. For the arguments see
    generate_tokens."""
    longest = max(map(len, prompt_ids))
    length = length or int(rounded_up(longest, PROMPT_MULTIPLE))
    tokens, lengths = right_padded(prompt_ids, len(prompt_ids), length)
    max_length = max_length or max(rounded_up(longest + sampling.max_new_tokens, CACHE_MULTIPLE), length)
    logits, state = (begin or prefill)(model, adapters, tokens, lengths, max_length=max_length)
    return logits, stacked_state(state) if model.layout == "stacked" else state


# ------------------------------------------------------------------------------------------------------------ programs


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_token(treedef, leaves, state, token, sampling, position, allowed=None):
    """Each row's next token after `token`, int32 [batch], and the next state; the given state is donated."""
    logits, state = decode_step(jax.tree.unflatten(treedef, leaves), state, token)
    return choose(logits, sampling, position, allowed), state


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def next_likeliest(treedef, leaves, state, parents, tokens, top: int):
    """`likeliest` after each row's token int32 [batch], which follows the tokens of the row parents[row] of the same
    prompt, and the next state; the given state is donated."""
    batch_axis = int(isinstance(state, StackedState))
    cache = jax.tree.map(lambda leaf: jnp.take(leaf, parents, batch_axis), state.cache)
    logits, state = decode_step(jax.tree.unflatten(treedef, leaves), state._replace(cache=cache), tokens)
    return likeliest(logits, top), state


@partial(jax.jit, static_argnums=1)
def likeliest(logits, top: int):
    """The ids and the log-probabilities of each row's likeliest tokens, both [batch, top]."""
    found = logprobs_of(logits, jnp.zeros(len(logits), jnp.int32), top)
    return found.top_ids, found.of_top


@jax.jit
def choose(logits, sampling: RowSampling | None, position, allowed=None):
    """Each row's token at `position` of its answer, of those that are allowed; greedy without `sampling`."""
    logits = only_allowed(logits, allowed)
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


def allowed_tokens(guides: Sequence[Guide], rows: Sequence[list[int]]) -> np.ndarray:
    """Which tokens may follow each row's answer so far, int32 [batch, words] with one bit a token."""
    masks = np.full((len(guides), len(guides[0].first)), -1, np.int32)
    for guide, row, mask in zip(guides, rows, masks, strict=True):
        if NO_TOKEN not in row:
            guide.allow(row, mask)
    return masks


def before_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first of `stop_ids`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))]


def up_to_no_token(tokens: list[int]) -> list[int]:
    """The tokens up to the first NO_TOKEN."""
    return tokens[: tokens.index(NO_TOKEN) + 1] if NO_TOKEN in tokens else tokens
