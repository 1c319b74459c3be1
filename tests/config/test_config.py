"""Configs are strict: an unknown field, a wrong type or a value out of bounds is an error that names it."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from para_jax import Ia3Config, LoraConfig, ParaConfig, RunConfig, load_config
from para_jax.config import (
    ADAPTER_CONFIGS,
    SITES,
    EvalSection,
    MeshSection,
    SweepSection,
    TrainSection,
    config_dict,
    save_config,
)

SHIPPED = Path(__file__).parents[2] / "configs"


def error(*overrides, file=None):
    with pytest.raises(ValueError) as raised:
        load_config(file, overrides)
    assert len(str(raised.value).splitlines()) <= 2
    return str(raised.value)


def written(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


# -------------------------------------------------------------------------------------------------------------- loading


def test_an_empty_file_or_section_means_the_defaults(tmp_path):
    assert (
        load_config()
        == load_config(written(tmp_path, ""))
        == load_config(written(tmp_path, "# nothing\n"))
        == load_config(written(tmp_path, "train:\nadapter:\n"))
        == RunConfig()
    )


def test_overrides_come_after_the_file_and_the_file_after_the_defaults(tmp_path):
    file = written(tmp_path, "train: {learning_rate: 0.5, max_steps: 7}\nseed: 3\n")
    config = load_config(file, ["train.learning_rate=3e-3", "eval.choices=[a, b]", "adapter.pooler=mean"])
    assert (config.train.learning_rate, config.train.max_steps, config.seed) == (3e-3, 7, 3)
    assert config.eval.choices == ("a", "b") and config.adapter == ParaConfig(pooler="mean")
    assert config.train.per_device_batch_size == RunConfig().train.per_device_batch_size


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().seed = 1
    assert hash(load_config().train) == hash(load_config(None, ["train.max_grad_norm=1"]).train)


@pytest.mark.parametrize("overrides", [
    (),
    ("adapter.r=3", "adapter.target_modules=[up_proj, q_proj]", "train.max_steps=5", "eval.patience=2"),
    ("data.prompt={a}\\n{b} # \"'", "data.completion= {b}: ", "backbone.dtype=bfloat16"),
    ("eval.choices=['yes', 'no', '1', '1e3', '.5', 'nan', '1_0']", "logging.report_to=[]", "output_dir=runs/é x"),
])  # fmt: skip
def test_saved_and_loaded_is_the_same(overrides, tmp_path):
    config = load_config(None, overrides)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_dict(config)["adapter"]["method"] == "para"


def test_numbers_and_arrays_of_numpy_are_saved(tmp_path):
    adapter = {"r": np.int64(4), "lora_alpha": np.float32(0.5), "alora_invocation_tokens": np.arange(2)}
    config = RunConfig(
        adapter=LoraConfig(**adapter, scope="response", scope_window=2),
        sweep=SweepSection(learning_rate=np.logspace(-3, -2, 2), seed=[np.int32(1), 2]),
        train=TrainSection(max_steps=np.int64(5)),
        mesh=MeshSection(tensor=np.int64(1)),
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.sweep.learning_rate == (0.001, 0.01) and config.adapter.alora_invocation_tokens == (0, 1)
    with pytest.raises(ValueError, match=r"train.max_steps.* 0"):
        TrainSection(max_steps=np.int64(0))


@pytest.mark.parametrize(("given", "taken"), [
    ("{output}", "{output}"),
    ("{instruction}\\n{input}", "{instruction}\n{input}"),
    ("[a, b]", "[a, b]"),
    ("null", "null"),
    ("yes", "yes"),
    ("12", "12"),
    (" a = b: {c} # d ", " a = b: {c} # d "),
    ("", ""),
])  # fmt: skip
def test_text_overrides_are_literal(given, taken):
    config = load_config(None, [f"data.prompt={given}", f"data.completion={given}"])
    assert config.data.prompt == config.data.completion == taken


def test_other_overrides_are_yaml():
    config = load_config(
        None, ["train.max_steps=null", "eval.test=true", "backbone.dtype=float32", "train.learning_rate=1"]
    )
    assert (config.train.max_steps, config.eval.test, config.train.learning_rate) == (None, True, 1.0)


@pytest.mark.parametrize("method", ["para", "lora", "ia3"])
def test_a_learning_rate_that_is_not_set_is_the_methods(method, tmp_path):
    own = ADAPTER_CONFIGS[method].default_learning_rate
    config = load_config(None, [f"adapter.method={method}"])
    assert config.train.learning_rate == config.train.peak_learning_rate == own
    file = written(tmp_path, "train: {learning_rate: 0.5}\n")
    assert load_config(file, [f"adapter.method={method}"]).train.learning_rate == 0.5
    assert load_config(file, [f"adapter.method={method}", "train.learning_rate=null"]).train.learning_rate == own
    save_config(config, tmp_path / "saved.yaml")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["train"]["learning_rate"] == own
    swept = load_config(None, [f"adapter.method={method}", "sweep.learning_rate=[1e-4]"])
    assert swept.train.learning_rate is None  # no adapter is trained with it
    assert "default_learning_rate" not in config_dict(config)["adapter"]


def test_the_learning_rate_may_be_auto_and_then_is_no_number_yet():
    config = load_config(None, ["train.learning_rate=auto"])
    assert config.train.learning_rate == "auto"
    with pytest.raises(ValueError, match="auto"):
        _ = config.train.peak_learning_rate
    assert "or auto" in error("train.learning_rate=fast") and "or auto" in error("train.learning_rate=-1")


def test_target_modules_are_sorted_in_the_order_of_the_sites():
    assert ParaConfig(target_modules=("up_proj", "q_proj")).target_modules == ("q_proj", "up_proj")
    assert ParaConfig(target_modules=reversed(SITES)).target_modules == SITES
    assert LoraConfig(target_modules=set(SITES)).target_modules == SITES


@pytest.mark.parametrize("kind", [ParaConfig, LoraConfig, Ia3Config])
@pytest.mark.parametrize("given", ["all-linear", None, [], ["q_proj", "lm_head"]])
def test_targets_of_another_kind_are_shown_as_they_were_given(kind, given):
    """PEFT takes a text, and None for its own choice."""
    shown = repr(tuple(given) if isinstance(given, list) and given else given)
    said = f"target_modules must be a list of one or more of {', '.join(SITES)}; got {shown}"
    with pytest.raises(ValueError, match=re.escape(said)):
        kind(target_modules=given)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("override", "named"), [
    ("train.learning_rat=1", ("learning_rat", "learning_rate")),
    ("trian.max_steps=1", ("trian", "train")),
    ("data.promt=x", ("promt", "prompt")),
    ("seeds=1", ("seeds", "seed")),
])  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest_known_one(override, named, tmp_path):
    key, _, value = override.partition("=")
    section, _, field = key.rpartition(".")
    in_file = f"{section}:\n  {field}: {value}\n" if section else f"{field}: {value}\n"
    for message in (error(override), error(file=written(tmp_path, in_file))):
        assert all(name in message for name in named), message
    assert "run.yaml" in error(file=tmp_path / "run.yaml")


@pytest.mark.parametrize(("override", "meant"), [
    ("adapter.method=LoRA", "lora"),
    ("sweep.method=[para, Lora]", "lora"),
    ("eval.metric=acc", "accuracy"),
    ("train.schedule=cosin", "cosine"),
    ("eval.metric=bleu", None),
    ("adapter.method=null", None),
])  # fmt: skip
def test_a_wrong_name_is_answered_with_the_nearest_one(override, meant):
    said = error(override)
    assert override.partition("=")[0] in said
    assert (f"did you mean {meant}?" in said) if meant else "did you mean" not in said


@pytest.mark.parametrize(("override", "allowed"), [
    ("backbone.dtype=float16", "float32, bfloat16"),
    ("adapter.r=0", "1"),
    ("adapter.target_modules=[]", "q_proj"),
    ("train.warmup_ratio=1", "less than 1"),
    ("train.max_steps=010", "whole number"),
    ("eval.also=[loss]", "exact_match"),
    ("eval.test=maybe", "true or false"),
    ("sweep.seed=[-1]", "0"),
    ("adapter.scope_window=4", "1 with scope all"),
])  # fmt: skip
def test_a_value_out_of_bounds_names_the_field_the_value_and_what_is_allowed(override, allowed):
    key, _, value = override.partition("=")
    message = error(override)
    assert key.split(".")[-1] in message and allowed in message
    assert value.strip("[]").split(", ")[-1] in message


@pytest.mark.parametrize(("make", "named"), [
    (lambda: EvalSection(choices="yes"), "eval.choices.*'yes'"),
    (lambda: SweepSection(learning_rate=1e-3), "sweep.learning_rate.*0.001"),
    (lambda: MeshSection(data="8"), "mesh.data.*'8'"),
    (lambda: RunConfig(data={"train": "x"}), "data.*DataSection"),
])  # fmt: skip
def test_a_config_in_python_is_checked_as_one_in_a_file(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_a_list_becomes_a_tuple():
    """As files have them; a config is hashed."""
    made = EvalSection(choices=["a", "b"], also=["f1"]), SweepSection(learning_rate=np.array([0.5, 0.25])).learning_rate
    assert (made[0].choices, made[0].also, made[1]) == (("a", "b"), ("f1",), (0.5, 0.25)) and hash(made[0])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_steps", "section.field=value"),
        ("=3", "section.field=value"),
    ],
)
def test_an_override_without_a_value_says_how_one_looks(override, said):
    assert said in error(override)


def test_files_that_are_no_config_are_named(tmp_path):
    assert "nowhere.yaml: no such file" in error(file=tmp_path / "nowhere.yaml")
    assert "run.yaml" in error(file=written(tmp_path, "train: [unclosed\n"))
    assert "run.yaml" in error(file=written(tmp_path, "- a\n- b\n"))
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe")
    assert "utf-8" in error(file=tmp_path / "run.yaml")
    assert "run.yaml" in error(file=written(tmp_path, "train: 3\n"))


def test_a_shipped_config_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted(SHIPPED.glob("*.yaml"))
    assert "own-data" in [file.stem for file in files]
    for file in files:
        assert load_config(file.stem) == load_config(Path(file.stem)) == load_config(file)
    said = error(file="unheard-of")
    assert "unheard-of: no such file" in said and ", ".join(file.stem for file in files) in said
    for wrong in ("own-dat", "Own_Data", "own-data.yml", "configs/own-data.yaml"):
        assert "did you mean own-data?" in error(file=wrong)


def test_a_file_here_comes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own-data").write_text("output_dir: runs/of-this-file\n")
    assert load_config("own-data").output_dir == "runs/of-this-file"


def test_a_template_without_quotes_is_named(tmp_path):
    said = error(file=written(tmp_path, "data: {prompt: {question}}\n"))
    assert "data.prompt: YAML reads this as {'question': None}; put the text in quotes" in said


@pytest.mark.parametrize("override", ("eval.choices=[yes, no]", "output_dir=yes"))
def test_a_truth_value_in_place_of_text_is_refused(override):
    with pytest.raises(ValueError, match="put the text in quotes"):
        load_config(None, [override])
    assert load_config(None, ["eval.choices=['yes', 'no']"]).eval.choices == ("yes", "no")


def test_off_is_text_for_the_field_that_has_it(tmp_path):
    scoped = "adapter: {scope: response}\n"
    for value, expected in (("off", "off"), ("'off'", "off"), ("memory", "memory")):
        config = load_config(written(tmp_path, f"{scoped}train: {{cache_prompts: {value}}}\n"))
        assert config.train.cache_prompts == expected
        save_config(config, tmp_path / "again.yaml")
        assert load_config(tmp_path / "again.yaml") == config
    assert load_config(None, ["train.cache_prompts=off"]) == load_config()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((), "got all"),
        (("adapter.scope=prompt",), "got prompt"),
        (("sweep.method=[para, ia3]",), "got all"),
    ],
)
def test_prompts_are_kept_with_scope_response_alone(overrides, named):
    said = error("train.cache_prompts=memory", *overrides)
    assert "train.cache_prompts=memory" in said and named in said
    load_config(None, ["train.cache_prompts=memory", "adapter.scope=response", "sweep.method=[lora, ia3]"])
    assert "one of off, memory" in error("train.cache_prompts=gpu", "adapter.scope=response")


def test_fields_that_exclude_each_other_are_both_named():
    message = error("data.tenants=somewhere", "sweep.seed=[1, 2]")
    assert "data.tenants" in message and "sweep" in message


def test_a_coordinator_is_auto_or_an_address():
    assert load_config(None, ["runtime.coordinator=auto"]).runtime.coordinator == "auto"
    among = ["runtime.num_processes=2", "runtime.process_id=1"]
    assert load_config(None, ["runtime.coordinator=10.0.0.2:80", *among]).runtime.process_id == 1


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_another_method_drops_the_adapter_fields_of_the_file(method, tmp_path):
    (tmp_path / "run.yaml").write_text("adapter: {method: para, r: 12, summary: rms}\nseed: 3\n")
    found = load_config(
        tmp_path / "run.yaml", [f"adapter.method={method}", "adapter.target_modules=[v_proj, down_proj]"]
    )
    other = ADAPTER_CONFIGS[method](target_modules=("v_proj", "down_proj"))
    assert (found.adapter, found.seed) == (other, 3)
    assert load_config(tmp_path / "run.yaml", ["adapter.method=para", "adapter.r=4"]).adapter == ParaConfig(
        r=4, summary="rms"
    )


def test_the_scope_of_the_file_stays_with_another_method(tmp_path):
    """As in sweep.method: two ways to compare methods train the same."""
    (tmp_path / "run.yaml").write_text("adapter: {method: ia3, scope: response, scope_window: 4}\n")
    found = load_config(tmp_path / "run.yaml", ["adapter.method=lora"]).adapter
    assert found == LoraConfig(scope="response", scope_window=4)
    assert load_config(tmp_path / "run.yaml", ["adapter.method=lora", "adapter.scope=all"]).adapter == LoraConfig()


@pytest.mark.parametrize("method", ADAPTER_CONFIGS)
def test_every_method_has_a_scope_in_a_file_and_on_the_command_line(method, tmp_path):
    window = 1 if method == "para" else 4
    expected = ADAPTER_CONFIGS[method](scope="response", scope_window=window)
    overrides = [f"adapter.method={method}", "adapter.scope=response", f"adapter.scope_window={window}"]
    assert load_config(None, overrides).adapter == expected
    (tmp_path / "run.yaml").write_text(f"adapter: {{method: {method}, scope: response, scope_window: {window}}}\n")
    assert load_config(tmp_path / "run.yaml").adapter == expected
    everywhere = load_config(tmp_path / "run.yaml", ["adapter.scope=all", "adapter.scope_window=1"])
    assert everywhere.adapter == ADAPTER_CONFIGS[method]()
    save_config(load_config(None, overrides), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").adapter == expected


def test_invocation_tokens_are_a_list_of_loras():
    overrides = ["adapter.method=lora", "adapter.scope=response", "adapter.scope_window=2"]
    found = load_config(None, [*overrides, "adapter.alora_invocation_tokens=[7, 9]"])
    assert found.adapter == ADAPTER_CONFIGS["lora"](scope="response", scope_window=2, alora_invocation_tokens=(7, 9))
    assert (
        load_config(None, [*overrides, "adapter.alora_invocation_tokens=null"]).adapter.alora_invocation_tokens is None
    )
    for value in ("[a]", "[1.5]", "[-1]", "7", "[]", "[7, 9, 1]"):
        assert "alora_invocation_tokens" in error(*overrides, f"adapter.alora_invocation_tokens={value}")
    assert "alora_invocation_tokens: no such field of para" in error("adapter.alora_invocation_tokens=[7]")


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(None, ["output_dir=~/runs/a"]).output_dir == "/home/me/runs/a"
    with pytest.raises(ValueError, match="~nobody-here/a"):
        load_config(None, ["output_dir=~nobody-here/a"])


def test_default_rows_are_the_batch_in_a_sweep_and_four_per_tenant_of_a_folder():
    def rows(*overrides):
        return load_config(None, ["train.per_device_batch_size=12", *overrides]).rows_per_tenant

    assert rows("sweep.seed=[0, 1]") == 12 and rows("data.tenants=somewhere") == 4
    assert (
        rows("sweep.seed=[0, 1]", "train.rows_per_tenant=3") == rows("data.tenants=x", "train.rows_per_tenant=3") == 3
    )
    with pytest.raises(ValueError, match=r"train.rows_per_tenant.*train.per_device_batch_size \(12\).* 5"):
        rows("sweep.seed=[0, 1]", "train.rows_per_tenant=5")


# ------------------------------------------------------------------------------------------------------ hostile configs

SECRET = "s3cret-of-the-environment"
REFERENCES = {  # YAML for a text in double quotes, and the text
    "${oc.env:PARA_SECRET}": "${oc.env:PARA_SECRET}",
    r"\u0024{oc.env:PARA_SECRET}": "${oc.env:PARA_SECRET}",
    r"\u0024\u0024{x} $ {y} {z}": "$${x} $ {y} {z}",
    "???": "???",
}


@pytest.mark.parametrize(("written_as", "text"), REFERENCES.items())
def test_no_way_to_write_a_reference_reaches_the_environment(written_as, text, tmp_path, monkeypatch):
    monkeypatch.setenv("PARA_SECRET", SECRET)
    quoted = f'"{written_as}"'
    file = written(
        tmp_path, f"backbone: {{source: {quoted}}}\ndata: {{prompt: {quoted}}}\neval: {{choices: [{quoted}]}}\n"
    )
    overrides = [f"backbone.source={quoted}", f"data.train={quoted}", f"eval.choices=[{quoted}]", f"data.prompt={text}"]
    for config in (load_config(file), load_config(None, overrides)):
        assert (config.backbone.source, config.data.prompt, config.eval.choices) == (text, text, (text,))
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        assert SECRET not in (tmp_path / "saved.yaml").read_text()


@pytest.mark.parametrize("overrides", [
    ("eval.choices=[{a: 1}]",),
    ("adapter.target_modules=[[q_proj]]",),
    ("train={? [a] : 1}",),
    ("seed=0x" + "f" * 9000,),
    ("adapter=",),
])  # fmt: skip
def test_values_of_any_wrong_kind_are_errors(overrides):
    assert len(error(*overrides)) < 1000


def test_an_error_shows_no_character_that_a_terminal_acts_on(tmp_path):
    for value in (r'"\x1b]0;owned\x07"', '"' + "x" * 100000 + '"'):
        for field in ("seed", "eval.metric", "train"):
            message = error(f"{field}={value}")
            assert all(c.isprintable() or c == "\n" for c in message) and len(message) < 1000
    message = error(file=written(tmp_path, r'train: {"\x1bowned": 1}'))
    assert "owned" in message and "x1b" in message and message.replace("\n", "").isprintable()


def test_dates_are_text_and_numbers_may_have_underscores(tmp_path):
    config = load_config(None, ["output_dir=2001-01-01", "train.learning_rate=1e-3", "train.weight_decay=1_0.5e-1"])
    assert (config.output_dir, config.train.learning_rate, config.train.weight_decay) == ("2001-01-01", 1e-3, 1.05)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("written", "007 20261127_1530 1e3 12:30 0x1F .5".split())
def test_a_text_that_yaml_reads_as_a_number_stays_as_it_was_written(written, tmp_path):
    """A label such as 007, and a folder named by date and time."""
    (tmp_path / "run.yaml").write_text(f"eval: {{choices: [{written}, a]}}\noutput_dir: {written}\n")
    for config in (
        load_config(tmp_path / "run.yaml"),
        load_config(None, [f"eval.choices=[{written}, a]", f"output_dir={written}"]),
    ):
        assert config.eval.choices == (written, "a") and config.output_dir == written
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config


def test_a_number_is_the_same_however_it_is_written():
    overrides = ["seed=0x10", "train.max_steps=1_000", "train.adam_eps=1e-3", "train.weight_decay=7"]
    config = load_config(None, overrides)
    found = config.seed, config.train.max_steps, config.train.adam_eps, config.train.weight_decay
    assert found == (16, 1000, 1e-3, 7) and {type(value) for value in found} == {int, float}


def test_anchors_and_merge_keys_are_read(tmp_path):
    file = written(tmp_path, "train: &t {max_steps: 3}\neval: {choices: &c [a, b]}\ndata: {prompt: x}\n")
    assert load_config(file).train.max_steps == 3
    file = written(tmp_path, "eval: {also: &m [f1]}\nmesh: {<<: {data: 2}, fsdp: 3}\nlogging: {every: 2}\n")
    assert load_config(file).mesh.fsdp == 3 and load_config(file).mesh.data == 2


def test_a_truth_value_is_0_or_1_but_no_other_number(tmp_path):
    assert load_config(None, ["data.packing=1", "data.max_seq_length=8"]).data.packing is True
    for text in ("31", "-1", "0.5"):
        with pytest.raises(ValueError, match=f"data.packing.*true or false.* {text}"):
            load_config(None, [f"data.packing={text}"])


@pytest.mark.parametrize(("text", "value"), [("'true'", True), ("'Yes'", True), ("'off'", False), ("'0'", False)])
def test_a_quoted_truth_value_is_one(text, value, tmp_path):
    file = written(tmp_path, f"eval: {{test: {text}}}")
    assert load_config(file).eval.test is value and load_config(None, [f"eval.test={text}"]).eval.test is value


def test_an_override_of_the_epochs_takes_the_place_of_the_steps_of_the_file(tmp_path):
    """As in a tenant.yaml; else it would have no effect."""
    file = written(tmp_path, "train: {max_steps: 7}\n")
    assert load_config(file, ["train.num_epochs=3"]).train.max_steps is None
    both = load_config(file, ["train.num_epochs=3", "train.max_steps=5"]).train
    assert (both.num_epochs, both.max_steps) == (3.0, 5)
    assert load_config(file, ["train.batch_size=8"]).train.max_steps == 7
    file.write_text("train: {num_epochs: 3}")
    assert load_config(file, ["train.max_steps=5"]).train.num_epochs == 1
    assert load_config(file, ["train.max_steps=null"]).train.num_epochs == 3
