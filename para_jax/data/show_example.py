"""An example as a terminal shows it: its tokens, and which of them are in the loss."""

from __future__ import annotations

from ..io.checks import printable
from .examples import Example


def show_example(tokenizer, example: Example, *, read_at_its_end: bool = True) -> str:
    """The example for a terminal: each token in brackets, prompt and completion separately.

    Args:
        read_at_its_end: whether the adapter reads the prompt at its last token, which is then marked.
    """
    prompt = [f"[{show_token(tokenizer, i)}]" for i in example.prompt_ids]
    completion = [f"[{show_token(tokenizer, i)}]" for i in example.completion_ids]
    marked = "; PARA reads the prompt at its last token, marked >> <<" * read_at_its_end
    if read_at_its_end:
        prompt[-1] = f">>{prompt[-1]}<<"
    return "\n".join(
        [f"prompt: {len(prompt)} tokens, no loss{marked}"]
        + wrap(prompt)
        + [f"completion: {len(completion)} tokens, each in the loss"]
        + wrap(completion)
    )


def show_token(tokenizer, token: int) -> str:
    """A token's text with its leading space. Newlines, escapes and other control characters are written out."""
    piece, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if piece.startswith("▁") or "\N{REPLACEMENT CHARACTER}" in text:  # SentencePiece's space; part of a character
        text = piece.replace("▁", " ")
    return printable(text)


def wrap(pieces: list[str]) -> list[str]:
    """The pieces in indented lines of at most 100 characters. No piece is cut."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1]) + len(piece) > 100:
            lines.append("")
        lines[-1] += piece
    return ["  " + line for line in lines]
