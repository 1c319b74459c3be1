"""What a checkpoint says about the run that it belongs to, compared with the run that would resume from it."""

from __future__ import annotations

from ..io.checks import printable, shorten


class OtherBackbone(ValueError):
    """A checkpoint belongs to a run with another backbone."""


class OtherData(ValueError):
    """A checkpoint belongs to this run, but the data have changed since."""


def check_run(held: dict[str, str], run: dict[str, str]) -> None:
    """Raises ValueError, naming what differs, for the digests of another run; OtherData if only the data differ."""
    common = held.keys() & run.keys()  # a backbone in another dtype has another name
    names = sorted(name for name in common if not is_data(name) and held[name] != run[name])
    other = [f"another {shorten(name)}" for name in names]
    changed = changed_data(held, run)
    kind = ValueError if other else OtherData
    if any(name != "config" for name in names):
        kind = OtherBackbone
    other += [describe_changes(changed, held, run)] if changed else []
    if other:
        raise kind(f"it is of another run: {' and '.join(other)}")


def is_data(name: str) -> bool:
    """Whether a part of what identifies a run is of its data. The others are "config", "backbone", and what
    `digests_of_run` adds."""
    return name.partition(" ")[0] not in ("config", "backbone")


def changed_data(held: dict[str, str], run: dict[str, str]) -> list[str]:
    """The parts of the data that differ between two runs."""
    names = filter(is_data, sorted(held | run))
    return [name for name in names if held.get(name) != run.get(name)]


def describe_changes(changed: list[str], held: dict[str, str], run: dict[str, str]) -> str:
    """other training data (20 examples there, 24 here)"""

    def described(name: str) -> str:
        there, here = (digests.get(name, "0").partition(" ")[0] for digests in (held, run))
        count = f"{there} examples there, {here} here" if there != here else f"{here} examples, not the same"
        return f"other {printable(name, 150)} ({count})"

    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(map(described, changed[:3])) + more
