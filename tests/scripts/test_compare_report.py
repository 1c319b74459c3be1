"""scripts/compare_report.py: the tables, verdicts and pictures of a folder of results."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_pictures  # noqa: E402
import compare_report  # noqa: E402
from compare_cells import label, packed, write  # noqa: E402
from compare_pictures import draw_bytes, draw_scopes  # noqa: E402
from compare_tables import write_tables  # noqa: E402

ROWS = 60
#: By name: parameters, and how many of the rows a seed answers: the first seed one more, and the last one less.
METHODS = {"PARA r=12": (1000, 40), "PARA r=48": (4000, 50), "LoRA r=9 on q, v, up": (1100, 40), "(IA)^3": (100, 20)}


def score(right: int, with_rows: bool = True, rows: int = ROWS) -> dict:
    values = [1.0] * right + [0.0] * (rows - right)
    found = {"name": "test", "metric": "accuracy", "score": right / rows, "loss": 1.0, "count": rows, "stderr": 0.06}
    return found | ({"rows": {"score": packed(values), "loss": packed([0.5] * rows)}} if with_rows else {})


def results(folder: Path, tasks=("sst2",), steps: int = 20, with_rows: bool = True, methods=METHODS) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    asked = {"backbone": "tiny", "steps": str(steps), "rows": "8"}
    for task in tasks:
        write(folder / f"{task}-base-tested.json", {"test": score(5, with_rows), "asked": asked})
        write(folder / f"{task}-base--4-examples-tested.json", {"test": score(10, with_rows), "asked": asked})
        for name, (parameters, right) in methods.items():
            key = f"{task}-{label(name)}"
            adapter = "Ia3Config()" if name == "(IA)^3" else "ParaConfig()"
            about = {"name": name, "parameters": parameters, "asked": asked | {"adapter": adapter}}
            trained = {"learning_rate": 1e-3, "rates": {"0.001": {"score": 0.5, "loss": 1.0}}}
            write(folder / f"{key}-trained.json", about | trained | {"validation": {"0": {"score": 0.5, "loss": 1.0}}})
            for seed in range(3):
                found = {"test": score(right + 1 - seed, with_rows)}
                found |= {"shuffled": score(right - 15, with_rows)} if name == "PARA r=12" else {}
                write(folder / f"{key}-seed-{seed}-tested.json", found | {"asked": asked})
    return folder


def row_of(text: str, method: str, task: str = "sst2") -> list[str]:
    part = text.partition(f"## {task}\n")[2].partition("\n## ")[0]
    (line,) = [line for line in part.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_another_scope_costs_is_shown_for_each_method_with_several(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare_report, "draw_scopes", lambda tasks: drawn.append(tasks) or draw_scopes(tasks))
    methods = METHODS | {"PARA r=12, response": (1000, 30), "LoRA r=9, response": (1100, 40), "Bias, response": (9, 9)}
    methods |= {"PARA r=12, response w=4": (1000, 35), "LoRA r=9, prompt": (1100, 20)}
    text = compare_report.write_report(results(tmp_path, ("sst2", "boolq"), methods=methods))
    part = text.partition("## What another scope costs\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[3:] if line]
    of_task = [
        ["LoRA r=9 on q, v, up", "prompt", "-0.333"],
        ["LoRA r=9 on q, v, up", "response", "+0.000"],
        ["PARA r=12", "response", "-0.167"],
        ["PARA r=12", "response w=4", "-0.083"],
    ]
    assert [[row[0], row[1], row[3], row[5].split()[0]] for row in rows if len(row) == 6] == [
        [task, *found] for task in ("boolq", "sst2") for found in of_task
    ]
    assert rows[2][2].startswith("0.667 ") and rows[2][4].startswith("0.500 ")
    (tasks,) = drawn
    points = tasks["sst2"]["PARA r=12"]
    assert [point.name for point in points] == ["PARA r=12, response", "PARA r=12, response w=4"]
    assert points[0].low < points[0].y < points[0].high and round(points[0].y, 3) == -0.167
    assert (tmp_path / "scores_by_scope.png").exists()
    for file in tmp_path.glob("*--response*"):
        file.unlink()
    for file in tmp_path.glob("*--prompt*"):
        file.unlink()
    assert "scope" not in compare_report.write_report(tmp_path) and not (tmp_path / "scores_by_scope.png").exists()


def test_scores_by_bytes_have_other_scopes_only_where_no_method_has_all(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare_report, "draw_bytes", lambda panels: drawn.append(panels) or draw_bytes(panels))
    results(tmp_path, methods={"PARA r=12": (1000, 40), "PARA r=12, response": (1000, 30)})
    results(tmp_path, ("boolq",), methods={"PARA r=12, response": (1000, 30)})
    compare_report.write_report(tmp_path)
    names = {task: [point.name for point in points if point.x] for task, points in drawn[0].items()}
    assert names == {"sst2 (accuracy)": ["PARA r=12"], "boolq (accuracy)": ["PARA r=12, response"]}


def test_other_prompts_are_compared_with_the_seeds_that_were_scored_with_them(tmp_path):
    """Else the differences of seeds would be taken for those of prompts."""
    folder = results(tmp_path)
    file = folder / f"sst2-{label('PARA r=12')}-seed-0-tested.json"
    found = json.loads(file.read_text())
    del found["shuffled"]
    file.write_text(json.dumps(found))
    text = compare_report.write_report(folder)
    shuffled = row_of(text, "PARA r=12, prompts shuffled")
    assert shuffled[-2].startswith(
        "-0.242 "
    )  # 25 of 60 rows for the 40 and 39 of the other seeds; the mean of all is 40
    assert "paired" not in shuffled[-2]


def test_a_method_is_compared_with_para_and_with_lora(tmp_path):
    text = compare_report.write_report(results(tmp_path))
    assert (tmp_path / "report.md").read_text() == text
    best, para, ia3 = (row_of(text, name) for name in ("PARA r=48", "PARA r=12", "(IA)^3"))
    assert best[1] == "0.8333 (0.8167 to 0.8500; 3)" and best[3:5] == ["4,000", "16 kB; 8 kB"]
    assert [cell.split()[0] for cell in best[-2:]] == ["+0.167"] * 2
    assert all(cell.endswith(") better") for cell in best[-2:]) and all(cell.endswith(") worse") for cell in ia3[-2:])
    assert (
        ia3[4] == "0 kB; 0 kB"
        and para[-2] == ""
        and para[-1].startswith("+0.000 (")
        and para[-1].endswith(") within noise")
    )
    assert row_of(text, "PARA r=12, prompts shuffled")[-2].endswith("worse")
    assert row_of(text, "base, 4 examples")[1] == "0.1667"
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert names == [
        "PARA r=48", "LoRA r=9 on q, v, up", "PARA r=12", "PARA r=12, prompts shuffled", "(IA)^3", "base, 4 examples",
        "base",
    ]  # fmt: skip


def test_scores_without_rows_are_compared_unpaired(tmp_path):
    text = compare_report.write_report(results(tmp_path, with_rows=False))
    assert row_of(text, "PARA r=48")[-1].endswith("within noise, unpaired")
    assert row_of(text, "base")[-1].endswith("worse, unpaired")


def test_an_advantage_that_the_seeds_do_not_share_is_within_noise(tmp_path):
    folder = results(tmp_path)
    other = json.loads((folder / "sst2-PARA-r-48-seed-1-tested.json").read_text())
    write(folder / "sst2-PARA-r-48-seed-1-tested.json", other | {"test": score(41)})
    text = compare_report.write_report(folder)
    assert row_of(text, "PARA r=48")[-1].endswith(") within noise")
    for seed in range(2):  # and the same over other rows is not paired
        file = folder / f"sst2-PARA-r-48-seed-{seed}-tested.json"
        found = json.loads(file.read_text())
        write(file, found | {"test": found["test"] | {"of": "other rows"}})
        of_lora = folder / f"sst2-{label('LoRA r=9 on q, v, up')}-seed-{seed}-tested.json"
        found = json.loads(of_lora.read_text())
        write(of_lora, found | {"test": found["test"] | {"of": "these rows"}})
    text = compare_report.write_report(folder)
    assert row_of(text, "PARA r=48")[-1].endswith("unpaired") and "unpaired" not in row_of(text, "PARA r=48")[-2]


def test_nothing_is_claimed_of_two_seeds(tmp_path):
    folder = results(tmp_path)
    (folder / "sst2-PARA-r-48-seed-1-tested.json").unlink()
    text = compare_report.write_report(folder)
    assert row_of(text, "PARA r=48")[-1].endswith("), few seeds") and row_of(text, "(IA)^3")[-1].endswith(") worse")
    assert row_of(text, "base")[-1].endswith(") worse")


def test_costs_and_forgetting_are_shown_where_they_were_measured(tmp_path):
    folder = results(tmp_path)
    write(folder / "sst2-PARA-r-48-alone.json", {"step_seconds": 1.234, "peak_bytes": 2.5e9})
    cost = {"decode": 1.01, "prefill": 1.107, "asked": {"backbone": "tiny"}}
    write(folder / "cost-PARA-r-48.json", cost)
    write(folder / "cost-PARA-r-12.json", cost | {"asked": {"backbone": "another"}})
    for seed, value in enumerate((0.1, 0.2)):
        write(folder / f"sst2-PARA-r-48-seed-{seed}-forgetting.json", {"forgetting": value})
    text = compare_report.write_report(folder)
    assert row_of(text, "PARA r=48")[5:10] == ["1.23", "2.50", "1.11", "1.01", "0.150 (0.100 to 0.200; 2)"]
    assert row_of(text, "PARA r=12")[5:10] == [""] * 5
    results(folder / "examples-80", steps=10)
    text = compare_report.write_report(folder)
    assert row_of(text, "PARA r=48", "sst2 (examples-80)")[5:10] == ["", "", "1.11", "1.01", ""]


def test_ranks_need_three_seeds_and_tasks_and_a_picture_of_fewer_is_removed(tmp_path, monkeypatch):
    folder, rank, ranked = results(tmp_path, tasks=("sst2", "copa", "rte")), compare_report.ranking, []
    monkeypatch.setattr(compare_report, "ranking", lambda scores: ranked.append(set(scores)) or rank(scores))
    text = compare_report.write_report(folder)
    assert "copa, rte, sst2. Friedman's test: p = " in text and (folder / "ranks.png").exists()
    (folder / "rte-PARA-r-12-seed-0-tested.json").unlink()
    compare_report.write_report(folder)
    assert ranked[0] - ranked[1] == {"PARA r=12"}  # two seeds are left
    for file in folder.glob("rte-*"):
        file.unlink()
    text = compare_report.write_report(folder)
    assert "Nothing is drawn: ranks need 3 methods" in text and not (folder / "ranks.png").exists()


@pytest.mark.long
def test_folders_inside_are_read_and_their_examples_drawn(tmp_path):
    results(tmp_path)
    results(tmp_path / "examples-80", steps=10)
    results(tmp_path / "runs" / "sst2", steps=10)
    text = compare_report.write_report(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## sst2")] == ["## sst2", "## sst2 (examples-80)"]
    assert "tiny, 80 training examples in 10 steps" in text and "tiny, 160 training examples in 20 steps" in text
    pictures = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    assert pictures == {"scores_by_bytes.png", "examples-80/scores_by_bytes.png", "scores_by_examples_tiny.png"}
    assert all(f"]({name})" in text for name in pictures)


def test_the_longest_training_on_as_many_examples_is_drawn(tmp_path):
    results(tmp_path)
    some = {name: METHODS[name] for name in ("PARA r=12", "(IA)^3")}
    results(tmp_path / "examples-80", steps=10, methods=some)
    cells = [cell for folder in ("", "examples-80") for cell in compare_report.cells_of(tmp_path, folder)]
    cells.append(next(cell for cell in cells if cell.name == "(IA)^3")._replace(steps=40))
    drawn = [(cell.name, cell.examples, cell.steps) for cell in compare_report.of_several_sizes(cells)]
    assert sorted(drawn) == [("(IA)^3", 80, 10), ("(IA)^3", 160, 40), ("PARA r=12", 80, 10), ("PARA r=12", 160, 20)]


def test_where_only_responses_were_run_they_are_compared_with_each_other(tmp_path):
    some = {"PARA r=12, response": (1000, 40), "LoRA r=9, response": (1100, 20), "(IA)^3, response": (100, 20)}
    text = compare_report.write_report(results(tmp_path, methods=some))
    assert [cell.split()[-1] for cell in row_of(text, "(IA)^3, response")[-2:]] == ["worse", "noise"]


def test_the_lora_of_paras_size_is_compared_with_whichever_scores_best(tmp_path):
    some = {"PARA r=12, response": (1000, 40), "LoRA r=9, response": (1100, 20), "LoRA r=36, response": (4400, 30)}
    for methods in (some, dict(reversed(some.items()))):
        cells = compare_report.cells_of(results(tmp_path, methods=methods), "")
        cells.sort(key=lambda cell: -max(cell.scores))
        assert [cell.name for cell in compare_report.references(cells)] == list(some)[:2]


def test_tasks_whose_names_begin_alike_are_kept_apart(tmp_path):
    few = {name: METHODS[name] for name in ("PARA r=12", "(IA)^3")}
    names = ("sst2", "sst2-own", "sst2-base")
    for number, task in enumerate(names):
        moved = {name: (1000 * number + size, right + number) for name, (size, right) in few.items()}
        results(tmp_path, tasks=(task,), methods=moved)
    cells = compare_report.cells_of(tmp_path, "")
    found = {(cell.task, cell.name): cell.scores[0] for cell in cells if cell.name in few}
    assert found == {
        (task, name): (right + number + 1) / ROWS
        for number, task in enumerate(names)
        for name, (_, right) in few.items()
    }
    assert {cell.name for cell in cells if cell.task == "sst2-own"} == {cell.name for cell in cells}
    write_tables(tmp_path)
    for file in ("validation.md", "table.md"):
        lines = (tmp_path / file).read_text().splitlines()
        assert sorted(line.split()[1] for line in lines if "| PARA r=12 |" in line) == sorted(names)
    shown = [line for line in lines if line.startswith("| sst2-own (")]
    assert len(shown) == 1 and "| base |" in shown[0]


def test_a_task_whose_base_model_was_not_scored_has_its_rows_too(tmp_path):
    folder = results(tmp_path)
    whole = [line for line in tables(folder) if "| base |" not in line]
    next(folder.glob("*-base-tested.json")).unlink()
    (folder / "scores.png").unlink()
    assert [line for line in tables(folder) if "| base |" not in line] == whole and len(whole) > 3
    assert (folder / "scores.png").exists()


def tables(folder):
    write_tables(folder)
    return (folder / "table.md").read_text().splitlines()


@pytest.mark.parametrize(
    "lost, said", [(1, "0.001: 0.500, loss 1.000, 1 of 2 not finite"), (2, "0.001: 2 of 2 not finite")]
)
def test_a_seed_that_diverged_has_no_score_in_the_table(lost, said, tmp_path):
    folder = results(tmp_path, methods={"PARA r=12": METHODS["PARA r=12"]})
    found = json.loads((folder / "sst2-PARA-r-12-trained.json").read_text())
    seeds = [{"score": 0.5, "loss": 1.0}] * (2 - lost) + [{"score": -1.0, "loss": 1e9}] * lost
    write(folder / "sst2-PARA-r-12-trained.json", found | {"validation": {str(i): one for i, one in enumerate(seeds)}})
    write_tables(folder)
    assert (folder / "validation.md").read_text().splitlines()[-1].endswith(f"| {said} |")


def test_the_other_methods_are_compared_with_each_other(tmp_path):
    text = compare_report.write_report(results(tmp_path))
    lines = [line.partition(" (")[0] for line in text.splitlines() if "` minus `" in line]
    assert lines == ["- `PARA r=48` minus `(IA)^3`: +0.500"]
    assert "` minus `" not in compare_report.write_report(results(tmp_path / "old", with_rows=False))


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no scores of test files"):
        compare_report.write_report(tmp_path)


def test_the_results_of_earlier_sessions_are_read():
    cells = compare_report.cells_of(ROOT / "results" / "compare_methods", "")
    held = {(cell.task, cell.name): cell for cell in cells}
    found = held["banking77", "PARA r=12"]
    assert (len(found.scores), found.examples, found.parameters) == (3, 640, 1_036_800)
    assert compare_report.verdicts([cell for cell in cells if cell.task == "banking77"])


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_kind_of_method_has_one_colour_and_a_scope_one_marker():
    kinds = [
        "base, 4 examples",
        "(IA)^3, response",
        "PARA r=12, constant pooler",
        "PARA r=48",
        "LoRA r=9, prompt",
        "DoRA",
    ]
    assert len({compare_pictures.colour(name) for name in kinds}) == len(kinds)
    assert compare_pictures.colour("PARA r=12, response") == compare_pictures.colour("PARA r=48")
    scopes = ("PARA r=12", "PARA r=12, response w=4", "LoRA r=9, prompt", "PARA r=12, prompts shuffled")
    assert "".join(map(compare_pictures.marker, scopes)) == "os^o"


@pytest.mark.parametrize(
    "heights", [[0.5] * 6, [0.9, 0.95, 1.0, 0.1], [0.0, 0.01, 0.02], list(np.linspace(0, 1, 30)), [2]]
)
def test_names_keep_their_order_and_do_not_touch(heights):
    placed = np.array(compare_pictures.dodged(heights, 0.05))
    order = np.argsort(heights, kind="stable")
    gap = min(0.05, 1 / max(1, len(heights) - 1))
    assert (np.diff(placed[order]) >= gap - 1e-9).all() and placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9


def test_points_of_one_size_are_drawn_side_by_side():
    points = [compare_pictures.Point(name, x, 0.5, 0.4, 0.6) for name, x in (("a", 100), ("b", 102), ("c", 1000))]
    drawn = {point.name: point.x for point in compare_pictures.side_by_side(points)}
    assert drawn["b"] > 1.1 * drawn["a"] and drawn["c"] == 1000
