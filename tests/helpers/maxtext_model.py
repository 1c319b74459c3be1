"""A tiny Llama of MaxText 0.2.5, and our own Transformer with the same weights. MaxText imports hundreds of packages
that such a model does not use: they are replaced by mocks where they are missing."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from unittest import mock

import jax.numpy as jnp
from flax import nnx

from para_jax import LayerKind, ModelConfig, RotaryConfig, Transformer

UNUSED = (
    "fire", "xprof", "gviz_api", "tokamax", "drjax", "ml_goodput_measurement", "google.cloud", "cloud_tpu_diagnostics",
    "pathwaysutils", "sentencepiece", "tensorboard", "evaluate", "nltk", "tiktoken", "blobfile", "librosa", "cv2",
    "soundfile", "math_verify", "gcsfs", "sympy", "tensorflow_text", "distrax", "pylint", "flask", "jsonlines",
)  # fmt: skip


class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: a package that is there is not replaced."""

    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(f"{one}.") for one in UNUSED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__name__, module.__spec__ = [], spec.name, spec
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(Mocks())
LAYERS, WIDTH, HIDDEN, HEADS, KV, HEAD, VOCAB = 3, 64, 96, 4, 2, 16, 128


def maxtext_model(folder, scan: bool):
    """MaxText's Transformer and its mesh."""
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.models.models import Transformer as Theirs
    from maxtext.utils import maxtext_utils

    config = pyconfig.initialize(
        ["", maxtext.__path__[0] + "/configs/base.yml"], run_name="tiny", base_output_directory=str(folder),
        model_name="default", decoder_block="llama2", base_emb_dim=WIDTH, base_mlp_dim=HIDDEN,
        base_num_query_heads=HEADS, base_num_kv_heads=KV, head_dim=HEAD, base_num_decoder_layers=LAYERS,
        vocab_size=VOCAB, max_target_length=12, per_device_batch_size=4, dtype="float32", weight_dtype="float32",
        mlp_activations=["silu", "linear"],
        attention="dot_product", scan_layers=scan, enable_checkpointing=False, logits_via_embedding=False,
        normalization_layer_epsilon=1e-6, rope_max_timescale=10_000, enable_dropout=False, matmul_precision="highest",
        skip_jax_distributed_system=True,
    )  # fmt: skip
    mesh = maxtext_utils.get_mesh_from_config(config)
    with mesh:
        return Theirs(config, mesh, None, rngs=nnx.Rngs(params=0, dropout=1)), mesh


def own_model(model, scan: bool) -> Transformer:
    """Our Transformer with its weights. MaxText folds 1 / sqrt(head_dim) into those of the queries."""
    config = ModelConfig(
        model_type="llama", vocab_size=VOCAB, width=WIDTH, hidden_width=HIDDEN, num_heads=HEADS, num_kv_heads=KV,
        head_dim=HEAD, norm_eps=1e-6, kinds=(LayerKind(rotary=RotaryConfig(dims=HEAD)),) * LAYERS,
        attention_scale=HEAD**-0.5,
    )  # fmt: skip
    own = Transformer(config, rngs=nnx.Rngs(0))

    def put(variable, value):
        variable.set_value(jnp.asarray(value).reshape(variable.get_value().shape))

    put(own.embedding, model.token_embedder.embedding[...])
    put(own.final_norm.weight, model.decoder.decoder_norm.scale[...])
    put(own.head, model.decoder.logits_dense.kernel[...])
    for i, ours in enumerate(own.layers):
        theirs = model.decoder.layers if scan else getattr(model.decoder, f"layers_{i}")

        def at(module, name="kernel", i=i):
            return getattr(module, name)[...].take(i, axis=1) if scan else getattr(module, name)[...]

        put(ours.input_norm.weight, at(theirs.pre_self_attention_layer_norm, "scale"))
        put(ours.pre_feedforward_norm.weight, at(theirs.post_self_attention_layer_norm, "scale"))
        for a, b in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
            folded = HEAD**0.5 if b == "query" else 1.0
            put(getattr(ours.attention, a).kernel, at(getattr(theirs.self_attention, b)) * folded)
        for a, b in (("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")):
            put(getattr(ours.feedforward, a).kernel, at(getattr(theirs.mlp, b)))
    return own
