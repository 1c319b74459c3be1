"""What PEFT's adapter_config.json asks for: LoRA's and (IA)^3's config, or a refusal of what we do not compute.

PEFT names a model's linears; ours are sites. They differ in phi3 alone, where one linear holds several sites.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ..config import FUSED, SITES, Ia3Config, LoraConfig, one_of, shorten
from ..untrusted import some
from .para_format import checked_rank

PREFIX = "base_model.model.model.layers."
NAME = re.compile(re.escape(PREFIX) + r"(\d{1,6})\.(?:self_attn|mlp)\.(\w+)\.(lora_A\.weight|lora_B\.weight|ia3_l)")
#: As much of the end of a linear's name as a target may give.
SUFFIX = re.compile(
    r"((((base_model\.model\.)?model\.)?layers\.)?\d{1,6}\.)?"
    r"((self_attn\.)?(?P<attention>[qkvo]_proj|qkv_proj)|(mlp\.)?(?P<mlp>(gate|up|down|gate_up)_proj))"
)

#: Keys that we read, and keys that change nothing once an adapter is trained. Every other key must be neutral.
USED = {
    "LORA": ("r", "lora_alpha", "use_rslora", "target_modules"),
    "IA3": ("target_modules", "feedforward_modules"),
}
WITHOUT_EFFECT = (
    "peft_type task_type peft_version base_model_name_or_path revision inference_mode auto_mapping lora_dropout "
    "init_lora_weights init_ia3_weights eva_config megatron_core qalora_group_size"
).split()
#: The ways to initialise LoRA that leave the backbone's weights as they are; the others train against changed ones.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_peft_config(found: dict, shapes: dict[str, tuple[int, ...]]) -> LoraConfig | Ia3Config:
    """The config in adapter_config.json. What we do not compute is refused by its key.

    Args:
        shapes: those of the folder's tensors. They say which linears are meant where target_modules is a pattern, which
            is not evaluated.
    """
    kind = found["peft_type"]
    require_supported(found, kind)
    linears = dict.fromkeys(linear for _, linear, _ in named(shapes))
    targets = listed("target_modules", found.get("target_modules"), linears)
    sites = tuple(site for name in targets for site in FUSED.get(name, (name,)))
    if kind == "IA3":
        by_shape = dict.fromkeys(linear for name, linear, _ in named(shapes) if shapes[name][:1] == (1,))
        inputs = listed("feedforward_modules", found.get("feedforward_modules"), by_shape)
        return Ia3Config(target_modules=sites, feedforward_modules=inputs)
    return LoraConfig(
        r=checked_rank(found.get("r")),
        lora_alpha=number("lora_alpha", found.get("lora_alpha")),
        use_rslora=truth("use_rslora", found.get("use_rslora", False)),
        target_modules=sites,
    )


def require_supported(found: dict, kind: str) -> None:
    """Raises ValueError naming the keys whose values ask for what we do not compute. A key that we do not know passes
    with a neutral value, so that folders of a newer PEFT load."""
    known = (*USED[kind], *WITHOUT_EFFECT)
    wrong = {key: value for key, value in found.items() if key not in known and not neutral(value)}
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        wrong["task_type"] = found["task_type"]
    if found.get("init_lora_weights") not in INITS:
        wrong["init_lora_weights"] = found["init_lora_weights"]
    if wrong:
        raise ValueError("not supported: " + some([f"{key} {shorten(value, 40)}" for key, value in wrong.items()]))


def neutral(value: object) -> bool:
    """Whether a value says that nothing is asked for. 0 does not: it may be an index."""
    return value is None or value is False or value in ("none", "", {}, [])


def listed(key: str, names: object, otherwise: dict[str, None]) -> tuple[str, ...]:
    """The linears that a list of names or dotted suffixes means; `otherwise` for a pattern or null."""
    if names is None or isinstance(names, str):
        names = list(otherwise)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}: {shorten(names)}; expected a list of names, or a pattern")
    matches = {name: SUFFIX.fullmatch(name) for name in names}
    other = [name for name, match in matches.items() if match is None]
    if other:
        raise ValueError(f"{key}: {some(other)} is not supported; expected {one_of((*SITES, *FUSED))}")
    return tuple(match["attention"] or match["mlp"] for match in matches.values() if match)


def number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-9 <= value <= 1e9:
        raise ValueError(f"{key}: {shorten(value)}; expected a number above 0, from 1e-9 to 1e9")
    return float(value)


def truth(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key}: {shorten(value)}; expected true or false")
    return value


# --------------------------------------------------------------------------------------------------------------- sizes


def peft_values(config: LoraConfig | Ia3Config, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """How many values a tenant holds, and how many decode carries a row, from the tensors' names and shapes. Sites that
    share a linear count as having an A of its full rank each: at most so many, for loading may find a smaller rank."""
    held = shared = 0
    for name, linear, _ in named(shapes):
        of_a = len(FUSED.get(linear, (linear,))) if name.endswith("lora_A.weight") else 1
        held += of_a * math.prod(shapes[name])
        if (
            isinstance(config, Ia3Config)
            and linear in config.feedforward_modules
            and "up_proj" in config.target_modules
        ):
            shared += math.prod(shapes[name])  # carried on up_proj's output, in one vector with its own
    return held, held - shared


def named(shapes) -> Iterator[tuple[str, str, int]]:
    """(name, linear, layer) of the tensors whose names are PEFT's."""
    for name in shapes:
        match = NAME.fullmatch(name)
        if match:
            yield name, match[2], int(match[1])
