"""A Ray cluster on this machine, and its processes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from quick_compiler import own_flags


@contextmanager
def cluster(cpus: int) -> Iterator[None]:
    """A cluster. Its workers compile as this process does, to the same bits, and find the tests' helpers."""
    import ray

    inherited = {"PYTHONPATH": os.pathsep.join(sys.path), **own_flags()}
    inherited |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_server_port_wait_time_s": "120"}
    inherited |= {"RAY_memory_monitor_refresh_ms": "0"}  # which kills workers where others take the machine's memory
    with pytest.MonkeyPatch.context() as patch:
        for name, value in inherited.items():
            patch.setenv(name, value)
        how = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100_000_000}
        ray.init(address="local", num_cpus=cpus, **how)
        try:
            yield
        finally:
            ray.shutdown()


def only_worker() -> int:
    """The process of the one worker of Ray Data that is alive."""
    from ray._private import state

    alive = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
    (found,) = [actor["Pid"] for actor in alive if "MapWorker" in actor["ActorClassName"]]
    return found


def process_that_writes(file: Path) -> int | None:
    """The process, other than this one, that has a file locked. One file of the system is read for it, because a worker
    that writes few lines soon ends. Its lines: "1: FLOCK ADVISORY WRITE 123 fe:00:456 0 EOF", process and inode."""
    inode = str(file.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        *_, process, place, _, _ = line.split()
        if place.rpartition(":")[2] == inode and int(process) != os.getpid():
            return int(process)
    return None
