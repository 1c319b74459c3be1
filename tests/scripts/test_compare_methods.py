"""scripts/compare_methods.py: what it scores."""

import argparse
import sys
from pathlib import Path

from golden_models import strong
from tiny_run import backbone_folder, tokenizer, write_rows

from para_jax import ParaConfig, init_adapter, load_backbone

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import compare_methods  # noqa: E402


def test_an_adapter_is_scored_with_its_own_and_with_shuffled_prompts(tmp_path):
    model = load_backbone(backbone_folder(tmp_path / "backbone"))
    rows = [{"sentence": f"w{20 + i} w{30 + i}", "label": i % 2} for i in range(6)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", rows)
    sizes = dict(steps=1, rows=2, limit=2, test_limit=4)
    args = argparse.Namespace(backbone=tmp_path / "backbone", data=tmp_path, output=tmp_path / "out", **sizes)
    given = args, "sst2", model, tokenizer(), strong(init_adapter(ParaConfig(r=4), model.config))
    own, shuffled, again = (compare_methods.tested(*given, shuffle) for shuffle in (None, 0, 0))
    assert own["count"] == 4 and own["metric"] == "accuracy"
    assert shuffled == again and shuffled["loss"] != own["loss"]
