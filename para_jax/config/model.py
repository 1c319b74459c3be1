"""The shape of a backbone: `ModelConfig`, and the layers whose output an adapter may change (SITES)."""

from dataclasses import dataclass

#: The linear layers whose output an adapter may change, named as Hugging Face names them, always in this order.
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: Linears of Phi-3 that hold several sites, in the order of their rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """One rotary embedding (arXiv:2104.09864, rotate-half form): how fast each of the first `dims` of a head turns."""

    dims: int
    theta: float = 10000.0
    scaling: str = "none"
    """none | linear (all frequencies / factor) | llama3 (only the low ones)"""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ from layer to layer: the rotary embedding, and the window in tokens (None: full attention)."""

    rotary: RotaryConfig
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer. The families of backbone/families.py differ only by these values."""

    model_type: str
    vocab_size: int
    width: int
    hidden_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]
    """one a layer"""
    max_positions: int = 4096
    activation: str = "silu"
    """silu | gelu (erf) | gelu_tanh | relu"""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """norms multiply by (norm_offset + weight); 1 in the Gemma families"""
    pre_norm: bool = True
    post_norm: bool = False
    """norms on the outputs of attention and feed-forward, before they join the residual stream"""
    qk_norm: str = "none"
    """none | head (over each head) | projection (over all heads at once)"""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    """query times key times this"""
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
        """The width of a site's output."""
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
        """The name of the axis of a site's output, for sharding.py."""
        return {
            "q_proj": "heads",
            "k_proj": "kv_heads",
            "v_proj": "kv_heads",
            "o_proj": "width",
            "down_proj": "width",
        }.get(site, "hidden")

    def site_input_width(self, site: str) -> int:
        """The width of a site's input."""
        return {"o_proj": self.q_width, "down_proj": self.hidden_width}.get(site, self.width)

    def site_input_axis(self, site: str) -> str:
        """The name of the axis of a site's input."""
        return {"o_proj": "heads", "down_proj": "hidden"}.get(site, "width")
