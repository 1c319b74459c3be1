import pytest

from para_jax.config import LoraConfig, RunConfig, load_config
from para_jax.config.unknown_field import OTHER_NAMES, dotted_fields, meant_field


@pytest.mark.parametrize(("given", "meant"), [
    ("train.lr", "train.learning_rate"),
    ("lr", "train.learning_rate"),
    ("learning_rate", "train.learning_rate"),
    ("train.epochs", "train.num_epochs"),
    ("train.num_train_epochs", "train.num_epochs"),
    ("train.steps", "train.max_steps"),
    ("steps", "train.max_steps"),
    ("eval.steps", "eval.every"),
    ("train.warmup_steps", "train.warmup_ratio"),
    ("train.gradient_accumulation", "train.gradient_accumulation_steps"),
    ("train.batch", "train.per_device_batch_size"),
    ("train.per_device_train_batch_size", "train.per_device_batch_size"),
    ("train.batchsize", "train.batch_size"),
    ("train.learningrate", "train.learning_rate"),
    ("train.LR", "train.learning_rate"),
    ("train.r", "adapter.r"),
    ("adapter.rank", "adapter.r"),
    ("adapter.lora_r", "adapter.r"),
    ("adapter.alpha", "adapter.lora_alpha"),
    ("adapter.type", "adapter.method"),
    ("adapter.learning_rate", "train.learning_rate"),
    ("data.max_length", "data.max_seq_length"),
    ("train.max_length", "data.max_seq_length"),
    ("data.dataset", "data.train"),
    ("model", "backbone"),
    ("backbone.model", "backbone.source"),
    ("backbone.torch_dtype", "backbone.dtype"),
    ("eval.metrics", "eval.metric"),
    ("output", "output_dir"),
    ("train.output_dir", "output_dir"),
    ("train.seed", "seed"),
    ("trian", "train"),
])  # fmt: skip
def test_the_field_that_was_meant_is_named(given, meant):
    with pytest.raises(ValueError) as error:
        load_config(None, ["adapter.method=lora", f"{given}=1"])
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{given}: no such field of ") and first.endswith(f"; did you mean {meant}?")
    assert second.startswith("the fields of ")


def test_an_adapters_fields_are_those_of_its_method():
    with pytest.raises(
        ValueError, match=r"adapter\.rank: no such field of para; .*adapter\.r\?\n.*para are scope, scope_window, r, "
    ):
        load_config(None, ["adapter.rank=8"])
    with pytest.raises(ValueError, match=r"adapter\.lora_alpha: no such field of para; .*adapter\.method=lora\n"):
        load_config(None, ["adapter.lora_alpha=8"])


def test_rows_of_a_program_are_no_field_of_a_file():
    with pytest.raises(ValueError) as error:
        load_config(None, ["data.given=1"])
    assert str(error.value).startswith("data.given: no such field of data\n") and str(error.value).endswith("packing")


def test_a_field_that_resembles_none_is_listed_with_those_there_are():
    with pytest.raises(ValueError, match=r"^xyzzy: no such field of a run\nthe fields of a run are backbone, adapter"):
        load_config(None, ["xyzzy=1"])


def test_each_other_name_belongs_to_a_field_that_is_there():
    known = {
        *dotted_fields(RunConfig()),
        *dotted_fields(RunConfig(adapter=LoraConfig())),
        "adapter.feedforward_modules",
    }
    assert set(OTHER_NAMES) <= known
    for name in known:
        section, _, field = name.rpartition(".")
        assert field not in OTHER_NAMES.get(name, "").split()
    assert meant_field("train.", "lr", RunConfig().train, RunConfig()) == "train.learning_rate"


def test_a_mistake_in_the_file_names_the_file_and_one_in_an_override_does_not(tmp_path):
    file = tmp_path / "run.yaml"
    for text in ("train: {lr: 1}", "train: {max_steps: 0}", "adapter: {r: 0}"):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"^config {file}: (train|adapter)"):
            load_config(file)
    file.write_text("train: {max_steps: 3}")
    for override in ("train.lr=1", "train.max_steps=0", "adapter.r=0"):
        with pytest.raises(ValueError, match=f"^{override.split('=')[0]}[ :]"):
            load_config(file, [override])
