"""A trace of some training steps by jax.profiler, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax

from ..config import ProfilerSection
from ..io.messages import say
from ..io.storage.bucket import BucketPath, Place
from ..runtime.processes import is_first


class Profiler:
    """Traces `steps` steps from `start_step` into output_dir/profile, on the first process only. For a bucket the trace
    is written locally first. A run that starts or ends within these steps traces the part that it runs."""

    def __init__(self, section: ProfilerSection, folder: Place):
        start = section.start_step
        self.steps = range(start, start + section.steps) if start is not None and is_first() else range(0)
        self.folder, self.on = folder / "profile", False
        self.here = tempfile.TemporaryDirectory(prefix="para_jax-") if isinstance(folder, BucketPath) else None

    def before(self, step: int) -> None:
        if step in self.steps and not self.on:
            jax.profiler.start_trace(self.here.name if self.here else self.folder)
            self.on = True

    def after(self, step: int, values) -> None:
        """Ends the trace after its last step, once the device has finished it."""
        if self.on and step + 1 not in self.steps:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        if self.on:
            self.on = False
            jax.profiler.stop_trace()
            if self.here:
                upload(Path(self.here.name), self.folder)
            say(f"wrote a profile to {self.folder}; to see it, run `tensorboard --logdir {self.folder}`")


def upload(folder: Path, to: BucketPath) -> None:
    """Copies the files of a folder into a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (to / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
