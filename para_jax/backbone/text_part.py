"""The text model in a checkpoint that has an image part too, such as Gemma 3 from 4B on: its config, and the names that
its tensors have in a text model of its own."""

from __future__ import annotations

import re
from typing import Any, TypeVar

#: By model_type of the whole: what its text_config may leave out, as in the configuration classes of transformers 5.24.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8,
    },
    "mistral3": {"model_type": "mistral"},
}  # fmt: skip
#: What the whole's config says for its text model as well.
OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")

#: Published checkpoints begin with language_model., those that transformers 5 writes with model.language_model.; PEFT's
#: adapters put base_model.model. before it.
TEXT = re.compile(r"(base_model\.model\.)?(model\.)?language_model\.")
IMAGE = re.compile(r"(base_model\.model\.)?(model\.)?(vision_tower|multi_modal_projector)\.")

Tensor = TypeVar("Tensor")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model. A config without one is returned as it is."""
    whole, own = config.get("model_type"), config.get("text_config")
    if not isinstance(whole, str) or not has_image_part(whole) or not isinstance(own, dict) or not own:
        return config
    return TEXT_CONFIGS[whole] | own | {key: config[key] for key in OF_THE_WHOLE if config.get(key) is not None}


def has_image_part(model_type: str) -> bool:
    """Whether checkpoints with this model_type have an image part, and a text model that is supported."""
    return model_type in TEXT_CONFIGS


def whole_name(name: str) -> str:
    """The name that PEFT gives an adapter's tensor where the model has an image part."""
    return name.replace("base_model.model.model.", "base_model.model.model.language_model.", 1)


def text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text model's tensors, by the names that they have without an image part."""
    if not any(map(TEXT.match, tensors)):
        return tensors
    return {TEXT.sub(r"\1\2", name, count=1): tensor for name, tensor in tensors.items() if not IMAGE.match(name)}
