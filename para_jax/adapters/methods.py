"""The adapter methods. A new method is a file in this folder, an entry here, and a config in config/adapter.py."""

from __future__ import annotations

from typing import Any

from .ia3 import IA3
from .lora import LORA
from .method import Method
from .para import PARA
from .scope import scope_of

METHODS: tuple[Method, ...] = (
    PARA,
    LORA,
    IA3,
)


def method_of(config: Any) -> Method:
    """The method of an adapter config. Raises ValueError for anything else."""
    for method in METHODS:
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS)
    raise ValueError(f"{type(config).__name__} is not an adapter config; use one of {known}")


def form_named(peft_type: Any) -> Method | None:
    """The method, in the format of its folders, whose adapter_config.json has this peft_type."""
    return next((form for method in METHODS for form in method.forms if form.peft_type == peft_type), None)


def has_plain_prompts(config: Any) -> bool:
    """Whether prompts of adapters of this config run through the plain backbone, up to the window."""
    return scope_of(config)[0] == "response"


def is_adapter_config(value: Any) -> bool:
    return any(type(value) is method.config for method in METHODS)
