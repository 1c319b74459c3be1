"""Notices an adapter that is worse than the base model on held-out data."""

from __future__ import annotations

from ..training.scores_file import Records

#: The share by which a loss is above the base model's before that is said.
ABOVE_BASE = 0.02


def worse_than_base(scores: Records, learning_rate: float) -> str | None:
    """What is wrong with the adapter by its scores, and what to do about it; None if nothing is, or if it was not
    compared. A loss may rise while the metric gets better: the model becomes too sure of the answers it gets wrong."""
    for split in ("validation", "test"):
        base, adapter = scores.get(f"{split}_base"), scores.get(split)
        if base is None or adapter is None:
            continue
        before, after, metric = base["values"], adapter["values"], adapter["metric"]
        better = metric != "loss" and after[metric] > before[metric]
        if not better and after["loss"] > before["loss"] + ABOVE_BASE * abs(before["loss"]):
            return (
                f"{split} loss {after['loss']:.3g} is above the base model's {before['loss']:.3g}; lower "
                f"train.learning_rate ({learning_rate:g})"
            )
    return None
