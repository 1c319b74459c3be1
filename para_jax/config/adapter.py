"""The configs of the adapter methods: PARA, LoRA and (IA)^3. Each has the learning rate that its method is trained with
unless `train.learning_rate` is set."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from ..io.checks import require
from .bounds import Bounds, PositiveFloat, check_fields
from .model import SITES

#: An adapter of a hub may name any rank, and the arrays follow from it.
Rank = Annotated[int, Bounds(at_least=1, at_most=2**16)]
#: Marks a field that adapter folders leave out where it has its default.
OPTIONAL = {"optional": True}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the configs of all methods have."""

    default_learning_rate: ClassVar[float] = 1e-3
    scope: Literal["all", "prompt", "response"] = field(default="all", metadata=OPTIONAL)
    """the positions where the adapter acts [our choice]. all: every one. response: the last `scope_window` prompt
    tokens and the completion; the tokens before them run through the plain backbone, so every tenant can share them.
    prompt: the prompt alone, so decoding carries nothing"""
    scope_window: Annotated[int, Bounds(at_least=1, at_most=2**20)] = field(default=1, metadata=OPTIONAL)
    """how many of the prompt's last tokens are adapted with scope=response. PARA takes 1: it makes the factors"""

    def __post_init__(self):
        check_fields(self)
        fits = self.scope == "response" or self.scope_window == 1
        require(fits, "scope_window", self.scope_window, f"1 with scope {self.scope}; only response has a window")


@dataclass(frozen=True, kw_only=True)
class ParaConfig(AdapterConfig):
    """PARA (arXiv:2502.01033). r = 12 is the only rank that gives the paper's 8.9M parameters on LLaMA-2 7B
    [derived]."""

    default_learning_rate: ClassVar[float] = 1e-3
    r: Rank = 12
    """the generator's rank"""
    pooler: Literal["last", "mean", "constant"] = "last"
    """constant learns one vector per layer instead of reading the prompt: the control that shows what reading the
    prompt is worth [our choice: all three]"""
    summary: Literal["raw", "rms"] = "raw"
    """how the pooled state is normalised [our choice: both]"""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "identity"] = "gelu"
    """gelu is the exact form, with erf"""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    """the linear layers whose outputs are scaled"""
    layers_to_transform: tuple[int, ...] | None = None
    """the layers that have a generator, counted from 0; None: all layers [our choice]"""
    up_bias: bool = field(default=False, metadata=OPTIONAL)
    """W_up has a bias: a learned constant next to what the prompt makes. It starts from zero [our choice]"""
    late_r: Rank | None = field(default=None, metadata=OPTIONAL)
    """the rank in the last third of the layers, where prompts differ most; None: r in all layers [our choice]"""

    def __post_init__(self):
        object.__setattr__(self, "target_modules", sites_in_order(self.target_modules))
        super().__post_init__()
        if self.scope == "response" and (self.pooler not in ("last", "constant") or self.scope_window != 1):
            raise ValueError(
                f"scope response reads the last prompt token alone: pooler ({self.pooler}) must be last or constant, "
                f"and scope_window ({self.scope_window}) must be 1 for PARA"
            )
        if (layers := self.layers_to_transform) is not None:
            rise = bool(layers) and layers[0] >= 0 and layers == tuple(sorted(set(layers)))
            expected = "None (all layers) or rising whole numbers of at least 0, such as (20, 21, 22)"
            require(rise, "layers_to_transform", layers, expected)

    @property
    def array_r(self) -> int:
        """The rank of the arrays in memory: the largest of the layers."""
        return max(self.r, self.late_r or 0)

    def rank_of(self, layer: int, num_layers: int) -> int:
        """The rank of a layer of a backbone, counted from 0."""
        return self.late_r if self.late_r and layer >= num_layers - late_layers(num_layers) else self.r

    def total_rank(self, num_layers: int) -> int:
        """The sum of the ranks of the layers that have a generator. A file may name any number of layers, so they are
        not counted one by one."""
        if self.layers_to_transform is not None:
            return sum(self.rank_of(layer, num_layers) for layer in self.layers_to_transform)
        late = late_layers(num_layers)
        return (num_layers - late) * self.r + late * (self.late_r or self.r)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA (arXiv:2106.09685), with the names and defaults of Hugging Face PEFT."""

    default_learning_rate: ClassVar[float] = 3e-3
    r: Rank = 8
    """the rank of each pair of matrices"""
    lora_alpha: PositiveFloat = 8
    """what is added is scaled by lora_alpha / r"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) (arXiv:2312.03732) instead of lora_alpha / r"""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """the linear layers that get a pair"""
    alora_invocation_tokens: tuple[Annotated[int, Bounds(at_least=0)], ...] | None = field(
        default=None, metadata=OPTIONAL
    )
    """for scope=response: the token ids that every prompt ends with, scope_window of them. The adapter is then PEFT's
    activated LoRA (arXiv:2504.12397), and other prompts are refused"""

    def __post_init__(self):
        object.__setattr__(self, "target_modules", sites_in_order(self.target_modules))
        super().__post_init__()
        if (tokens := self.alora_invocation_tokens) is not None:
            fits = self.scope == "response" and self.scope_window == len(tokens)
            expected = "None, or a list of scope_window token ids with scope response"
            require(fits, "alora_invocation_tokens", tokens, expected)

    @property
    def scale(self) -> float:
        """The factor on the product of the two matrices."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class Ia3Config(AdapterConfig):
    """(IA)^3 (arXiv:2205.05638), with the names and defaults of Hugging Face PEFT."""

    default_learning_rate: ClassVar[float] = 3e-2
    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """the linear layers that are scaled"""
    feedforward_modules: tuple[str, ...] = ("down_proj",)
    """target modules whose input is scaled instead of their output; only down_proj can be one"""

    def __post_init__(self):
        object.__setattr__(self, "target_modules", sites_in_order(self.target_modules))
        scaled = listed(self.feedforward_modules)
        fits = scaled is not None and all(site == "down_proj" for site in scaled)
        require(fits, "feedforward_modules", scaled or self.feedforward_modules, "[down_proj] or empty")
        object.__setattr__(self, "feedforward_modules", tuple(s for s in scaled or () if s in self.target_modules))
        super().__post_init__()


def late_layers(num_layers: int) -> int:
    """How many layers are the last third."""
    return max(1, num_layers // 3)


def with_scope_of(config: AdapterConfig, kind: Any) -> Any:
    """The defaults of another config class, with the scope and window of this config."""
    return kind(scope=config.scope, scope_window=config.scope_window)


def given_fields(config: Any) -> dict[str, Any]:
    """The fields of a config without those that are marked OPTIONAL and have their default."""
    held = {one.name: (one, getattr(config, one.name)) for one in fields(config)}
    return {k: value for k, (one, value) in held.items() if not one.metadata.get("optional") or value != one.default}


def sites_in_order(target_modules: Any) -> tuple[str, ...]:
    """The target modules in the order of SITES. Raises ValueError for none, and for one that is no site."""
    sites = listed(target_modules) or ()
    known = bool(sites) and all(site in SITES for site in sites)
    require(known, "target_modules", sites or target_modules, f"a list of one or more of {', '.join(SITES)}")
    return tuple(site for site in SITES if site in sites)


def listed(names: Any) -> tuple | None:
    """The items of a list, a set or the like. None for a text, which is no list of its letters, and anything else."""
    return None if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)


#: The configs of the adapter methods by name. adapters/methods.py has the methods themselves, which need JAX.
ADAPTER_CONFIGS: dict[str, Any] = {
    "para": ParaConfig,
    "lora": LoraConfig,
    "ia3": Ia3Config,
}
