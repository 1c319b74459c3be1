"""The quickstart, on a tiny backbone with a tokenizer of the quickstart's own texts; the real one is marked slow."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import FIXTURES
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast

from para_jax import quickstart
from para_jax.cli import main
from para_jax.quickstart.examples import JOBS, business_examples
from para_jax.runs.folder import claim_folder
from para_jax.runs.train import TenantsResult

# The tiny tokenizer makes more tokens of some prompts than the 48 that SmolLM2's always stays below.
TINY = ["data.truncate=left", "train.max_steps=1", "runtime.compilation_cache=false", "runtime.allow_cpu=true"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """One layer of the llama fixture beside a BPE of its 256 tokens, which may span words: the texts are much alike."""
    folder = tmp_path_factory.mktemp("backbone")
    config, weights = (FIXTURES / "llama" / name for name in ("config.json", "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    first = {name: w for name, w in load_file(weights).items() if ".layers." not in name or ".layers.0." in name}
    save_file(first, folder / "model.safetensors")
    counts = {"train": quickstart.TRAIN_EXAMPLES, "test": quickstart.SCORED_EXAMPLES}
    examples = [e for job in JOBS for split, n in counts.items() for e in business_examples(job, split, n, seed=0)]
    made = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=256, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([text for e in examples for text in (e["prompt"], " " + e["completion"])], trainer)
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.long
def test_a_quickstart_that_learns_nothing_fails_and_leaves_its_run_folders(backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "SCORED_EXAMPLES", 2)  # fewer lengths, so fewer programs
    assert main(["quickstart", f"backbone.source={backbone}", "train.learning_rate=0", *TINY]) == 1
    shown = capsys.readouterr().out
    assert "gained less than 0.3: routing, orders, dates" in shown
    for job in JOBS:
        assert f"{job:<10}   0.000   0.000   0.000" in shown and f"  tenant {job}: " in shown
        run = tmp_path / "runs" / "quickstart-1" / "tenants" / job
        assert {"config.yaml", "metrics.jsonl", "adapter"} <= {path.name for path in run.iterdir()}
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in steps] == [1, 1, 1] and steps[0]["loss"] > 1
    assert "exact match on 2 held-out examples" in shown and shown.count("base model: ") == 3
    assert "--adapters runs/quickstart-1/tenants --tenant dates" in shown[shown.index("next: ") :]
    answers = re.findall(r"  tenant \w+: (.*) \(expected .*\n  base model: (.*)", shown)
    assert len(answers) == 3
    for tenant, base in answers:  # an adapter that learnt nothing is the base model
        assert ast.literal_eval(base) and ast.literal_eval(tenant)[:80] == ast.literal_eval(base)
    assert quickstart.own_folder().name == "quickstart-2"
    examples = (tmp_path / "runs" / "quickstart-1" / "data" / "dates" / "train.jsonl").read_bytes()
    other = "output_dir=runs/quickstart-1", "seed=1"
    assert main(["quickstart", f"backbone.source={backbone}", "train.learning_rate=0", *TINY, *other]) == 2
    assert (tmp_path / "runs" / "quickstart-1" / "data" / "dates" / "train.jsonl").read_bytes() == examples


def test_a_quickstart_that_was_stopped_goes_on_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped = Path("runs/quickstart-1")
    assert quickstart.own_folder() == stopped
    claim_folder(quickstart.config_in(stopped, ["train.max_steps=9"]))
    assert quickstart.own_folder() == stopped
    (stopped / "results.json").write_text("{}")  # it has ended
    assert quickstart.own_folder() == Path("runs/quickstart-2")


@pytest.mark.parametrize(("gains", "code"), [((0.3, 0.5, 1.0), 0), ((0.9, 0.29, 0.9), 1), ((0.9, 0.9, -0.1), 1)])
def test_the_exit_code_is_0_only_where_each_tenant_gains_03(backbone, tmp_path, monkeypatch, capsys, gains, code):
    before = dict(zip(JOBS, (0.0, 0.1, 0.0), strict=True))
    after = {
        job: {"test_before": before[job], "test_after": before[job] + g} for job, g in zip(JOBS, gains, strict=True)
    }
    monkeypatch.setattr(quickstart, "train_tenants", lambda config: TenantsResult(after, tmp_path))
    monkeypatch.setattr(quickstart, "load_adapter", lambda *_, **__: None)
    monkeypatch.setattr(quickstart, "show_mixed_batch", lambda *_: None)
    assert main(["quickstart", f"backbone.source={backbone}", f"output_dir={tmp_path}", *TINY]) == code
    assert ("gained less than 0.3" in capsys.readouterr().out) == bool(code)


@pytest.mark.slow
def test_the_real_quickstart_gains_03_for_each_tenant(tmp_path):
    """In a process of its own, as users run it: the flags of the tests' compiler would make it slower by far."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "para_jax.cli", "quickstart", "runtime.allow_cpu=true"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact match on 30 held-out examples" in done.stdout and "gained less than" not in done.stdout
    assert len(list(tmp_path.glob("runs/quickstart-1/tenants/*/adapter/adapter_model.safetensors"))) == 3
