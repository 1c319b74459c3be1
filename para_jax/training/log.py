"""A run's log: metrics.jsonl, TensorBoard and wandb. Values are written one step late: no step waits for them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from .. import atomic, devices
from ..config import RunConfig, config_dict
from ..processes import by_first
from ..storage.bucket import BucketPath, Place
from .metrics_file import Reached, Rows, is_log, kept_rows, read_metrics, write_metrics

FLUSH_SECONDS = 10.0
#: Seconds that TensorBoard's values are kept back from a bucket.
UPLOAD_SECONDS = 60.0
#: Values of a step that differ from run to run: times, and what is made of them.
TIMES = ("step_seconds", "input_wait_seconds", "tokens_per_second", "model_flops_utilisation")


class Done(NamedTuple):
    """A step that is dispatched; its values may still be on their way."""

    step: int
    values: dict[str, Any]
    tokens: int
    """of the batch, without padding"""
    begun: float | None
    """when its batch was asked for, in seconds of time.monotonic; None where the time is not that of a step"""
    waited: float
    """seconds until the batch was there"""


class Log:
    """metrics.jsonl, TensorBoard and wandb; the first process alone writes.

    What a run that goes on from `reached` will write again is dropped; all of it for None, a run that starts. Raises
    ValueError, on all processes, for a metrics.jsonl that is damaged.

    Args:
        peak_rate: tokens a second at which the devices would do nothing but the backbone's matrix products at their
            peak, for the utilisation; None where the peak is not known.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Place,
        reached: Reached | None,
        *,
        ended: bool = False,
        peak_rate: float | None = None,
    ):
        self.folder, self.every, self.peak_rate = folder, config.logging.every, peak_rate
        self.first = jax.process_index() == 0
        step = reached.step if reached else None
        self.writers = [WRITERS[name](config, folder, step) for name in config.logging.report_to] if self.first else []
        self.rows = Rows(folder / "metrics.jsonl")
        self.read = 0.0  # when the values of the step before came
        by_first(lambda: drop_rows(self.rows.file, reached, ended=ended))

    def step(self, done: Done, values: dict[str, float], bar: tqdm, advance: int = 1) -> None:
        """Writes a step's values, which have come just now, and moves the bar on."""
        now = time.monotonic()
        rates = {} if done.begun is None else step_rates(done, now - max(done.begun, self.read), self.peak_rate)
        self.read = now
        shown = {"loss": f"{values['loss']:.4f}"}
        if rates:
            shown["tokens/s"] = f"{rates['tokens_per_second']:.0f}"
        if "model_flops_utilisation" in rates:
            shown["utilisation"] = f"{rates['model_flops_utilisation']:.1%}"
        bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in shown.items()))
        bar.update(advance)
        if done.step % self.every == 0:
            self.write(done.step, values | rates)

    def write(self, step: int, values: dict[str, float], *, show: bool = False) -> None:
        """Adds values of a step, for the user to see too with `show`; OSError names the folder where it can't."""
        if show:
            devices.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        with self.errors_named():
            if self.first:
                self.rows.add(step, values)
            for writer in self.writers:
                writer(step, values)
        if show:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that were kept back. Before a checkpoint: a resumed run does not make earlier ones again."""
        with self.errors_named():
            if self.first:
                self.rows.flush()

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = error.strerror or str(error)
            raise OSError(
                f"{self.folder}: the log can't be written ({said}); what was saved before is kept: "
                f"{atomic.remedy(error.errno)}, and the same command resumes"
            ) from None

    def close(self) -> None:
        with suppress(OSError):  # of a run that ends with an error; one that does not has flushed
            self.flush()
        for writer in self.writers:
            writer.close()


class TensorBoard:
    """An event file, by tensorboardX's record writer: its SummaryWriter has a thread, which a full disk ends, and whose
    queue then holds the run up for ever. In a bucket it is several files: each is written here first."""

    def __init__(self, config: RunConfig, folder: Place, step: int | None):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        self.event, self.scalar = Event, scalar
        self.to, self.step, self.count = folder / "tensorboard", step or 0, 0
        self.here: Any = None
        if isinstance(folder, BucketPath):
            self.here = tempfile.TemporaryDirectory(prefix="para_jax-")
        self.to.mkdir(exist_ok=True)
        self.open()
        # TensorBoard drops what it has seen from this step on
        begin = SessionLog(status=SessionLog.START)
        self.events.write_event(Event(wall_time=time.time(), step=(step or 0) + 1, session_log=begin))

    def open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        place = self.here.name if self.here else self.to
        self.events = EventsWriter(
            str(Path(str(place)) / "events"), f".{self.step}" + f".{self.count:06d}" * bool(self.here)
        )
        self.flushed, self.count = time.monotonic(), self.count + 1

    def __call__(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = self.event(wall_time=time.time(), step=step, summary=self.scalar(name, value))
            self.events.write_event(event)
        if self.here and time.monotonic() > self.flushed + UPLOAD_SECONDS:
            self.upload()
            self.open()
        elif not self.here and time.monotonic() > self.flushed + FLUSH_SECONDS:
            self.events.flush()
            self.flushed = time.monotonic()

    def upload(self) -> None:
        """Moves the event file into the bucket."""
        self.events.close()
        for file in sorted(Path(self.here.name).iterdir()):
            (self.to / file.name).write_bytes(file.read_bytes())
            file.unlink()

    def close(self) -> None:
        with suppress(OSError):  # metrics.jsonl has it all; an error that ends the run shall not be hidden by this one
            if self.here:
                self.upload()
                self.here.cleanup()
            else:
                self.events.close()


class Wandb:
    def __init__(self, config: RunConfig, folder: Place, step: int | None):
        try:
            import wandb
        except ImportError:
            raise ValueError("logging.report_to: wandb is not installed; `pip install 'para_jax[wandb]'`") from None
        here = tempfile.mkdtemp(prefix="para_jax-") if isinstance(folder, BucketPath) else str(folder)
        self.run = wandb.init(dir=here, config=config_dict(config), name=folder.name)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def step_rates(done: Done, seconds: float, peak_rate: float | None) -> dict[str, float]:
    """What a step's time says; the names of TIMES."""
    rate = done.tokens / seconds
    rates = {"step_seconds": seconds, "input_wait_seconds": done.waited, "tokens_per_second": rate}
    if peak_rate is not None:
        rates["model_flops_utilisation"] = rate / peak_rate
    return {name: float(f"{value:.4g}") for name, value in rates.items()}


def drop_rows(file: Place, reached: Reached | None, *, ended: bool = False) -> None:
    """Drops what a run that goes on from here will write again out of its log; all of it for None."""
    if is_log(file):
        write_metrics(file, kept_rows(read_metrics(file), reached, ended=ended) if reached else [])
