"""The model card of an adapter folder, README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import yaml

from ..io.checks import expanded, printable
from ..io.hub import BUILT_IN, BUILT_IN_HUB_ID, BUILT_IN_WEIGHTS, HUB_ID, name_and_revision
from .method import Method
from .scope import invocation_tokens, scope_of

#: What users of PEFT must know about activated LoRA.
ALORA_LINES = (
    "It is activated LoRA (tested with PEFT 0.21.2). Versions of PEFT and other libraries that don't know",
    "`alora_invocation_tokens` may apply it to the whole prompt.",
    "",
)
#: The headings around the lines that the card was given.
BEFORE, AFTER = "## Training", "## How to load it"
TEST = "- Test "


def model_card(method: Method, config: Any, base_model: str, lines: Iterable[str], example: str | list[dict]) -> str:
    """README.md as hubs read it. It names PEFT as the library for adapters that PEFT can load.

    Args:
        base_model: a hub id, a folder, or "".
        lines: Markdown on training, data and scores.
        example: the prompt of the example code.
    """
    name, _ = name_and_revision(base_model)
    named = "@" not in name and not name.endswith(".gguf") and HUB_ID.fullmatch(name)
    base = name if named and not expanded(name).exists() else ""  # a folder such as models/tiny looks like a hub id
    front = {
        "library_name": "peft" if method.in_peft else "para_jax",
        **({"base_model": base} if base else {}),
        "tags": [method.name, "adapter"],
    }
    given = list(lines)
    of_built_in = base_model == BUILT_IN_HUB_ID
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {method.label} adapter",
            "",
            f"Base model: {base_model or 'not stated'}. {method.outline(config)}{scope_outline(config)}.",
            *([f"The built-in backbone `{BUILT_IN}` is this model, {BUILT_IN_WEIGHTS}."] if of_built_in else []),
            "",
            *([BEFORE, "", *given, ""] if given else []),
            AFTER,
            "",
            *(peft_lines(base_model) if method.in_peft and base_model else []),
            *(ALORA_LINES if invocation_tokens(config) else []),
            "With para_jax:",
            "```python",
            "from para_jax import generate, load_adapter, load_backbone, load_tokenizer",
            "",
            f"base = {json.dumps(BUILT_IN if of_built_in else base_model or 'the base model')}",
            "model, tokenizer = load_backbone(base), load_tokenizer(base)",
            'adapter = load_adapter("this folder, or its hub id", model.config, model=model)',
            f"prompt = {json.dumps(example, ensure_ascii=False)}",
            "print(generate(model, [prompt], tokenizer=tokenizer, adapters=adapter)[0])",
            "```",
            "",
            *(["It is in the format of Hugging Face PEFT.", ""] if method.in_peft else []),
        ]
    )


def example_of(card: str) -> str | list[dict]:
    """The prompt of the example code in a model card."""
    found = re.search(r"(?m)^prompt = (.*)$", card)
    try:
        return json.loads(found[1]) if found else "a prompt"
    except ValueError:
        return "a prompt"


def scope_outline(config: Any) -> str:
    """Where an adapter acts, as the end of a sentence; empty for everywhere."""
    scope, window = scope_of(config)
    if scope == "all":
        return ""
    if scope == "prompt":
        return ". Scope prompt: it acts on the prompt alone"
    last = "token" if window == 1 else f"{window} tokens"
    text = f". Scope response: it acts on the last {last} of the prompt and on the completion"
    tokens = invocation_tokens(config)
    return text + (f". Every prompt ends with the tokens {', '.join(map(str, tokens))}" if tokens else "")


def peft_lines(base_model: str) -> list[str]:
    """How PEFT loads the folder. It finds the base model in adapter_config.json."""
    return [
        "With PEFT:",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("this folder, or its hub id")',
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name_and_revision(base_model)[0])})",
        "```",
        "",
    ]


def training_lines(
    *, method: str, data: str, examples: int, steps: int, rows: int, learning_rate: float, version: str
) -> list[str]:
    """How an adapter was trained."""
    return [
        f"- {method}. Trained for {steps} steps on {printable(data, 200)} ({examples} examples).",
        f"- Learning rate {learning_rate:g}, {rows} rows per step.",
        f"- Trained by para_jax {version}.",
    ]


def score_line(
    split: str, metric: str, score: float, stderr: float | None, count: int, loss: float, base: float | None = None
) -> str:
    """A score with its standard error and its number of examples.

    Args:
        split: "Validation" or "Test".
        score, base: of the adapter, and of the base model alone. For the metric "loss", the losses.
    """
    error = f" ± {stderr:.4f} (standard error)" if stderr else ""
    also = "" if metric == "loss" else f", loss {loss:.4f}"
    compared = "" if base is None else f"; {base:.4f} without the adapter"
    return f"- {split} {metric}: {score:.4f}{error} on {count} examples{also}{compared}."


def given_lines(card: str) -> list[str]:
    """The lines that a card was given."""
    _, before, rest = card.partition(f"\n{BEFORE}\n")
    return rest.partition(f"\n{AFTER}\n")[0].strip("\n").split("\n") if before else []


def with_test_score(card: str, line: str) -> str:
    """The card with a line on the test score, in place of an earlier one."""
    before, heading, after = card.partition(f"\n{AFTER}\n")
    kept = [each for each in before.rstrip("\n").split("\n") if not each.startswith(TEST)]
    return "\n".join([*kept, line, ""]) + heading + after
