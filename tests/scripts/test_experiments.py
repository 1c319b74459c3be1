"""scripts/experiments: a measurement writes its record, and the results in git are read and give their report."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import golden_models
import pytest
from golden_models import FIXTURES
from long_cases import quick
from tiny_run import tokenizer

from para_jax import LoraConfig, ParaConfig
from para_jax.evaluation.score_plots import Bar

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
sys.path[:0] = str(EXPERIMENTS), str(EXPERIMENTS.parent)

import bench_prefix  # noqa: E402
import compare_cells  # noqa: E402
import compare_report  # noqa: E402
import measure  # noqa: E402
import plot_scores  # noqa: E402
from bench_sampling import bench_sampling  # noqa: E402
from compare_training import form_of  # noqa: E402

RESULTS = ROOT / "results" / "compare_methods"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare_methods")
    for name in ("cells", "rows"):
        shutil.copy(RESULTS / f"{name}.parquet", folder)
    compare_cells.unpack(folder)
    return folder


@pytest.mark.parametrize("script", sorted(EXPERIMENTS.parent.rglob("*.py")), ids=lambda file: file.stem)
def test_every_script_finds_what_it_imports(script, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # one script sets it for its process
    if script.stem.startswith("tunix_"):
        pytest.importorskip("tunix")
    if script.stem.endswith("_worker"):  # needs torch and PEFT
        compile(script.read_text(), script, "exec")
    else:
        import_module(script.stem)


def test_a_measurement_writes_its_record(tmp_path, monkeypatch, capsys):
    given = ["--backbone", FIXTURES / "smollm2", "--rows", 3, "--rounds", 2, "--output", tmp_path / "a.json"]
    monkeypatch.setattr(sys, "argv", ["bench_sampling.py", *map(str, given)])
    measure.main(bench_sampling)
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["medians"]) == 7 and record["rows"] == 3 and "all greedy" in capsys.readouterr().out


def test_the_tables_hold_what_the_files_said(unpacked, tmp_path):
    files = {file.relative_to(unpacked) for file in unpacked.rglob("*.json")}
    assert len(files) > 500
    for name in ("sst2-PARA-r-12-trained", "sms_spam--IA--3-seed-0-tested", "boolq_closed--IA--3-seed-0-forgetting"):
        shutil.copy(unpacked / f"{name}.json", tmp_path)
    before = {file.name: compare_cells.read(file) for file in tmp_path.glob("*.json")}
    compare_cells.pack(tmp_path)
    for name in before:
        (tmp_path / name).unlink()
    compare_cells.unpack(tmp_path)
    assert {file.name: compare_cells.read(file) for file in tmp_path.glob("*.json")} == before


def test_a_file_of_an_earlier_form_is_not_taken_for_the_present_one(unpacked):
    held = {
        name: compare_cells.read(unpacked / f"banking77-{name}-trained.json")["asked"]["adapter"]
        for name in ("PARA-r-12", "LoRA-r-9--response", "PARA-r-12--response")
    }
    sites = ParaConfig().target_modules
    assert held["PARA-r-12"] == form_of(ParaConfig(r=12))
    assert held["LoRA-r-9--response"] == form_of(LoraConfig(r=9, lora_alpha=9, target_modules=sites, scope="response"))
    assert held["PARA-r-12--response"] != form_of(ParaConfig(r=12, scope="response"))


@pytest.mark.long
def test_the_report_is_that_of_the_tables(unpacked):
    assert compare_report.write_report(unpacked) == (RESULTS / "report.md").read_text()


def test_scores_of_a_folder_of_results_are_bars(tmp_path):
    values = {"alias": "t", "accuracy,none": 0.5, "accuracy_stderr,none": 0.05}
    record = {"results": {"t": values}, "n-samples": {"t": {"original": 90, "effective": 60}}}
    (tmp_path / "acme.json").write_text(json.dumps(record))
    (scores,) = plot_scores.read_scores([tmp_path]).values()
    assert scores.bars == {"acme": Bar(0.5, 0.05, 60)}


@pytest.mark.parametrize("name", quick(["bench_http", "bench_packing", "compare_methods", "sweep_rates"], "bench_http"))
def test_a_script_tells_its_options(name):
    run = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--help"]
    assert "--output" in subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_shared_prefixes_are_measured_by_scope_and_with_every_tokens_answer(monkeypatch):
    sides = {name: bench_prefix.SIDES[name] for name in ("base", "PARA, response", "PARA, all")}
    # few shapes, so that the engines share programs
    small = dict(PREFIX=12, QUESTION=3, TURNS=2, SYSTEM=16, TENANTS=2, LONG=16, SIDES=sides)
    for name, value in small.items():
        monkeypatch.setattr(bench_prefix, name, value)
    model = golden_models.backbone("llama")
    found = bench_prefix.bench_prefixes(model, tokenizer(), 1)
    assert len(found["medians"]) == 6 and all(value > 0 for value in found["medians"].values())
    assert "a chat, PARA, response / base" in found["ratios"]
    served = bench_prefix.bench_system_prompt(model, tokenizer(), [[3, 4], [5]], [3, 2], 2, 1)
    assert set(served["medians"]) == set(sides)
    assert set(served["ratios"]) == {"PARA, response / base", "PARA, response / PARA, all"}
    assert len(bench_prefix.bench_gaps(model, tokenizer(), 1)["medians"]) == 4
