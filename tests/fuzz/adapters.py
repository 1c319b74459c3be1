"""Adapter folders of each method, and a bank that is given one next to a good tenant."""

import json
import random
from functools import cache, partial
from pathlib import Path

import numpy as np
from golden_models import backbone, prompts, strong

from para_jax import AdapterBank, Ia3Config, LoraConfig, ParaConfig, forward, init_adapter, load_adapter, save_adapter
from para_jax.adapters.adapter import named_leaves
from para_jax.config import SITES

from . import mutate, tensors
from .cases import Trial, Wrong, shared_folder

CONFIG, WEIGHTS, LAYER = "adapter_config.json", "adapter_model.safetensors", "base_model.model.model.layers."
#: Keys that ask for something para_jax does not compute, unless their value is neutral.
UNCOMPUTED = (
    "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "bias", "use_dora",
    "fan_in_fan_out", "layer_replication", "trainable_token_indices", "exclude_modules", "lora_bias",
)  # fmt: skip
EXTRAS = {
    "para_constant": "constant",
    "para_summary_mean": "mean",
    "para_summary_scale": "scale",
    "para_numerator": "numerator",
    "para_denominator": "denominator",
}
VARIANTS = {
    "para": (
        ParaConfig(r=4),
        ParaConfig(r=3, pooler="constant", target_modules=("v_proj",)),
        ParaConfig(r=2, summary="standardised", activation="rational", layers_to_transform=(1, 2)),
        ParaConfig(r=2, scope="response", up_bias=True),
        ParaConfig(r=2, late_r=3),
    ),
    "lora": (
        LoraConfig(r=4),
        LoraConfig(r=2, lora_alpha=3.5, use_rslora=True, target_modules=("up_proj", "q_proj")),
        LoraConfig(r=2, scope="prompt"),
        LoraConfig(r=2, scope="response", scope_window=2, alora_invocation_tokens=(7, 9)),
    ),
    "ia3": (
        Ia3Config(),
        Ia3Config(target_modules=("q_proj", "v_proj"), feedforward_modules=()),
        Ia3Config(scope="response", scope_window=2),
    ),
}


@cache
def good(method: str, variant: int) -> Path:
    folder = shared_folder() / f"{method}-{variant}"
    save_adapter(strong(init_adapter(VARIANTS[method][variant], backbone("llama").config), variant), folder)
    return folder


def damaged(draw: random.Random, folder: Path, method: str) -> Path:
    """A copy of a good adapter folder, with one of its files changed."""
    made = mutate.copied(good(method, draw.randrange(len(VARIANTS[method]))), folder / "adapter")
    change = draw.random()
    if change < 0.45:
        found = json.loads((made / CONFIG).read_text())
        (made / CONFIG).write_bytes(mutate.json_text(draw, found, UNCOMPUTED))
    elif change < 0.9:
        tensors.mutated(draw, made / WEIGHTS)
    else:
        mutate.file(draw, made / draw.choice((CONFIG, WEIGHTS)))
        if draw.random() < 0.3:
            (made / draw.choice(("adapter_model.bin", "weights.pt"))).write_bytes(b"\x80\x04.")
    return made


def adapter(method: str, draw: random.Random, folder: Path) -> Trial:
    """load_adapter gives what the two files say, or an error that names a file."""
    made = damaged(draw, folder, method)
    model = backbone("llama").config
    return Trial(lambda: load_adapter(made, model), (str(made), CONFIG, WEIGHTS), partial(check_adapter, made))


def check_adapter(folder: Path, loaded) -> None:
    said = json.loads((folder / CONFIG).read_bytes())
    try:
        stored = tensors.read(folder / WEIGHTS)
    except tensors.Malformed as error:
        raise Wrong(f"accepted weights that the format does not allow: {error}") from None
    asked = {key: said[key] for key in UNCOMPUTED if said.get(key) not in (None, False, "none", "", {}, [])}
    if said["peft_type"] == "PARA":
        asked.pop("layers_to_transform", None)
    if asked:
        raise Wrong(f"accepted {asked}")
    of_type = {"PARA": para_leaves, "LORA": lora_leaves, "IA3": ia3_leaves}
    expected = of_type.get(said["peft_type"], own_leaves)(said, stored)
    found = named_leaves(loaded)
    if set(found) != set(expected):
        raise Wrong(f"arrays {sorted(found)}, expected {sorted(expected)}")
    for name, array in expected.items():
        if not np.array_equal(found[name], array.astype(np.float32)):
            raise Wrong(f"{name} differs from the file")
    tokens = said.get("alora_invocation_tokens") or []
    scope = ("response", len(tokens)) if tokens else (said.get("scope", "all"), said.get("scope_window", 1))
    if (loaded.config.scope, loaded.config.scope_window) != scope:
        raise Wrong(f"scope {loaded.config.scope} {loaded.config.scope_window}, the file says {scope}")
    if list(getattr(loaded.config, "alora_invocation_tokens", None) or []) != tokens:
        raise Wrong(f"alora_invocation_tokens are {loaded.config.alora_invocation_tokens}, the file says {tokens}")
    for key in ("r", "lora_alpha", "use_rslora", "pooler", "summary", "activation", "up_bias", "late_r"):
        if hasattr(loaded.config, key) and getattr(loaded.config, key) != said.get(key, getattr(loaded.config, key)):
            raise Wrong(f"{key} is {getattr(loaded.config, key)}, the file says {said.get(key)}")


def layers(stored: dict[str, np.ndarray], ending: str) -> np.ndarray:
    """A tensor of every layer that has it, stacked, with zeros up to the largest."""
    numbers = sorted(int(name[len(LAYER) :].split(".")[0]) for name in stored if name.endswith(ending))
    found = [stored[f"{LAYER}{i}.{ending}"].astype(np.float32) for i in numbers]
    most = np.max([one.shape for one in found], axis=0)
    return np.stack([np.pad(one, [(0, m - n) for m, n in zip(most, one.shape, strict=True)]) for one in found])


def para_leaves(said: dict, stored: dict) -> dict[str, np.ndarray]:
    sites = [site for site in SITES if site in said["target_modules"]]
    widths = [backbone("llama").config.site_width(site) for site in sites]
    made = {"down": layers(stored, "para_down.weight").swapaxes(1, 2)}
    ups = np.split(layers(stored, "para_up.weight").swapaxes(1, 2), np.cumsum(widths)[:-1], axis=2)
    made |= {f"up.{site}": up for site, up in zip(sites, ups, strict=True)}
    if said.get("up_bias"):
        biases = np.split(layers(stored, "para_up.bias"), np.cumsum(widths)[:-1], axis=1)
        made |= {f"up_bias.{site}": bias for site, bias in zip(sites, biases, strict=True)}
    return made | {
        name: layers(stored, ending) for ending, name in EXTRAS.items() if any(key.endswith(ending) for key in stored)
    }


def lora_leaves(said: dict, stored: dict) -> dict[str, np.ndarray]:
    linears = {name.removeprefix(LAYER).split(".", 1)[1].rsplit(".", 2)[0] for name in stored}
    return {
        f"{half.lower()}.{linear.split('.')[1]}": layers(stored, f"{linear}.lora_{half}.weight").swapaxes(1, 2)
        for linear in linears
        for half in "AB"
    }


def ia3_leaves(said: dict, stored: dict) -> dict[str, np.ndarray]:
    linears = {name.removeprefix(LAYER).split(".", 1)[1].removesuffix(".ia3_l") for name in stored}
    stacked = {linear: layers(stored, f"{linear}.ia3_l") for linear in linears}
    return {f"scale.{linear.split('.')[1]}": stack.reshape(len(stack), -1) for linear, stack in stacked.items()}


def own_leaves(said: dict, stored: dict) -> dict[str, np.ndarray]:
    names = {name.removeprefix(LAYER).split(".", 1)[1] for name in stored}
    return {name: layers(stored, name) for name in names}


# ---------------------------------------------------------------------------------------------------------------- bank


def bank(draw: random.Random, folder: Path) -> Trial:
    """A bank that adds a damaged adapter, or refuses it, serves the tenant that it had as before."""
    made = damaged(draw, folder, draw.choice(tuple(VARIANTS)))
    model = backbone("llama")
    held = AdapterBank(model.config, max_r=4, sites=SITES, methods=tuple(VARIANTS))
    held.add("good", good("para", 0))
    entry = held.entry("good")

    def add():
        try:
            held.add("bad", made)
        except (ValueError, OSError):
            if tuple(held.names) != ("good",) or held.entry("good") is not entry:
                raise Wrong("a failed add changed the bank") from None
            raise

    def check(_):
        rows = held.rows(["good", "bad", None])
        found = forward(model, rows, np.repeat(tokens(), 3, axis=0), 7)
        alone = alone_in_bank()
        for row, name, expected in ((0, "the neighbour", alone[0]), (2, "the base model", alone[1])):
            if not np.array_equal(np.asarray(found[row]), expected):
                raise Wrong(f"{name} answers otherwise next to the new adapter")

    return Trial(add, (str(made), CONFIG, WEIGHTS, "bank: bad"), check)


def tokens() -> np.ndarray:
    return prompts(backbone("llama"), batch=1, length=8)


@cache
def alone_in_bank() -> np.ndarray:
    """The logits of the good tenant and of the base model, in a bank with nobody else."""
    model = backbone("llama")
    held = AdapterBank(model.config, max_r=4, sites=SITES, methods=tuple(VARIANTS))
    held.add("good", good("para", 0))
    rows = held.rows(["good", None, None])
    return np.asarray(forward(model, rows, np.repeat(tokens(), 3, axis=0), 7))[:2]
