"""EvalOptions: how adapters are evaluated. The flags of `para-jax evaluate` are made from its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..config.bounds import Bounds, PositiveInt, Seed, check_fields
from ..io.shards import Shard, parse_shard


def described(default: Any, text: str, **more: str) -> Any:
    """A field with its default and its flag's help."""
    return field(default=default, metadata={"help": text} | more)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Which examples are asked, how, and what is kept."""

    limit: PositiveInt | None = described(None, "score the first N examples of each task; default: all", metavar="N")
    rows: PositiveInt = 16
    """rows per batch"""
    max_prefill_tokens: PositiveInt | None = None
    """of the engine that writes answers"""
    seed: Seed = 0
    """for sampled answers and shuffled prompts"""
    split: Literal["validation", "test"] = "test"
    """which split of a run's data, of data sets and of folders to score"""
    own: bool = described(
        False,
        "--tasks is a folder of tenants' data: score each adapter on its own test file, the base model on all",
    )
    base: bool | None = None
    """score the base model too. None: yes, unless there is exactly one adapter"""
    shuffle_prompts: bool = described(
        False, "give each example the factors of another example's prompt (not for lm-eval's tasks)"
    )
    log_samples: bool = described(
        False,
        "also write each example's prompt, expected and given answer, and scores: samples_ADAPTER_TASK.jsonl",
    )
    adapter_memory: Annotated[float, Bounds(above=0, below=math.inf)] = 8.0
    """GB of host memory for adapters. If they need more, they are evaluated in passes"""
    shard: Shard | str | None = field(default=None, metadata={"in_file": False})
    """I/N: evaluate one part of the adapters, chosen by a hash of their files. `para-jax merge` joins the outputs"""
    include_path: str | None = None
    """a folder of further task files for lm-eval"""
    num_fewshot: Annotated[int, Bounds(at_least=0)] | None = described(
        None, "examples in each context; default: the task's own number", metavar="N"
    )
    chat: bool = described(False, "format contexts with the chat template")

    def __post_init__(self):
        if self.shard is not None:
            object.__setattr__(self, "shard", parse_shard(str(self.shard)))
        check_fields(self)
