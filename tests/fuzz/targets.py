"""All targets by name, each with how many cases it gets."""

from functools import partial
from typing import NamedTuple

from . import (
    adapters,
    backbones,
    command_lines,
    configs,
    gguf_files,
    http_requests,
    job_lines,
    names,
    rows,
    run_folders,
    schedules,
    tokenizer_folders,
)
from .cases import Target


class Aim(NamedTuple):
    make: Target
    share: float = 1.0
    """of --fuzz-cases: less for a target whose cases are slow"""
    short: int = 10
    """cases in the default tests, which have no time for targets that compile much"""


TARGETS: dict[str, Aim] = {
    "adapter-para": Aim(partial(adapters.adapter, "para")),
    "adapter-lora": Aim(partial(adapters.adapter, "lora")),
    "adapter-ia3": Aim(partial(adapters.adapter, "ia3")),
    "adapter-bank": Aim(adapters.bank),
    "backbone-config": Aim(backbones.config),
    "backbone-weights": Aim(backbones.weights),
    "config": Aim(configs.config, share=2.0, short=20),
    "rows": Aim(rows.rows, share=2.0, short=20),
    "gguf": Aim(gguf_files.model),
    "gguf-tokenizer": Aim(gguf_files.tokenizer),
    "tokenizer": Aim(tokenizer_folders.tokenizer),
    "chat-template": Aim(tokenizer_folders.template, share=0.5, short=15),
    "name": Aim(names.name),
    "job": Aim(job_lines.jobs, short=12),
    "run-report": Aim(run_folders.report),
    "run-resume": Aim(run_folders.resume, share=0.1, short=0),
    "command": Aim(command_lines.command, share=0.5, short=0),
    "http": Aim(http_requests.request, short=20),
    "schedule": Aim(schedules.schedule, share=0.25, short=4),
    "interrupt": Aim(schedules.interrupts, share=0.25, short=2),
}
