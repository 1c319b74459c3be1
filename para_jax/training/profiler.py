"""`profiler: {start_step, steps}`: a trace of some steps by jax.profiler, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from .. import devices
from ..config import ProfilerSection
from ..processes import is_first


class Profiler:
    """Traces the steps from `start_step` on, into output_dir/profile; the first process alone does. A run that resumes
    among them, or ends there, has a trace of those it made."""

    def __init__(self, section: ProfilerSection, folder: Path):
        start = section.start_step
        self.steps = range(start, start + section.steps) if start is not None and is_first() else range(0)
        self.folder, self.on = folder / "profile", False

    def before(self, step: int) -> None:
        if step in self.steps and not self.on:
            jax.profiler.start_trace(self.folder)
            self.on = True

    def after(self, step: int, values) -> None:
        """Ends the trace with the last of its steps, when the device has done it."""
        if self.on and step + 1 not in self.steps:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        if self.on:
            self.on = False
            jax.profiler.stop_trace()
            devices.say(f"wrote a profile to {self.folder}; look at it with `tensorboard --logdir {self.folder}`")
