"""The log of a run: metrics.jsonl, TensorBoard and wandb. Values are written one step late, so no step waits for
them."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..config import RunConfig, config_dict
from ..io.messages import say
from ..io.progress import Progress
from ..io.storage.bucket import BucketPath, Place
from ..runtime.processes import is_first, on_first_process
from .metrics_file import MetricsWriter, keep_rows

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

    Raises ValueError on all processes if metrics.jsonl is damaged.

    Args:
        step, rows: of the checkpoint that the run resumes from: the rows after those are dropped.
        ended: whether the run has ended, so that its test scores stay.
        peak_rate: tokens per second if the devices computed only the backbone's matrix products, at their peak. The
            utilisation is relative to it; None if the peak is unknown.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Place,
        step: int = 0,
        rows: int = 0,
        *,
        ended: bool = False,
        peak_rate: float | None = None,
    ):
        self.folder, self.every, self.peak_rate = folder, config.logging.every, peak_rate
        self.first = is_first()
        self.writers: list[Any] = []
        made = (WRITERS[name](config, folder, step) for name in config.logging.report_to)
        on_first_process(lambda: self.writers.extend(made))  # an error there ends all hosts
        file = folder / "metrics.jsonl"
        self.rows = MetricsWriter(file, on_first_process(lambda: keep_rows(file, rows, ended=ended)))
        self.last_values_at = 0.0  # in time.monotonic

    def step(self, done: Done, values: dict[str, float], bar: Progress, advance: int = 1) -> None:
        """Writes the values of a step, which must have just arrived, and advances the run's progress."""
        now = time.monotonic()
        # Steps are dispatched ahead: this one began no earlier than the one before it ended.
        begun = None if done.begun is None else max(done.begun, self.last_values_at)
        rates = {} if begun is None else step_rates(done, now - begun, self.peak_rate)
        self.last_values_at = now
        details = {"loss": f"{values['loss']:.4f}"}
        if rates:
            details["tokens/s"] = f"{rates['tokens_per_second']:.0f}"
        if "model_flops_utilisation" in rates:
            details["utilisation"] = f"{rates['model_flops_utilisation']:.1%}"
        bar.advance(advance, **details)  # also for steps that are not logged
        if done.step % self.every == 0:
            self.write(done.step, values | rates)

    def write(self, step: int, values: dict[str, float], *, show: bool = False) -> None:
        """Adds values of a step, and logs them as a message with `show`."""
        if show:
            say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        if self.first:
            self.rows.add(step, values)
        for writer in self.writers:
            writer(step, values)
        if show:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that were held back. A resumed run does not repeat rows from before its checkpoint."""
        if self.first:
            self.rows.flush()

    def close(self) -> None:
        with suppress(OSError):  # a run that ends without an error has flushed already
            self.flush()
        for writer in self.writers:
            writer.close()


class TensorBoard:
    """An event file, written by tensorboardX's record writer. Its SummaryWriter has a thread that dies when the disk is
    full, and whose queue then blocks the run forever. For a bucket it is written locally, and uploaded as a whole."""

    def __init__(self, config: RunConfig, folder: Place, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        self.event, self.scalar, self.to = Event, scalar, folder / "tensorboard"
        self.to.mkdir(exist_ok=True)
        self.here = tempfile.TemporaryDirectory(prefix="para_jax-") if isinstance(folder, BucketPath) else None
        place = self.here.name if self.here else str(self.to)
        self.events, self.flushed = EventsWriter(f"{place}/events", f".{step}"), time.monotonic()
        # TensorBoard drops what it has seen from this step on
        begin = SessionLog(status=SessionLog.START)
        self.events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=begin))

    def __call__(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = self.event(wall_time=time.time(), step=step, summary=self.scalar(name, value))
            self.events.write_event(event)
        if time.monotonic() > self.flushed + (UPLOAD_SECONDS if self.here else FLUSH_SECONDS):
            self.flush()

    def flush(self) -> None:
        self.events.flush()
        for file in Path(self.here.name).iterdir() if self.here else ():
            (self.to / file.name).write_bytes(file.read_bytes())
        self.flushed = time.monotonic()

    def close(self) -> None:
        with suppress(OSError):  # metrics.jsonl has everything, and this must not hide an error that ends the run
            self.flush()
            self.events.close()


class Wandb:
    def __init__(self, config: RunConfig, folder: Place, step: int):
        try:
            import wandb
        except ImportError:
            raise ValueError("logging.report_to: wandb is not installed; run `pip install 'para_jax[wandb]'`") from None
        here = tempfile.mkdtemp(prefix="para_jax-") if isinstance(folder, BucketPath) else str(folder)
        self.run = wandb.init(dir=here, config=config_dict(config), name=folder.name)

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
