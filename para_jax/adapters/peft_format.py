"""LoRA's and (IA)^3's layout of the two files of an adapter folder, that of Hugging Face PEFT: written and read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ..config import FUSED, SITES, Ia3Config, LoraConfig, ModelConfig
from .adapter import init, with_leaves
from .folder import read_tensors
from .ia3 import Ia3
from .lora import Lora
from .peft_config import PREFIX

# ------------------------------------------------------------------------------------------------------------- writing


def peft_json(adapter: Lora | Ia3, base_model: str) -> dict:
    """adapter_config.json, with what PEFT needs; it fills in its defaults for the rest."""
    config, linears = adapter.config, linears_of(adapter.backbone.model_type, adapter.config.target_modules)
    found = {
        "peft_type": "LORA" if isinstance(adapter, Lora) else "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "target_modules": [name.partition(".")[2] for name in linears],
        "modules_to_save": None,
        "fan_in_fan_out": False,
    }
    if isinstance(adapter, Ia3):
        return found | {"feedforward_modules": list(config.feedforward_modules), "init_ia3_weights": True}
    at_rank = with_rank(config, config.r * blocks_of(linears))
    alpha = at_rank.lora_alpha
    return found | {
        "r": at_rank.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def peft_tensors(adapter: Lora | Ia3) -> dict[str, np.ndarray]:
    """The tensors by name, in PyTorch's orientation."""
    widths = dict(adapter.backbone.site_widths)
    linears = linears_of(adapter.backbone.model_type, adapter.config.target_modules)
    if isinstance(adapter, Ia3):
        stacked = {f"{name}.ia3_l": ia3_stack(adapter, parts, widths) for name, parts in linears.items()}
    else:
        rank = adapter.config.r * blocks_of(linears)
        stacked = {}
        for name, parts in linears.items():
            pair = lora_stacks(adapter, parts, widths, rank)
            stacked |= {f"{name}.lora_{half}.weight": stack for half, stack in zip("AB", pair, strict=True)}
    layers = range(adapter.backbone.num_layers)
    return {f"{PREFIX}{i}.{name}": stack[i] for i in layers for name, stack in stacked.items()}


def lora_stacks(adapter: Lora, parts, widths, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [layers, rank, in] and B [layers, out, rank] of one linear. Sites that share a linear have rows of A of their
    own, and B is zero but for their blocks; what is left of the rank is zero."""
    held = [site for site in parts if site in adapter.a]
    layers, width, r = adapter.a[held[0]].shape
    a = np.zeros((layers, rank, width), np.float32)
    b = np.zeros((layers, sum(widths[site] for site in parts), rank), np.float32)
    for site, rows, columns in blocks(parts, widths, r):
        if site in held:
            a[:, columns] = np.swapaxes(np.asarray(adapter.a[site][...]), 1, 2)
            b[:, rows, columns] = np.swapaxes(np.asarray(adapter.b[site][...]), 1, 2)
    return a, b


def ia3_stack(adapter: Ia3, parts, widths) -> np.ndarray:
    """The vectors of one linear, [layers, out, 1], or [layers, 1, in] where they scale its input."""
    if parts[0] in adapter.config.feedforward_modules:
        return np.asarray(adapter.scale[parts[0]][...])[:, None]
    ones = {site: np.ones((adapter.backbone.num_layers, widths[site]), np.float32) for site in parts}
    vectors = ones | {site: np.asarray(adapter.scale[site][...]) for site in parts if site in adapter.scale}
    return np.concatenate([vectors[site] for site in parts], axis=1)[:, :, None]


# ------------------------------------------------------------------------------------------------------------- reading


def load_peft(folder: Path, config: LoraConfig | Ia3Config, model: ModelConfig) -> Lora | Ia3:
    """The adapter of a folder whose config is checked."""
    linears = linears_of(model.model_type, config.target_modules)
    widths = {site: model.site_width(site) for site in SITES}
    shapes = expected_shapes(config, linears, model)
    tensors = read_tensors(folder, {f"{PREFIX}{i}.{n}": s for i in range(model.num_layers) for n, s in shapes.items()})
    stacked = {name: np.stack([tensors[f"{PREFIX}{i}.{name}"] for i in range(model.num_layers)]) for name in shapes}
    if isinstance(config, Ia3Config):
        config, leaves = ia3_leaves(config, linears, widths, stacked)
        adapter = jax.eval_shape(lambda: init(Ia3, config, model, 0))
    else:
        config, leaves = lora_leaves(config, linears, widths, stacked)
        adapter = jax.eval_shape(lambda: init(Lora, config, model, 0))
    return with_leaves(adapter, {name: jnp.array(leaf) for name, leaf in leaves.items()})


def expected_shapes(config, linears, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's tensors."""
    shapes = {}
    for name, parts in linears.items():
        width_in, width_out = model.site_input_width(parts[0]), sum(map(model.site_width, parts))
        if isinstance(config, LoraConfig):
            shapes[f"{name}.lora_A.weight"] = (config.r, width_in)
            shapes[f"{name}.lora_B.weight"] = (width_out, config.r)
        else:
            shapes[f"{name}.ia3_l"] = (1, width_in) if parts[0] in config.feedforward_modules else (width_out, 1)
    return shapes


def lora_leaves(config: LoraConfig, linears, widths, stacked) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The adapter's arrays. Sites that share a linear share its A, unless all linears are as `lora_stacks` makes them:
    then each takes its block back, and the rank is the smaller one again."""
    pairs = {name: (stacked[f"{name}.lora_A.weight"], stacked[f"{name}.lora_B.weight"]) for name in linears}
    r = config.r // blocks_of(linears)
    in_blocks = config.r % blocks_of(linears) == 0 and all(
        only_blocks(*pairs[name], blocks(parts, widths, r)) for name, parts in linears.items()
    )
    if in_blocks and r < config.r:
        config = with_rank(config, r)
        config = replace(config, lora_alpha=float(f"{config.lora_alpha:.14g}"))  # there and back is the same
    found = {}
    for name, parts in linears.items():
        a, b = pairs[name]
        for site, rows, columns in blocks(parts, widths, r):
            columns = columns if in_blocks else slice(None)
            found[site] = a[:, columns].swapaxes(1, 2), b[:, rows, columns].swapaxes(1, 2)
    unused = {site for site, pair in found.items() if not any(matrix.any() for matrix in pair)}
    kept = used_sites(linears, unused)
    leaves = {f"a.{site}": found[site][0] for site in kept} | {f"b.{site}": found[site][1] for site in kept}
    return replace(config, target_modules=kept), leaves


def only_blocks(a: np.ndarray, b: np.ndarray, cut: list) -> bool:
    """Whether B is zero outside these blocks, and A in the rows that belong to none."""
    outside = b.copy()
    for _, rows, columns in cut:
        outside[:, rows, columns] = 0
    return not outside.any() and not a[:, cut[-1][2].stop :].any()


def ia3_leaves(config: Ia3Config, linears, widths, stacked) -> tuple[Ia3Config, dict[str, np.ndarray]]:
    found = {}
    for name, parts in linears.items():
        vectors = stacked[f"{name}.ia3_l"].reshape(len(stacked[f"{name}.ia3_l"]), -1)
        cuts = np.cumsum([widths[site] for site in parts])[:-1]
        found |= dict(zip(parts, np.split(vectors, cuts, axis=1), strict=True))
    kept = used_sites(linears, {site for site, vectors in found.items() if (vectors == 1).all()})
    return replace(config, target_modules=kept), {f"scale.{site}": found[site] for site in kept}


def used_sites(linears, unused: set[str]) -> tuple[str, ...]:
    """The sites of the linears without those that share one with another that is used and change nothing."""
    used = [[site for site in parts if site not in unused] or parts for parts in linears.values()]
    return tuple(site for parts in used for site in parts)


# ------------------------------------------------------------------------------------------------ linears and sites


def linears_of(model_type: str, sites: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The linears of a layer that hold these sites, as the model names them, each with all the sites it holds."""
    fused = {site: (name, parts) for name, parts in FUSED.items() for site in parts} if model_type == "phi3" else {}
    named = [fused.get(site, (site, (site,))) for site in SITES if site in sites]
    attention = SITES[:4]
    return {f"{'self_attn' if parts[0] in attention else 'mlp'}.{name}": parts for name, parts in named}


def blocks(parts: tuple[str, ...], widths: dict[str, int], r: int) -> list[tuple[str, slice, slice]]:
    """Where the sites of one linear stand in its B: (site, rows, columns) each, r columns a site."""
    ends = np.cumsum([0, *(widths[site] for site in parts)]).tolist()
    return [(site, slice(ends[j], ends[j + 1]), slice(j * r, (j + 1) * r)) for j, site in enumerate(parts)]


def blocks_of(linears: dict[str, tuple[str, ...]]) -> int:
    """The most sites that one linear holds: by so much the rank in the file, one for all, exceeds a site's."""
    return max(map(len, linears.values()))


def with_rank(config: LoraConfig, r: int) -> LoraConfig:
    """The config at another rank, with the scale it has."""
    if r == config.r:
        return config
    return replace(config, r=r, lora_alpha=config.scale * (r**0.5 if config.use_rslora else r))
