"""Which training runs fit which TPU slices, by the TPU's own compiler, without a TPU.

    pip install -e '.[aot]'
    python scripts/tpu_train.py [--print]

Each row is `para-jax train CONFIG --dry-run --topology SLICE OVERRIDES`. What results/tpu_train.json holds already is
not compiled again: delete the file after a change of the model's code. The table is printed from the file.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from para_jax import make_mesh
from para_jax.config import load_config
from para_jax.dry_run.topology import compile_step, parsed_topology, topology_devices
from para_jax.roofline import estimate_time, training_work

RESULTS = Path("results/tpu_train.json")
CONFIGS = {
    "Gemma 2B": "configs/gemma-2b-boolq.yaml",
    "LLaMA-2 7B": "configs/llama2-7b-boolq.yaml",
    "LLaMA-2 13B": "configs/llama2-13b-boolq.yaml",
}
CASES = [
    ("LLaMA-2 7B", "v5e:4x4", ()),
    ("LLaMA-2 7B", "v5e:4x4", ("backbone.quantize=int8",)),
    ("LLaMA-2 7B", "v5e:4x4", ("data.tenants=data/tenants", "train.tenants_at_once=64")),
    ("LLaMA-2 13B", "v5e:4x4", ()),
    ("LLaMA-2 7B", "v5e:1x1", ()),
    ("LLaMA-2 7B", "v5e:1x1", ("backbone.quantize=int8",)),
    ("Gemma 2B", "v5e:1x1", ()),
    ("Gemma 2B", "v5e:2x4", ()),
    ("LLaMA-2 7B", "v5e:2x4", ()),
    ("LLaMA-2 13B", "v5e:2x4", ()),
    ("LLaMA-2 13B", "v5e:1x1", ()),
]
ROWS = "train.per_device_batch_size=4"
COMMON = ("train.batch_size=null", "train.remat=block", "data.max_seq_length=512", "mesh.data=1")
COLUMNS = ("model", "slice", "mesh", "rows a chip", "HBM a chip", "arguments", "temporaries")
COLUMNS += ("collectives of a chip and step", "estimated time")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="compile nothing")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model, where, more in CASES:
        name = " ".join([model, where, *more])
        if name not in found and not args.print:
            found[name] = compiled_entry(model, where, more)
            print(name, found[name], file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(line, found.values())]))


def compiled_entry(model: str, where: str, more: tuple[str, ...]) -> dict:
    kind, chips = parsed_topology(where)
    overrides = [*COMMON, ROWS, f"mesh.fsdp={chips}", *more]
    config = load_config(CONFIGS[model], overrides)
    mesh = make_mesh(data=1, fsdp=chips, devices=topology_devices(where, chips))
    tenants = config.train.tenants_at_once if config.many else 1
    said = compile_step(config, mesh, tenants)
    time = estimate_time(training_work(config, mesh, tenants), said.collective_bytes, kind)
    return {
        "model": model + (f", {tenants} tenants" if config.many else " int8" if more else ""),
        "slice": where,
        "mesh": f"fsdp={chips}",
        "rows": config.train.per_device_batch_size,
        "command": f"para-jax train {CONFIGS[model]} --dry-run --topology {where} {' '.join(overrides)}",
        "versions": f"jax {jax.__version__}, libtpu {version('libtpu')}",
        **said._asdict(),
        "program": said.program and said.program._asdict(),
        "time": time._asdict(),
    }


def line(entry: dict) -> str:
    """One row of the table."""
    gib = lambda size: f"{size / 2**30:.2f}"  # noqa: E731
    place = [entry["model"], entry["slice"], entry["mesh"], str(entry["rows"])]
    if entry["program"] is None:
        over = f"{gib(entry['needed'])} GiB: {gib(entry['needed'] - entry['limit'])} too much"
        return f"| {' | '.join([*place, over, '', '', '', ''])} |"
    program, runs, bytes_of, time = (entry[key] for key in ("program", "collectives", "collective_bytes", "time"))
    shown = ", ".join(f"{count} {name} {bytes_of[name] / 1e9:.2f} GB" for name, count in runs.items()) or "none"
    sizes = [gib(entry["needed"]) + " GiB: fits", gib(program["arguments"]), gib(program["temporaries"])]
    least = f"{time['seconds']:.2f} s, by {time['bound']}"
    return f"| {' | '.join([*place, *sizes, shown, least])} |"


if __name__ == "__main__":
    main()
