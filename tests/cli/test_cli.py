"""The command line on a tiny backbone: what each command prints and leaves, and what a user's mistake gives."""

import errno
import importlib.metadata
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
from adapter_folder import LAYER, WEIGHTS, change_config, change_tensors, saved_config
from golden_models import strong
from long_cases import quick
from safetensors.numpy import load_file
from tiny_gguf import write_gguf
from tiny_run import backbone_folder, tokenizer, write_rows
from tokenizers.pre_tokenizers import ByteLevel

import para_jax.adapters.files
from para_jax import (
    Request,
    generate,
    load_adapter,
    load_backbone,
    load_model_config,
    load_tokenizer,
    save_adapter,
)
from para_jax.cli import main, parse, program, serve
from para_jax.cli.train import best_combination
from para_jax.data.examples import encode_prompt

CONFIG = """
backbone: {{source: {folder}/backbone}}
adapter: {{method: para, r: 4}}
data: {{train: {folder}/data, buckets: 1}}
train: {{learning_rate: 3.0e-2, max_steps: 4}}
eval: {{every: 2, metric: loss, batch_size: 8, max_new_tokens: 4, test: true}}
mesh: {{data: 1}}
logging: {{report_to: []}}
runtime: {{compilation_cache: false, allow_cpu: true}}
output_dir: {folder}/run
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, data, and the config of a run of 4 steps on them: run.yaml."""
    folder = tmp_path_factory.mktemp("cli")
    backbone_folder(folder / "backbone")
    for split, count in {"train": 20, "validation": 8, "test": 5}.items():
        write_rows(folder / "data" / f"{split}.jsonl", rows(split, count))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def trained(folder, config):
    """The run folder after `para-jax train`, which wrote its scores to results/run.json."""
    assert command("train", config, "--results", folder / "results" / "run.json") == 0
    return folder / "run"


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of the trained adapter, to be spoilt."""
    return shutil.copytree(trained / "adapter", tmp_path / "adapter")


def rows(split, count):
    """Prompts of 6 words, each with 1 to 5 of the words w9 w10 w11 ..."""
    draw = random.Random(split)
    words = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    return [
        {"prompt": words(draw.sample(range(20, 256), 6)), "completion": words(range(9, 10 + i % 5))}
        for i in range(count)
    ]


def command(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # as argparse ends
        return stop.code


def mistake(capsys, *arguments):
    """What a command says on stderr: it must end with code 2 and an error of one or two lines, before a list."""
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    lines = said[said.index("para-jax") :].splitlines()
    assert len([line for line in lines if not line.startswith("  ")]) <= 2 and "Traceback" not in said
    return "\n".join(lines)


def generate_line(folder, *options):
    quick = ("--max-new-tokens", 4, "--no-compilation-cache", "--allow-cpu")
    return ("generate", "--backbone", folder / "backbone", "--prompt", "w20 w30", *quick, *options)


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ----------------------------------------------------------------------------------------------------- what should work


def test_train_leaves_a_run_folder_and_the_results_of_the_command(folder, config, trained):
    held = {".lock", "config.yaml", "metrics.jsonl", "checkpoints", "adapter", "scores.json"}
    assert {path.name for path in trained.iterdir()} == held
    results = json.loads((folder / "results" / "run.json").read_text())
    assert results["command"] == f"para-jax train {config} --results {folder}/results/run.json"
    assert "cpu" in results["device"] and results["seconds"] > 0
    assert results["config"]["train"]["max_steps"] == 4 and results["config"]["adapter"]["method"] == "para"
    scores = results["scores"]
    losses = {"test_before_loss", "validation_loss", "test_after_loss"}
    assert set(scores) == losses | {f"{name}_stderr" for name in losses}
    assert scores["test_after_loss"] != scores["test_before_loss"]


def test_evaluate_gives_the_score_that_training_gave(folder, config, trained, tmp_path, capsys):
    scores = json.loads((folder / "results" / "run.json").read_text())["scores"]
    for when, options in {"before": [], "after": ["--adapter", trained / "adapter"]}.items():
        assert command("evaluate", config, *options, "--results", tmp_path / "e.json") == 0
        name = "run" if options else "base"
        assert f"| {name} |" in capsys.readouterr().out
        found = json.loads((tmp_path / "e.json").read_text())["scores"][name]["test"]
        assert found["loss,none"] == pytest.approx(scores[f"test_{when}_loss"], abs=1e-5) and found["sample_len"] == 5
    assert command("evaluate", config, "--split", "validation", "--limit", 3, "--results", tmp_path / "e.json") == 0
    assert json.loads((tmp_path / "e.json").read_text())["scores"]["base"]["validation"]["sample_len"] == 3


def test_evaluate_shuffles_prompts_where_it_is_asked_to(folder, config, trained, tmp_path, capsys):
    line = ("evaluate", config, "--adapter", trained / "adapter", "--results", tmp_path / "e.json")

    def found(*options):
        assert command(*line, *options) == 0
        return json.loads((tmp_path / "e.json").read_text())["scores"]["run"]["test"]

    own, other, drawn = found(), found("--shuffle-prompts"), found("--shuffle-prompts", "seed=1")
    assert len({own["loss,none"], other["loss,none"], drawn["loss,none"]}) == 3 and other["sample_len"] == 5
    assert other == found("--shuffle-prompts") and own["loss_stderr,none"] > 0
    assert_says(mistake(capsys, *line[:4], "--shuffle-prompts", "--limit", 1), "test: 1 example; to shuffle prompts")


@pytest.mark.long
def test_plot_draws_curves_and_factors(folder, trained, tmp_path, capsys):
    backbone = ("--backbone", folder / "backbone", "--allow-cpu", "--no-compilation-cache")
    adapter = ("--adapter", trained / "adapter")
    for name, options in {
        "curves": [trained],
        "one": [*adapter, "--prompt", "w20 w30", *backbone],
        "two": [*adapter, "--prompt", "w20 w30", "--prompt", "w40\\nw60", *backbone],
    }.items():
        assert command("plot", *options, "--output", tmp_path / f"{name}.png") == 0
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path}/two.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give RUN"),
        (["/nowhere"], "/nowhere: no run is there"),
    ],
)
def test_plot_names_options_that_it_cannot_draw(capsys, tmp_path, options, said):
    given = [] if "--output" in options else ["--output", tmp_path / "x.png"]
    assert_says(mistake(capsys, "plot", *options, *given), said)
    assert list(tmp_path.iterdir()) == []


def test_generate_answers_each_prompt_as_the_library_does(folder, trained, capsys):
    prompts = ["w20 w30", "w40 w50\nw60"]
    options = ["--prompt", "w40 w50\\nw60", "--adapter", trained / "adapter"]
    assert command(*generate_line(folder, *options)) == 0
    shown = capsys.readouterr().out
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    made = load_adapter(trained / "adapter", model.config)
    texts = generate(model, prompts, tokenizer=tokenizer, adapters=made, max_new_tokens=4)
    assert all(texts) and shown == "".join(f"> {p}\n{t}\n\n" for p, t in zip(prompts, texts, strict=True))


@pytest.mark.long
def test_one_prompt_prints_only_the_answer_and_options_change_it(folder, capsys):
    greedy = [command(*generate_line(folder, *options)) or capsys.readouterr().out for options in ([], ["--top-k", 1])]
    assert greedy[0] == greedy[1] and greedy[0].startswith("w") and greedy[0].count("\n") == 1
    hot = ["--temperature", 5, "--seed"]
    drawn = [command(*generate_line(folder, *hot, seed)) or capsys.readouterr().out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    third = greedy[0].strip().split("w")[3]
    assert command(*generate_line(folder, "--stop", f"w{third}")) == 0
    assert capsys.readouterr().out == greedy[0][: greedy[0].index(f"w{third}")] + "\n"


@pytest.mark.long
def test_generate_answers_for_many_tenants_in_one_batch(folder, trained, tmp_path, capsys):
    """Each as with its adapter alone; the base model's answer is that without one."""
    adapters = {"ours": trained / "adapter", "loud": tmp_path / "loud"}
    config = load_model_config(folder / "backbone")
    save_adapter(strong(load_adapter(adapters["ours"], config), scale=0.5), adapters["loud"])
    alone = {}
    for name, options in {"base": [], **{name: ["--adapter", path] for name, path in adapters.items()}}.items():
        assert command(*generate_line(folder, *options)) == 0
        alone[name] = capsys.readouterr().out.strip()
    assert alone["loud"] != alone["base"]
    tenants = ["--adapters", *(f"{name}={path}" for name, path in adapters.items())]
    for name, answer in alone.items():
        assert command(*generate_line(folder, *tenants, "--tenant", name)) == 0
        shown = capsys.readouterr()
        assert shown.out.strip() == answer and "2 of 2 tenants (2 para)" in shown.err
    line = list(generate_line(folder, "--adapter", adapters["ours"]))
    del line[1:3]  # --backbone: the adapter names it
    assert command(*line) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == alone["ours"] and f"backbone: {folder / 'backbone'}" in shown.err
    each = [text for name in ("loud", "base", "ours") for text in ("--tenant", name)]
    line = generate_line(folder, *tenants, *each, "--prompt", "w20 w30", "--prompt", "w20 w30")
    assert command(*line) == 0
    shown = capsys.readouterr().out
    assert shown == "".join(f"> [{name}] w20 w30\n{alone[name]}\n\n" for name in ("loud", "base", "ours"))


@pytest.fixture(scope="module")
def moody(folder, tmp_path_factory):
    """The backbone with a chat template that begins an answer with the variable `mood`, else w7."""
    moody = tmp_path_factory.mktemp("moody")
    chats = deepcopy(tokenizer())
    chats.chat_template = MOODS
    shutil.copytree(folder / "backbone", moody / "backbone")
    chats.save_pretrained(moody / "backbone")
    return moody


MOODS = (
    "{% set begins = mood | default('w7') + ' ' %}"
    "{% for m in messages %}{{ (begins if m.role == 'assistant' else '') + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ begins }}{% endif %}"
)


@pytest.mark.long
def test_chats_are_rendered_with_the_variables_of_the_command_or_the_config(folder, moody, trained, tmp_path, capsys):
    adapter = ["--adapter", trained / "adapter"]
    assert (
        command(
            *generate_line(
                moody, *adapter, "--prompt", "w20 w30 w7", "--prompt", "w20 w30 w9", "--prompt", "w5 w20 w30 w7"
            )
        )
        == 0
    )
    expected = capsys.readouterr().out.splitlines()[4::3]
    variables = "--chat-template-kwargs", '{"mood": "w9"}'
    found = []
    for options in ([], variables, ("--system", "w5")):
        assert command(*generate_line(moody, *adapter, "--chat", *options)) == 0
        found.append(capsys.readouterr().out.strip())
    assert found == expected and found[0] != found[1]
    exported = []
    for prompt in (["w20 w30 w9"], ["w20 w30", "--chat", *variables], ["w20 w30", "--chat"]):
        line = (
            "export",
            adapter[1],
            "--prompt",
            *prompt,
            "--backbone",
            moody / "backbone",
            "--output",
            tmp_path / "out",
        )
        assert command(*line, "--allow-cpu") == 0
        exported.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert exported[0] == exported[1] != exported[2] and capsys.readouterr()
    write_rows(tmp_path / "text.jsonl", [{"prompt": "w20 w30 w9", "completion": "w5 w6"}])
    write_rows(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "w20 w30"}], "completion": "w5 w6"}])
    line = ("evaluate", folder / "run.yaml", f"backbone.source={moody}/backbone", *adapter)
    scores = []
    for data, options in (
        ("text", []),
        ("chat", variables),
        ("chat", ["data.chat_template_kwargs={mood: w9}"]),
        ("chat", []),
    ):
        assert command(*line[:3], f"data.test={tmp_path}/{data}.jsonl", *options, *line[3:]) == 0
        scores.append(capsys.readouterr().out.splitlines()[2])
    assert scores[0] == scores[1] == scores[2] != scores[3]


def test_the_server_renders_chats_with_the_variables_of_its_command(moody):
    quick = ["--slots", "1", "--max-length", "32", "--allow-cpu", "--no-compilation-cache"]
    variables = ["--chat-template-kwargs", '{"mood": "w9"}']
    engine = serve.engine_of(parse(["serve", "--backbone", str(moody / "backbone"), *quick, *variables]), {})
    ids = encode_prompt(engine.tokenizer, [{"role": "user", "content": "w20 w30"}])
    assert ids == [20, 30, 9]


@pytest.mark.long
def test_two_servers_draw_different_answers(folder):
    """Each request without a seed: replicas that drew alike would answer one request with the same text."""
    quick = ["--slots", "1", "--max-length", "64", "--allow-cpu", "--no-compilation-cache"]
    texts = []
    for _ in range(2):
        engine = serve.engine_of(parse(["serve", "--backbone", str(folder / "backbone"), *quick]), {})
        engine.submit(Request("w20", temperature=5.0, max_new_tokens=20, ignore_eos=True))
        texts.append([one.text for one in engine.run()])
    assert texts[0] != texts[1]


@pytest.mark.long
def test_training_on_chats_with_variables_is_training_on_the_texts_that_they_make(folder, moody, tmp_path, capsys):
    words = [(f"w{20 + i} w{30 + i}", f"w{i + 5}") for i in range(20)]
    write_rows(tmp_path / "text.jsonl", [{"prompt": f"{said} w9", "completion": answer} for said, answer in words])
    chats = [{"prompt": [{"role": "user", "content": said}], "completion": answer} for said, answer in words]
    write_rows(tmp_path / "chat.jsonl", chats)
    line = ("train", folder / "run.yaml", f"backbone.source={moody}/backbone", "eval.test=false", "train.max_steps=2")
    made = {}
    for data, options in {"text": [], "chat": ["data.chat_template_kwargs={mood: w9}"]}.items():
        run = tmp_path / f"run-{data}"
        assert command(*line, f"data.train={tmp_path}/{data}.jsonl", f"output_dir={run}", *options) == 0
        made[data] = (run / "adapter" / WEIGHTS).read_bytes()
    assert made["text"] == made["chat"]
    assert """`load_tokenizer(base, '{"mood": "w9"}')`""" in (run / "adapter" / "README.md").read_text()
    capsys.readouterr()


def test_generate_over_several_devices_answers_as_on_one(folder, trained, capsys):
    written = {}
    for devices in ("1", "2"):
        line = generate_line(folder, "--adapter", trained / "adapter", "--tensor-parallel-size", devices)
        assert command(*line) == 0
        written[devices] = capsys.readouterr().out
    assert written["1"] == written["2"]
    for devices, said in {"0": "at least 1; got 0", "x": "got 'x'"}.items():
        assert_says(mistake(capsys, *generate_line(folder, "--tensor-parallel-size", devices)), f"--tensor.*{said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapters", "acme=/x"], "--tenant is given 0 times.*.*base is no adapter"),
        (["--adapters", "acme=/x", "--tenant", "acne"], "--tenant: no tenant 'acne'; the nearest are acme"),
        (["--adapters", "a=x", "a=y", "--tenant", "a"], "--adapters 'a=y': the name 'a' is taken by x\ngive NAME=DIR"),
        (["--adapters", "acme=/nowhere", "--tenant", "acme"], "/nowhere"),
    ],
)
def test_wrong_tenants_are_named(folder, capsys, options, said):
    assert_says(mistake(capsys, *generate_line(folder, *options)), said)


def test_inspect_shows_a_run_an_adapter_and_data(config, trained, capsys):
    assert command("inspect", trained / "adapter") == 0
    shown = capsys.readouterr().out
    assert "PARA, r 4, pooler last" in shown and "llama, 3 layers, width 64" in shown and "3,456 values" in shown
    assert command("inspect", trained) == 0
    run = capsys.readouterr().out
    assert shown in run and "step 4     test_before_loss" in run and "step 4     validation_loss" in run
    assert re.search(r"\ntest +loss +\d\.\d+ ± \d\.\d+ +\d\.\d+ ± \d\.\d+ +5\n", run) and "loss -" not in run
    assert command("inspect", config, "--data") == 0
    data = capsys.readouterr().out
    assert data.count("prompt: 6 tokens") == 3 and data.count("]<<\ncompletion: ") == 3 and data.count(">>[w") == 3
    assert "[w9][w10][</s>]" in data and "20 examples; padded to 16 tokens (6 of completion); 3 batches" in data
    assert data.endswith("per epoch; also 8 validation and 5 test examples\n")


def test_a_dry_run_prints_sizes_and_writes_nothing(folder, config, tmp_path, capsys):
    output = tmp_path / "run"
    assert command("train", "--dry-run", config, f"output_dir={output}", "train.gradient_accumulation_steps=2") == 0
    shown = capsys.readouterr().out
    weights = load_file(folder / "backbone" / "model.safetensors")
    assert f"{sum(w.size for w in weights.values()):,} frozen, 3,456 trained (2.347%)" in shown
    assert "adapter 13.82 kB, optimiser 27.65 kB" in shown and "16 rows of at most 512 tokens" in shown
    assert "train: 20 records" in shown and not output.exists()
    linears = [array for name, array in weights.items() if "proj" in name]
    bytes_held = 4 * (sum(w.size for w in weights.values()) - sum(w.size for w in linears))
    bytes_held += sum(w.size + 4 * len(w) for w in linears)  # a byte a weight, and a scale an output
    assert command("train", "--dry-run", config, "backbone.quantize=int8") == 0
    assert f"weights {bytes_held / 1e3:.4g} kB (float32, linears int8)" in capsys.readouterr().out


def bytes_gguf(path):
    """The llama fixture as a .gguf file with the 256 bytes as its tokens."""
    tokens = {"tokens": sorted(ByteLevel.alphabet()), "token_type": [1] * 256, "model": "gpt2", "pre": "gpt-2"}
    return write_gguf(path, change={f"tokenizer.ggml.{key}": value for key, value in tokens.items()})


def test_convert_writes_a_folder_that_generates_what_the_gguf_file_does(folder, tmp_path, capsys):
    file, made = bytes_gguf(tmp_path / "m.gguf"), tmp_path / "made"
    assert command("convert", file, made) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in made.iterdir()}
    capsys.readouterr()
    answers = [command(*generate_line(folder, "--backbone", it)) or capsys.readouterr().out for it in (file, made)]
    assert answers[0] == answers[1] != "\n"


def test_help_is_there_for_the_program_and_each_command(capsys):
    assert command("--help") == 0
    shown = capsys.readouterr().out
    for name in ("quickstart", "train", "evaluate", "generate", "inspect", "convert", "prepare", "plot", "bench"):
        assert name in shown and command(name, "--help") == 0
        assert re.search(rf"examples?:\n  para-jax {name} ", capsys.readouterr().out)


@pytest.mark.parametrize("module", quick(["para_jax", "para_jax.cli"], "para_jax"))
def test_the_command_line_runs_where_its_script_is_not_on_the_path(module):
    """As after `pip install --user` on many machines."""
    run = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == para_jax.__version__
    wrong = subprocess.run([sys.executable, "-m", module, "inspect", "no/such"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no/such" in wrong.stderr and "Traceback" not in wrong.stderr


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mesh.data=9"], "'data': 9.* 8 devices"),
        (["data.prompt={question}"], "train.jsonl:1: .*'question'.*prompt, completion"),
        (["data.max_seq_length=7"], "train.jsonl:1: .*8 tokens.*data.max_seq_length.* 7.*20 of 20"),
        (["eval.metric=accuracy", "eval.choices=[w9]"], "eval.choices"),
        (["output_dir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_a_wrong_run_is_refused_before_anything_is_written(capsys, config, tmp_path, overrides, said):
    assert_says(mistake(capsys, "train", config, f"output_dir={tmp_path / 'run'}", *overrides), said)
    assert list(tmp_path.iterdir()) == []


GOOD = '{"prompt": "w20", "completion": "w9"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + '{"prompt": "w20",\n', "rows.jsonl:2: .*JSON"),
        (GOOD + '{"prompt": "w20"}', "rows.jsonl:2: .*'completion'.*prompt"),
    ],
)
def test_wrong_data_is_named_by_file_and_line(capsys, config, tmp_path, text, said):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_says(mistake(capsys, "train", config, f"data.train={file}", f"output_dir={tmp_path / 'run'}"), said)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_truncated_backbone_is_named(capsys, folder, tmp_path):
    broken = shutil.copytree(folder / "backbone", tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_says(mistake(capsys, *generate_line(folder, "--backbone", broken)), "model.safetensors")


def spoil_truncated(adapter):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])


def spoil_not_finite(adapter):
    change_tensors(adapter, lambda tensors: tensors[f"{LAYER}1.para_up.weight"].__setitem__((3, 2), np.nan))


def spoil_pickle_only(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def spoil_other_backbone(adapter):
    change_config(adapter, backbone=saved_config(adapter)["backbone"] | {"num_layers": 4})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_truncated, WEIGHTS),
        (spoil_not_finite, r"layers\.1\.para_up\.weight"),
        (spoil_pickle_only, r"adapter_model.bin.*pickle.*safetensors.torch.save_file"),
        (spoil_other_backbone, "num_layers.* 4.* 3"),
        (shutil.rmtree, "adapter"),
    ],
)
def test_an_unusable_adapter_is_named(capsys, folder, adapter, spoil, said):
    spoil(adapter)
    assert_says(mistake(capsys, *generate_line(folder), "--adapter", adapter), said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", -1], "temperature is -1.0"),
        (["--max-new-tokens", 1000], "2 tokens and max_new_tokens 1000 are more than the model's 512 positions"),
        (["--prompt", ""], "prompt is missing or empty"),
        (["--chat"], "chat_template is not set"),
        (["--chat-template-kwargs", "a=1"], "--chat-template-kwargs.*JSON object.*a=1"),
    ],
)
def test_generate_names_a_wrong_option(capsys, folder, options, said):
    assert_says(mistake(capsys, *generate_line(folder, *options)), said)


def test_a_hub_id_without_the_hub_is_named_with_what_to_do(capsys, folder, config, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for line in (
        generate_line(folder, "--backbone", "someone/model"),
        generate_line(folder, "--adapter", "someone/model"),
        ("train", config, "backbone.source=someone/model", f"output_dir={tmp_path / 'run'}"),
        ("train", config, "backbone.source=someone/model", "--dry-run"),
    ):
        assert_says(mistake(capsys, *line), "someone/model: .*can't be fetched from the hub")
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_another_run_stays_as_it_is(capsys, folder, config, trained):
    before = contents(trained)
    said = mistake(capsys, "train", config, "train.learning_rate=1e-3")
    assert_says(said, "train.learning_rate.*0.03.*0.001")
    assert contents(trained) == before
    data = contents(folder / "data")
    assert_says(mistake(capsys, "train", config, f"output_dir={folder / 'data'}"), str(folder / "data"))
    assert_says(mistake(capsys, "train", config, f"output_dir={config}"), str(config))
    assert contents(folder / "data") == data


def test_convert_refuses_a_folder_that_is_not_empty_and_a_broken_file(capsys, tmp_path):
    file = write_gguf(tmp_path / "m.gguf")
    assert_says(mistake(capsys, "convert", file, tmp_path / "made"), "m.gguf: .*no tokenizer.ggml.tokens")
    file.write_bytes(file.read_bytes()[:-40])
    assert_says(mistake(capsys, "convert", file, tmp_path / "made"), "m.gguf: .*output_norm.weight")
    file = bytes_gguf(tmp_path / "whole.gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert_says(mistake(capsys, "convert", file, tmp_path / "full"), "not an empty folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m.gguf", "whole.gguf"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_full_disk_while_saving_keeps_the_previous_adapter(capsys, folder, config, tmp_path, monkeypatch):
    """The adapter of step 2 is written, and the disk is full at step 4: without validation data each is kept."""
    real, written = para_jax.adapters.files.replacing, []

    def replacing(file):
        written.append(file)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file)

    run, data = tmp_path / "run", f"data.train={folder / 'data' / 'train.jsonl'}"
    with monkeypatch.context() as patch:
        patch.setattr(para_jax.adapters.files, "replacing", replacing)
        said = mistake(capsys, "train", config, f"output_dir={run}", data, "eval.test=false")
    assert_says(said, "No space left on device: .*run/adapter")
    assert "Trained for 2 steps" in (run / "adapter" / "README.md").read_text()
    held = [".lock", "adapter", "checkpoints", "config.yaml", "metrics.jsonl"]
    assert sorted(path.name for path in run.iterdir()) == held
    assert command(*generate_line(folder, "--adapter", run / "adapter")) == 0
    assert command("train", config, f"output_dir={run}", data, "eval.test=false") == 0
    assert "Trained for 4 steps" in (run / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "generate --prompt a --adapter ''",
        "serve --api-key-file ''",
    ],
)
def test_an_empty_text_does_not_count_as_left_out(capsys, config, line):
    """As "$UNSET" gives it: the base model would answer in place of an adapter, and a server would ask for no key."""
    assert_says(mistake(capsys, *shlex.split(line.format(config=config))), "argument .*: the text is empty")


def test_a_key_on_the_command_line_is_refused_and_not_shown(capsys):
    """As vLLM takes it. It is no abbreviation of --api-key-file."""
    error = mistake(capsys, "serve", "--api-key=sk")
    assert_says(error, "--api-key-file")
    assert not re.search(r"\bsk\b", error)


def test_the_home_folder_of_an_option_is_expanded(tmp_path, monkeypatch):
    """A shell leaves the ~ of --output=~/file as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, option in (("generate", "--input"), ("generate", "--output"), ("bench", "--output")):
        options = parse([name, *(["decode"] if name == "bench" else []), f"{option}=~/a.jsonl"])
        assert getattr(options, option[2:]) == tmp_path / "a.jsonl"


def test_ctrl_c_gives_one_line_and_code_130(capsys, config, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("para_jax.cli.train.load_config", interrupted)
    assert command("train", config) == 130
    assert capsys.readouterr().err == "para-jax: interrupted\n"


# ------------------------------------------------------------------------------------------------------------ terminals


def test_the_version_is_that_of_the_package(capsys):
    assert command("--version") == 0
    assert capsys.readouterr().out == f"para-jax {importlib.metadata.version('para_jax')}\n"


def test_a_closed_output_ends_a_command_silently(adapter):
    """As `para-jax inspect ADAPTER | head -0`."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from para_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "inspect", str(adapter)]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_results_are_of_the_adapter_that_is_kept(config, tmp_path, monkeypatch):
    """The adapter of the last step may be worse, and is not kept."""
    rows = [
        {"step": 2, "validation_loss": 0.5},
        {"step": 4, "validation_loss": 2.0},
        {"step": 4, "test_after_loss": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {"validation": {"values": {"loss": 0.5}}, "test": {"values": {"loss": 0.6}}}
    rest = dict(output_dir=tmp_path, warning=None, scores=kept)
    result = SimpleNamespace(report=lambda: "", step=4, best="best validation loss 0.5000 at step 2", **rest)
    monkeypatch.setattr("para_jax.runs.train.train", lambda _: result)
    assert command("train", config, "--results", tmp_path / "run.json") == 0
    found = json.loads((tmp_path / "run.json").read_text())["scores"]
    assert found == {"validation_loss": 0.5, "test_after_loss": 0.6}


def test_of_combinations_with_equal_scores_the_one_with_the_lowest_loss_is_the_best():
    def entry(score, loss, rows):
        values = {"accuracy": score, "loss": loss}
        records = {"validation": {"metric": "accuracy", "count": len(rows), "values": values, "rows": rows}}
        return {"best_score": score, "metric": "accuracy", "best_step": 4, "scores": records}

    tied = {"rate-1e-4": entry(0.5, 9.0, [0, 1] * 4), "rate-1e-3": entry(0.5, 0.7, [1, 0] * 4)}
    none = {"rate-1": entry(0.5, 0.1, []) | {"best_score": None, "scores": {}}}
    worse = {"rate-1e-2": entry(0.0, 0.1, [0] * 8)}
    for order in (tied, dict(reversed(tied.items())), none | tied):
        said = best_combination(order)
        assert said[0] == "best: rate-1e-3, with validation accuracy 0.5000 at step 4"
        assert set(said[1].partition(" have the same score")[0].split(", ")) == set(tied) and len(said) == 3
        assert "rate-1e-3, rate-1e-4 are not told apart" in said[2] and "8 examples" in said[2]
    clear = {"good": entry(1.0, 0.7, [1] * 40), "bad": entry(0.0, 0.1, [0] * 40)}
    assert best_combination(clear) == ["best: good, with validation accuracy 1.0000 at step 4"]
    assert not any("rate-1e-2" in line for line in best_combination(tied | worse)[:2]) and best_combination(none) == []


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch, adapter):
    """An answer or a report in another script ends no command after its work."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr("para_jax.reports.inspect.folder_report", lambda _: "caf\u00e9")
    assert command("inspect", adapter) == 0
    assert shown.getvalue() == rb"caf\xe9" + b"\n"


def test_a_defect_has_a_traceback_and_an_exit_code_of_its_own(monkeypatch, capsys, adapter):
    """A script would take Python's, which is 1, for "some answers are errors"."""
    monkeypatch.setattr("para_jax.reports.inspect.folder_report", lambda _: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["para-jax", "inspect", str(adapter)])
    assert program() == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and "ZeroDivisionError" in said


def test_an_error_escapes_terminal_characters(capsys, config, tmp_path):
    text = "\x1b]0;owned\x07 \x9b31m \u202e"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": text, "r": text, text: text}))
    lines = [("train", config, f"seed={text}"), ("train", config, f"backbone.source={text}"), ("inspect", adapter)]
    lines += [("train", text), ("fly", text), ("train", config, f"--{text}"), ("inspect", text), (text,)]
    for line in lines:
        said = mistake(capsys, *line)
        assert all(c.isprintable() or c == "\n" for c in said), line


def test_inspect_escapes_terminal_characters_in_foreign_text(capsys, adapter):
    file = adapter / "adapter_config.json"
    found = json.loads(file.read_text())
    found["base_model_name_or_path"] = "\x1b]0;owned\x07\nbackbone   trusted"
    file.write_text(json.dumps(found))
    assert command("inspect", adapter) == 0
    shown = capsys.readouterr().out
    assert "owned" in shown and all(c.isprintable() or c == "\n" for c in shown)
    assert len([line for line in shown.splitlines() if line.startswith("backbone ")]) == 1


def assert_says(text, pattern):
    assert re.search(pattern, text, re.DOTALL), f"{pattern!r} is not in {text!r}"
