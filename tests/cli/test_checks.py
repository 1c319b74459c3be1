"""A mistake in the options or the config is an error before JAX or transformers is imported."""

import json
import re
import subprocess
import sys

import pytest

from para_jax.cli import bench as bench_command

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
    ("bench decode --rounds 0", "--rounds: .*at least 1; got 0"),
    ("bench decode --rows 1,x", "--rows: .*'x'"),
    ("evaluate run.yaml --split train", "--split: .*validation, test; got 'train'"),
    ("evaluate run.yaml --backbone b --tasks t", "CONFIG and --backbone"),
    ("train rum.yaml", r"did you mean run\.yaml\?"),
    ("train run.yaml train.learningrate=1e-3", r"train\.learningrate.*learning_rate"),
    ("train run.yaml train.max_steps=-1", "train.max_steps.*-1"),
    ("train run.yaml eval.metric=bleu", "eval.metric.*'bleu'"),
    ("train run.yaml --results runs", "--results runs: a folder"),
    ("generate", "generate takes prompts or a file"),
    ("generate --input nope.jsonl --output o.jsonl", "--input nope.jsonl: no such file"),
    ("generate --prompt a --backbone model --adapters mine=runs/mine/adapter --tenant mime", "'mime'.*mine"),
    ("generate --prompt a --adapter runs/mine", r"runs/mine.*did you mean runs/mine/adapter\?"),
    ("serve --adapter runs/mine/adapter", r"--adapter'.*did you mean --adapters\?"),
    ("serve --backbone model --adapters model=runs/mine/adapter", "model is the base model's name"),
    ("serve --backbone model --port 70000", "--port: .*70000"),
    ("serve --backbone model --api-key-file nope", "--api-key-file nope"),
    ("serve --backbone model --adapter-root nope", "--adapter-root nope"),
    ("plot --output x.png", "give RUN"),
    ("bench speed", "'speed'.*decode.*serve"),
    ("train run.yaml --lr 1e-3", r"'--lr'; fields of the config are given as"),
    ("train run.yaml --dryrun", r"'--dryrun'; did you mean --dry-run\?"),
    ("train run.yaml train.learning_rate 1e-3", "'train.learning_rate': write section.field=value"),
    ("evaluate runs/mine", "Is a directory: .runs/mine"),
    ("eval run.yaml", r"'eval'.*did you mean evaluate\?"),
]
HELP = [
    "--help",
    "--version",
    *(f"{name} --help" for name in "train generate serve evaluate inspect plot bench".split()),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What one process says to each command line, in a folder with a config and the run runs/mine."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "runs/mine/adapter").mkdir(parents=True)
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "runs/mine/adapter/adapter_config.json").write_text("{}")
    lines = json.dumps([line.split() for line in [*HELP, *(line for line, _ in MISTAKES)]])
    done = subprocess.run([sys.executable, "-c", RUNNER], input=lines, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml", "runs"]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip([*HELP, *(line for line, _ in MISTAKES)], answers, strict=True))


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_a_mistake_is_named_before_anything_slow_is_loaded(told, line, said):
    code, text, out, loaded = told[line]
    assert (code, out) == (2, "") and len(text.splitlines()) <= 2, text
    assert re.search(said, text, re.DOTALL), text
    assert loaded == []


@pytest.mark.parametrize("line", HELP)
def test_help_loads_nothing_slow(told, line):
    code, text, out, loaded = told[line]
    assert (code, text, loaded) == (0, "", []) and "para-jax" in out


def test_the_names_of_the_benchmarks_are_those_that_there_are():
    from para_jax import bench

    assert set(bench_command.NAMES) == set(bench.BENCHMARKS)
