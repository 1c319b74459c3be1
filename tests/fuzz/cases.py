"""One case: a good input is mutated, given to a public entry point, and the outcome is after_score.

A case is a pure function of its target's name and its number: all that is drawn comes from one `random.Random`.
"""

import random
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

#: A clean error has at most so many lines and characters; a case may take so much more memory than was held before.
MAX_LINES, MAX_CHARACTERS, MAX_BYTES = 19, 4000, 2**30

#: clean: a ValueError or OSError that names the file, field or value. accepted: the right result. weak: a clean error
#: that is long, holds raw control characters or names nothing. The last five are failures.
OUTCOMES = ("clean", "accepted", "weak", "traceback", "hang", "memory", "wrong")
FAILURES = OUTCOMES[2:]


class Outcome(NamedTuple):
    kind: str
    detail: str = ""


class Wrong(Exception):
    """A result that differs from an independent reading of the same input."""


class Trial(NamedTuple):
    """A mutated input, ready to be tried."""

    run: Callable[[], Any]
    """calls the entry point"""
    names: tuple[str, ...]
    """a clean error holds at least one of these texts"""
    check: Callable[[Any], None] = lambda result: None
    """raises Wrong if the result of `run` is not the right one"""


#: Makes the trial of a case from its random numbers and an empty folder of its own.
Target = Callable[[random.Random, Path], Trial]


def run_case(target: str, number: int, began: Callable[[], None] = lambda: None) -> Outcome:
    """The outcome of one case. `began` is called once the input is ready, just before the entry point is."""
    from .targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        trial = TARGETS[target].make(random.Random(f"{target} {number}"), Path(folder))
        began()
        before = reset_peak()
        outcome = judge(trial)
        used = peak_bytes() - before
        return Outcome("memory", f"{used / 1e9:.1f} GB") if used > MAX_BYTES else outcome


def judge(trial: Trial) -> Outcome:
    try:
        result = trial.run()
    except Wrong as error:
        return Outcome("wrong", str(error))
    except MemoryError as error:
        return Outcome("memory", last_lines(error))
    except (ValueError, OSError) as error:
        faults = faults_of(str(error), trial.names)
        return Outcome("weak" if faults else "clean", f"{', '.join(faults)}: {error!r}" if faults else str(error))
    except BaseException as error:  # a panic in Rust is one that is no Exception
        return Outcome("traceback", last_lines(error))
    try:
        trial.check(result)
    except Wrong as error:
        return Outcome("wrong", str(error))
    except BaseException as error:
        return Outcome("traceback", f"after it was accepted: {last_lines(error)}")
    return Outcome("accepted")


def faults_of(text: str, names: tuple[str, ...]) -> list[str]:
    """What is wrong with the text of an error."""
    faults = []
    if len(text) > MAX_CHARACTERS:
        faults.append(f"{len(text)} characters")
    if text.count("\n") >= MAX_LINES:
        faults.append(f"{text.count(chr(10)) + 1} lines")
    if any(is_control(character) for character in text):
        faults.append("raw control characters")
    if not any(name and name in text for name in names):
        faults.append("names nothing")
    return faults


def is_control(character: str) -> bool:
    """Whether a terminal could act on a character, or could not show it at all (half a surrogate pair)."""
    return (character < " " and character != "\n") or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff"


def last_lines(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "para_jax" in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place}: {str(error)[:300]}"


@cache
def shared_folder() -> Path:
    """A folder for good inputs that all cases of this process copy from."""
    shared_folder.kept = tempfile.TemporaryDirectory(prefix="fuzz-good-")
    return Path(shared_folder.kept.name)


# -------------------------------------------------------------------------------------------------------------- memory


def reset_peak() -> int:
    """Starts a new measurement of the peak; the bytes of memory held now. Both are 0 where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_bytes()


def peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
