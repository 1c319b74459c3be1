import pytest

from para_jax.config import load_config


@pytest.mark.parametrize(("given", "meant"), [
    ("learning_rate", "train.learning_rate"),
    ("train.batchsize", "train.batch_size"),
    ("train.r", "adapter.r"),
    ("adapter.learning_rate", "train.learning_rate"),
    ("data.max_length", "data.max_seq_length"),
    ("train.output_dir", "output_dir"),
    ("trian", "train"),
])  # fmt: skip
def test_the_field_that_was_meant_is_named(given, meant):
    with pytest.raises(ValueError) as error:
        load_config(None, ["adapter.method=lora", f"{given}=1"])
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{given}: no such field of ") and first.endswith(f"; did you mean {meant}?")
    assert second.startswith("the fields of ")


def test_an_adapters_fields_are_those_of_its_method():
    with pytest.raises(ValueError, match=r"adapter\.rank: no such field of para\n.*para are scope, scope_window, r, "):
        load_config(None, ["adapter.rank=8"])
    with pytest.raises(ValueError, match=r"adapter\.lora_alpha: no such field of para; .*adapter\.method=lora\n"):
        load_config(None, ["adapter.lora_alpha=8"])


def test_rows_of_a_program_are_no_field_of_a_file():
    with pytest.raises(ValueError) as error:
        load_config(None, ["data.given=1"])
    assert str(error.value).startswith("data.given: no such field of data\n") and str(error.value).endswith("packing")


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
