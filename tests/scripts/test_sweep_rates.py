"""scripts/sweep_rates.py: finished work is kept for the same settings only, and a table says what it is of."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from sweep_rates import done, write_table  # noqa: E402

ASKED = {"steps": 40, "rows": 4, "limit": 100, "seeds": [0, 1, 2]}


def test_work_of_other_settings_is_not_taken(tmp_path):
    file, made = tmp_path / "sst2-para.json", []

    def make() -> dict:
        made.append(1)
        return {"runs": [{"seed": seed} for seed in (2, 0, 1)]}

    for _ in range(2):
        done(file, make, ASKED)
    assert len(made) == 1
    file.write_text(json.dumps(make()))  # of an earlier version: the runs tell the seeds, and the rest is unknown
    done(file, make, ASKED)
    for name, value in (("seeds", [0]), ("steps", 80)):
        done(tmp_path / "new.json", make, ASKED)
        with pytest.raises(SystemExit, match=f"was made with {name} .* choose another --output"):
            done(tmp_path / "new.json", make, ASKED | {name: value})
    with pytest.raises(SystemExit, match="seeds"):
        done(file, make, ASKED | {"seeds": [0]})


def test_the_table_is_that_of_the_files_and_a_diverged_seed_has_no_mean(tmp_path):
    results = ROOT / "results" / "rates"
    for file in results.glob("*.json"):
        shutil.copy(file, tmp_path)
    write_table(tmp_path)
    assert (tmp_path / "rates.md").read_text() == (results / "rates.md").read_text()
    for file in tmp_path.glob("sst2-para-*.json"):
        held = json.loads(file.read_text())
        held["runs"][0]["validation"] = {}  # the first rate's first seed
        file.write_text(json.dumps(held))
    write_table(tmp_path)
    lines = (tmp_path / "rates.md").read_text().splitlines()
    (line,) = [line for line in lines if "| sst2 |" in line and "para" in line]
    assert "0.0003: not finite (1 of 3 seeds), 0.001: **0.186" in line
