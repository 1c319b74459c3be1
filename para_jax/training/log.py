"""The log of a run: metrics.jsonl, TensorBoard and wandb. Values are written one step late, so no step waits for
them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..config import RunConfig, config_dict
from ..io import atomic
from ..io.checks import printable
from ..io.messages import say
from ..io.progress import Progress
from ..io.storage.bucket import BucketPath, Place
from ..runtime.processes import is_first, on_first_process
from .metrics_file import MetricsWriter, Reached, is_log, kept_rows, read_metrics, write_metrics

FLUSH_SECONDS = 10.0
#: Seconds between two uploads of TensorBoard's values to a bucket.
UPLOAD_SECONDS = 60.0
#: Values of a step that differ between runs: times, and rates derived from them.
TIMES = ("step_seconds", "input_wait_seconds", "tokens_per_second", "model_flops_utilisation")


class Done(NamedTuple):
    """A dispatched step. Its values may still be being computed."""

    step: int
    values: dict[str, Any]
    tokens: int
    """in the batch, without padding"""
    begun: float | None
    """when its batch was requested, in seconds of time.monotonic; None if this step is not to be timed"""
    waited: float
    """seconds until the batch arrived"""


class Log:
    """metrics.jsonl, TensorBoard and wandb. Only the first process writes.

    A run that resumes from `reached` drops the rows that it will write again; a new run (None) drops all rows. Raises
    ValueError on all processes if metrics.jsonl is damaged.

    Args:
        peak_rate: tokens per second if the devices computed only the backbone's matrix products, at their peak. The
            utilisation is relative to it; None if the peak is unknown.
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
        self.first = is_first()
        step = reached.step if reached else None
        self.writers: list[Any] = []
        made = (WRITERS[name](config, folder, step) for name in config.logging.report_to)
        on_first_process(lambda: self.writers.extend(made))  # an error there ends all hosts
        self.rows = MetricsWriter(folder / "metrics.jsonl")
        self.last_values_at = 0.0  # in time.monotonic
        on_first_process(lambda: drop_rows(self.rows.file, reached, ended=ended))

    def step(self, done: Done, values: dict[str, float], bar: Progress, advance: int = 1) -> None:
        """Writes the values of a step, which must have just arrived, and advances the run's progress."""
        now = time.monotonic()
        begun = None if done.begun is None else max(done.begun, self.last_values_at)
        rates = {} if begun is None else step_rates(done, now - begun, self.peak_rate)
        self.last_values_at = now
        details = {"loss": f"{values['loss']:.4f}"}
        if rates:
            details["tokens/s"] = f"{rates['tokens_per_second']:.0f}"
        if "model_flops_utilisation" in rates:
            details["utilisation"] = f"{rates['model_flops_utilisation']:.1%}"
        bar.advance(advance, **details)
        if done.step % self.every == 0:
            self.write(done.step, values | rates)

    def write(self, step: int, values: dict[str, float], *, show: bool = False) -> None:
        """Adds values of a step, and logs them as a message with `show`. An OSError names the folder."""
        if show:
            say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        with self.errors_named():
            if self.first:
                self.rows.add(step, values)
            for writer in self.writers:
                writer(step, values)
        if show:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that were held back. A resumed run does not repeat rows from before its checkpoint."""
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
                f"{self.folder}: can't write the log ({said}). What was saved before is kept; "
                f"{atomic.remedy(error.errno)}, and the same command resumes"
            ) from None

    def close(self) -> None:
        with suppress(OSError):  # a run that ends without an error has flushed already
            self.flush()
        for writer in self.writers:
            writer.close()


class TensorBoard:
    """An event file, written by tensorboardX's record writer. Its SummaryWriter has a thread that dies when the disk is
    full, and whose queue then blocks the run forever. In a bucket there are several files, each written locally first.
    """

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
        with suppress(OSError):  # metrics.jsonl has everything, and this must not hide an error that ends the run
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
            raise ValueError("logging.report_to: wandb is not installed; run `pip install 'para_jax[wandb]'`") from None
        here = tempfile.mkdtemp(prefix="para_jax-") if isinstance(folder, BucketPath) else str(folder)
        try:
            self.run = wandb.init(dir=here, config=config_dict(config), name=folder.name)
        except Exception as error:  # wandb's errors have no common class but this
            raise ValueError(
                f"logging.report_to: wandb can't start ({printable(str(error), 200)}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def step_rates(done: Done, seconds: float, peak_rate: float | None) -> dict[str, float]:
    """The values named in TIMES, for a step that took this long."""
    rate = done.tokens / seconds
    rates = {"step_seconds": seconds, "input_wait_seconds": done.waited, "tokens_per_second": rate}
    if peak_rate is not None:
        rates["model_flops_utilisation"] = rate / peak_rate
    return {name: float(f"{value:.4g}") for name, value in rates.items()}


def drop_rows(file: Place, reached: Reached | None, *, ended: bool) -> None:
    """Removes the rows that a run resumed from here will write again; all rows for None."""
    if is_log(file):
        write_metrics(file, kept_rows(read_metrics(file), reached, ended=ended) if reached else [])
