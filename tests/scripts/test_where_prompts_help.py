"""scripts/where_prompts_help.py: the loss without swaps is `evaluate`'s, with all it is that of shuffled prompts."""

import sys
from pathlib import Path

import numpy as np
import pytest
from golden_models import backbone, strong
from tiny_run import rows_of_text, tokenizer, words, write_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from where_prompts_help import losses  # noqa: E402

from para_jax import ParaConfig, evaluate, init_adapter  # noqa: E402
from para_jax.data.records import read_records  # noqa: E402
from para_jax.evaluation.tasks import EvalTask  # noqa: E402


@pytest.mark.long
def test_the_ends_are_the_losses_of_evaluate(tmp_path):
    rows = rows_of_text(6, seed=4)
    draw = np.random.default_rng(5)
    for row, length in zip(rows, (6, 3, 9, 4, 8, 5), strict=True):
        row["prompt"] = words(draw.integers(20, 200, length))
    task = EvalTask("t", read_records(write_rows(tmp_path / "test.jsonl", rows)), "loss", batch_size=6)
    model, adapter = backbone("llama"), strong(init_adapter(ParaConfig(r=4), backbone("llama").config), 1, 0.3)
    found = losses(model, adapter, task, tokenizer(), limit=6)
    for name, shuffled in (("none", False), ("all", True)):
        (score,) = evaluate(model, adapter, [task], tokenizer=tokenizer(), shuffle_prompts=shuffled).scores
        assert found[name] == pytest.approx(score.loss, rel=1e-4)
    assert len(set(found.values())) == len(found)
