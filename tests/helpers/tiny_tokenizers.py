"""Tiny tokenizers of the kinds that published models have, with chat templates, for the tests of data/."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Message: where is my parcel?\nTeam: shipping",
    "Answer with yes or no.\nAnswer: yes the movie is a good one",
    "user assistant system the quick brown fox jumps over the lazy dog 0123456789",
] * 3

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (  # Gemma's: BOS in the template, `model` for the assistant, an end token that is not EOS
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINK = CHATML.replace(  # Qwen3's: the last turn says that nothing was thought
    "message['content'] + '<|im_end|>",
    "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content'] + "
    "'<|im_end|>",
)
MAY_THINK = THINK.replace(  # Qwen3's too: with enable_thinking=false the prompt says that nothing is thought
    "assistant\n' }}{% endif",
    "assistant\n' + ('' if enable_thinking | default(true) else '<think>\n\n</think>\n\n') }}{% endif",
)
REASON = (  # DeepSeek-R1's and QwQ's: the generation prompt begins a thought, and answers are shown without theirs
    CHATML.replace("message['content']", "message['content'].split('</think>')[-1].lstrip('\n')").replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
)
INST = (  # Llama 2's: no generation prompt, the turn starts with a space and ends in EOS
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token"
    " }}{% else %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)

ZEPHYR = (  # Zephyr's and TinyLlama's: a newline before the answer, which ends in EOS
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

MOVED = (  # Mistral's, of Nemo: the system message is written into the last message, if that is the user's
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}"
    "{{ '[INST]' + (system + '\n\n' if system and loop.last else '') + message['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)


@cache
def plain():
    """A byte-level BPE without BOS, as SmolLM2's."""
    return byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=CHATML)


@cache
def thinking():
    """As `plain`, with a chat template that begins every answer with an empty thought, as Qwen3's."""
    return byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=THINK)


@cache
def reasoning():
    """As `plain`, with a chat template whose generation prompt begins a thought, as DeepSeek-R1's and QwQ's."""
    return byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=REASON)


@cache
def with_bos():
    """A byte-level BPE that puts BOS before each text, and whose chat turns end in a token that is not EOS."""
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return byte_level(special, bos=True, bos_token="<bos>", eos_token="<eos>", chat_template=TURNS)


@cache
def moved_system():
    """A byte-level BPE whose chat template writes the system message into the last user's message."""
    special = ["<s>", "</s>", "[INST]", "[/INST]"]
    return byte_level(special, bos_token="<s>", eos_token="</s>", chat_template=MOVED)


@cache
def own_space():
    """A BPE with SentencePiece's spaces, which adds BOS and its own leading space, as Llama 2's."""
    return sentencepiece([], eos_token="</s>", chat_template=INST)


@cache
def own_space_zephyr():
    """As `own_space`, with Zephyr's chat template."""
    return sentencepiece([], eos_token="</s>", chat_template=ZEPHYR)


@cache
def own_space_chatml():
    """As `own_space`, with ChatML and its special tokens, as OpenHermes' for Mistral."""
    return sentencepiece(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=CHATML)


def sentencepiece(added, **settings):
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *added]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + bytes_, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    made = without_special(made, special)
    add_bos(made, "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", **settings)


def byte_level(special, *, bos=False, **settings):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    if bos:
        add_bos(made, settings["bos_token"])
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings)


def add_bos(made, bos):
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )


def without_special(made, special):
    """The same tokenizer with only `special` as special tokens: the byte tokens are ordinary ones."""
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))
