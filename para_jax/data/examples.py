"""Token ids of prompts and completions: the one place that decides where a prompt ends. Training, generate, evaluation
and the engine all use it.

The prompt is encoded without its completion. Training therefore sees the same prompt ids as serving, and the model must
produce every token from the first completion id on, including the end of sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple

from ..config import Variables
from ..io.checks import printable, shorten
from ..io.untrusted import require_unicode
from .chat_messages import checked_messages
from .chats import answered, render_all

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
    return Example(encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, completion))


def encode_prompt(
    tokenizer,
    prompt: Prompt,
    *,
    most: int | None = None,
    variables: Variables | None = None,
    may_be_blank: bool = False,
    generation_prompt: bool = True,
) -> list[int]:
    """The prompt's ids. Text follows the tokenizer's BOS rules, and never begins with two; messages are rendered by its
    chat template, up to the answer.

    Args:
        most: the maximum number of characters (`most_characters`). A longer prompt raises ValueError without being
            tokenised.
        variables: of the chat template; those of `load_tokenizer` hold for others.
        may_be_blank: whether the prompt may be white space alone, as that of a request may. A prompt without tokens
            raises ValueError all the same.
        generation_prompt: whether messages end with what begins the answer. False: more messages may follow.
    """
    if not may_be_blank:
        require_filled("prompt", prompt)
    if not isinstance(prompt, str):
        prompt = without_ends(tokenizer, checked_messages("prompt", prompt))
    require_short(prompt, most)
    require_unicode("prompt", prompt)
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt)
    else:
        (text,) = render_all(tokenizer, [(prompt, {**(variables or {}), "add_generation_prompt": generation_prompt})])
        require_short(text, most)
        ids = encode(tokenizer, text)
    if not ids:
        raise ValueError(f"prompt {shorten(prompt)} becomes no tokens")
    return ids


def encode_completion(tokenizer, prompt: Prompt, completion: str) -> list[int]:
    """The ids that the model must produce after the prompt, including the token that ends them.

    Text follows the prompt after one space, unless the prompt ends or the completion starts with white space. It ends
    with one EOS, also if the completion has it already. After messages, it is the assistant turn as the chat template
    renders it, up to the template's end token (EOS if it has none).
    """
    require_filled("prompt", prompt)
    require_filled("completion", completion)
    require_unicode("completion", completion)
    if isinstance(prompt, str):
        text = joined_completion(prompt, up_to_eos(tokenizer, completion))
        return with_end(encode_following(tokenizer, prompt, text, encode_text), eos_token_id(tokenizer))
    messages = without_ends(tokenizer, checked_messages("prompt", prompt))
    ((before, turn),) = answered(tokenizer, [(messages, answer_alone(tokenizer, completion))])
    return up_to_end_token(tokenizer, encode_following(tokenizer, before, turn, encode))


def with_end(ids: list[int], end: int) -> list[int]:
    """The ids of a completion with the end token. Data for other libraries may have it in the text."""
    return ids if ids[-1:] == [end] else [*ids, end]


def up_to_eos(tokenizer, completion: str) -> str:
    """The completion without the white space after an EOS at its end."""
    bare = completion.rstrip()
    return bare if tokenizer.eos_token and bare.endswith(tokenizer.eos_token) else completion


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
    try:
        end = template_end(tokenizer, str(tokenizer.chat_template))
    except ValueError:  # the template refuses the short conversation
        end = tokenizer.eos_token_id
    if end is None:
        return answer
    ends = tokenizer.convert_ids_to_tokens(list({end, tokenizer.eos_token_id} - {None}))
    kept = stop = len(answer)
    while True:  # without a copy of the text, which may consist of end tokens
        while stop and answer[stop - 1].isspace():
            stop -= 1
        found = next((text for text in ends if answer.endswith(text, 0, stop)), None)
        if found is None:
            return answer[:kept]
        kept = stop = stop - len(found)


def answer_alone(tokenizer, completion: str) -> str:
    """The completion `without_end`. Raises ValueError if nothing is left."""
    answer = without_end(tokenizer, completion)
    if not answer.strip():
        raise ValueError(f"completion {shorten(completion)} is only an end token; leave the row out")
    return answer


def stop_token_ids(tokenizer, config_eos: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The ids that end every completion: EOS of the tokenizer and of the model config."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted({*config_eos, *own}))


def turn_stop_ids(tokenizer, prompt: Prompt | Ids) -> tuple[int, ...]:
    """The ids, besides `stop_token_ids`, that end the answer to this prompt: the end-of-turn token of a chat.

    The chat template is rendered once, and only if the prompt is a chat.
    """
    if isinstance(prompt, str | tuple):
        return ()
    try:
        return (end_of_turn(tokenizer, str(tokenizer.chat_template)),)
    except ValueError:  # the template refuses the short conversation
        return ()


@lru_cache(8)
def end_of_turn(tokenizer, template: str) -> int:
    """The id that ends an answer in the tokenizer's chat template.

    Args:
        template: the tokenizer's current template, part of the cache key because users may replace it.
    """
    return up_to_end_token(tokenizer, short_turn(tokenizer))[-1]


@lru_cache(8)
def template_end(tokenizer, template: str) -> int | None:
    """`end_of_turn`, if the template itself writes it."""
    turn = short_turn(tokenizer)
    end = up_to_end_token(tokenizer, turn)[-1]
    return end if end in turn else None


def short_turn(tokenizer) -> list[int]:
    """The ids of an answer's turn, in a short conversation."""
    ((before, turn),) = answered(tokenizer, [([{"role": "user", "content": "a"}], "a")])
    return encode_following(tokenizer, before, turn, encode)


def answer_opening(tokenizer, prompt: Prompt) -> str:
    """What the model writes before its answer to this prompt, because the chat template begins every answer with it, as
    Qwen3's does with <think></think>. Mostly nothing. As text without the white space at its ends.

    The chat template is rendered once, and only if the prompt is a chat.
    """
    if isinstance(prompt, str):
        return ""
    try:
        return template_opening(tokenizer, str(tokenizer.chat_template))
    except ValueError:  # the template refuses the short conversation
        return ""


@lru_cache(8)
def template_opening(tokenizer, template: str) -> str:
    """`answer_opening` of the tokenizer's chat template, which is `template`, as in `end_of_turn`."""
    answer = "0123456789"
    ((_, turn),) = answered(tokenizer, [([{"role": "user", "content": "a"}], answer)])
    before, found, _ = turn.partition(answer)
    ids = encode(tokenizer, before) if found else []
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


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


def require_tokenizer(tokenizer: object) -> None:
    """Raises ValueError for what is no tokenizer, such as the name of one."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; give one that load_tokenizer returns")


def most_characters(tokenizer, tokens: int) -> int:
    """The maximum number of characters of a prompt with this many tokens, if all were as long as the longest token."""
    return tokens * max(TOKEN_CHARACTERS, *map(len, tokenizer.get_vocab()))


def require_filled(name: str, value: object) -> None:
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{name} is missing or empty; pass text{' or messages' if name == 'prompt' else ''}")


def require_short(prompt: Prompt, most: int | None) -> None:
    """Raises ValueError for a prompt of more than `most` characters in all its messages; None means no limit."""
    texts = [prompt] if isinstance(prompt, str) else [text for m in prompt for text in (m["role"], m["content"])]
    characters = sum(map(len, texts))
    if most is not None and characters > most:
        raise ValueError(f"prompt has {characters} characters; at most {most} fit the maximum number of tokens")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text, without added special tokens. Special tokens written in the text are recognised."""
    return tokenise(tokenizer, text, add_special_tokens=False)


def tokenise(tokenizer, text: str, **options: bool) -> list[int]:
    """The ids of a text by the tokenizer's own rules. ValueError if the tokenizer fails."""
    with failures(f"the tokenizer fails on {shorten(text)}"):
        return tokenizer(text, verbose=False, **options)["input_ids"]


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


def encode_following(tokenizer, prompt: str, text: str, ids_of: Callable[..., list[int]]) -> list[int]:
    """The ids of a text that follows a prompt.

    A tokenizer that puts a space before each text would also put one between a newline and an answer. So it encodes
    prompt and text together, and the text's ids are those after the prompt's. If the prompt has other ids in the joined
    text, the text is encoded alone, as other tokenizers do it.

    Args:
        ids_of: ids_of(tokenizer, prompt) gives the prompt's ids.
    """
    found = None
    if adds_own_space(tokenizer):
        found = following(ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + text))
    return encode_continuation(tokenizer, text) if found is None else found


def following(prompt: list[int], ids: list[int]) -> list[int] | None:
    """The ids after the prompt's; None if the ids do not begin with them."""
    return ids[len(prompt) :] if ids[: len(prompt)] == prompt else None


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


def joined_completion(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: after one space, unless there already is white space."""
    return completion if prompt[-1].isspace() or completion[0].isspace() else " " + completion


def encode_text(tokenizer, text: str) -> list[int]:
    """The ids of a text prompt by the tokenizer's own rules for special tokens, less those of `without_added`."""
    ids = tokenise(tokenizer, text)
    return without_added(tokenizer, ids, encode(tokenizer, text)) if may_have_added(tokenizer, ids) else ids


def may_have_added(tokenizer, ids: list[int]) -> bool:
    """Whether `without_added` could leave out one of these ids."""
    return ids[-1:] == [tokenizer.eos_token_id] or ids[:2] == [tokenizer.bos_token_id] * 2


def without_added(tokenizer, ids: list[int], plain: list[int]) -> list[int]:
    """The ids without an EOS that the tokenizer appended, since the prompt continues, and without a BOS that it added
    to a text that begins with one, as a rendered chat does.

    Args:
        plain: the ids of the same text without added special tokens.
    """
    if ids[-1:] == [tokenizer.eos_token_id] and ids[:-1][-len(plain) :] == plain:
        ids = ids[:-1]
    second_bos = ids[:2] == [tokenizer.bos_token_id] * 2 and len(ids) > len(plain)
    return ids[1:] if second_bos else ids


def eos_token_id(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so completions would never end; set its eos_token")
    return tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------- the end of a turn


def up_to_end_token(tokenizer, ids: list[int], seen: dict[int, bool | None] | None = None) -> list[int]:
    """A turn's ids up to its end token, without the white space that templates write after it. EOS is added if the turn
    has no end token.

    Args:
        seen: results of `ends_turn` by token, kept for the next turn.
    """
    seen = {} if seen is None else seen
    for i in reversed(range(len(ids))):
        if ids[i] not in seen:
            seen[ids[i]] = ends_turn(tokenizer, ids[i])
        if seen[ids[i]]:
            return ids[: i + 1]
        if seen[ids[i]] is False:
            break
    return [*ids, eos_token_id(tokenizer)]


def ends_turn(tokenizer, token: int) -> bool | None:
    """True for a special token, which ends a turn; None for white space, which may follow the end; else False."""
    text = tokenizer.decode([token])
    if text != "" and tokenizer.decode([token], skip_special_tokens=True) == "":
        return True
    return False if text.strip() else None
