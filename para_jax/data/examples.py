"""Token ids of prompts and completions: the one place that decides where a prompt ends. Training, generate, evaluation
and the engine all use it.

The prompt is encoded without its completion. Training therefore sees the same prompt ids as serving, and the model must
produce every token from the first completion id on, including the end of sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple

from ..config import Variables
from ..io.checks import printable, shorten
from ..io.untrusted import require_unicode
from .chats import answered, checked_messages, render

#: Text, or chat messages ({"role": ..., "content": ...}) for the tokenizer's chat template.
Prompt = str | list[dict]
#: A prompt that the caller has tokenised.
Ids = tuple[int, ...]
#: A token may cover this many characters, even if none in the vocabulary is as long: an unknown word, a run of spaces.
TOKEN_CHARACTERS = 128


class Example(NamedTuple):
    """One example as token ids. The prompt's last id gives the summary; the loss is on the completion's ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


def encode_example(tokenizer, prompt: Prompt, completion: str) -> Example:
    """The example that training and evaluation use, with the prompt ids of `encode_prompt`."""
    return encode_examples(tokenizer, [(prompt, completion)])[0]


def encode_completion(tokenizer, prompt: Prompt, completion: str) -> list[int]:
    """The ids that the model must produce after the prompt, including the token that ends them."""
    return encode_example(tokenizer, prompt, completion).completion_ids


def encode_examples(tokenizer, pairs: Sequence[tuple[Prompt, str]]) -> list[Example]:
    """The example of each (prompt, completion). A fast tokenizer uses all cores, in a few calls for all of them.

    A completion of a text follows it after one space, unless the prompt ends or the completion starts with white space.
    It ends with one EOS, also if the completion has it already. After messages, it is the assistant turn as the chat
    template renders it, up to the template's end token (EOS if it has none).
    """
    texts = [prompt_and_answer(tokenizer, prompt, completion) for prompt, completion in pairs]
    chats = [not isinstance(prompt, str) for prompt, _ in pairs]
    joined = [prompt + answer for prompt, answer in texts] if adds_own_space(tokenizer) else []
    ids = encode_prompts(tokenizer, [prompt for prompt, _ in texts] + joined, chats + chats[: len(joined)])
    prompts, both = ids[: len(texts)], ids[len(texts) :]
    if not all(prompts):
        raise ValueError(f"prompt {shorten(texts[prompts.index([])][0])} becomes no tokens")
    # A tokenizer that puts a space before each text would put one between a newline and an answer too. So the answer
    # has the ids that follow the prompt's in the joined text. If those do not begin with the prompt's, it is encoded
    # alone, as other tokenizers do it.
    answers: list[list[int] | None] = [None] * len(texts)
    for i, (before, whole) in enumerate(zip(prompts, both, strict=False)):
        if whole[: len(before)] == before:
            answers[i] = whole[len(before) :]
    alone = [continuation_text(tokenizer, text) for (_, text), ids in zip(texts, answers, strict=True) if ids is None]
    encoded = iter(encode_texts(tokenizer, alone))
    completions = [next(encoded) if ids is None else ids for ids in answers]
    return [
        Example(prompt, up_to_end_token(tokenizer, ids) if chat else with_eos(tokenizer, ids))
        for prompt, ids, chat in zip(prompts, completions, chats, strict=True)
    ]


def prompt_and_answer(tokenizer, prompt: Prompt, completion: str) -> tuple[str, str]:
    """The text of a prompt, and that of the completion as it follows."""
    if isinstance(prompt, str):
        bare = completion.rstrip()
        has_eos = tokenizer.eos_token and bare.endswith(tokenizer.eos_token)
        return prompt, joined_completion(prompt, bare if has_eos else completion)
    answer = without_end(tokenizer, completion)
    if not answer.strip():
        raise ValueError(f"completion {shorten(completion)} is only an end token; leave the row out")
    return answered(tokenizer, without_ends(tokenizer, prompt), answer)


def joined_completion(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: after one space, unless there already is white space."""
    return completion if prompt[-1].isspace() or completion[0].isspace() else " " + completion


def encode_prompt(
    tokenizer,
    prompt: Prompt,
    *,
    most: int | None = None,
    variables: Variables | None = None,
    may_be_blank: bool = False,
) -> list[int]:
    """The prompt's ids. Text follows the tokenizer's BOS rules, and never begins with two; messages are rendered by its
    chat template, up to the answer.

    Args:
        most: the maximum number of characters (`most_characters`). A longer prompt raises ValueError without being
            tokenised.
        variables: of the chat template; those of `load_tokenizer` hold for others.
        may_be_blank: whether the prompt may be white space alone, as that of a request may. A prompt without tokens
            raises ValueError all the same.
    """
    if not may_be_blank and (not prompt or (isinstance(prompt, str) and not prompt.strip())):
        raise ValueError("prompt is missing or empty; pass text or messages")
    is_chat = not isinstance(prompt, str)
    if is_chat:
        prompt = without_ends(tokenizer, checked_messages("prompt", prompt))
    require_short(prompt, most)
    require_unicode("prompt", prompt)
    text = prompt
    if not isinstance(prompt, str):
        text = render(tokenizer, prompt, **{**(variables or {}), "add_generation_prompt": True})
        require_short(text, most)
    ids = encode_prompts(tokenizer, [str(text)], [is_chat])[0]
    if not ids:
        raise ValueError(f"prompt {shorten(prompt)} becomes no tokens")
    return ids


def require_short(prompt: Prompt, most: int | None) -> None:
    """Raises ValueError for a prompt of more than `most` characters in all its messages; None means no limit."""
    texts = [prompt] if isinstance(prompt, str) else [text for m in prompt for text in (m["role"], m["content"])]
    characters = sum(map(len, texts))
    if most is not None and characters > most:
        raise ValueError(f"prompt has {characters} characters; at most {most} fit the maximum number of tokens")


def most_characters(tokenizer, tokens: int) -> int:
    """The maximum number of characters of a prompt with this many tokens, if all were as long as the longest token."""
    return tokens * max(TOKEN_CHARACTERS, *map(len, tokenizer.get_vocab()))


# ------------------------------------------------------------------------------------------- the end of a chat's turns


class Turn(NamedTuple):
    """How the tokenizer's chat template writes an answer."""

    opening: str
    """what begins every answer, such as Qwen3's <think></think>; without the white space at its ends"""
    end: int
    writes_end: bool
    """whether the template itself writes `end`; else we add it"""


def answer_turn(tokenizer) -> Turn | None:
    """How the tokenizer's current chat template writes an answer. None if it refuses a short conversation."""
    return turn_of_template(tokenizer, str(tokenizer.chat_template))


@lru_cache(8)
def turn_of_template(tokenizer, template: str) -> Turn | None:
    """`answer_turn`. The template is part of the cache's key, because users may replace it."""
    answer = "0123456789"
    try:
        _, turn = answered(tokenizer, [{"role": "user", "content": "a"}], answer)
        ids = encode(tokenizer, turn)
        end = up_to_end_token(tokenizer, ids)[-1]
        before, found, _ = turn.partition(answer)
        opening = encode(tokenizer, before) if found else []
    except ValueError:
        return None
    text = tokenizer.decode(opening, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Turn(text.strip(), end, end in ids)


def turn_stop_ids(tokenizer, prompt: Prompt | Ids) -> tuple[int, ...]:
    """The ids, besides `stop_token_ids`, that end the answer to this prompt: the end-of-turn token of a chat."""
    turn = None if isinstance(prompt, str | tuple) else answer_turn(tokenizer)
    return () if turn is None else (turn.end,)


def answer_opening(tokenizer, prompt: Prompt) -> str:
    """What the model writes before its answer to this prompt, because the chat template begins every answer with it.
    Mostly nothing."""
    turn = None if isinstance(prompt, str) else answer_turn(tokenizer)
    return "" if turn is None else turn.opening


def without_ends(tokenizer, messages: list[dict]) -> list[dict]:
    """The messages, and each answer `without_end`."""
    return [
        message | {"content": without_end(tokenizer, message["content"])} if message["role"] == "assistant" else message
        for message in messages
    ]


def without_end(tokenizer, answer: str) -> str:
    """An answer of a chat without end tokens (the template's, or EOS) at its end. Data for other libraries may have
    them, and the chat template writes one itself. If it writes none, the answer stays as it is."""
    if answer.rstrip()[-1:] not in last_characters(tokenizer, len(tokenizer)):
        return answer
    turn = answer_turn(tokenizer)
    end = tokenizer.eos_token_id if turn is None else turn.end
    if end is None or (turn is not None and not turn.writes_end):
        return answer
    ends = tuple(tokenizer.convert_ids_to_tokens(list({end, tokenizer.eos_token_id} - {None})))
    stop = size = len(answer)
    while True:  # without a copy of the text, which may consist of end tokens
        while size and answer[size - 1].isspace():
            size -= 1
        if not answer.endswith(ends, 0, size):
            return answer[:stop]
        stop = size = size - next(len(text) for text in ends if answer.endswith(text, 0, size))


def up_to_end_token(tokenizer, ids: list[int]) -> list[int]:
    """A turn's ids up to its end token, without the white space that templates write after it. EOS is added if the turn
    has no end token."""
    # From the back: an answer may name the end token, and only the last one ends the turn.
    for i in reversed(range(len(ids))):
        if (ends := ends_turn(tokenizer, ids[i])) is not None:
            if ends:
                return ids[: i + 1]
            break
    return [*ids, eos_token_id(tokenizer)]


@lru_cache(256)
def ends_turn(tokenizer, token: int) -> bool | None:
    """True for a special token, which ends a turn; None for white space, which may follow the end; else False."""
    text = tokenizer.decode([token])
    if text != "" and tokenizer.decode([token], skip_special_tokens=True) == "":
        return True
    return False if text.strip() else None


def with_eos(tokenizer, ids: list[int]) -> list[int]:
    """The ids of a completion with one EOS. Data for other libraries may have it in the text."""
    end = eos_token_id(tokenizer)
    return ids if ids[-1:] == [end] else [*ids, end]


def eos_token_id(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so completions would never end; set its eos_token")
    return tokenizer.eos_token_id


def stop_token_ids(tokenizer, config_eos: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The ids that end every completion: EOS of the tokenizer and of the model config."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted({*config_eos, *own}))


def special_stop_ids(tokenizer, stop: Sequence[str]) -> tuple[int, ...]:
    """The ids of the stop texts that are special tokens, such as <|im_end|>: they do not appear in decoded text.
    Most of them have no role, such as EOS has, and are not among the tokenizer's `all_special_tokens`."""
    special = special_tokens(tokenizer, len(tokenizer)) if stop else {}
    return tuple(special[text] for text in dict.fromkeys(stop) if text in special)


@lru_cache(8)
def special_tokens(tokenizer, length: int) -> dict[str, int]:
    """The ids of the special tokens, by their text. `length` is the tokenizer's, and part of the cache's key: it grows
    when tokens are added."""
    return {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


@lru_cache(8)
def last_characters(tokenizer, length: int) -> frozenset[str]:
    """The last characters of the special tokens. Some tokenizers have thousands of those."""
    return frozenset(text[-1] for text in special_tokens(tokenizer, length))


# ----------------------------------------------------------------------------------------------------------- tokenizer


def encode_prompts(tokenizer, texts: list[str], chats: list[bool]) -> list[list[int]]:
    """The ids of prompts: of rendered chats as they are, of texts by the tokenizer's own rules for special tokens.

    Left out are an EOS that the tokenizer appends to a text, since the prompt continues, and a BOS that it adds to a
    text that begins with one, as a rendered chat does.

    Args:
        chats: which of the texts are chats.
    """
    plain = iter(encode_texts(tokenizer, [text for text, chat in zip(texts, chats, strict=True) if chat]))
    own = iter(encode_texts(tokenizer, [t for t, chat in zip(texts, chats, strict=True) if not chat], special=True))
    found = [next(plain if chat else own) for chat in chats]
    eos, two_bos = tokenizer.eos_token_id, [tokenizer.bos_token_id] * 2
    doubtful = [i for i, ids in enumerate(found) if not chats[i] and (ids[-1:] == [eos] or ids[:2] == two_bos)]
    for i, bare in zip(doubtful, encode_texts(tokenizer, [texts[i] for i in doubtful]), strict=True):
        ids = found[i]
        if ids[-1:] == [eos] and ids[:-1][-len(bare) :] == bare:
            ids = ids[:-1]
        found[i] = ids[1:] if ids[:2] == two_bos and len(ids) > len(bare) else ids
    return found


def encode_text(tokenizer, text: str) -> list[int]:
    """The ids of a text prompt."""
    return encode_prompts(tokenizer, [text], [False])[0]


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text, without added special tokens. Special tokens written in the text are recognised."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer, texts: list[str], special: bool = False) -> list[list[int]]:
    """The ids of each text. ValueError if the tokenizer fails.

    Args:
        special: whether the tokenizer adds its special tokens.
    """
    if not texts:
        return []
    only_ids = dict(return_attention_mask=False, return_token_type_ids=False, verbose=False)
    with failures(f"the tokenizer fails on {shorten(texts[0]) if len(texts) == 1 else f'one of {len(texts)} texts'}"):
        return tokenizer(texts, add_special_tokens=special, **only_ids)["input_ids"]


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Turns errors of a tokenizer into a ValueError that begins with `what`. Tokenizers raise errors of any kind, and
    their Rust code raises PanicException, which is not an Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt and the like
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f"{what}: {printable(lines[0], 300)}") from None


def encode_continuation(tokenizer, text: str) -> list[int]:
    """The ids of a text that is encoded without its prompt."""
    return encode(tokenizer, continuation_text(tokenizer, text))


def continuation_text(tokenizer, text: str) -> str:
    """The text without its leading space if the tokenizer adds one itself."""
    return text[1:] if text.startswith(" ") and adds_own_space(tokenizer) else text


@lru_cache(8)
def adds_own_space(tokenizer) -> bool:
    """Whether the tokenizer adds a space before each text, as SentencePiece's do."""
    with suppress(ValueError):  # it may lack the word
        word = encode(tokenizer, "a")
        return " " in tokenizer.decode(word + word)
    return False
