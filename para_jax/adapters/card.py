"""The model card of an adapter folder, README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import yaml

from .method import Method


def model_card(method: Method, config: Any, base_model: str, lines: Iterable[str]) -> str:
    """README.md as hubs read it. It names PEFT as the library for adapters that PEFT can load."""
    base = {"base_model": base_model} if base_model else {}
    front = {
        "library_name": "peft" if method.in_peft else "para_jax",
        **base,
        "tags": [method.name, "adapter"],
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {method.label} adapter",
            "",
            f"Base model: {base_model or 'not stated'}. {method.outline(config)}.",
            "",
            *lines,
            "",
            "## How to load it",
            "",
            "```python",
            "from para_jax import generate, load_adapter, load_backbone, load_tokenizer",
            "",
            f"base = {json.dumps(base_model or 'the base model')}",
            "model, tokenizer = load_backbone(base), load_tokenizer(base)",
            'adapter = load_adapter("this folder, or its hub id", model.config, model=model)',
            'print(generate(model, ["a prompt"], tokenizer=tokenizer, adapters=adapter)[0])',
            "```",
            "",
            *(["It is in the format of Hugging Face PEFT, which loads it too.", ""] if method.in_peft else []),
        ]
    )
