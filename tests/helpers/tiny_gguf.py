"""GGUF files: a golden backbone as llama.cpp's converter writes it, and vocabularies with a backbone of zeros."""

import json

import gguf
import numpy as np
from golden_models import FIXTURES
from safetensors.numpy import load_file
from tiny_tokenizers import CHATML, plain

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
#: Kinds of tokens in a vocabulary.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def hugging_face(family):
    folder = FIXTURES / family
    return json.loads((folder / "config_legacy.json").read_text()), load_file(folder / "model.safetensors")


def llama_cpp_name(name, arch):
    module, _, kind = name.removeprefix("model.layers.").rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    layer, _, module = module.partition(".")
    after_attention = {"llama": "ffn_norm", "gemma3": "post_attention_norm"}[arch]
    return f"blk.{layer}.{(NAMES | {'post_attention_layernorm': after_attention})[module]}.{kind}"


def interleave(weight, heads):
    """As llama.cpp's convert_hf_to_gguf.py permutes q_proj and k_proj."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, family="llama", *, arch=None, kind=None, change=(), tensors=None):
    """Writes a fixture as llama.cpp's converter does. `change` replaces metadata; `kind` quantises the matrices."""
    config, weights = hugging_face(family)
    arch = arch or ("gemma3" if "gemma" in family else "llama")
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_theta"]),
    }
    if "gemma" in family:
        values |= {"attention.key_length": config["head_dim"], "attention.sliding_window": config["sliding_window"]}
    for key, value in (values | dict(change)).items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](
                key if "." in key and key.split(".")[0] in ("split", "tokenizer") else f"{arch}.{key}", value
            )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in (weights | (tensors or {})).items():
        if weight is None:
            continue
        if ".q_proj." in name or ".k_proj." in name:
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            weight = interleave(weight, heads) if "gemma" not in family else weight
        if "gemma" in family and "norm" in name:
            weight = weight + 1
        name = name if name.startswith("raw.") else llama_cpp_name(name, "gemma3" if "gemma" in family else "llama")
        if kind is not None and weight.ndim == 2:
            writer.add_tensor(name.removeprefix("raw."), gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name.removeprefix("raw."), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(path, tokens, types, *, arch="llama", **metadata):
    """A GGUF file with one layer of zeros and this vocabulary; metadata by its name after tokenizer.ggml."""
    writer = gguf.GGUFWriter(path, arch)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 4}
    for key, value in (sizes | {"attention.sliding_window": 8}).items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in metadata.items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ]
        add(f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    linear = {"attn_q": 8, "attn_k": 4, "attn_v": 4, "attn_output": 8, "ffn_gate": 8, "ffn_up": 8, "ffn_down": 8}
    norms = {"attn_norm": 8, "ffn_norm": 8}
    if arch == "gemma3":
        norms |= {"attn_q_norm": 4, "attn_k_norm": 4, "post_attention_norm": 8, "post_ffw_norm": 8}
    for name, size in linear.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((size, 8), np.float32))
    for name, size in norms.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(size, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_gguf(path, **metadata):
    """The vocabulary of tiny_tokenizers.plain(), <|im_start|> and <|im_end|> as control tokens."""
    state = json.loads(plain().backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    types = [CONTROL if token.startswith("<|") else NORMAL for token in tokens]
    merges = [" ".join(merge) for merge in state["merges"]]
    settings = {"model": "gpt2", "pre": "gpt-2", "merges": merges, "bos_token_id": 0, "eos_token_id": 1}
    return write_vocabulary(
        path, tokens, types, **(settings | {"padding_token_id": 1, "chat_template": CHATML} | metadata)
    )
