"""The linears of a model as Hugging Face PEFT names them, and the sites that each holds.

They differ from sites in phi3 only, where one linear holds several sites.
"""

from __future__ import annotations

from ..config import FUSED, SITES


def linears_of(model_type: str, sites: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The linears of a layer that hold these sites, as the model names them, each with all the sites it holds."""
    fused = {site: (name, parts) for name, parts in FUSED.items() for site in parts} if model_type == "phi3" else {}
    held = [fused.get(site, (site, (site,))) for site in SITES if site in sites]
    attention = SITES[:4]
    return {f"{'self_attn' if parts[0] in attention else 'mlp'}.{name}": parts for name, parts in held}


def used_sites(linears: dict[str, tuple[str, ...]], unused: set[str]) -> tuple[str, ...]:
    """The sites of the linears, without the unused ones that share a linear with a used one."""
    used = [[site for site in parts if site not in unused] or parts for parts in linears.values()]
    return tuple(site for parts in used for site in parts)
