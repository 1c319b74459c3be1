"""The token boundary: prompt and completion to token ids. Training, generate, evaluation and the engine all call this.

Prompt and completion are encoded apart, so training sees the very prompt ids that serving sees, and every token from
the first completion id on is one that the model must produce, the end of sequence included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

from ..config import printable, shorten
from ..untrusted import require_flat
from .chat_template import TemplateError, render_templates

#: A prompt: text, or chat messages ({"role": ..., "content": ...}) for the tokenizer's chat template.
Prompt = str | list[dict]
#: A prompt of one who tokenises by himself: its ids.
Ids = tuple[int, ...]
#: No token is counted as shorter, for some stand for more text than they show: a long unknown word, a run of spaces.
TOKEN_CHARACTERS = 128


class Example(NamedTuple):
    """One example as token ids. The prompt's summary is taken at its last id; the loss is on the completion's ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


def encode_example(tokenizer, prompt: Prompt, completion: str) -> Example:
    """The example that training and evaluation use; its prompt ids are those of `encode_prompt`."""
    return Example(encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, completion))


def encode_prompt(tokenizer, prompt: Prompt, *, most: int | None = None) -> list[int]:
    """The prompt's ids: text by the tokenizer's own BOS rules, messages by its chat template up to the answer.

    Args:
        most: characters of a prompt (`most_characters`); a longer one raises ValueError before it is tokenised.
    """
    require_filled("prompt", prompt)
    if not isinstance(prompt, str):
        checked_messages("prompt", prompt)
    require_short(prompt, most)
    require_unicode("prompt", prompt)
    if isinstance(prompt, str):
        ids = without_added_eos(tokenizer, prompt, tokenise(tokenizer, prompt))
    else:
        text = render(tokenizer, prompt, add_generation_prompt=True)
        require_short(text, most)
        ids = encode(tokenizer, text)
    if not ids:
        raise ValueError(f"prompt {shorten(prompt)}: the tokenizer makes no token of it")
    return ids


def encode_completion(tokenizer, prompt: Prompt, completion: str) -> list[int]:
    """The ids that the model must produce after the prompt, up to and with the token that ends them.

    Text: one space joins it to the prompt, unless the prompt ends or the completion starts with white space; EOS ends
    it. Messages: the assistant turn as the chat template writes it, with the template's end token (else EOS).
    """
    require_filled("prompt", prompt)
    require_filled("completion", completion)
    if isinstance(prompt, str):
        return encode_continuation(tokenizer, joined_completion(prompt, completion)) + [eos_token_id(tokenizer)]
    return up_to_end_token(tokenizer, encode_continuation(tokenizer, assistant_turn(tokenizer, prompt, completion)))


def stop_token_ids(tokenizer, config_eos: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The ids that end every completion: the tokenizer's EOS and the model config's."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted({*config_eos, *own}))


def turn_stop_ids(tokenizer, prompt: Prompt | Ids) -> tuple[int, ...]:
    """Further ids, after `stop_token_ids`, that end the answer to this prompt: a chat's end-of-turn token.

    The chat template is rendered for chats only, once: a text's answer does not depend on it.
    """
    if isinstance(prompt, str | tuple):
        return ()
    try:
        return (end_of_turn(tokenizer, str(tokenizer.chat_template)),)
    except ValueError:  # a template that refuses the conversation of two words adds nothing
        return ()


@lru_cache(8)
def end_of_turn(tokenizer, template: str) -> int:
    """The id with which the tokenizer's chat template, given since it may be changed, ends an answer."""
    return encode_completion(tokenizer, [{"role": "user", "content": "a"}], "a")[-1]


def special_stop_ids(tokenizer, stop: Sequence[str]) -> tuple[int, ...]:
    """The ids of those stop texts that are special tokens, such as <|im_end|>, which no decoded text shows."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) if stop else {}
    return tuple(special[text] for text in stop if text in special)


def most_characters(tokenizer, tokens: int) -> int:
    """The characters that a prompt of so many tokens may have: its tokens are as long as the longest that there is."""
    return tokens * max(TOKEN_CHARACTERS, *map(len, tokenizer.get_vocab()))


def require_short(prompt: Prompt, most: int | None) -> None:
    """Raises ValueError for a prompt of more than `most` characters, those of all messages together; None: no limit."""
    texts = [prompt] if isinstance(prompt, str) else [text for m in prompt for text in (m["role"], m["content"])]
    characters = sum(map(len, texts))
    if most is not None and characters > most:
        raise ValueError(f"prompt: {characters} characters are more than {most}, which the room for tokens allows")


def split_conversation(messages: list[dict]) -> list[tuple[list[dict], dict]]:
    """A conversation with k assistant turns as k pairs (everything before the turn, the turn)."""
    return [(messages[:i], turn) for i, turn in enumerate(messages) if turn["role"] == "assistant"]


def show_example(tokenizer, example: Example) -> str:
    """The example for a plain terminal: each token in brackets, prompt and loss apart, the summary's marked."""
    prompt = [f"[{show_token(tokenizer, i)}]" for i in example.prompt_ids]
    completion = [f"[{show_token(tokenizer, i)}]" for i in example.completion_ids]
    prompt[-1] = f">>{prompt[-1]}<<"
    return "\n".join(
        [f"prompt: {len(prompt)} tokens, no loss; the summary is taken at the last one, between >> and <<"]
        + wrap(prompt)
        + [f"completion: {len(completion)} tokens, each in the loss"]
        + wrap(completion)
    )


def checked_messages(name: str, value: object) -> list[dict]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected text or a list of messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'{name}: {shorten(message)} is no message; expected {{"role": text, "content": text}}')
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{name}: an assistant message is empty")
    return prompt_messages(value) if name == "prompt" else value


def prompt_messages(messages: list[dict]) -> list[dict]:
    if not messages:
        raise ValueError("prompt is empty: no message stands before the assistant's")
    return messages


def require_unicode(name: str, value: object) -> None:
    """Raises ValueError for half a surrogate pair in a text, which no tokenizer and no file takes, and for values that
    are not JSON's or that nest too deep."""
    try:
        require_flat(value)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {error.object[error.start : error.end]!r} is half a character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the value is not JSON ({error})") from None


# ----------------------------------------------------------------------------------------------------------- tokenizer


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text to which no special token is added; those written in it are found."""
    return tokenise(tokenizer, text, add_special_tokens=False)


def tokenise(tokenizer, text: str, **options: bool) -> list[int]:
    """The ids of a text, by the tokenizer's own rules; ValueError where its files make it fail."""
    with failures(f"the tokenizer fails on {shorten(text)}"):
        return tokenizer(text, verbose=False, **options)["input_ids"]


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Turns what a tokenizer raises into ValueErrors that begin with `what`: errors of many kinds, bare Exceptions, and
    PanicException of its Rust code, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt and the like
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f"{what}: {printable(lines[0], 300)}") from None


def encode_continuation(tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on after a prompt; its leading space is left to tokenizers that add their own."""
    return encode(tokenizer, text[1:] if text.startswith(" ") and adds_own_space(tokenizer) else text)


def adds_own_space(tokenizer) -> bool:
    """Whether a text that is encoded apart gets a leading space, as SentencePiece's tokenizers do."""
    word = encode(tokenizer, "a")
    return " " in tokenizer.decode(word + word)


def joined_completion(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: after one space, unless there is white space already."""
    return completion if prompt[-1].isspace() or completion[0].isspace() else " " + completion


def without_added_eos(tokenizer, text: str, ids: list[int]) -> list[int]:
    """The ids without an EOS that the tokenizer's post-processor put at the end: a prompt is to be continued."""
    return drop_added_eos(ids, encode(tokenizer, text)) if ids[-1:] == [tokenizer.eos_token_id] else ids


def drop_added_eos(ids: list[int], plain: list[int]) -> list[int]:
    """As `without_added_eos`, for ids that end in EOS and the ids of the same text without special tokens."""
    return ids[:-1] if ids[:-1][-len(plain) :] == plain else ids


def eos_token_id(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a completion could not end; set its eos_token")
    return tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------------------- chat


def render(tokenizer, messages: list[dict], **options: bool) -> str:
    """The conversation as the tokenizer's chat template writes it, BOS included where the template has one. All keys of
    a message reach the template, which may read more than role and content, such as tool_calls.

    Args:
        options: add_generation_prompt and continue_final_message, as transformers' apply_chat_template has them.

    Raises TemplateError, a ValueError, for everything that goes wrong in the template, and where it takes too much time
    or memory (chat_template.py).
    """
    return render_all(tokenizer, [(messages, options)])[0]


def render_all(tokenizer, conversations: Sequence[tuple[list[dict], dict[str, bool]]]) -> list[str]:
    """As `render` for each (messages, options); if one fails, all do."""
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise ValueError("prompt is a list of messages, but the tokenizer has no chat template; give it as text")
    tokens = tokenizer.special_tokens_map
    given = [(messages, {**tokens, **options}) for messages, options in conversations]
    try:
        texts = render_templates(tokenizer.get_chat_template(), given)
    except ValueError as error:
        refused = shorten(conversations[0][0])
        raise TemplateError(f"the tokenizer's chat template refuses {refused}: {error}") from None
    require_unicode("the tokenizer's chat template", texts)
    return texts


def assistant_turn(tokenizer, prompt: list[dict], completion: str) -> str:
    """The answer as the chat template writes it: the conversation with it, less the conversation up to it."""
    return turn_between(
        *(render(tokenizer, messages, **options) for messages, options in two_parts(prompt, completion))
    )


def two_parts(prompt: list[dict], completion: str) -> list[tuple[list[dict], dict[str, bool]]]:
    """The conversation up to an answer, and with it, each with the options for `render`."""
    answered = [*prompt, {"role": "assistant", "content": completion}]
    return [(prompt, dict(add_generation_prompt=True)), (answered, dict(add_generation_prompt=False))]


def turn_between(before: str, whole: str) -> str:
    """The assistant turn by which a rendered conversation is longer than the one before it."""
    if not whole.startswith(before) or len(whole) == len(before):
        raise ValueError(
            "the tokenizer's chat template writes an assistant turn that does not start with its generation prompt "
            f"({shorten(before[-40:])} is not in {shorten(whole[len(before) - 40 :])}); use another template"
        )
    return whole[len(before) :]


def up_to_end_token(tokenizer, ids: list[int], seen: dict[int, bool | None] | None = None) -> list[int]:
    """A turn's ids up to its end token: the white space that a template writes behind it is not for the model.

    Args:
        seen: what `ends_turn` said of tokens, kept for the next turn.
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
    """Whether a token is a special one, which ends a turn; None for white space, which may follow the end."""
    text = tokenizer.decode([token])
    if text != "" and tokenizer.decode([token], skip_special_tokens=True) == "":
        return True
    return False if text.strip() else None


# ----------------------------------------------------------------------------------------------------- checks, display


def require_filled(name: str, value: object) -> None:
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{name} is missing or empty; expected text{' or messages' if name == 'prompt' else ''}")


def show_token(tokenizer, token: int) -> str:
    """A token's text with its leading space; what a terminal could act on (newlines, escapes) is written out."""
    piece, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if piece.startswith("▁") or "\N{REPLACEMENT CHARACTER}" in text:  # SentencePiece's space; a part of a character
        text = piece.replace("▁", " ")
    return printable(text)


def wrap(pieces: list[str], width: int = 100) -> list[str]:
    """The pieces side by side in indented lines of at most `width` characters, none cut."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return ["  " + line for line in lines]
