"""The configs of the adapter methods: PARA, LoRA and (IA)^3."""

import typing
from dataclasses import dataclass

from .check import one_of, require
from .model import SITES


@dataclass(frozen=True, kw_only=True)
class ParaConfig:
    """PARA (arXiv:2502.01033). r = 12 is the only rank that gives the paper's 8.9M parameters on LLaMA-2 7B
    [derived]."""

    r: int = 12
    pooler: str = "last"
    """last | mean | max | constant (a learned vector a layer instead of the prompt's state: the control that shows what
    reading the prompt is worth) [our choice: all four]"""
    summary: str = "raw"
    """raw | rms | standardised [our choice: all three]"""
    activation: str = "gelu"
    """gelu (erf) | gelu_tanh | silu | relu | identity | rational"""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    layers_to_transform: tuple[int, ...] | None = None
    """the layers that have a generator, counted from 0; None: all [our choice]"""

    POOLERS: typing.ClassVar = ("last", "mean", "max", "constant")
    SUMMARIES: typing.ClassVar = ("raw", "rms", "standardised")
    ACTIVATIONS: typing.ClassVar = ("gelu", "gelu_tanh", "silu", "relu", "identity", "rational")

    def __post_init__(self):
        require(isinstance(self.r, int) and self.r >= 1, "r", self.r, "a whole number of at least 1")
        require(self.pooler in self.POOLERS, "pooler", self.pooler, one_of(self.POOLERS))
        require(self.summary in self.SUMMARIES, "summary", self.summary, one_of(self.SUMMARIES))
        require(self.activation in self.ACTIVATIONS, "activation", self.activation, one_of(self.ACTIVATIONS))
        require_sites(self)
        if self.layers_to_transform is not None:
            require_layers(self)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685), with the names and defaults of Hugging Face PEFT."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) (arXiv:2312.03732) instead of lora_alpha / r"""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        require(isinstance(self.r, int) and self.r >= 1, "r", self.r, "a whole number of at least 1")
        require(0 < self.lora_alpha < float("inf"), "lora_alpha", self.lora_alpha, "a number above 0")
        require_sites(self)

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """(IA)^3 (arXiv:2205.05638), with the names and defaults of Hugging Face PEFT."""

    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward_modules: tuple[str, ...] = ("down_proj",)
    """the targets whose input is scaled, not their output: down_proj, where it is a target, or none"""

    def __post_init__(self):
        require_sites(self)
        scaled = tuple(self.feedforward_modules)
        require(set(scaled) <= {"down_proj"}, "feedforward_modules", scaled, "down_proj or none")
        object.__setattr__(self, "feedforward_modules", tuple(s for s in scaled if s in self.target_modules))


def require_sites(config) -> None:
    """Checks `target_modules` and puts it into the order of SITES."""
    sites = tuple(config.target_modules)
    require(
        bool(sites) and set(sites) <= set(SITES), "target_modules", sites, "a non-empty part of " + ", ".join(SITES)
    )
    object.__setattr__(config, "target_modules", tuple(site for site in SITES if site in sites))


def require_layers(config) -> None:
    """Checks `layers_to_transform` and makes it a tuple."""
    given = config.layers_to_transform
    layers = tuple(given) if isinstance(given, (tuple, list, range)) else ()
    rise = all(type(i) is int and i >= 0 for i in layers) and layers == tuple(sorted(set(layers)))
    expected = "None (all layers), or whole numbers of at least 0 that rise, such as (20, 21, 22)"
    require(bool(layers) and rise, "layers_to_transform", given, expected)
    object.__setattr__(config, "layers_to_transform", layers)


#: The adapter methods and their configs. A new method is one line here and one file in adapters/.
ADAPTER_CONFIGS = {"para": ParaConfig, "lora": LoraConfig, "ia3": Ia3Config}
