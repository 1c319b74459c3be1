"""Run folders: damaged metrics, tenants, configs, checkpoints and adapters, as reports, as plots, and resumed."""

import json
import os
import random
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import tiny_run

from para_jax import train
from para_jax.config import save_config
from para_jax.inspect import folder_report
from para_jax.plots import curves_plot

from . import configs, mutate
from .cases import Trial, Wrong, is_control, shared_folder

ENTRY = {
    "examples": 20, "steps": 6, "best_step": 3, "best_score": 0.5, "metric": "exact_match", "test_before": 0.1,
    "test_after": None, "ended": "done", "warning": None, "scores": {},
}  # fmt: skip
ROWS = [
    {"step": 1, "loss": 6.9, "grad_norm": 1.2, "learning_rate": 0.01, "tokens": 33.0, "step_seconds": 0.01},
    {"step": 2, "loss": 6.4, "grad_norm": 1.3, "learning_rate": 0.02, "tokens": 32.0},
    {"step": 2, "validation_loss": 6.5, "validation_exact_match": 0.25, "validation_exact_match_stderr": 0.1},
    {"step": 4, "loss": 6.0, "tokens": 30.0},
    {"step": 4, "validation_loss": 6.1, "validation_exact_match": 0.5, "validation_exact_match_stderr": 0.1},
]


@cache
def work() -> Path:
    return tiny_run.run_folder(shared_folder() / "work")


# ------------------------------------------------------------------------------------------------------------- reports


def report(draw: random.Random, folder: Path) -> Trial:
    """A damaged folder is reported and drawn, or refused by the name of the file."""
    made, many = folder / "run", draw.random() < 0.5
    made.mkdir()
    options = ["sweep.seed=[1,2]"] if many else []
    save_config(tiny_run.run_config(work(), f"output_dir={made}", *options), made / "config.yaml")
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if many:
        entries = {"a": ENTRY, "b": ENTRY | {"ended": "not finite", "best_score": None, "test_after": 0.5}}
        (made / "tenants.json").write_text(json.dumps(entries, indent=1) + "\n")
        for name in entries:
            (made / name).mkdir()
            shutil.copy(made / "config.yaml", made / name)
    file = made / draw.choice(
        ("tenants.json", "tenants.json", "config.yaml") if many else ("metrics.jsonl", "config.yaml")
    )
    damage(draw, file)
    plot = not many and draw.random() < 0.4

    def run():
        if plot:
            curves_plot([made]).draw_without_rendering()
            return ""
        return folder_report(made)

    def check(text):
        if any(is_control(character) for character in text):
            raise Wrong("raw control characters in the report")

    said = configs.field_names() if file.name == "config.yaml" else ()
    return Trial(run, (str(made), file.name, *said), check)


def damage(draw: random.Random, file: Path) -> None:
    """One of a run's files is changed: its values, its bytes, or what it is."""
    if draw.random() < 0.1:
        mutate.file(draw, file)
    elif file.suffix == ".jsonl" and draw.random() < 0.8:
        lines = file.read_text().splitlines()
        at = draw.randrange(len(lines))
        changed = mutate.json_text(draw, json.loads(lines[at]), ("step", "loss", "validation_loss", "test_after_loss"))
        lines[at : at + draw.randint(0, 1)] = [draw.choice((changed, changed, b"5", b"[]", b"{}", b'{"step": "x"}'))]
        file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    elif file.suffix == ".json" and draw.random() < 0.8:
        file.write_bytes(mutate.json_text(draw, json.loads(file.read_text()), tuple(ENTRY)))
    else:
        file.write_bytes(mutate.data(draw, file.read_bytes()))


# -------------------------------------------------------------------------------------------------------------- resume


@cache
def whole() -> tuple[Path, dict[str, np.ndarray]]:
    """A run that was never disturbed: its folder, with the checkpoints of steps 3 and 6, and its adapter."""
    config = tiny_run.run_config(work(), f"output_dir={work() / 'whole'}")
    return work() / "whole", arrays(train(config))


@cache
def other() -> Path:
    """Another run of the same shape, with checkpoints of the same steps."""
    config = tiny_run.run_config(work(), f"output_dir={work() / 'other'}", "seed=1")
    train(config)
    return work() / "other"


def arrays(result) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(result.adapter)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses(folder: Path) -> list[tuple[int, float]]:
    """The training losses of the steps after the first checkpoint, which a run that stopped there computes again."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row and row["step"] > 3]


def resume(draw: random.Random, folder: Path) -> Trial:
    """A damaged run goes on to the very adapter of the run that nothing disturbed, or is refused by name."""
    original, expected = whole()
    other()
    made = folder / "run"
    shutil.copytree(original, made)
    config = tiny_run.run_config(work(), f"output_dir={made}")
    save_config(config, made / "config.yaml")
    half = draw.random() < 0.7
    if half:
        shutil.rmtree(made / "checkpoints" / "6")
    steps = sorted(path.name for path in (made / "checkpoints").iterdir())
    change, step = draw.random(), made / "checkpoints" / draw.choice(steps)
    if change < 0.1:  # the checkpoint of another run
        shutil.rmtree(step)
        shutil.copytree(other() / "checkpoints" / step.name, step)
    elif change < 0.2:
        draw.choice((shutil.rmtree, lambda path: os.rename(path, path.with_name(draw.choice(("9", "x", "03", "2"))))))(
            step
        )
    elif change < 0.7:
        files = sorted(path for path in step.rglob("*") if path.is_file())
        damage(draw, draw.choice(files))
    else:
        kept = made / "adapter"
        damage(
            draw, draw.choice((made / "metrics.jsonl", made / "metrics.jsonl", made / "config.yaml", *kept.iterdir()))
        )

    def check(found):
        for name, array in expected.items():
            if not np.array_equal(found[name], array):
                raise Wrong(f"the resumed run's {name} differs from the undisturbed one's")
        if half and losses(made) != losses(original):
            raise Wrong("the resumed run's losses differ from the undisturbed one's")

    return Trial(lambda: arrays(train(config)), (str(made), *configs.field_names()), check)
