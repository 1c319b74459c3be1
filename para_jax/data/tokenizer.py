"""Loads the tokenizer of a backbone: a Hugging Face folder or hub id through transformers, a GGUF file through its
metadata. Either way a transformers tokenizer comes out, and torch is not needed."""

from __future__ import annotations

from pathlib import Path

from ..backbone.gguf.file import GgufFile
from ..backbone.gguf.tokenizer import gguf_tokenizer
from ..config import RunConfig, Variables, template_variables
from ..io.hub import MAX_TEXT_BYTES, resolve_tokenizer
from ..io.untrusted import read_json
from .chats import with_variables
from .examples import failures

#: Classes that put bos and eos around a text as add_bos_token and add_eos_token of tokenizer_config.json say.
WITH_OWN_ENDS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")


def run_tokenizer(config: RunConfig):
    """The tokenizer of a run: its backbone's, with the run's data.chat_template_kwargs."""
    return load_tokenizer(config.backbone.source, config.data.chat_template_kwargs)


def load_tokenizer(source: str | Path, chat_template_kwargs: Variables | str | None = None):
    """The tokenizer of a backbone.

    Args:
        source: as for load_backbone: a folder, a hub id, a .gguf file or a built-in name.
        chat_template_kwargs: variables of its chat template, as a dict or its JSON text. Those that a caller of the
            template gives win over them.

    Raises ValueError, naming the source, if its files are missing or do not describe a tokenizer, and for variables
    without a chat template.

    >>> tokenizer = load_tokenizer("smollm2-135m")
    >>> len(tokenizer("Hello world")["input_ids"])
    2
    """
    path = resolve_tokenizer(source)
    if path.is_file():
        file = GgufFile(path)
        with failures(f"{path}: cannot build a tokenizer from its metadata"):
            tokenizer = gguf_tokenizer(file)
    else:
        if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ValueError(  # transformers would make an empty one
                f"{source}: no tokenizer.json, tokenizer.model or vocab.json; put the tokenizer's files next to the "
                "weights, for example those of the model that it was tuned from"
            )
        from transformers import AutoTokenizer

        with failures(f"{source}: cannot load a tokenizer"):
            found = AutoTokenizer.from_pretrained(
                path,
                config=model_type_config(path),
                mistral_format=False,  # else it would read tekken.json if mistral-common is installed
                trust_remote_code=False,
                local_files_only=True,
            )
            tokenizer = with_own_ends(as_published(found, path), path)
    if variables := template_variables("chat_template_kwargs", chat_template_kwargs):
        set_variables(tokenizer, variables)
    return tokenizer


def set_variables(tokenizer, variables: Variables) -> None:
    """Gives the tokenizer's chat template these variables. Whatever depends on the template's text, such as a cache of
    token ids, then depends on them too."""
    tokenizer.chat_template = with_variables(tokenizer.get_chat_template(), variables)


def model_type_config(folder: Path):
    """What transformers chooses the tokenizer's class by: a config of the model's type, with default values. With its
    own values transformers refuses some models that para_jax reads, such as the first Phi-3 128k."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    said = read_json(folder / "config.json", MAX_TEXT_BYTES)
    named = {key: said[key] for key in ("model_type", "tokenizer_class") if isinstance(said.get(key), str)}
    known = named.get("model_type") in CONFIG_MAPPING
    return AutoConfig.for_model(**named) if known else PreTrainedConfig(**named)


def as_published(tokenizer, folder: Path):
    """The tokenizer with every step of its tokenizer.json.

    For some classes transformers 5 takes only the vocabulary and the merges from it. SmolLM2's, a GPT2Tokenizer, would
    not split digits off, and so two newlines before a digit would be other tokens. Llama 2's would put no space before
    the text after a special token, such as [INST] after <s>.
    """
    from transformers import PreTrainedTokenizerFast

    complete = type(tokenizer) is PreTrainedTokenizerFast or getattr(tokenizer, "backend_tokenizer", None) is None
    if complete or not (folder / "tokenizer.json").is_file():
        return tokenizer
    whole = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    known = whole.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():  # the class has defaults, which transformers adds as new
        if getattr(whole, name, None) is None and isinstance(token, str) and token in known:
            setattr(whole, name, token)
    return whole


def with_own_ends(tokenizer, folder: Path):
    """The tokenizer, with bos and eos around a text as its tokenizer_config.json asks.

    transformers 5 reads neither key next to a tokenizer.json, so DeepSeek's prompts would begin without bos. Only the
    classes that read them in transformers 4 get them. If one key is missing, it has the default that it had there.
    """
    file = folder / "tokenizer_config.json"
    said = read_json(file, MAX_TEXT_BYTES) if file.is_file() and (folder / "tokenizer.json").is_file() else {}
    ends = {name: said[name] for name in ("add_bos_token", "add_eos_token") if isinstance(said.get(name), bool)}
    if ends and str(said.get("tokenizer_class")).removesuffix("Fast") in WITH_OWN_ENDS:
        for name, value in ({"add_bos_token": True, "add_eos_token": False} | ends).items():
            setattr(tokenizer, name, value)
    return tokenizer
