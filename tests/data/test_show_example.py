"""An example that is shown: all its tokens, on lines that a terminal can print."""

import pytest
import tiny_tokenizers

from para_jax.data.examples import Example, encode_example, encode_prompt
from para_jax.data.show_example import show_example


@pytest.fixture(params=["plain", "with_bos", "own_space"])
def tokenizer(request):
    return getattr(tiny_tokenizers, request.param)()


def test_a_shown_example_has_every_token_and_marks_its_parts():
    tokenizer = tiny_tokenizers.plain()
    example = encode_example(tokenizer, "Answer:\nAnswer:", "yes")
    shown = show_example(tokenizer, example).splitlines()
    split = next(i for i, line in enumerate(shown) if line.startswith("completion"))
    assert f"prompt: {len(example.prompt_ids)} tokens, no loss" in shown[0]
    assert f"completion: {len(example.completion_ids)} tokens" in shown[split]
    prompt, completion = "".join(shown[1:split]), "".join(shown[split + 1 :])
    assert prompt.count("[") == len(example.prompt_ids) and prompt.endswith("[:]<<") and prompt.count(">>") == 1
    assert completion.count("[") == len(example.completion_ids) and completion.endswith("[<|im_end|>]")
    assert "[\\n]" in prompt and " yes" in completion.replace("][", "")
    unread = show_example(tokenizer, example, read_at_its_end=False)
    assert ">>" not in unread and "PARA" not in unread and unread.count("[") == "\n".join(shown).count("[")


def test_a_shown_example_is_printable(tokenizer):
    ids = encode_prompt(tokenizer, "yes\x1b[31m no\r\u202e日本" * 20)
    shown = show_example(tokenizer, Example(ids, ids))
    assert all(c.isprintable() or c == "\n" for c in shown) and max(map(len, shown.splitlines())) <= 110


def test_a_leading_space_is_shown_whatever_the_tokenizer(tokenizer):
    example = encode_example(tokenizer, "Answer:", "yes")
    assert " yes" in show_example(tokenizer, example).splitlines()[-1].replace("][", "")
