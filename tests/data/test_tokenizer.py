import json

import pytest
from tiny_tokenizers import plain
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from para_jax.data.examples import encode_prompt
from para_jax.data.tokenizer import load_tokenizer


def test_a_damaged_tokenizer_folder_is_a_one_line_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text('{"cut off')
    with pytest.raises(ValueError, match=r"cannot load a tokenizer[^\n]*$"):
        load_tokenizer(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    made = Tokenizer(models.BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config"}}')
    names = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "custom.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\nclass Config: pass\n"
    )
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------------- hostile files


def spoiled(tmp_path, settings=None, **parts):
    """The folder of a tokenizer with other settings in tokenizer_config.json, or other parts of tokenizer.json."""
    plain().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, changes in (("tokenizer_config.json", settings or {}), ("tokenizer.json", parts)):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tmp_path


@pytest.mark.parametrize("longest", ["x", -1, 0, [1], {}, True])
def test_a_wrong_model_max_length_is_named(tmp_path, longest):
    with pytest.raises(ValueError, match="model_max_length"):
        load_tokenizer(spoiled(tmp_path, {"model_max_length": longest}))


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "<gone>", "type_id": 0}}]}


def test_a_panic_of_the_tokenizers_library_is_a_value_error(tmp_path, capfd):
    with pytest.raises(ValueError, match=f"{tmp_path}.*tokenizer"):
        load_tokenizer(spoiled(tmp_path, post_processor=TEMPLATE | {"special_tokens": {}}))
    tokenizer = plain_with(TEMPLATE | {"special_tokens": {}}, tmp_path)
    with pytest.raises(ValueError, match="the tokenizer fails on 'Answer:'"):
        encode_prompt(tokenizer, "Answer:")


def plain_with(processor, folder):
    """A tokenizer that was loaded without `load_tokenizer`."""
    return AutoTokenizer.from_pretrained(spoiled(folder, post_processor=processor))


def test_a_text_without_tokens_is_an_error_and_ctrl_c_is_not():
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="the tokenizer fails on 'b'.*UNK"):
        encode_prompt(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="a"), "b")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_prompt(interrupted, "b")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_file_that_is_too_large_for_a_tokenizer_is_not_read(tmp_path, name):
    with (spoiled(tmp_path) / name).open("ab") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match=f"{name} is larger than"):
        load_tokenizer(tmp_path)
