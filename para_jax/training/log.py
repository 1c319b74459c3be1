"""A run's log: metrics.jsonl, TensorBoard and wandb. Values are written one step late: no step waits for them."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

import jax
from tqdm import tqdm

from .. import devices
from ..config import RunConfig, config_dict


class Log:
    """metrics.jsonl, TensorBoard and wandb; the first process alone writes.

    What a run that goes on after `step` will write again is dropped; all of it for None, a run that starts.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int | None):
        self.folder, self.every = folder, config.logging.every
        self.first = jax.process_index() == 0
        self.writers = [WRITERS[name](config, folder, step) for name in config.logging.report_to] if self.first else []
        self.file = folder / "metrics.jsonl"
        self.clock: float | None = None
        if self.first and self.file.exists():
            replace_file(self.file, "" if step is None else lines_up_to(step, self.file.read_text()))

    def step(self, pending, new, bar: tqdm):
        """Writes the values of the step before, when the next is dispatched (or None: none comes at once), and gives
        back the new ones."""
        if pending is not None:
            step, values, tokens = pending
            values = {name: float(value) for name, value in values.items()}
            require_finite(step, values)
            now = time.monotonic()
            rate = {"tokens_per_second": round(tokens / (now - self.clock), 1)} if self.clock else {}
            self.clock = None if new is None else now
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate.get('tokens_per_second', 0):.0f} tokens/s")
            bar.update()
            if step % self.every == 0:
                self.write(step, values | rate)
        return new

    def write(self, step: int, values: dict[str, float], *, show: bool = False) -> None:
        if show:
            devices.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        if self.first:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        for writer in self.writers:
            writer(step, values)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class TensorBoard:
    def __init__(self, config: RunConfig, folder: Path, step: int | None):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=(step or 0) + 1)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, config: RunConfig, folder: Path, step: int | None):
        try:
            import wandb
        except ImportError:
            raise ValueError("logging.report_to: wandb is not installed; `pip install 'para_jax[wandb]'`") from None
        self.run = wandb.init(dir=str(folder), config=config_dict(config), name=folder.name)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def require_finite(step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"step {step}: the {name} is {value}; lower train.learning_rate")


def lines_up_to(step: int, text: str) -> str:
    """The lines of metrics.jsonl that a run keeps when it goes on after this step: not the score after training, which
    is measured again, and not a line that was cut off when the run was."""
    kept = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["step"] <= step and not any(name.startswith("test_after") for name in row):
                kept.append(line + "\n")
    return "".join(kept)


def replace_file(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}")
    part.write_text(text)
    os.replace(part, file)
