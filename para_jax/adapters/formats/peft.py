"""An adapter folder in the format of Hugging Face PEFT: adapter_config.json, refused where it asks for more than we
compute, and the names of linears. Each method has its own tensors (lora.py, ia3.py).

The linears differ from sites where a model has its own, which may hold several sites, as in Phi-3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ...backbone.text_part import has_image_part
from ...config import FEEDFORWARD_NAMES, FUSED, OWN_LINEARS, SITES
from ...io.checks import shorten
from ...io.hub import name_and_revision
from ...io.untrusted import safe_names
from ..adapter import Backbone
from .own import PREFIX

FEEDFORWARDS = "|".join(["mlp", *FEEDFORWARD_NAMES.values()])
NAME = re.compile(re.escape(PREFIX) + rf"(\d{{1,6}})\.(?:self_attn|{FEEDFORWARDS})\.(\w+)\.[\w.]+")
#: Keys that make no difference once an adapter is trained. Every key but these and a method's own must be neutral. The
#: tensors tell which linears were trained: PEFT, too, ignores names of linears that a model lacks.
WITHOUT_EFFECT = (
    "peft_type task_type peft_version base_model_name_or_path revision inference_mode auto_mapping lora_dropout "
    "init_lora_weights init_ia3_weights eva_config megatron_core qalora_group_size target_modules exclude_modules "
    "feedforward_modules"
).split()
#: The ways to initialise LoRA that keep the backbone's weights; with the others it is trained against changed ones.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def peft_config(peft_type: str, config: Any, backbone: Backbone, base_model: str) -> dict:
    """The keys of every method. PEFT fills in its defaults for those that are missing."""
    linears = names_of(backbone.model_type, config.target_modules)
    pattern = rf".*\.language_model\..*\.({'|'.join(linears)})"  # the image part has linears of these names too
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        **peft_base(base_model),
        "inference_mode": True,
        "target_modules": pattern if has_image_part(backbone.model_type) else linears,
        "modules_to_save": None,
        "fan_in_fan_out": False,
    }


def peft_base(base_model: str) -> dict:
    """The keys that name the base model. A revision has a key of its own."""
    name, revision = name_and_revision(base_model)
    return {"base_model_name_or_path": name or None} | ({"revision": revision} if revision else {})


def require_supported(found: dict, own_keys: tuple[str, ...]) -> None:
    """Raises ValueError, naming the keys, for values that ask for something we do not compute.

    An unknown key passes with a neutral value, so that folders of a newer PEFT load.

    Args:
        own_keys: the method's keys that we read.
    """
    known = (*own_keys, *WITHOUT_EFFECT)
    wrong = {key: value for key, value in found.items() if key not in known and not neutral(value)}
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        wrong["task_type"] = found["task_type"]
    if found.get("init_lora_weights") not in INITS:
        wrong["init_lora_weights"] = found["init_lora_weights"]
    if wrong:
        raise ValueError(
            "not supported: " + safe_names([f"{key} {shorten(value, 40)}" for key, value in wrong.items()])
        )


def neutral(value: object) -> bool:
    """Whether a value asks for nothing. 0 may be an index, so it is not neutral."""
    return value is None or value is False or value in ("none", "", {}, [])


def trained_sites(shapes: Iterable[str]) -> tuple[str, ...]:
    """The sites of the linears that the file has tensors of."""
    return sites_of(dict.fromkeys(linear for _, linear, _ in peft_tensors(shapes)))


def peft_tensors(shapes: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """(name, linear, layer) of the tensors with names in PEFT's form."""
    for name in shapes:
        match = NAME.fullmatch(name)
        if match:
            yield name, match[2], int(match[1])


# --------------------------------------------------------------------------------------------------------- the linears


def linears_of(model_type: str, sites: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The linears of a layer that hold these sites, as the model names them, each with all the sites it holds."""
    own = {site: (name, parts) for name, parts in OWN_LINEARS.get(model_type, {}).items() for site in parts}
    held = [own.get(site, (site, (site,))) for site in SITES if site in sites]
    attention, feedforward = SITES[:4], FEEDFORWARD_NAMES.get(model_type, "mlp")
    return {f"{'self_attn' if parts[0] in attention else feedforward}.{name}": parts for name, parts in held}


def names_of(model_type: str, sites: tuple[str, ...]) -> list[str]:
    """The names of the linears that hold these sites, without their layer's."""
    return [name.partition(".")[2] for name in linears_of(model_type, sites)]


def sites_of(linears: Iterable[str]) -> tuple[str, ...]:
    """The sites that these linears hold."""
    return tuple(site for name in linears for site in FUSED.get(name, (name,)))


def used_sites(linears: dict[str, tuple[str, ...]], unused: set[str]) -> tuple[str, ...]:
    """The sites of the linears, without the unused ones that share a linear with a used one."""
    used = [[site for site in parts if site not in unused] or parts for parts in linears.values()]
    return tuple(site for parts in used for site in parts)
