import json

import pytest
from tiny_tokenizers import MAY_THINK, byte_level, own_space, plain
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax.config import load_config
from para_jax.data.examples import answer_opening, encode_example, encode_prompt
from para_jax.data.tokenizer import load_tokenizer, run_tokenizer


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


CLASSES = ("GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "olmo2"])
def test_a_text_is_split_as_tokenizer_json_says(tmp_path, kind, model_type):
    """For SmolLM2's, a GPT2Tokenizer, transformers 5.24 drops the step that splits digits off."""
    plain().save_pretrained(tmp_path)
    file, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    made = Tokenizer.from_file(str(file))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    saved = json.loads(made.to_str())
    for pair in (("1", "2"), ("Ġ", "1")):
        saved["model"]["vocab"]["".join(pair)] = len(saved["model"]["vocab"])
        saved["model"]["merges"].append(pair)
    file.write_text(json.dumps(saved))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": kind}))
    tokenizer, text = load_tokenizer(tmp_path), "<|im_start|>x\n\n3.  12 1212 it's"
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(file)).encode(text).ids
    assert (tokenizer.eos_token, tokenizer.chat_template) == (plain().eos_token, plain().chat_template)


@pytest.mark.parametrize("kind", [*CLASSES, "LlamaTokenizer"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_text_after_a_special_token_begins_as_tokenizer_json_says(tmp_path, kind, legacy):
    own_space().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": kind, "legacy": legacy}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer, file = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<s>[INST] a [/INST] b </s><s>[INST] c", "a</s>\nb", "  a"):
        for special in (True, False):
            found = tokenizer(text, add_special_tokens=special)["input_ids"]
            assert found == file.encode(text, add_special_tokens=special).ids
            assert tokenizer.decode(found) == own_space().decode(found)


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize(
    ("ends", "begin", "end"),
    [
        ({"add_bos_token": True, "add_eos_token": False}, ["<s>"], []),
        ({"add_eos_token": True}, ["<s>"], ["</s>"]),
        ({"add_bos_token": False}, [], []),
        ({}, [], []),
    ],
)
def test_a_text_begins_and_ends_as_tokenizer_config_says(tmp_path, kind, ends, begin, end):
    """DeepSeek's folders are like this: their tokenizer.json adds nothing. transformers 5 does not read these keys."""
    byte_level(["<s>", "</s>"], bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    file, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": level}))
    saved = json.loads(settings.read_text())
    saved = {key: value for key, value in saved.items() if not key.startswith("add_")} | {"tokenizer_class": kind}
    settings.write_text(json.dumps(saved | ends))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("hello")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [*begin, *"hello", *end]
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == ids[len(begin) : len(ids) - len(end)]


def test_a_folder_without_a_tokenizer_that_can_be_read_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mistral3"}')
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_a_class_has_its_default_eos_if_the_vocabulary_has_it(tmp_path, known):
    """transformers would add it, as a token that the model lacks."""
    byte_level(["<|im_end|>", *["<|endoftext|>"] * known], eos_token="<|im_end|>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    found, count = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    assert (found.eos_token, len(found)) == ("<|endoftext|>" if known else None, count)
    assert None not in found.all_special_ids


def test_a_config_that_transformers_refuses_has_a_tokenizer(tmp_path):
    """The first configs of Phi-3 128k are so."""
    plain().save_pretrained(tmp_path)
    scaling = {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}
    config = {"model_type": "phi3", "rope_scaling": scaling, "max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path)("Answer:")["input_ids"] == plain()("Answer:")["input_ids"]


# -------------------------------------------------------------------------------------------------------- hostile files


def spoiled(tmp_path, settings=None, **parts):
    """The folder of a tokenizer with other settings in tokenizer_config.json, or other parts of tokenizer.json."""
    plain().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, changes in (("tokenizer_config.json", settings or {}), ("tokenizer.json", parts)):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tmp_path


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "<gone>", "type_id": 0}}]}


def test_a_panic_of_the_tokenizers_library_is_a_value_error(tmp_path):
    tokenizer = load_tokenizer(spoiled(tmp_path, post_processor=TEMPLATE | {"special_tokens": {}}))
    with pytest.raises(ValueError, match="the tokenizer fails on 'Answer:'"):
        encode_prompt(tokenizer, "Answer:")


def test_a_text_without_tokens_is_an_error_and_ctrl_c_is_not():
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="the tokenizer fails on 'b'.*UNK"):
        encode_prompt(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="a"), "b")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_prompt(interrupted, "b")


def folder_of(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


THOUGHT = "<think>\n\n</think>\n\n"


def test_a_tokenizer_renders_chats_with_the_variables_that_it_was_loaded_with(tmp_path):
    special = ["<|im_start|>", "<|im_end|>"]
    folder = folder_of(byte_level(special, eos_token="<|im_end|>", chat_template=MAY_THINK), tmp_path)
    chat, answer = [{"role": "user", "content": "yes or no"}], "yes"
    plain, quiet = load_tokenizer(folder), load_tokenizer(folder, {"enable_thinking": False})
    expected = plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert expected.endswith(THOUGHT) and quiet.decode(encode_prompt(quiet, chat)) == expected
    found, before = encode_example(quiet, chat, answer), encode_example(plain, chat, answer)
    assert sum(found, []) == sum(before, []), "the thought goes from the completion to the prompt"
    assert quiet.decode(found.completion_ids) == "yes<|im_end|>" and answer_opening(quiet, chat) == ""
    assert answer_opening(plain, chat) == THOUGHT.strip()
    config = load_config(None, [f"backbone.source={folder}", "data.chat_template_kwargs={enable_thinking: false}"])
    assert run_tokenizer(config).chat_template == quiet.chat_template != plain.chat_template


def test_variables_need_a_template(tmp_path):
    with pytest.raises(ValueError, match="chat_template_kwargs: 'messages'"):
        load_tokenizer(folder_of(plain(), tmp_path / "chats"), {"messages": False})
    bare = folder_of(byte_level(["</s>"], eos_token="</s>"), tmp_path / "bare")
    with pytest.raises(ValueError, match="chat_template is not set"):
        load_tokenizer(bare, '{"enable_thinking": false}')
    assert load_tokenizer(bare, {}).chat_template is None
