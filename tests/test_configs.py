"""Every file in configs/ passes its dry run, without network and data, and says in a comment how it is run."""

import re
import shlex
from dataclasses import replace
from fractions import Fraction
from itertools import takewhile
from pathlib import Path

import pytest

from para_jax.cli import main
from para_jax.config import ParaConfig, load_config
from para_jax.data.records import load_records
from para_jax.data.sources import validation_rows
from para_jax.data.tasks import TASKS

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
#: Parameters of each backbone and of its adapter: the published counts, and those that method.md derives for r = 12.
SIZES = {
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 8_945_664),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", 13_015_864_320, 14_008_320),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B", 3_212_749_824, 5_160_960),
    "gemma-2b": ("google/gemma-2b", 2_506_172_416, 4_478_976),
    "smollm2": ("smollm2-135m", 134_515_008, 1_036_800),
    "quickstart": ("smollm2-135m", 134_515_008, 1_036_800),
    "own-data": ("smollm2-135m", 134_515_008, 1_036_800),
    "many-answers": ("smollm2-135m", 134_515_008, 2_154_240),
}
#: The sibling papers' settings: AdamW at 1e-4, linear decay, 6 % warm-up, 10 epochs, evaluation every 200 steps.
SIBLINGS = {"learning_rate": 1e-4, "schedule": "linear", "warmup_ratio": 0.06, "num_epochs": 10}
#: 16 below 10,000 examples, and otherwise 128. BoolQ has 9427.
BATCH = {"boolq": 16, "copa": 16, "squad": 128}

each_config = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty working directory, a hub that fails at once and an empty cache."""
    import huggingface_hub

    def fetch(*_, **__):
        raise AssertionError("a dry run must not use the network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr("subprocess.run", fetch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_config
def test_a_dry_run_prints_the_sizes_and_needs_nothing(file, nowhere, capsys):
    assert main(["train", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    source, frozen, trained = next(sizes for start, sizes in SIZES.items() if file.stem.startswith(start))
    assert shown.startswith(f"backbone   {source}: ") and f"{frozen:,} frozen, {trained:,} trained" in shown
    sites = ", ".join(load_config(file).adapter.target_modules)
    assert f"({trained / (frozen + trained):.3%}); para on {sites}" in shown
    assert "not there yet" in shown and list(nowhere.iterdir()) == []


@each_config
def test_the_comment_at_the_top_gives_the_command_and_what_to_expect(file):
    comment = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert file.read_text().startswith(comment)
    assert re.search(rf"^#   para-jax train {re.escape(file.stem)}(?: --results results/{file.stem}\.json)?$",
                     comment, re.MULTILINE)  # fmt: skip
    assert "Expected: " in comment or "Not run" in comment


def test_many_answers_is_own_data_with_the_form_that_was_measured():
    many, own = (load_config(file) for file in CONFIGS if file.stem in ("many-answers", "own-data"))
    six = ("q_proj", "v_proj", "up_proj", "o_proj", "gate_proj", "down_proj")
    assert many.adapter == ParaConfig(r=4, late_r=28, up_bias=True, target_modules=six)
    assert many.train == replace(own.train, learning_rate=3e-4) and many.train.bias_lr_ratio == 30
    assert (many.data, many.eval, many.backbone) == (own.data, own.eval, own.backbone)


def test_each_run_has_an_output_folder_of_its_own():
    assert len({load_config(file).output_dir for file in CONFIGS}) == len(CONFIGS) > 10


each_task = pytest.mark.parametrize("task", BATCH)
each_of_the_papers = pytest.mark.parametrize("backbone", ["llama2-7b", "llama2-13b", "gemma-2b"])


@each_task
@each_of_the_papers
def test_the_papers_backbones_and_tasks_have_the_sibling_papers_settings(backbone, task):
    file = next(file for file in CONFIGS if file.stem == f"{backbone}-{task}")
    config = load_config(file)
    assert {key: getattr(config.train, key) for key in SIBLINGS} == SIBLINGS
    assert config.train.batch_size == BATCH[task]
    assert (config.data.task, config.eval.every, config.eval.patience, config.adapter.r) == (task, 200, 10, 12)
    comment = file.read_text().split("backbone:")[0]
    assert "sibling papers" in comment and f"batch {BATCH[task]}" in comment
    assert f"{SIZES[backbone][2]:,} trained parameters" in comment


#: Data sets of the hub by the names in the configs, and the number of rows in each split of a small copy.
HUB = {
    "aps/super_glue:boolq": {"train": 40, "validation": 10, "test": 6},
    "aps/super_glue:copa": {"train": 40, "validation": 10, "test": 6},
    "rajpurkar/squad:": {"train": 200, "validation": 10},
}
TEXTS = {
    "boolq": ["question", "passage"],
    "copa": ["premise", "choice1", "choice2", "question"],
    "squad": ["title", "context", "question"],
}


def hub_rows(task, split, count):
    """Rows with the columns of the real data set. SuperGLUE hides the labels of its test split."""
    import datasets

    answers = {"text": ["the word", "word"], "answer_start": [0, 4]}
    own = [
        {"answers": answers} if task == "squad" else {"label": -1 if split == "test" else i % 2} for i in range(count)
    ]
    rows = [{name: f"{name} {i} of {split}" for name in TEXTS[task]} | own[i] for i in range(count)]
    table = datasets.Dataset.from_list(rows)
    return table if task == "squad" else table.cast_column("label", datasets.ClassLabel(names=["False", "True"]))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Small local copies of the data sets, as hf: sources by their names on the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    copies = {}
    for name, splits in HUB.items():
        repository, _, config = name.partition(":")
        task, folder = config or "squad", tmp_path / repository
        (folder / task).mkdir(parents=True)
        for split, count in splits.items():
            hub_rows(task, split, count).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
        copies[f"hf:{name}"] = f"hf:{folder}:{config}"
        with (folder / "README.md").open("a") as readme:
            files = ", ".join(f"{{split: {split}, path: {task}/{split}-*}}" for split in splits)
            readme.write("" if readme.tell() else "---\nconfigs:\n")
            readme.write(f"- {{config_name: {task}, data_files: [{files}]}}\n")
    for readme in tmp_path.glob("*/*/README.md"):
        readme.write_text(readme.read_text() + "---\n")
    return copies


@each_task
@each_of_the_papers
def test_the_command_of_a_papers_config_gets_the_siblings_splits_from_the_hub(backbone, task, hub, capsys):
    header = (FOLDER / f"{backbone}-{task}.yaml").read_text().replace("\\\n# ", "")
    (command,) = re.findall(r"^#   (para-jax train .* data.train=hf:.*)$", header, re.MULTILINE)
    for name, copy in hub.items():
        command = command.replace(name, copy)
    _, _, name, *overrides = shlex.split(command)
    config = load_config(name, overrides)
    records = {split: load_records(config.data, split) or [] for split in ("train", "validation", "test")}
    expected = {"squad": [198, 2, 10]}.get(task, [40, 5, 5])  # squad: two of 200 training rows, by validation_split
    assert [len(found) for found in records.values()] == expected
    prompts = {record.prompt for found in records.values() for record in found}
    assert len(prompts) == sum(expected)  # no row is in two splits
    assert {record.completion for record in records["test"]} == {"squad": {"the word"}}.get(
        task, set(TASKS[task].choices)
    )
    assert config.data.task == task and "warning" not in capsys.readouterr().err


def test_the_share_of_squad_is_1000_rows():
    (share,) = set(re.findall(r"data.validation_split=(\S+)", (FOLDER / "llama2-7b-squad.yaml").read_text()))
    assert sum(1 for _ in takewhile(lambda row: row < 87_599, validation_rows(Fraction(share)))) == 1000


def test_the_run_beside_pefts_method_comparison_has_its_settings(tmp_path):
    """The defaults of huggingface/peft, method_comparison/MetaMathQA: default_training_params.json and utils.py."""
    from para_jax.evaluation.metrics import measure

    file = next(file for file in CONFIGS if file.stem == "llama3.2-3b-metamathqa")
    config = load_config(file, [f"data.train={tmp_path}"])
    theirs = {"schedule": "cosine", "warmup_ratio": 0.1, "max_steps": 5000, "max_grad_norm": 1, "weight_decay": 0}
    assert {name: getattr(config.train, name) for name in theirs} == theirs
    assert config.train.batch_size == 4
    assert (config.data.max_seq_length, config.eval.every, config.eval.max_new_tokens) == (768, 250, 300)
    assert (config.backbone.dtype, config.seed, config.eval.metric) == ("bfloat16", 0, "final_number")
    row = '{"query": "Two and {three}?", "response": "2+3=5\\n#### 5", "type": "GSM_AnsAug"}\n'
    (tmp_path / "train.jsonl").write_text(row)
    record = (load_records(config.data, "train") or [])[0]
    assert record.prompt == "Question: Two and {three}? Think step by step.\nAnswer:"
    assert record.completion == "2+3=5\n#### 5"
    assert measure(config.eval.metric, ["It is 5. The answer is: 5"], [record.references])[0] == 1
