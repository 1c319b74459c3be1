"""What a checkpoint says about the run that it belongs to, compared with the run that would resume from it."""

from __future__ import annotations

from typing import Any

from ..config import printable, shorten


class OtherBackbone(ValueError):
    """A checkpoint belongs to a run with another backbone."""


class OtherData(ValueError):
    """A checkpoint belongs to this run, but the data have changed since."""


#: The digest of the config fields that identify a run. "config", which earlier versions wrote alone, is that of more.
CONFIG_OF_RUN = "config of the run"
#: What "config" also has. The config.yaml next to such a checkpoint may have other values by now.
MAY_CHANGE = "mesh, train.remat, eval.batch_size and the passes of train.batch_size"


def check_run(about: dict[str, Any], run: dict[str, str] | None, accept_data: bool = False) -> None:
    """Raises ValueError, naming what differs, for the progress of another run. Raises OtherData if only the data differ
    and that is not accepted."""
    held = about.get("run")
    if not held or not run:
        return
    common = held.keys() & run.keys()  # earlier versions kept fewer
    if CONFIG_OF_RUN in common:
        common -= {"config"}
    names = [name for name in common if not is_data(name) and held[name] != run[name]]
    names = sorted("config" if name == CONFIG_OF_RUN else name for name in names)
    other = [f"another {shorten(name)}" for name in names]
    if names == ["config"] and CONFIG_OF_RUN in run.keys() - held.keys():
        other = [f"{other[0]} (an earlier version wrote it: put {MAY_CHANGE} back as they were)"]
    changed = [] if accept_data else changed_data(held, run)
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


def changed_data(held: dict[str, str] | None, run: dict[str, str] | None) -> list[str]:
    """The parts of the data that differ between two runs; "data" if a checkpoint of an earlier version does not say
    which part."""
    if not held or not run:
        return []
    parts = [{name for name in names if is_data(name)} - {"data"} for names in (held, run)]
    names = sorted(parts[0] | parts[1]) if all(parts) else ["data"]
    return [name for name in names if held.get(name) != run.get(name)]


def describe_changes(changed: list[str], held: dict[str, str], run: dict[str, str]) -> str:
    """other training data (20 examples there, 24 here)"""

    def described(name: str) -> str:
        if name == "data":
            return "another 'data'"
        there, here = (digests.get(name, "0").partition(" ")[0] for digests in (held, run))
        count = f"{there} examples there, {here} here" if there != here else f"{here} examples, not the same"
        return f"other {printable(name, 150)} ({count})"

    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(map(described, changed[:3])) + more
