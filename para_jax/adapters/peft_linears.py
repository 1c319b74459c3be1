"""The linears of a model as Hugging Face PEFT names them, and the sites that each holds.

They differ from sites where a model has its own linears, which may hold several sites, as in Phi-3.
"""

from __future__ import annotations

from ..config import FEEDFORWARD_NAMES, FUSED, OWN_LINEARS, SITES


def linears_of(model_type: str, sites: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The linears of a layer that hold these sites, as the model names them, each with all the sites it holds."""
    own = {site: (name, parts) for name, parts in OWN_LINEARS.get(model_type, {}).items() for site in parts}
    held = [own.get(site, (site, (site,))) for site in SITES if site in sites]
    attention, feedforward = SITES[:4], FEEDFORWARD_NAMES.get(model_type, "mlp")
    return {f"{'self_attn' if parts[0] in attention else feedforward}.{name}": parts for name, parts in held}


def names_of(model_type: str, sites: tuple[str, ...]) -> list[str]:
    """The names of the linears that hold these sites, without their layer's."""
    return [name.partition(".")[2] for name in linears_of(model_type, sites)]


def sites_of(linears: tuple[str, ...]) -> tuple[str, ...]:
    """The sites that these linears hold."""
    return tuple(site for name in linears for site in FUSED.get(name, (name,)))


def used_sites(linears: dict[str, tuple[str, ...]], unused: set[str]) -> tuple[str, ...]:
    """The sites of the linears, without the unused ones that share a linear with a used one."""
    used = [[site for site in parts if site not in unused] or parts for parts in linears.values()]
    return tuple(site for parts in used for site in parts)
