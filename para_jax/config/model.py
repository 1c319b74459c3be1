"""The shape of a backbone: `ModelConfig`, and the layers whose output an adapter may change (SITES)."""

from dataclasses import dataclass
from typing import Literal

#: The linear layers whose output an adapter may change, by their Hugging Face names, always in this order.
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: By model_type: linear layers whose names are not those of sites, and the sites that they hold, in the order of rows.
OWN_LINEARS = {
    "phi3": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    "granitemoehybrid": {"input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",)},
}
#: Those of all model types.
FUSED = {name: sites for linears in OWN_LINEARS.values() for name, sites in linears.items()}
#: By model_type: the feed-forward layer's name in Hugging Face's models, if it is not mlp.
FEEDFORWARD_NAMES = {"granitemoehybrid": "shared_mlp"}


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """A rotary embedding (arXiv:2104.09864, rotate-half form) of the first `dims` dimensions of each head. dims = 0 is
    none."""

    dims: int
    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """linear divides all frequencies by `factor`, llama3 only the low ones, yarn and longrope each by its own number"""
    factor: float = 1.0
    """with yarn, how many times the original length the model can read"""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, kw_only=True)
class DividedRotaryConfig(RotaryConfig):
    """A rotary embedding with scaling yarn or longrope. It is a class of its own because a backbone's hash has the text
    of its config: new fields in RotaryConfig would change the hash of every backbone."""

    divisors: tuple[float, ...]
    """one per frequency, which it divides"""
    attention_factor: float = 1.0
    """multiplies the rotated parts of queries and keys"""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ between layers: the rotary embedding, and the attention window in tokens (None: no limit)."""

    rotary: RotaryConfig
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer. The families in backbone/families.py differ only in these values."""

    model_type: str
    vocab_size: int
    width: int
    hidden_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]
    """one per layer"""
    max_positions: int = 4096
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """gelu is the exact form, with erf"""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """norms multiply by (norm_offset + weight); 1 in the Gemma families"""
    pre_norm: bool = True
    post_norm: bool = False
    """normalise the outputs of attention and feed-forward before they are added to the residual stream"""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """head: over each head; projection: over all heads at once"""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    """attention scores are query times key times this"""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def site_width(self, site: str) -> int:
        """The width of the output of a site."""
        return {
            "q_proj": self.q_width,
            "k_proj": self.kv_width,
            "v_proj": self.kv_width,
            "o_proj": self.width,
            "gate_proj": self.hidden_width,
            "up_proj": self.hidden_width,
            "down_proj": self.width,
        }[site]

    def site_axis(self, site: str) -> str:
        """The name of the output axis of a site; sharding.py maps names to mesh axes."""
        return {
            "q_proj": "heads",
            "k_proj": "kv_heads",
            "v_proj": "kv_heads",
            "o_proj": "width",
            "down_proj": "width",
        }.get(site, "hidden")

    def site_input_width(self, site: str) -> int:
        """The width of the input of a site."""
        return {"o_proj": self.q_width, "down_proj": self.hidden_width}.get(site, self.width)

    def site_input_axis(self, site: str) -> str:
        """The name of the input axis of a site."""
        return {"o_proj": "heads", "down_proj": "hidden"}.get(site, "width")
