"""Compiles the decode step of real models for a TPU, without a TPU: programs, memory and collectives.

    pip install '.[aot]'
    python scripts/experiments/tpu_compile.py --largest [--only 'Gemma 2B'] [--print]

Nothing runs and no weights are made: abstract bfloat16 arguments go through `para_jax.model.adapted.decode_step`, with
the state donated, to the compiler in libtpu. Every row is a tenant of its own, with 512 tokens of cache. Results in
results/tpu_compile.json are not compiled again: delete the file after a change of the model's code. The table is
printed from the file.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from program_counts import Program, describe_program

from para_jax import ParaConfig, init_adapter, load_model_config, make_mesh, pick, prefill, stack_adapters
from para_jax.adapters.adapter import Factors
from para_jax.backbone.load import abstract_backbone
from para_jax.config import SITES, Ia3Config, LoraConfig
from para_jax.estimate.topology import topology_devices
from para_jax.model.adapted import decode_step
from para_jax.runtime.sharding import partition, with_sharding

RESULTS = Path("results/tpu_compile.json")
ROWS = (8, 32)
TOKENS = 512
HBM = int(15.75 * 2**30)  # bytes available to a program on a v5e with 16 GiB
PLACES = {
    "Gemma 2B on one v5e": ("google/gemma-2b", 1),
    "LLaMA-2 7B on one v5e": ("meta-llama/Llama-2-7b-hf", 1),
    "LLaMA-2 7B on v5e:2x2, tensor=4": ("meta-llama/Llama-2-7b-hf", 4),
}
TOPOLOGIES = {1: "v5e:1x1", 4: "v5e:2x2"}
METHODS = {
    "base": None,
    "PARA r=12": ParaConfig(r=12),
    "(IA)^3 on q, v, up": Ia3Config(target_modules=("q_proj", "v_proj", "up_proj"), feedforward_modules=()),
    "LoRA r=4": LoraConfig(r=4, target_modules=SITES),
    "LoRA r=16": LoraConfig(r=16, target_modules=SITES),
}
COLUMNS = ("rows", "fusions", "matrix products", "collectives", "copies", "bytes accessed", "arguments")
COLUMNS += ("HBM in GiB", "largest batch")
OUT_OF_MEMORY = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(15.75G\)|Used ([\d.]+)G of 15.75G hbm")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only where 'place: method' contains this text")
    parser.add_argument("--largest", action="store_true", help="also look for the largest batch that fits")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for place, method in itertools.product(PLACES, METHODS) if not args.print else ():
        if args.only in f"{place}: {method}":
            for rows in ROWS:
                compile_once(found, place, method, rows)
            if args.largest:
                find_largest(found, place, method)
    print("\n".join(table(found)))


def compile_once(found: dict, place: str, method: str, rows: int) -> None:
    """Compiles one program and adds the result to `found` and the file, unless it is there."""
    programs = found.setdefault(place, {}).setdefault(method, {})
    if str(rows) in programs:
        return
    start = time.perf_counter()
    programs[str(rows)] = said = compiled_entry(place, method, rows)
    said["versions"] = f"jax {jax.__version__}, libtpu {version('libtpu')}"
    print(f"{place}: {method}, {rows} rows, {time.perf_counter() - start:.0f} s: {said}", file=sys.stderr, flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def compiled_entry(place: str, method: str, rows: int) -> dict:
    """A Program as a dict, with whether it fits and its total memory. If it does not fit, only these two."""
    try:
        program = describe_program(compile_decode(*PLACES[place], METHODS[method], rows))
    except jax.errors.JaxRuntimeError as error:
        needed = OUT_OF_MEMORY.search(str(error))
        if needed is None:
            raise
        return {"fits": False, "memory": int(float(needed[1] or needed[2]) * 2**30)}
    return {"fits": True, "memory": program.memory, **program._asdict()}


def find_largest(found: dict, place: str, method: str) -> None:
    """Compiles until a batch fits and one row more does not. Memory grows about linearly with the rows, so each guess
    is drawn through the nearest compiles on both sides, or through the two largest that fit."""
    programs = found[place][method]
    while True:
        fitting = sorted(int(rows) for rows in programs if programs[rows]["fits"])
        too_many = sorted(int(rows) for rows in programs if not programs[rows]["fits"])
        if not fitting or fitting[-1] + 1 in too_many:
            return
        low, high = (fitting[-1], too_many[0]) if too_many else fitting[-2:]
        low_bytes, high_bytes = (programs[str(rows)]["memory"] for rows in (low, high))
        guess = low + int((HBM - low_bytes) * (high - low) / (high_bytes - low_bytes))
        compile_once(found, place, method, max(fitting[-1] + 1, min([guess, *(rows - 1 for rows in too_many)])))


def largest(programs: dict) -> int:
    """The largest number of rows found to fit."""
    return max((int(rows) for rows, said in programs.items() if said["fits"]), default=0)


def table(found: dict) -> Iterator[str]:
    """The results as Markdown: a table per place, and below it what each method costs beyond the base, where that was
    compiled."""
    for place, methods in found.items():
        base = methods.get("base", {})
        cases = [(method, rows) for rows in map(str, ROWS) for method in methods if rows in methods[method]]
        yield f"\n{place}:\n"
        yield "| | " + " | ".join(COLUMNS) + " |"
        yield "|---" * (len(COLUMNS) + 1) + "|"
        for method, rows in cases:
            yield line(method, rows, methods[method], base.get(rows, {}))
        yield ""
        for method, rows in cases:
            if method != "base" and methods[method][rows]["fits"] and base.get(rows, {}).get("fits"):
                more = excess(program_of(methods[method][rows]), program_of(base[rows]), bytes_share=0.005)
                yield f"- {method}, {rows} rows: {'; '.join(more) or 'no more than base, bytes accessed within 0.5 %'}"


def line(method: str, rows: str, programs: dict, base: dict) -> str:
    said = programs[rows]
    bound = [int(n) for n in programs if not programs[n]["fits"]]
    most = str(largest(programs)) if largest(programs) + 1 in bound else f"at least {largest(programs)}"
    memory = f"{said['memory'] / 2**30:.2f}"
    if not said["fits"]:
        over = (said["memory"] - HBM) / 2**30
        return f"| {method} | {rows} | | | | | | | {memory}: {over:.2f} too much | {most} |"
    program = program_of(said)
    cells = [
        sum(program.fusions.values()),
        program.products,
        sum(program.collectives.values()),
        program.copies,
        *(against(getattr(program, name), base.get(name)) for name in ("bytes_accessed", "arguments")),
    ]
    return f"| {method} | {rows} | {' | '.join(map(str, cells))} | {memory} | {most} |"


def against(count: float, base: float | None) -> str:
    return f"{count / 1e9:.3f} GB" + (f" ({count / base:.4f})" if base else "")


def program_of(said: dict) -> Program:
    return Program(**{name: said[name] for name in Program._fields})


def compile_decode(source: str, chips: int, adapter, rows: int):
    """The compiled decode step of one backbone on this many chips, with tensor parallelism over all of them."""
    mesh = make_mesh(tensor=chips, devices=topology_devices(TOPOLOGIES[chips], chips))
    config = load_model_config(source)
    model = abstract_backbone(config, jnp.bfloat16, mesh, layout="layers")
    state = decode_state(model, adapter, rows)
    state = jax.tree.map(with_sharding, state, state_shardings(state, mesh, config))
    tokens = with_sharding(jax.ShapeDtypeStruct((rows,), jnp.int32), state.length.sharding)
    with jax.set_mesh(mesh):
        return jax.jit(decode_step, donate_argnums=1).lower(model, state, tokens).compile()


def decode_state(model, adapter, rows: int):
    """The abstract state after a prefill in which every row has an adapter of its own."""

    def adapters():
        stack = stack_adapters([init_adapter(adapter, model.config)] * rows)
        return pick(stack, jnp.arange(rows, dtype=jnp.int32))

    made = None if adapter is None else jax.eval_shape(adapters)
    tokens = jax.ShapeDtypeStruct((rows, 16), jnp.int32)
    run = lambda model, made, tokens: prefill(model, made, tokens, 16, max_length=TOKENS)[1]  # noqa: E731
    return jax.eval_shape(run, model, made, tokens)


def state_shardings(state, mesh, config):
    """The NamedSharding of every array of a decode state: caches by kv heads, adjustments as their sites."""
    counts = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}

    def over(*axes):
        def sharding(leaf):
            sizes = tuple(counts.get(axis, n) for axis, n in zip(axes, leaf.shape, strict=True))
            return NamedSharding(mesh, partition(axes, sizes, mesh.shape))

        return sharding

    def of_adjustment(adjustment):
        if isinstance(adjustment, Factors):
            made = {site: over(None, config.site_axis(site))(x) for site, x in adjustment.distance.items()}
            return Factors(made)
        a = {site: over(None, config.site_input_axis(site), None)(x) for site, x in adjustment.a.items()}
        b = {site: over(None, None, config.site_axis(site))(x) for site, x in adjustment.b.items()}
        return type(adjustment)(a, b)

    cache = jax.tree.map(over(None, "kv_heads", None, None), state.cache)
    return type(state)(cache, tuple(map(of_adjustment, state.adjustments)), over(None)(state.length))


def excess(program: Program, base: Program, *, bytes_share: float) -> list[str]:
    """One line for each count in which `program` exceeds `base`: fusions, matrix products, collectives, and bytes
    accessed beyond a share of the base's (0.005: half a percent). Empty if the program costs no more."""
    counts = {
        "fusions": (sum(program.fusions.values()), sum(base.fusions.values())),
        "matrix products": (program.products, base.products),
        "collectives": (sum(program.collectives.values()), sum(base.collectives.values())),
    }
    lines = [f"{more} {name}, base {fewer}" for name, (more, fewer) in counts.items() if more > fewer]
    if program.bytes_accessed > base.bytes_accessed * (1 + bytes_share):
        lines.append(f"{program.bytes_accessed:.12g} bytes accessed, base {base.bytes_accessed:.12g}")
    return lines


if __name__ == "__main__":
    main()
