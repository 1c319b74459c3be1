"""A mistake is told before anything slow is loaded: neither JAX nor transformers is imported for it."""

import json
import re
import subprocess
import sys

import pytest
from tiny_run import write_rows

from para_jax.cli import bench as bench_command
from para_jax.cli.checks import check_data
from para_jax.config import load_config

#: Packages that take long to load.
SLOW = ["jax", "flax", "optax", "orbax", "transformers", "tokenizers", "datasets", "tensorflow", "torch", "lm_eval"]
SLOW += ["matplotlib", "huggingface_hub"]
#: Runs each command line of standard input, and prints its exit code, what it said, and what is loaded after it.
RUNNER = f"""
import contextlib, io, json, sys
from para_jax.cli import main

for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue(), out.getvalue(), [name for name in {SLOW} if name in sys.modules]]))
"""
CONFIG = """
backbone: {source: model}
data: {train: data}
output_dir: runs/new
"""
MISTAKES = [
    ("", "required: COMMAND"),
    ("train data.train=data/trec seed=1", "CONFIG is missing before data.train=data/trec"),
    ("train run.yaml --topology v5e:4x4", "--topology v5e:4x4 requires --dry-run\nadd --dry-run"),
    ("bench decode --rounds 0", "--rounds: .*at least 1; got 0"),
    ("evaluate run.yaml --split train", "--split: .*validation, test; got 'train'"),
    ("evaluate run.yaml --limit 0", "--limit: .*a whole number, at least 1; got 0"),
    ("evaluate run.yaml --backbone b --tasks t", "CONFIG and --backbone"),
    ("train nowhere.yaml", "config nowhere.yaml: no such file"),
    ("train rum.yaml", r"did you mean run\.yaml\?"),
    ("train data", "data is a folder of data, not a config.*own-data data.train=data"),
    ("train run.yaml train.learningrate=1e-3", r"train\.learningrate.*learning_rate"),
    ("train run.yaml train.max_steps=-1", "train.max_steps.*-1"),
    ("train run.yaml backbone.source=runs/nope", r"runs/nope: no such folder; did you mean runs/mine\?"),
    ("train run.yaml data.train=dota", "data.train.*dota"),
    ("train run.yaml data.train=table.jsonl", "table.jsonl:1"),
    ("train run.yaml data.task=songs", "data.task.*'songs'"),
    ("train run.yaml eval.metric=bleu", "eval.metric.*'bleu'"),
    ("train run.yaml output_dir=runs/mine", "runs/mine.*train.learning_rate.*0.5"),
    ("train runs/moved/config.yaml", "runs/moved/config.yaml.*output_dir is runs/new.*output_dir=runs/moved"),
    ("train run.yaml output_dir=data", "output_dir data is not a run folder"),
    ("evaluate run.yaml --split validation --output runs/mine", r"--output runs/mine is the folder of a run \(config"),
    ("evaluate run.yaml --results data/train.jsonl", "--results data/train.jsonl: .* would be overwritten"),
    ("generate", "generate takes prompts or a file"),
    ("generate --prompt a --system b", "--system 'b' goes with --chat"),
    ("evaluate --backbone model --tasks data.test=data", r"--tasks .data\.test=data.: .* a field .*before --tasks"),
    ("evaluate --backbone model eval.limit=3", "no task.*CONFIG of a run, or --backbone with --tasks"),
    ("serve --adapter runs/mine/adapter", r"--adapter'.*did you mean --adapters\?"),
    (
        "generate --prompt a --backbone model --adapter runs/nope",
        r"runs/nope: no such folder; did you mean runs/mine\?",
    ),
    ("generate --prompt a --backbone model --adapter runs/mine", r"runs/mine.*did you mean runs/mine/adapter\?"),
    ("generate --prompt a --backbone model --adapters runs/several", r"such as runs/several/acme\?.*--adapters DIR/\*"),
    ("serve --adapters runs/away/adapter", "runs/away/adapter.*models/gone: no such folder"),
    ("generate --prompt a --backbone ./none", "./none: no such file or folder"),
    ("generate --prompt a --backbone model --adapters mine=runs/mine/adapter --tenant mime", "'mime'.*mine"),
    ("generate --prompt a --backbone model --adapters runs/quick --tenant a", r"did you mean runs/quick/tenants\?"),
    ("generate --input nope.jsonl --output o.jsonl", "--input nope.jsonl: no such file"),
    ("serve --backbone model --adapters model=runs/mine/adapter", "model is the base model's name"),
    ("serve --backbone model --port 70000", "--port 70000"),
    ("serve --backbone model --api-key-file nope", "--api-key-file nope"),
    ("serve --backbone model --slots 0", "--slots: .*at least 1; got 0"),
    ("serve --backbone model --adapter-root nope", "--adapter-root nope"),
    ("evaluate run.yaml --adapter runs/nope", "runs/nope: no such folder"),
    ("evaluate run.yaml", "data.test is not set"),
    ("evaluate run.yaml data.train=dota", r"data\.train: dota does not exist; did you mean data\?"),
    ("train run.yaml --dry-run --results r.json", "--results r.json"),
    ("evaluate --backbone model --tasks data/nope.jsonl", "data/nope.jsonl.*no such file"),
    ("evaluate --backbone model --tasks data/train.jsonl:bleu", "bleu.*exact_match"),
    ("inspect runs/nope", r"runs/nope: no such folder; did you mean runs/mine\?"),
    ("inspect data", "data holds neither an adapter .* nor a run"),
    ("inspect run.yaml", "--data"),
    ("plot runs/mine --output x.gif", "--output x.gif"),
    ("bench speed", "bench: 'speed'.* decode, serve"),
    ("convert nope.gguf made", "nope.gguf: no such file"),
    ("train run.yaml --lr 1e-3", r"'--lr'; fields of the config are given as"),
    ("train run.yaml --dryrun", r"'--dryrun'; did you mean --dry-run\?"),
    ("train run.yaml train.learning_rate 1e-3", "'train.learning_rate': write section.field=value"),
    ("evaluate runs/mine", "config runs/mine is a folder.*config.yaml"),
    ("eval run.yaml", r"'eval'.*did you mean evaluate\?"),
    ("generate --prompt a --max_new_tokens 5", r"'--max_new_tokens'; did you mean --max-new-tokens\?"),
]
HELP = [
    "--help",
    "--version",
    *(f"{name} --help" for name in "train generate serve evaluate inspect plot bench".split()),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What one process says to each command line, in a folder with a backbone, data, and the run runs/mine."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("model", "models", "runs/mine/adapter", "runs/away/adapter"):
        (folder / name).mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_text("")
    (folder / "models" / "table.csv").write_text("prompt\nWhy?\n")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "runs/mine/config.yaml").write_text(CONFIG + "train: {learning_rate: 0.5}\n")
    (folder / "runs/mine/adapter/adapter_config.json").write_text("{}")
    for name, file in (("moved", "metrics.jsonl"), ("compared", "comparison.json")):
        (folder / "runs" / name / file).parent.mkdir(parents=True)
        (folder / "runs" / name / file).touch()
        (folder / "runs" / name / "config.yaml").write_text(CONFIG)
    away = {"base_model_name_or_path": "models/gone"}
    (folder / "runs/away/adapter/adapter_config.json").write_text(json.dumps(away))
    (folder / "runs/several/acme").mkdir(parents=True)
    (folder / "runs/several/acme/adapter_config.json").write_text("{}")
    (folder / "runs/quick/tenants").mkdir(parents=True)
    (folder / "runs/quick/tenants/tenants.json").write_text("{}")
    (folder / "table.jsonl").write_text("prompt,completion\na,b\n")
    write_rows(folder / "data" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    write_rows(folder / "columns.jsonl", [{"question": "a", "answer": "b"}])
    lines = json.dumps([line.split() for line in [*HELP, *(line for line, _ in MISTAKES)]])
    done = subprocess.run([sys.executable, "-c", RUNNER], input=lines, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["columns.jsonl", "data", "model", "models", "run.yaml", "runs", "table.jsonl"]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip([*HELP, *(line for line, _ in MISTAKES)], answers, strict=True))


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_a_mistake_is_named_before_anything_slow_is_loaded(told, line, said):
    code, text, out, loaded = told[line]
    listed = [part for part in text.splitlines() if part.startswith("  ")]  # below the two lines, such as differences
    assert (code, out) == (2, "") and len(text.splitlines()) - len(listed) <= 2, text
    assert re.search(said, text, re.DOTALL), text
    assert loaded == []


@pytest.mark.parametrize("line", HELP)
def test_help_loads_nothing_slow(told, line):
    code, text, out, loaded = told[line]
    assert (code, text, loaded) == (0, "", []) and "para-jax" in out


def test_the_names_that_are_checked_early_are_those_that_are_used():
    from para_jax import bench

    assert set(bench_command.NAMES) == set(bench.BENCHMARKS)


def test_the_rows_of_a_tenant_are_read_by_its_own_templates(tmp_path):
    """Those of its tenant.yaml; the run's config has none."""
    write_rows(tmp_path / "acme" / "train.jsonl", [{"text": "a", "label": "spam"}])
    own, config = tmp_path / "acme" / "tenant.yaml", load_config(None, [f"data.tenants={tmp_path}"])
    own.write_text("data: {prompt: 'Spam? {text}', completion: '{label}'}\n")
    check_data(config, ["train", "validation"])
    own.write_text("data: {prompt: 'Spam? {mail}', completion: '{label}'}\n")
    with pytest.raises(ValueError, match="train.jsonl:1: no field 'mail'; the row has text, label"):
        check_data(config, ["train"])
    own.write_text("data: {truncate: left}\n")
    with pytest.raises(ValueError, match="tenant.yaml: data.truncate can't be set for one tenant"):
        check_data(config, ["train"])
