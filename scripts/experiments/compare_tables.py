"""validation.md and table.md: what a folder holds while a comparison is running."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from compare_cells import read, task_of


def write_tables(output: Path) -> None:
    """validation.md and table.md of all that the output folder holds so far."""
    trained = {file: read(file) for file in sorted(output.glob("*-trained.json"))}
    tasks = {file: task_of(file, found["name"]) for file, found in trained.items()}
    trained = dict(sorted(trained.items(), key=lambda item: (tasks[item[0]], item[1]["parameters"])))
    lines = ["| task | method | parameters | score (loss) after half the steps, by learning rate | seeds at the best |"]
    lines.append("|---|---|---|---|---|")
    for file, found in trained.items():
        tried = ", ".join(
            f"{float(r):g}: " + (f"{one['score']:.3f} ({one['loss']:.3f})" if one["score"] >= 0 else "not finite")
            for r, one in found["rates"].items()
        )
        chosen = f"{found['learning_rate']:g}: {of_seeds(list(found['validation'].values()))}"
        lines.append(f"| {tasks[file]} | {found['name']} | {found['parameters']:,} | {tried} | {chosen} |")
    (output / "validation.md").write_text("\n".join(lines) + "\n")

    lines = ["| task | method | parameters | learning rate | score | loss | training step, s | peak memory, GB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    bases = {task_of(file, "base"): read(file)["test"] for file in sorted(output.glob("*-base-tested.json"))}
    keys = {file: file.name.removesuffix("-trained.json") for file in trained}
    tested = {
        file: [read(one) for one in sorted(output.glob(f"{key}-seed-*-tested.json"))] for file, key in keys.items()
    }
    for task in sorted(bases.keys() | {tasks[file] for file, seeds in tested.items() if seeds}):
        of_task = {file: seeds for file, seeds in tested.items() if seeds and tasks[file] == task}
        base = bases.get(task)
        about = base or next(iter(of_task.values()))[0]["test"]
        name = f"{task} ({about['metric']}, {about['count']} rows)"
        scored = f"{base['score']:.4f} | {base['loss']:.4f}" if base else "|"
        lines.append(f"| {name} | base | 0 | | {scored} | | |")
        for file, seeds in of_task.items():
            found = trained[file]
            rate = found["learning_rate"]
            edge = " (highest tried)" if rate == max(map(float, found["rates"])) else ""
            edge = " (lowest tried)" if rate == min(map(float, found["rates"])) else edge
            timed = output / f"{keys[file]}-alone.json"
            beside = read(timed) if timed.exists() else None
            cost = f"{beside['step_seconds']:.2f} | {beside['peak_bytes'] / 1e9:.2f}" if beside else "|"
            for part, after in (("test", ""), ("shuffled", ", prompts shuffled")):
                scores = [one[part] for one in seeds if part in one]
                if scores:
                    cells = [spread([one[of] for one in scores], 4) for of in ("score", "loss")]
                    shown = f"{task} | {found['name']}{after} | {found['parameters']:,} | {rate:g}{edge}"
                    lines.append(f"| {shown} | {' | '.join(cells)} | {cost if part == 'test' else '|'} |")
    (output / "table.md").write_text("\n".join(lines) + "\n")


def of_seeds(seeds: Sequence[dict]) -> str:
    """ "0.380 (0.375 to 0.455; 3), loss 0.806 (0.790 to 0.898; 3)", without the seeds that diverged."""
    held = [one for one in seeds if one["score"] >= 0]
    said = []
    if held:
        said.append(f"{spread([one['score'] for one in held], 3)}, loss {spread([one['loss'] for one in held], 3)}")
    if len(held) < len(seeds):
        said.append(f"{len(seeds) - len(held)} of {len(seeds)} not finite")
    return ", ".join(said)


def spread(values: Sequence[float], digits: int, middle=median) -> str:
    """middle (lowest to highest; number), or the only value"""
    low, high = min(values), max(values)
    within = f" ({low:.{digits}f} to {high:.{digits}f}; {len(values)})" if len(values) > 1 else ""
    return f"{middle(values):.{digits}f}{within}"
