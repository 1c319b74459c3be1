"""report.md: what compare_methods.py's output folder and the folders inside it hold, with verdicts and pictures.

Computes no model. Statistics are in compare_statistics.py, pictures in compare_pictures.py.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from compare_cells import label, read, task_of, unpacked
from compare_pictures import MARKERS, Point, draw_bytes, draw_examples, draw_ranks, draw_scopes, marker, save
from compare_statistics import (
    FEWEST_ROWS,
    Difference,
    complete_block,
    holm,
    p_text,
    paired_difference,
    ranking,
    reverse,
    unpaired_difference,
    verdict,
)
from compare_tables import spread

#: What the verdicts compare with: PARA r=12, and the LoRA whose size is closest to it. A task that was run with scope
#: `response` only has these two with that scope.
REFERENCES = (("PARA r=12", "PARA r=12, response"), ("LoRA r=# on q, v, up", "LoRA r=#, response"))
SHUFFLED = ", prompts shuffled"
#: With fewer seeds nothing is claimed.
FEWEST_SEEDS = 3


class Cell(NamedTuple):
    """A method's scores on a task's test file."""

    folder: str
    """inside the output folder; empty: the output folder itself"""
    task: str
    name: str
    metric: str
    scores: list[float]
    """of the seeds"""
    losses: list[float]
    count: int
    """test rows"""
    stderr: float
    """of one seed's score"""
    rows: np.ndarray | None
    """each row's score, [seeds, rows]; None in results of earlier versions"""
    backbone: str
    examples: int
    """training examples"""
    steps: int
    parameters: int = 0
    bytes: tuple[int, int] = (0, 0)
    """of a tenant, in float32 and in bfloat16"""
    step_seconds: float | None = None
    peak_bytes: float | None = None
    decode: float | None = None
    """relative to the base model; so is prefill"""
    prefill: float | None = None
    forgetting: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    """which seeds the scores and rows are of; empty for the base model"""
    of: str = ""
    """two digits for each row, a hash of its completion; empty in results of earlier versions"""

    @property
    def is_method(self) -> bool:
        return self.parameters > 0 and not self.name.endswith(SHUFFLED)


def write_report(output: Path) -> str:
    """Writes report.md and its pictures into the folder, and returns the text."""
    groups = {folder: cells_of(output, folder) for folder in folders_of(output)}
    groups = {folder: cells for folder, cells in groups.items() if cells}
    if not groups:
        raise SystemExit(f"compare_methods: {output} holds no scores of test files; run --stages train test first")
    lines = ["# Methods compared", "", HOW_TO_READ, ""]
    for cells in groups.values():
        for task in dict.fromkeys(cell.task for cell in cells):
            lines += task_lines([cell for cell in cells if cell.task == task])
    lines += scope_lines(output, [cell for cells in groups.values() for cell in cells])
    for folder, cells in groups.items():
        lines += rank_lines(output, folder, of_scope_all(cells))
    lines += picture_lines(output, groups)
    text = "\n".join(lines).rstrip() + "\n"
    (output / "report.md").write_text(text)
    return text


HOW_TO_READ = f"""\
Scores and losses are means over the seeds, with the lowest and the highest. Verdicts compare a method with PARA r=12
and with the LoRA of its size: the difference of scores, its 95 % interval, and better, worse or within noise at 5 %.

- The interval is over the test rows that both answered and over the seeds of each method. In simulations of equal
  methods (tests/scripts/test_compare_statistics.py) at most about one pair in ten is told apart before the correction.
- Verdicts are corrected for the number of comparisons of a task (Holm). The intervals are not.
- "seeds overlap": one method's worst seed is not above the other's best one, so other seeds may say otherwise.
- "unpaired": scores of other rows, or of earlier versions without rows. Their interval is wider.
- "few seeds": a method has fewer than {FEWEST_SEEDS}, so nothing is claimed. Neither is it of fewer than {FEWEST_ROWS}
  rows.
- Bytes are a tenant's, in float32 and in bfloat16. Vectors stay float32: counted for (IA)^3, not for a PARA with a bias
  or a constant pooler, whose second figure is up to 6 % too small.
- Prefill and decode are relative to the base model, 8 rows of 8 tenants.
- Forgetting is the loss on plain text, with the adapter less without it.
- PARA's rows with `response` are of an earlier form of this scope (scripts/experiments/README.md)."""


# ------------------------------------------------------------------------------------------------------------- reading


def folders_of(output: Path) -> list[str]:
    """The output folder and those inside it that hold results, by their names inside it."""
    found = {file.parent.relative_to(output) for file in output.rglob("*-tested.json")}
    return sorted("" if str(one) == "." else str(one) for one in found if "runs" not in one.parts)


def cells_of(output: Path, folder: str) -> list[Cell]:
    """The cells of one folder that have test scores."""
    place = output / folder
    cells = [base_cell(folder, file) for file in sorted(place.glob("*-base-tested.json"))]
    cells += [base_cell(folder, file) for file in sorted(place.glob("*-base--*-examples-tested.json"))]
    for file in sorted(place.glob("*-trained.json")):
        key = file.name.removesuffix("-trained.json")
        seeds = [read(one) for one in sorted(place.glob(f"{key}-seed-*-tested.json"))]
        cells += method_cells(output, folder, file, read(file), seeds) if seeds else []
    return cells


def base_cell(folder: str, file: Path) -> Cell:
    found, task = read(file), task_of(file, "base")
    shots = file.name.removeprefix(f"{task}-base").removesuffix("-tested.json").strip("-").replace("-", " ")
    return scored_cell(folder, task, f"base, {shots}" if shots else "base", [found["test"]], found["asked"], 0)


def method_cells(output: Path, folder: str, file: Path, found: dict, seeds: list[dict]) -> list[Cell]:
    """The method, and the method with shuffled prompts where that was scored."""
    name, parameters, asked = found["name"], found["parameters"], found["asked"]
    task, key = task_of(file, name), file.name.removesuffix("-trained.json")
    examples = found.get("examples", int(asked["steps"]) * int(asked["rows"]))
    half = 4 if asked["adapter"].startswith("Ia3Config") else 2
    held = scored_cell(folder, task, name, [one["test"] for one in seeds], asked, examples)
    held = held._replace(parameters=parameters, bytes=(4 * parameters, half * parameters))
    held = held._replace(seeds=tuple(range(len(seeds))))
    shuffled = {seed: one["shuffled"] for seed, one in enumerate(seeds) if "shuffled" in one}
    cells = [held._replace(**measured(output / folder, key), **serving_costs(output, folder, name, asked["backbone"]))]
    if shuffled:
        other = scored_cell(folder, task, name + SHUFFLED, list(shuffled.values()), asked, examples)
        cells.append(other._replace(parameters=parameters, bytes=held.bytes, seeds=tuple(shuffled)))
    return cells


def measured(place: Path, key: str) -> dict:
    """What the stages `alone` and `forgetting` left of a cell."""
    file = place / f"{key}-alone.json"
    alone = read(file) if file.exists() else {}
    forgotten = [read(one)["forgetting"] for one in sorted(place.glob(f"{key}-seed-*-forgetting.json"))]
    return {part: alone.get(part) for part in ("step_seconds", "peak_bytes")} | {"forgetting": tuple(forgotten)}


def serving_costs(output: Path, folder: str, name: str, backbone: str) -> dict:
    """prefill and decode of a method, measured in this folder or, with the same backbone, in the output folder."""
    files = [place / f"cost-{label(name)}.json" for place in (output / folder, output)]
    held = [found for file in files if file.exists() if (found := read(file))["asked"]["backbone"] == backbone]
    return {part: held[0][part] for part in ("prefill", "decode")} if held else {}


def scored_cell(folder: str, task: str, name: str, seeds: list[dict], asked: dict, examples: int) -> Cell:
    first = seeds[0]
    rows = None
    if all("rows" in one for one in seeds):
        each = [unpacked(one["rows"]["score"]) for one in seeds]
        count = min(map(len, each))
        rows = np.array([one[:count] for one in each])
    scores, losses = [one["score"] for one in seeds], [one["loss"] for one in seeds]
    errors = [one["stderr"] or 0.0 for one in seeds]
    about = dict(backbone=Path(asked["backbone"]).name, examples=examples, rows=rows, stderr=mean(errors))
    about |= {"steps": int(asked["steps"]), "of": first.get("of", "")}
    return Cell(folder, task, name, first["metric"], scores, losses, first["count"], **about)


# ------------------------------------------------------------------------------------------------------------ verdicts


def difference(one: Cell, other: Cell) -> tuple[Difference, int]:
    """The first cell's score less the second's, and how many rows it is from. A method with other prompts' factors is
    compared with its own seeds."""
    one, other = of_the_same_seeds(one, other)
    if one.rows is not None and other.rows is not None and of_same_rows(one, other):
        apart = paired_difference(one.rows, other.rows, same_seeds=are_same(one, other))
        return apart, min(one.rows.shape[1], other.rows.shape[1])
    pair = ((mean(cell.scores), cell.stderr) for cell in (one, other))
    return unpaired_difference(*pair, (one.scores, other.scores)), min(one.count, other.count)


def of_same_rows(one: Cell, other: Cell) -> bool:
    """Whether the rows that both have are the same, as far as is known."""
    count = min(len(one.of), len(other.of))
    return one.of[:count] == other.of[:count]


def are_same(one: Cell, other: Cell) -> bool:
    """Whether both cells are the same adapters, with their own prompts and with others."""
    return one.name.removesuffix(SHUFFLED) == other.name.removesuffix(SHUFFLED)


def of_the_same_seeds(one: Cell, other: Cell) -> tuple[Cell, Cell]:
    """Two cells, with the seeds that both have if they are the same method, with its own prompts and with others."""
    if not are_same(one, other):
        return one, other
    common = [seed for seed in one.seeds if seed in other.seeds]
    return of_seeds(one, common), of_seeds(other, common)


def of_seeds(cell: Cell, seeds: list[int]) -> Cell:
    places = [cell.seeds.index(seed) for seed in seeds]
    rows = None if cell.rows is None else cell.rows[places]
    return cell._replace(seeds=tuple(seeds), scores=[cell.scores[place] for place in places], rows=rows)


def verdicts(cells: Sequence[Cell]) -> dict[tuple[str, str], str]:
    """What is said of a cell (by name) next to each reference that the task has."""
    compared = references(cells)
    names = [cell.name for cell in compared]
    pairs = [(one, other) for i, other in enumerate(compared) for one in cells if one.name not in names[: i + 1]]
    found = [difference(one, other) for one, other in pairs]
    said = {}
    for (one, other), (apart, rows), p in zip(pairs, found, holm([apart.p for apart, _ in found]), strict=True):
        said[one.name, other.name] = describe(apart, verdict(apart, p, rows), one, other)
        said[other.name, one.name] = describe(reverse(apart), verdict(reverse(apart), p, rows), one, other)
    return said


def describe(apart: Difference, word: str, one: Cell, other: Cell) -> str:
    """ "+0.021 (+0.004 to +0.038) better, seeds overlap"; without a verdict where few seeds can't give one."""
    if has_few_seeds(one, other):
        word = ""
    overlap = word not in ("", "within noise") and seeds_overlap(one, other)
    return f"{interval(apart)}{word and ' '}{word}{marks(apart, one, other, overlap)}"


def marks(apart: Difference, one: Cell, other: Cell, overlap: bool) -> str:
    """What limits a comparison: ", seeds overlap, few seeds, unpaired"."""
    few = has_few_seeds(one, other)
    return ", seeds overlap" * overlap + ", few seeds" * few + ", unpaired" * (not apart.paired)


def interval(apart: Difference) -> str:
    value, low, high = (round(one, 3) + 0.0 for one in (apart.value, apart.low, apart.high))  # no -0.000
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def has_few_seeds(one: Cell, other: Cell) -> bool:
    """Whether one of the cells is a method with few seeds. The base model has none."""
    return any(cell.seeds and len(cell.scores) < FEWEST_SEEDS for cell in of_the_same_seeds(one, other))


def references(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that others are compared with, in the order of REFERENCES."""
    found: list[Cell] = []
    for forms in REFERENCES:
        held = [of_form for form in forms if (of_form := [c for c in cells if c.is_method and has_form(c.name, form)])]
        size = found[0].parameters if found else 0
        found += [min(held[0], key=lambda cell: abs(cell.parameters - size))] if held else []
    return found


def has_form(name: str, form: str) -> bool:
    start, _, end = form.partition("#")
    return name.startswith(start) and name.endswith(end or start)


def seeds_overlap(one: Cell, other: Cell) -> bool:
    low, high = sorted((cell.scores for cell in of_the_same_seeds(one, other)), key=mean)
    return max(low) >= min(high)


# --------------------------------------------------------------------------------------------------------------- text


def task_lines(cells: list[Cell]) -> list[str]:
    """A heading and the table of one task in one folder, the best method first."""
    cells = sorted(cells, key=lambda cell: -mean(cell.scores))
    said, compared = verdicts(cells), references(cells)
    counts = sorted({cell.count for cell in cells})
    examples = sorted({cell.examples for cell in cells if cell.is_method})
    steps = sorted({cell.steps for cell in cells if cell.is_method})
    about = f"{cells[0].backbone}, {' or '.join(map(str, examples))} training examples in "
    about += f"{' or '.join(map(str, steps))} steps, {cells[0].metric} on "
    about += f"{' or '.join(map(str, counts))} test rows"
    heads = ["method", "score", "loss", "parameters", "bytes", "step, s", "peak, GB", "prefill", "decode", "forgetting"]
    heads += [f"next to {other.name}" for other in compared]
    lines = [f"## {cells[0].task}{f' ({cells[0].folder})' if cells[0].folder else ''}", "", about, "", row(heads)]
    lines.append("|" + "---|" * len(heads))
    for cell in cells:
        values = [cell.name, spread(cell.scores, 4, mean), spread(cell.losses, 3, mean)]
        values += [f"{cell.parameters:,}", "; ".join(map(size, cell.bytes))] if cell.parameters else ["", ""]
        values += [number(cell.step_seconds, 2), number(cell.peak_bytes and cell.peak_bytes / 1e9, 2)]
        values += [number(cell.prefill, 2), number(cell.decode, 2)]
        values.append(spread(cell.forgetting, 3, mean) if cell.forgetting else "")
        lines.append(row([*values, *(said.get((cell.name, other.name), "") for other in compared)]))
    return [*lines, "", *pair_lines(cells, compared)]


def pair_lines(cells: Sequence[Cell], compared: Sequence[Cell]) -> list[str]:
    """The differences of the other methods, each from each, where the rows of both were kept."""
    names = {cell.name for cell in compared}
    others = [cell for cell in cells if cell.is_method and cell.rows is not None and cell.name not in names]
    lines = []
    for one, other in combinations(others, 2):
        apart, _ = difference(one, other)
        said = interval(apart) + marks(apart, one, other, seeds_overlap(one, other))
        lines.append(f"- `{one.name}` minus `{other.name}`: {said}")
    return ["The other methods, each from each, with intervals and without verdicts:", "", *lines, ""] if lines else []


def scope_lines(output: Path, cells: Sequence[Cell]) -> list[str]:
    """What the other scopes cost the methods that were also scored with `all`, with a picture."""
    held = [(one, others) for one in cells if (others := of_other_scopes(one, cells))]
    file = output / "scores_by_scope.png"
    if not held:
        file.unlink(missing_ok=True)
        return []
    heads = ["task", "method", "`all`", "scope", "its score", "less `all`"]
    lines, tasks = [], {}
    for one, others in held:
        where = f"{one.task} ({one.folder})" if one.folder else one.task
        points = tasks.setdefault(where, {}).setdefault(one.name, [])
        for other in others:
            apart, _ = difference(other, one)
            points.append(Point(other.name, 0, apart.value, apart.low, apart.high))
            said = interval(apart) + marks(apart, one, other, seeds_overlap(one, other))
            scores = (spread(cell.scores, 3, mean) for cell in (one, other))
            lines.append(row([where, one.name, next(scores), other.name.removeprefix(f"{stem(one)}, "), *scores, said]))
    save(draw_scopes(tasks), file)
    picture = f"![scores by scope]({file.name})"
    return ["## What another scope costs", "", row(heads), "|" + "---|" * len(heads), *lines, "", picture, ""]


def of_other_scopes(one: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """The same method on the same task with the scope `response`, its windows and `prompt`."""
    starts = tuple(f"{stem(one)}, {scope}" for scope in MARKERS if scope)
    of_task = [cell for cell in cells if (cell.folder, cell.task) == (one.folder, one.task) and cell.is_method]
    return [cell for cell in of_task if cell.name.startswith(starts)]


def stem(cell: Cell) -> str:
    """What the names of a method's other scopes begin with: "LoRA r=9 on q, v, up" has "LoRA r=9, response"."""
    return cell.name.partition(" on q")[0]


def row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def rank_lines(output: Path, folder: str, cells: list[Cell]) -> list[str]:
    """The mean ranks over the tasks of a folder, with their picture; a sentence where there are too few."""
    scores: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell.is_method and len(cell.scores) >= FEWEST_SEEDS:
            scores.setdefault(cell.task, {})[cell.name] = mean(cell.scores)
    file = output / folder / "ranks.png"
    tasks, names = complete_block(scores)
    heading = [f"## Ranks over tasks{f' ({folder})' if folder else ''}", ""]
    if not tasks:
        file.unlink(missing_ok=True)
        return [*heading, f"Nothing is drawn: ranks need 3 methods with {FEWEST_SEEDS} seeds on the same 3 tasks.", ""]
    found = ranking({name: [scores[task][name] for task in tasks] for name in names})
    save(draw_ranks(found), file)
    said = f"{', '.join(tasks)}. Friedman's test: {p_text(found.p)}; Nemenyi's critical difference at 5 %: "
    said += f"{found.critical:.2f} ranks. "
    said += "The methods are not told apart." if found.p > 0.05 else "Bars join methods that are not told apart."
    return [*heading, said, "", f"![mean ranks of the methods]({file.relative_to(output)})", ""]


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_lines(output: Path, groups: dict[str, list[Cell]]) -> list[str]:
    lines = ["## Pictures", ""]
    for folder, cells in groups.items():
        file = output / folder / "scores_by_bytes.png"
        save(draw_bytes(points_by_task(of_scope_all(cells), lambda cell: cell.bytes[0])), file)
        lines += [f"![scores against bytes per tenant]({file.relative_to(output)})", ""]
    for backbone in dict.fromkeys(cell.backbone for cells in groups.values() for cell in cells):
        every = [cell for cells in groups.values() for cell in cells if cell.backbone == backbone]
        panels = points_by_task(of_several_sizes(every), lambda cell: cell.examples)
        file = output / f"scores_by_examples_{label(backbone)}.png"
        if panels:
            save(draw_examples(panels), file)
            lines += [f"![scores against training examples]({file.name})", ""]
    return lines


def of_scope_all(cells: Sequence[Cell]) -> list[Cell]:
    """Without the other scopes, which have a picture of their own, on tasks that have methods with `all`."""

    def acts_everywhere(cell: Cell) -> bool:
        return marker(cell.name) == MARKERS[""]

    tasks = {cell.task for cell in cells if cell.is_method and acts_everywhere(cell)}
    return [cell for cell in cells if acts_everywhere(cell) or cell.task not in tasks]


def of_several_sizes(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of methods that were trained on several numbers of examples; of each number the longest training."""
    longest: dict[tuple, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.steps):
        if cell.is_method:
            longest[cell.task, cell.name, cell.examples] = cell
    count = Counter((task, name) for task, name, _ in longest)
    return [cell for (task, name, _), cell in longest.items() if count[task, name] > 1]


def points_by_task(cells: Sequence[Cell], x) -> dict[str, list[Point]]:
    panels: dict[str, list[Point]] = {}
    for cell in cells:
        if not cell.name.endswith(SHUFFLED):
            point = Point(cell.name, x(cell), mean(cell.scores), min(cell.scores), max(cell.scores))
            panels.setdefault(f"{cell.task} ({cell.metric})", []).append(point)
    return panels
