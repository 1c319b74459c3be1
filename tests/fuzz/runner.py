"""Runs cases in child processes, which are replaced when they hang, die or have grown."""

import faulthandler
import multiprocessing
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .cases import FAILURES, OUTCOMES, Outcome, peak_bytes, reset_peak, run_case

#: Seconds for the entry point, and for the input that is made before (the first case of a target compiles).
SECONDS, SETUP_SECONDS = 20, 180
#: The most bytes of data of a child, after which allocations fail; and from which it is replaced between two cases.
DATA_BYTES, GROWN_BYTES = 4 * 2**30, 2 * 2**30
SECRET = ("PARA_JAX_FUZZ", "secret-of-the-environment")


class Worker:
    """A child process that runs one case after another."""

    def __init__(self):
        self.child = None

    def run(self, target: str, number: int) -> Outcome:
        if self.child is None:
            self.start()
        self.pipe.send((target, number))
        try:
            for limit in (SETUP_SECONDS, SECONDS):  # the input is ready; the outcome
                if not self.answers_within(limit):
                    return Outcome("hang", f"longer than {limit} s: {self.stop()}")
                outcome = self.pipe.recv()
                if outcome is not None:
                    break
        except EOFError:
            self.child.join(SECONDS)
            return Outcome("traceback", f"the process died with code {self.child.exitcode}: {self.stop()}")
        kind, detail, spent = outcome
        if spent:
            self.stop()
        return Outcome(kind, detail)

    def answers_within(self, limit: float) -> bool:
        """Whether the child says something within `limit` seconds, or later on a busy machine: until it has used that
        much processor time, at most ten times as long."""
        began, worked = time.monotonic(), processor_seconds(self.child.pid)
        while not self.pipe.poll(min(limit, 1)):
            waited = time.monotonic() - began
            if waited > 10 * limit or (waited > limit and processor_seconds(self.child.pid) - worked > limit):
                return False
        return True

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.log = tempfile.NamedTemporaryFile(prefix="fuzz-log-")  # noqa: SIM115
        self.child = context.Process(target=serve, args=(theirs, self.log.name), daemon=True)
        self.child.start()
        theirs.close()

    def stop(self) -> str:
        """Ends the child, if there is one; the last that it said on stderr."""
        if self.child is None:
            return ""
        self.child.kill()
        self.child.join()
        self.child = None
        self.pipe.close()
        said = Path(self.log.name).read_text(errors="replace")[-1500:]
        self.log.close()
        return said


def processor_seconds(process: int) -> float:
    """The processor time of a process; infinite where Linux does not tell, or the process has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(pipe, log: str) -> None:
    """The child: an outcome for each (target, number) that the pipe brings."""
    stream = open(log, "w")  # noqa: SIM115
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    prepare()

    def began():
        faulthandler.dump_traceback_later(SECONDS - 1, file=stream)
        pipe.send(None)

    while True:
        try:
            target, number = pipe.recv()
        except EOFError:
            return
        before = threading.enumerate()
        kind, detail = run_case(target, number, began)
        faulthandler.cancel_dump_traceback_later()
        reset_peak()
        left_over = kind in FAILURES and set(threading.enumerate()) - set(before)  # they would disturb the next case
        pipe.send((kind, detail, bool(left_over) or peak_bytes() > GROWN_BYTES))


def prepare() -> None:
    """What a process needs before it runs cases: a limit of memory, no network, a cache folder of its own, and a secret
    to be kept."""
    with suppress(ValueError, OSError):  # a system without such a limit
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    os.environ |= dict([SECRET]) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    cache = tempfile.mkdtemp(prefix="fuzz-cache-")
    os.environ |= {"XDG_CACHE_HOME": cache, "HF_HOME": cache}
    sys.setrecursionlimit(1000)


# ------------------------------------------------------------------------------------------------------------ campaign


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    made = [Worker() for _ in range(count)]
    try:
        yield made
    finally:
        for worker in made:
            worker.stop()


def campaign(team: list[Worker], target: str, numbers: Iterable[int]) -> dict[int, Outcome]:
    """The outcome of each of a target's cases."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        left.put(number)
    outcomes = {}

    def work(worker: Worker):
        with suppress(queue.Empty):
            while True:
                number = left.get_nowait()
                outcomes[number] = worker.run(target, number)

    with ThreadPoolExecutor(len(team)) as pool:
        list(pool.map(work, team))
    return dict(sorted(outcomes.items()))


def counts(outcomes: dict[int, Outcome]) -> dict[str, int]:
    counted = Counter(outcome.kind for outcome in outcomes.values())
    return {kind: counted[kind] for kind in OUTCOMES}


def table(rows: dict[str, dict[str, int]]) -> str:
    """Counts by target, and their sums, as Markdown."""
    total = {kind: sum(row[kind] for row in rows.values()) for kind in OUTCOMES}
    lines = [f"| target | cases | {' | '.join(OUTCOMES)} |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for name, row in (rows | {"all": total}).items():
        lines.append(f"| {name} | {sum(row.values())} | {' | '.join(str(row[kind]) for kind in OUTCOMES)} |")
    return "\n".join(lines)


def failures(target: str, outcomes: dict[int, Outcome], shown: int = 3) -> str:
    """The failed cases of a target, the first of each kind with how to run them again; empty where all is well."""
    lines = []
    for kind in FAILURES:
        failed = [number for number, outcome in outcomes.items() if outcome.kind == kind]
        if failed:
            lines.append(f"{target}: {len(failed)} {kind}: {' '.join(map(str, failed))}")
        for number in failed[:shown]:
            lines += [f"  PYTHONPATH=tests python -m fuzz {target} {number}", f"    {outcomes[number].detail[:700]}"]
    return "\n".join(lines)
