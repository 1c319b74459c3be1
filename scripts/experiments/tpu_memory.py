"""Memory of a training step by attention kernel and train.remat, by the TPU's compiler, without a TPU.

    pip install '.[aot]'
    python scripts/experiments/tpu_memory.py [--print]

LLaMA-2 7B, 2 rows of 4096 tokens per chip, fully sharded over 16 chips; packed rows; and 4 rows of 2048 tokens by
scope, and with LoRA. Results in results/tpu_memory.json are not compiled again: delete the file after a change of the
model's code. The tables are printed from the file.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from para_jax import make_mesh
from para_jax.config import load_config
from para_jax.estimate.memory import shard_bytes, step_arguments
from para_jax.estimate.topology import compile_step, parsed_topology, topology_devices

RESULTS = Path("results/tpu_memory.json")
CONFIG, SLICE = "configs/llama2-7b-boolq.yaml", "v5e:4x4"
COMMON = ("train.batch_size=null", "mesh.data=1", "mesh.fsdp=16")
ROWS = {
    "4 x 2048": ("train.per_device_batch_size=4", "data.max_seq_length=2048"),
    "2 x 4096": ("train.per_device_batch_size=2", "data.max_seq_length=4096"),
    "4 x 2048, packed": ("train.per_device_batch_size=4", "data.max_seq_length=2048", "data.packing=true"),
}
CASES = [
    *(("2 x 4096", kernel, remat) for remat in ("block", "dots", "none") for kernel in ("plain", "splash")),
    *(("4 x 2048, packed", "splash", remat) for remat in ("block", "dots")),
]
COLUMNS = ("rows per chip", "attention", "train.remat", "arguments", "temporaries", "HBM per chip", "compiled in")
#: 4 rows of 2048 tokens: (scope, prompt tokens, completion tokens)
SPLITS = (("all", 1536, 512), ("response", 1536, 512), ("response", 1792, 256), ("response", 2032, 16))

LORA = (
    "adapter.method=lora", "adapter.r=8", "adapter.scope=all",
    "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="compile nothing")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def compile_once(name: str, about: dict, *given) -> None:
        if name not in found and not args.print:
            found[name] = about | compiled_entry(*given)
            print(name, found[name], file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")

    for rows, kernel, remat in CASES:
        about = {"rows": rows, "kernel": kernel, "remat": remat}
        compile_once(f"{rows}, {kernel}, {remat}", about, ROWS[rows], kernel, remat)
    for remat, (scope, prompt, completion) in product(("dots", "block"), SPLITS):
        about = {"scope": scope, "prompt": prompt, "completion": completion, "remat": remat}
        given = (*ROWS["4 x 2048"], f"adapter.scope={scope}")
        compile_once(split_name(scope, prompt, completion, remat), about, given, "splash", remat, (prompt, completion))
    for remat in ("dots", "none"):
        about = {"scope": "all", "prompt": 1536, "completion": 512, "remat": remat}
        name = f"4 x 2048, LoRA r=8 on all linears, {remat}"
        compile_once(name, about, (*ROWS["4 x 2048"], *LORA), "splash", remat, (1536, 512))
    lines = [line(found[name]) for name in map(", ".join, CASES) if name in found]
    print("\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *lines]))
    print(
        "\n".join(
            ["", "| scope | prompt + completion | dots | / all | block | / all |", "|---" * 6 + "|", *by_scope(found)]
        )
    )


def split_name(scope: str, prompt: int, completion: int, remat: str) -> str:
    return f"4 x 2048, scope {scope}, {prompt} + {completion}, {remat}"


def by_scope(found: dict) -> Iterator[str]:
    """Rows with the temporaries in GiB, and their ratio to those of scope all."""
    for split in SPLITS:
        cells = []
        for remat in ("dots", "block"):
            sizes = [found.get(split_name(*one, remat)) for one in (split, SPLITS[0])]
            if all(sizes):
                one, everywhere = map(temporaries, sizes)
                cells += [f"{one / 2**30:.2f}", f"{one / everywhere:.2f}"]
        scope, prompt, completion = split
        yield f"| {scope} | {prompt} + {completion} | {' | '.join(cells)} |"


def temporaries(entry: dict) -> int:
    """Bytes. If the program does not fit, its need beyond the arguments."""
    return entry["program"]["temporaries"] if entry["program"] else entry["needed"] - entry["arguments"]


def compiled_entry(overrides: tuple[str, ...], kernel: str, remat: str, split: tuple[int, int] | None = None) -> dict:
    _, chips = parsed_topology(SLICE)
    given = [*COMMON, *overrides, f"train.remat={remat}", f"backbone.attention={kernel}"]
    config = load_config(CONFIG, given)
    mesh = make_mesh(data=1, fsdp=chips, devices=topology_devices(SLICE, chips))
    said = compile_step(config, mesh, split=split)
    return {
        "command": f"para-jax train {CONFIG} --dry-run --topology {SLICE} {' '.join(given)}",
        "versions": f"jax {jax.__version__}, libtpu {version('libtpu')}",
        "arguments": shard_bytes(step_arguments(config, mesh)),
        **{key: value for key, value in said._asdict().items() if key != "memory"},
        "program": said.memory and said.memory._asdict(),
    }


def line(entry: dict) -> str:
    """One row of the table."""
    gib = lambda size: f"{size / 2**30:.2f}"  # noqa: E731
    program, needed = entry["program"], entry["needed"]
    verdict = "fits" if program else f"{gib(needed - entry['limit'])} too much"
    sizes = [
        gib(entry["arguments"]),
        gib(temporaries(entry)),
        f"{gib(needed)} GiB: {verdict}",
        f"{entry['seconds']:.0f} s",
    ]
    return f"| {' | '.join([entry['rows'], entry['kernel'], entry['remat'], *sizes])} |"


if __name__ == "__main__":
    main()
