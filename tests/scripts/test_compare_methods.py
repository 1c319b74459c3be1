"""scripts/compare_methods.py: what it trains, scores and keeps."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_models import strong
from tiny_run import backbone_folder, rows_of_text, tokenizer, words, write_rows

from para_jax import ParaConfig, init_adapter, load_backbone
from para_jax.evaluation.evaluate import Tasks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_cells  # noqa: E402
import compare_methods  # noqa: E402
import compare_scores  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, a task of labels, a task of written answers, and passages."""
    made = tmp_path_factory.mktemp("compare")
    backbone_folder(made / "backbone")
    labelled = [{"sentence": f"w{20 + i} w{30 + i}", "label": i % 2} for i in range(12)]
    draw = np.random.default_rng(0)
    passages = [{"prompt": f"Passage: {words(draw.integers(20, 256, 140))}\nQuestion: w7\nAnswer:", "completion": "w8"}]
    for split in ("train", "validation", "test"):
        write_rows(made / "data" / "sst2" / f"{split}.jsonl", labelled)
        write_rows(made / "data" / "own" / f"{split}.jsonl", rows_of_text(12, seed=len(split)))
        write_rows(made / "data" / "squad" / f"{split}.jsonl", 2 * passages)
    return made


def arguments(folder: Path, output: Path, *given: str) -> list[str]:
    sizes = "--steps 2 --rows 2 --limit 2 --test-limit 4 --seeds 2 --texts 2".split()
    return ["--backbone", str(folder / "backbone"), "--data", str(folder / "data"), "--output", str(output)] + [
        *sizes, *given,
    ]  # fmt: skip


def parsed(folder: Path, output: Path, *given: str) -> argparse.Namespace:
    return compare_methods.arguments(arguments(folder, output, *given))


def test_an_adapter_is_scored_with_its_own_and_with_shuffled_prompts(folder, tmp_path):
    args = parsed(folder, tmp_path)
    model = load_backbone(folder / "backbone")
    tasks = Tasks(model, tokenizer(), [compare_methods.test_task(args, "sst2")], args.test_limit)
    adapter = strong(init_adapter(ParaConfig(r=4), model.config))
    own, shuffled, again = (compare_scores.scored(tasks, adapter, shuffle) for shuffle in (None, 0, 0))
    assert own["count"] == 4 and own["metric"] == "accuracy"
    assert shuffled == again and shuffled["loss"] != own["loss"]
    rows = {name: compare_cells.unpacked(text) for name, text in own["rows"].items()}
    assert rows["score"].mean() == own["score"] and len(rows["loss"]) == 4


@pytest.mark.parametrize("values", [[0, 1, 1], [1.0], [0.25, 1, 0], [1234.5, 0.5], [0.5]])
def test_packed_rows_are_unpacked(values):
    text = compare_cells.packed(values)
    assert "\n" not in text
    np.testing.assert_allclose(compare_cells.unpacked(text), values, rtol=1e-3)


def test_a_missing_loss_stays_missing():
    assert np.isnan(compare_cells.unpacked(compare_cells.packed([None, 0.5]))).tolist() == [True, False]
