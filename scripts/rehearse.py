"""Rehearses a run on a TPU slice or a GPU without the hardware.

    pip install '.[aot,gcs,test]'
    python scripts/rehearse.py v5e:4x4                                        # all of configs/
    python scripts/rehearse.py v5e:4x4 configs/llama2-7b-boolq.yaml --processes 4
    python scripts/rehearse.py h100 --no-runs                                 # one GPU's memory, by an estimate

For each config: (1) the TPU's compiler compiles the training step, evaluation, prefill and decode for the slice, with
the mesh that the run would choose. (2) The same config trains a tiny backbone on as many virtual CPU devices: once in
one process, and once in several that are killed and then resumed on empty disks. Their run folder is in a bucket: an
emulator on this machine, or the one given by --output. Exits with 1 if something fails or does not fit.

The table shows what fits, the bytes that chips exchange, and the least time of a step from the chip's published peaks,
which is an estimate. Compiling 7B takes minutes per program on a small machine. Results in the --json file are not
computed again: delete the file after a change of the model's code.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import buckets
import rehearse_run
from hlo import collective_bytes, collectives_run
from rehearse_programs import compile_programs
from roofline import estimate_time, training_work

from para_jax.config import RunConfig, load_config
from para_jax.estimate.memory import CHIP_GIB, GIB, choose_mesh, run_bytes
from para_jax.estimate.memory import abstract_mesh as mesh_of
from para_jax.estimate.topology import Compiled, parsed_topology, topology_devices
from para_jax.io.record_file import write_record
from para_jax.reports import inspect
from para_jax.runtime.sharding import make_mesh, mesh_sizes
from para_jax.training.passes import step_passes

CONFIGS = Path(__file__).parents[1] / "configs"
#: What JAX gives a program of an H100's 80 GB by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
H100_BYTES = int(0.75 * 79.6 * GIB)
#: The tenants that a config is compiled for if its own can't be counted here.
TENANTS = 16
PROGRAMS = ("train", "prompts", "loss", "prefill", "ranking", "decode")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", help="a slice such as v5e:4x4 or v6e:2x4, or h100")
    parser.add_argument("configs", nargs="*", type=Path, help="default: all of configs/")
    parser.add_argument("--processes", type=int, default=2, help="hosts of the runs (default: 2)")
    parser.add_argument("--output", help="a gs:// folder for the runs; default: an emulator's bucket on this machine")
    parser.add_argument("--json", type=Path, help="keep results in this file")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiler")
    parser.add_argument("--no-runs", action="store_true", help="skip the runs on virtual devices")
    options = parser.parse_args()
    chips, room = slice_of(options.topology)
    if not options.no_runs and chips % options.processes:
        parser.error(f"--processes {options.processes} does not divide {chips} devices")
    files = options.configs or sorted(CONFIGS.glob("*.yaml"))
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in (file.stem for file in files):
        held = found.get(name, {}).get("topology", options.topology)  # entries of earlier versions do not say it
        if held != options.topology:
            parser.error(f"--json {options.json} holds {name} for {held}; give another file for {options.topology}")
    with tempfile.TemporaryDirectory() as name:
        folder = rehearse_run.make_data(Path(name))
        server, emulated = (None, None) if options.no_runs or options.output else emulated_bucket()
        output = options.output or emulated
        for file in files:
            entry = found.setdefault(file.stem, {})
            begun = time.monotonic()
            config = load_config(file)
            sizes = chosen_sizes(config, chips, room)
            entry |= {"topology": options.topology, "mesh": sizes, "tenants": tenants_of(config)}
            if not options.no_compile and "error" in entry.get("programs", {"error": "none yet"}):
                entry["programs"] = attempt(compiled, options.topology, file, sizes, room)
            if not options.no_runs and "seconds" not in entry.get("run", {}):
                entry["run"] = attempt(rehearse_run.rehearse, file, sizes, options.processes, folder, output)
            print(f"{file.stem}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            if options.json:
                write_record(options.json, found)
        if server:
            server.stop()
    print("\n".join(table({file.stem: found[file.stem] for file in files})))
    return int(any(map(failed, (found[file.stem] for file in files))))


def slice_of(topology: str) -> tuple[int, int]:
    """The number of devices, and the bytes of each."""
    if topology == "h100":
        return 1, H100_BYTES
    kind, chips = parsed_topology(topology)
    return chips, CHIP_GIB[kind] * GIB


def chosen_sizes(config: RunConfig, chips: int, room: int) -> dict[str, int]:
    sizes = mesh_sizes(choose_mesh(config, chips, room, tenants_of(config)).sizes, chips)
    if sizes is None:
        raise SystemExit(f"mesh {vars(config.mesh)} does not fit {chips} devices")
    return sizes


def tenants_of(config: RunConfig) -> int:
    if config.data.tenants and config.train.tenants_at_once is None and not inspect.tenants_are_here(config):
        return TENANTS
    return inspect.tenants_of(config)


def attempt(work: Callable, *arguments) -> dict[str, Any]:
    """The result, or its error: a failing config does not end the rehearsal of the others."""
    try:
        return work(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-2000:]}


def emulated_bucket() -> tuple[Any, str]:
    """The emulator's server, and a folder in its bucket."""
    server, port = buckets.start()
    os.environ.update(buckets.environment(port))
    return server, f"gs://{buckets.BUCKET}/rehearsal"


# --------------------------------------------------------------------------------------------------------- the compiler


def compiled(topology: str, file: Path, sizes: dict[str, int], room: int) -> dict[str, Any]:
    """A record of each program by name. For an H100, which has no compiler here, the estimate of a whole run."""
    config = load_config(file)
    tenants = tenants_of(config)
    passes = None if config.many else step_passes(config.train, mesh_of(sizes))
    if topology == "h100":
        return {"estimate": {"needed": run_bytes(config, mesh_of(sizes), tenants), "limit": room}}
    kind, chips = parsed_topology(topology)
    mesh = make_mesh(**sizes, devices=topology_devices(topology, chips))
    found = {name: record(one) for name, one in compile_programs(config, mesh, tenants).items()}
    if found["train"]["fits"]:
        least = estimate_time(training_work(config, mesh, tenants), found["train"]["collective_bytes"], kind)
        found["train"] |= {"seconds_at_least": least.seconds, "bound": least.bound}
    return found | {"about": {"passes": passes, "libtpu": version("libtpu")}}


def record(found: Compiled) -> dict[str, Any]:
    text = found.program and found.program.as_text() or ""
    return {
        "fits": found.fits,
        "needed": found.needed,
        "collectives": collectives_run(text) if text else {},
        "collective_bytes": collective_bytes(text) if text else {},
        "compile_seconds": round(found.seconds),
    }


# ------------------------------------------------------------------------------------------------------------ the table


def table(found: dict[str, dict]) -> list[str]:
    """The results as Markdown, without empty columns, and the errors below it."""
    rows = [cells(name, entry) for name, entry in found.items()]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    errors = [
        f"{name}: {entry[part]['error']}"
        for name, entry in found.items()
        for part in ("programs", "run")
        if "error" in entry.get(part, {})
    ]
    return lines + ["", *errors] * bool(errors)


def cells(name: str, entry: dict) -> dict[str, str]:
    """One row of the table, by column."""
    programs = entry.get("programs", {})
    train = programs.get("train", {})
    moved = sum(train.get("collective_bytes", {}).values())
    least = train.get("seconds_at_least")
    return {
        "config": name,
        "tenants": str(entry["tenants"]) if entry.get("tenants", 1) > 1 else "",
        "data x fsdp x tensor": " x ".join(map(str, entry["mesh"].values())),
        **{f"{program}: GiB": memory(programs, program) for program in PROGRAMS},
        "collectives of a step": f"{moved / 1e9:.1f} GB" if least else "",
        "least time of a step (estimate)": f"{least:.2g} s, by {train['bound']}" if least else "",
        "tiny run": said_of_run(entry.get("run")),
    }


def memory(programs: dict, name: str) -> str:
    if "error" in programs:
        return "failed"
    if name == "train" and "estimate" in programs:
        one = programs["estimate"]
        fits = "fits" if one["needed"] <= one["limit"] else "too much"
        return f"about {one['needed'] / GIB:.1f} of {one['limit'] / GIB:.1f}: {fits} (estimate)"
    one = programs.get(name)
    if one is None:
        return ""
    return f"{one['needed'] / GIB:.2f}" + ("" if one["fits"] else ": too much")


def said_of_run(run: dict | None) -> str:
    if run is None:
        return ""
    if "error" in run:
        return "failed"
    return f"killed, resumed; {run['processes']} processes equal one within {max(run['difference'], 1e-9):.0e}"


def failed(entry: dict) -> bool:
    programs = entry.get("programs", {})
    too_much = any("fits" in one and not one["fits"] for one in programs.values() if isinstance(one, dict))
    estimate = programs.get("estimate")
    over = bool(estimate) and estimate["needed"] > estimate["limit"]
    return too_much or over or "error" in programs or "error" in entry.get("run", {})


if __name__ == "__main__":
    sys.exit(main())
