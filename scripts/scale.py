"""The arithmetic of docs/scaling.md: its tables, from the shapes of models and the published figures of chips.

    python scripts/scale.py
    python scripts/scale.py --prompt 2000 --answer 300 --requests 10       # your own traffic
    python scripts/scale.py --backbone runs/my-backbone                    # a folder or hub id, on one chip

Nothing is measured. Each time is the least that a chip needs if it reads memory and multiplies at its peak. Real times
are longer. The symbols in the docstrings are those of the page.
"""

import argparse
import math
from functools import cache
from typing import Any, NamedTuple

import jax
from roofline import CHIPS, keys_seen

from para_jax.adapters.adapter import count_parameters
from para_jax.backbone.load import load_model_config
from para_jax.backbone.weights import parameter_shapes
from para_jax.config import SITES, Ia3Config, LoraConfig, ModelConfig, ParaConfig
from para_jax.estimate.memory import CHIP_GIB, GIB, USABLE, abstract_mesh, shard_bytes
from para_jax.model.adapted import init_adapter
from para_jax.runtime.devices import PEAK_FLOPS, matrix_weights
from para_jax.runtime.sharding import tree_shardings, with_sharding


class Chip(NamedTuple):
    """What one chip can do at most."""

    flops: float
    """C, bfloat16 per second"""
    hbm: float
    """B, bytes per second from its memory"""
    memory: float
    """M, bytes"""
    link: float
    """H, bytes per second from the host"""


#: TPUs: roofline.py and memory.py. Their link: "PCIe" in jax-ml.github.io/scaling-book/tpus. H100 SXM: the data sheet
#: at nvidia.com, 3.35 TB/s, 80 GB, and 64 of the 128 GB/s of PCIe 5, which are those of both directions.
CHIP = {
    "v5e": Chip(CHIPS["v5e"].flops, CHIPS["v5e"].hbm, CHIP_GIB["v5e"] * GIB, 16e9),
    "v6e": Chip(CHIPS["v6e"].flops, CHIPS["v6e"].hbm, CHIP_GIB["v6e"] * GIB, 32e9),
    "H100": Chip(PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 3.35e12, 80e9, 64e9),
}
METHODS = {
    "PARA r=12": ParaConfig(r=12),
    "(IA)^3": Ia3Config(target_modules=("q_proj", "v_proj", "up_proj"), feedforward_modules=()),
    "LoRA r=8, q and v": LoraConfig(r=8),
    "LoRA r=8, all sites": LoraConfig(r=8, target_modules=SITES),
}
PARA, BANK_BYTES = "PARA r=12", 4  # a bank's numbers are float32, those on the device bfloat16


class Backbone(NamedTuple):
    name: str
    source: str
    quantize: str | None
    chips: dict[str, int]
    """how many chips hold it together, by kind"""

    @property
    def model(self) -> ModelConfig:
        return load_model_config(self.source)


BACKBONES = [
    Backbone("SmolLM2-135M", "smollm2-135m", None, {"v5e": 1, "v6e": 1, "H100": 1}),
    Backbone("LLaMA-2 7B, int8", "meta-llama/Llama-2-7b-hf", "int8", {"v5e": 1, "v6e": 1, "H100": 1}),
    Backbone("LLaMA-2 70B, int8", "meta-llama/Llama-2-70b-hf", "int8", {"v5e": 8, "v6e": 4, "H100": 2}),
]


class Traffic(NamedTuple):
    """Requests, all of the same length."""

    prompt: int = 512
    """p, tokens"""
    answer: int = 128
    """a, tokens"""
    adapters: int = 10_000
    requests: int = 100
    """of each adapter per day"""
    prefix: int = 2000
    """s, tokens that prompts share"""

    @property
    def length(self) -> int:
        """c, tokens of a row"""
        return self.prompt + self.answer


# ------------------------------------------------------------------------------------------------ bytes of one backbone


@cache
def weight_bytes(model: ModelConfig, quantize: str | None) -> int:
    """W, as they lie in the chips' memory. int8 has a float32 scale for each output of a linear."""
    whole, linears = sum(map(math.prod, parameter_shapes(model).values())), matrix_weights(model)
    if quantize is None:
        return 2 * whole
    return 2 * (whole - linears) + linears + 4 * model.num_layers * sum(map(model.site_width, SITES))


def read_bytes(backbone: Backbone) -> int:
    """R: the weights that each step reads: all but an embedding that is not also the head."""
    model = backbone.model
    return weight_bytes(model, backbone.quantize) - (0 if model.tied_embeddings else 2 * model.vocab_size * model.width)


def cache_bytes(model: ModelConfig) -> int:
    """K: keys and values of one token, in all layers."""
    return 2 * 2 * model.num_layers * model.kv_width


@cache
def adapter_values(method: str, model: ModelConfig) -> int:
    """A: the numbers of one adapter."""
    return count_parameters(jax.eval_shape(lambda: init_adapter(METHODS[method], model)))


@cache
def copied_bytes(method: str, model: ModelConfig, chips: int) -> int:
    """What each chip gets of one adapter from the bank: its part of what `tensor` splits, and all of the rest."""
    adapter = jax.eval_shape(lambda: init_adapter(METHODS[method], model))
    mesh = abstract_mesh({"data": 1, "fsdp": 1, "tensor": chips})
    return shard_bytes(jax.tree.map(with_sharding, adapter, tree_shardings(adapter, mesh, model)))


@cache
def carried_bytes(method: str, model: ModelConfig) -> int:
    """F: what each row carries through decode, in all layers."""
    adapter = jax.eval_shape(lambda: init_adapter(METHODS[method], model))
    summary = jax.ShapeDtypeStruct((model.num_layers, model.width), "float32")
    carried = jax.eval_shape(jax.vmap(lambda layer, x: layer.condition(x)), adapter, summary)
    return sum(2 * leaf.size for leaf in jax.tree.leaves(carried))


# ---------------------------------------------------------------------------------------------- least times on chips


class Decode(NamedTuple):
    rows: int
    """n, that fit the memory"""
    seconds: float
    """of one step, for all rows"""
    bound: str


def prefill_seconds(backbone: Backbone, chip: str, tokens: int, method: str | None = None, before: int = 0) -> float:
    """The larger of its multiplications and one reading of the weights, for the tokens after the first `before`."""
    flops = prefill_flops(backbone.model, tokens, method, before)
    return max(flops / CHIP[chip].flops, read_bytes(backbone) / CHIP[chip].hbm) / backbone.chips[chip]


def prefill_flops(model: ModelConfig, tokens: int, method: str | None = None, before: int = 0) -> float:
    seen = sum(keys_after(before, tokens, kind.window) for kind in model.kinds)
    products = 2 * (matrix_weights(model) + lora_values(method, model)) + 4 * seen * model.q_width
    return tokens * products + 2 * model.width * model.vocab_size


def keys_after(before: int, tokens: int, window: int | None) -> float:
    """The mean number of keys that these tokens see, which come after `before` others."""
    whole = (before + tokens) * keys_seen(before + tokens, window, "splash")
    return (whole - (before * keys_seen(before, window, "splash") if before else 0)) / tokens


def decode(backbone: Backbone, chip: str, length: int, method: str | None = None) -> Decode:
    """A step with as many rows as fit, each with a full cache; no rows where not one fits."""
    model, chips, one = backbone.model, backbone.chips[chip], CHIP[chip]
    row = cache_bytes(model) * length + (carried_bytes(method, model) if method else 0)
    rows = max(0, int((USABLE * one.memory * chips - weight_bytes(model, backbone.quantize)) // row))
    parts = {
        "HBM": (read_bytes(backbone) + rows * row) / one.hbm / chips,
        "FLOPs": rows * decode_flops(model, length, method) / one.flops / chips,
    }
    bound = max(parts, key=lambda part: parts[part])
    return Decode(rows, parts[bound], bound)


def decode_flops(model: ModelConfig, length: int, method: str | None = None) -> float:
    """Of one row, with `length` keys."""
    products = matrix_weights(model) + model.width * model.vocab_size + lora_values(method, model)
    return 2 * products + 4 * model.num_layers * model.q_width * length


def lora_values(method: str | None, model: ModelConfig) -> int:
    """The numbers that every token is multiplied by: all of LoRA's, none of the others'."""
    return adapter_values(method, model) if method and isinstance(METHODS[method], LoraConfig) else 0


def request_seconds(backbone: Backbone, chip: str, traffic: Traffic, method: str | None = None) -> float:
    """Chip-seconds of one request: its prefill, and its share of the decode steps; infinite where no row fits."""
    steps = decode(backbone, chip, traffic.length, method)
    if not steps.rows:
        return math.inf
    once = prefill_seconds(backbone, chip, traffic.prompt, method) + traffic.answer * steps.seconds / steps.rows
    return once * backbone.chips[chip]


# ----------------------------------------------------------------------------------------------------------- the tables

Table = list[list[str]]
UNFIT = "does not fit"


def shown(number: float) -> str:
    """Three digits that matter, with commas: 1.53, 12.1, 20,700."""
    digits = f"{number:.3g}"
    return f"{float(digits):,.0f}" if abs(float(digits)) >= 100 else f"{float(digits):g}"


def chips_table() -> Table:
    rows = [["chip", "C, TFLOP/s", "B, GB/s", "M, GB", "H, GB/s"]]
    return rows + [[name, *(shown(x) for x in (c.flops / 1e12, c.hbm / 1e9, c.memory / 1e9, c.link / 1e9))]
                   for name, c in CHIP.items()]  # fmt: skip


def tenants_table(traffic: Traffic, backbones: list[Backbone]) -> Table:
    rows = [["backbone", "method", "A, million", "MB in a bank", "tenants per 100 GB", "F, MB", "F / (K c)"]]
    for backbone in backbones:
        for method in METHODS:
            values, carried = adapter_values(method, backbone.model), carried_bytes(method, backbone.model)
            held = BANK_BYTES * values
            numbers = values / 1e6, held / 1e6, 1e11 / held, carried / 1e6
            share = carried / (cache_bytes(backbone.model) * traffic.length)
            rows.append([backbone.name, method, *map(shown, numbers), f"{share:.1%}"])
    return rows


def speed_table(traffic: Traffic, backbones: list[Backbone]) -> Table:
    rows = [[
        "backbone", "chips", "rows", "ms per step", "bound by", "decode, tokens/s", "prefill, tokens/s", "requests/s",
        "bank to chip, MB/s", "of its link",
    ]]  # fmt: skip
    for backbone in backbones:
        for chip, count in backbone.chips.items():
            steps = decode(backbone, chip, traffic.length, PARA)
            if not steps.rows:
                rows.append([backbone.name, f"{count} x {chip}", UNFIT, *[""] * (len(rows[0]) - 3)])
                continue
            requests = 1 / request_seconds(backbone, chip, traffic, PARA)
            moved = requests * count * copied_bytes(PARA, backbone.model, count)
            filled = traffic.prompt / prefill_seconds(backbone, chip, traffic.prompt) / count
            numbers = steps.rows / steps.seconds / count, filled, requests, moved / 1e6
            names = [backbone.name, f"{count} x {chip}", f"{steps.rows:,}", shown(1e3 * steps.seconds), steps.bound]
            rows.append([*names, *map(shown, numbers), f"{moved / CHIP[chip].link:.1%}"])
    return rows


def day_table(traffic: Traffic, backbones: list[Backbone]) -> Table:
    methods = [None, PARA, "LoRA r=8, q and v", "LoRA r=8, all sites"]
    rows = [["backbone", "chips", "base model", *methods[1:]]]
    for backbone in backbones:
        for chip, count in backbone.chips.items():
            of_one = [request_seconds(backbone, chip, traffic, method) for method in methods]
            hours = [traffic.adapters * traffic.requests * seconds / 3600 for seconds in of_one]
            said = [shown(one) if math.isfinite(one) else UNFIT for one in hours]
            rows.append([backbone.name, f"{count} x {chip}", *said])
    return rows


def prefix_table(traffic: Traffic, backbones: list[Backbone]) -> Table:
    rows = [["backbone", "MB of a prefix", "prefixes in 10 GB", *(f"ms saved, {chip}" for chip in CHIP)]]
    for backbone in backbones:
        held = cache_bytes(backbone.model) * traffic.prefix
        saved = [prefix_seconds(backbone, chip, traffic) for chip in backbone.chips]
        rows.append([backbone.name, *map(shown, (held / 1e6, 1e10 / held, *(1e3 * x for x in saved)))])
    return rows


def prefix_seconds(backbone: Backbone, chip: str, traffic: Traffic) -> float:
    """What a request saves that finds its prefix in the cache."""
    whole = prefill_seconds(backbone, chip, traffic.prefix + traffic.prompt)
    return whole - prefill_seconds(backbone, chip, traffic.prompt, before=traffic.prefix)


def tables(traffic: Traffic = Traffic(), backbones: list[Backbone] | None = None) -> dict[str, Table]:  # noqa: B008
    """All tables of the page, by name."""
    backbones = backbones or BACKBONES
    return {
        "chips": chips_table(),
        "tenants": tenants_table(traffic, backbones),
        "speed": speed_table(traffic, backbones),
        "prefixes": prefix_table(traffic, backbones),
        "day": day_table(traffic, backbones),
    }


def markdown(table: Table) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Traffic._field_defaults.items():
        parser.add_argument(f"--{name}", type=positive, default=value, help="default: %(default)s")
    parser.add_argument("--backbone", help="a folder or hub id, in bfloat16 on one chip; default: those of the page")
    options: Any = parser.parse_args()
    traffic = Traffic(*(getattr(options, name) for name in Traffic._fields))
    own = options.backbone and [Backbone(options.backbone, options.backbone, None, dict.fromkeys(CHIP, 1))]
    for name, table in tables(traffic, own).items():
        print(f"{name}\n\n{markdown(table)}\n")


if __name__ == "__main__":
    main()
