"""`para-jax bench NAME`: what loading, decoding and training cost on this machine, as a record that says how.

Sides that are compared run in turn, one measurement each a round, so that a change in the machine's load meets them
all; what counts is the median over the rounds.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .. import devices
from ..config import RuntimeSection, one_of, require
from ..inspect import check_record_file, write_record
from ..plots import FORMATS, decode_plot
from .decode import bench_decode
from .evaluate import bench_evaluate
from .load import bench_load
from .sampling import bench_sampling
from .serve import bench_serve
from .tenants import bench_tenants
from .train import bench_packing, bench_train

#: The names of `para-jax bench`; each gives {"unit", "medians", "rounds", ...} for a backbone.
BENCHMARKS: dict[str, Callable[..., dict]] = {
    "load": bench_load,
    "decode": bench_decode,
    "serve": bench_serve,
    "evaluate": bench_evaluate,
    "train": bench_train,
    "packing": bench_packing,
    "tenants": bench_tenants,
    "sampling": bench_sampling,
}


def run(name: str, backbone: str = "smollm2-135m", output: str | Path | None = None, **options) -> dict:
    """One benchmark's record: medians, ratios, each round, command, device and versions. It is printed as a table, and
    written to the JSON file `output` where one is given; `decode` draws a picture beside it where matplotlib is.

    Args:
        options: the benchmark's own, such as rounds.
    """
    require(name in BENCHMARKS, "bench", name, one_of(BENCHMARKS))
    known = inspect.signature(BENCHMARKS[name]).parameters
    require(set(options) <= set(known), f"bench {name}: options", options, f"some of {', '.join(list(known)[1:])}")
    needed = [key for key, one in list(known.items())[1:] if one.default is one.empty and key not in options]
    if needed:
        raise ValueError(f"bench {name}: needs {' and '.join(f'--{key}' for key in needed)}")
    file = None if output is None else Path(output)
    if file is not None:
        check_record_file("--output", file)
        require(file.suffix not in FORMATS, "--output", str(file), "a .json file; a picture is drawn next to it")
    devices.start(RuntimeSection(compilation_cache=False, allow_cpu=True))
    measured = BENCHMARKS[name](backbone, **options)
    record = {
        "command": command(name, backbone, options),
        "device": devices.describe_devices(),
        "versions": devices.versions(),
        **measured,
    }
    print(table(measured))
    if file is not None:
        write_record(file, record)
        print(f"wrote {file}")
        if "sides" in record and find_spec("matplotlib"):
            decode_plot(record, file.with_suffix(".png"))
            print(f"wrote {file.with_suffix('.png')}")
    return record


def command(name: str, backbone: str, options: dict) -> str:
    given = [f"--{key}" if value is True else f"--{key} {shown(value)}" for key, value in options.items()]
    return " ".join([shlex.join(["para-jax", "bench", name, "--backbone", str(backbone)]), *given])


def shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table(measured: dict) -> str:
    rows = [(name, f"{value:.1f} {measured['unit']}") for name, value in measured["medians"].items()]
    bytes_of = measured.get("byte_ratios", {})
    for name, value in measured.get("ratios", {}).items():
        rows.append((name, f"{value:.3f}" + (f"   bytes {bytes_of[name]:.3f}" if bytes_of else "")))
    rows += [(f"{name}: equal texts", f"{value:.3f}") for name, value in measured.get("equal_texts", {}).items()]
    for method, values in measured.get("latencies_ms", {}).items():
        rows += [(f"{method}: {name}", f"{value:.0f} ms") for name, value in values.items()]
    rows += [(f"prefill of {n}", f"{v:.0f} ms") for n, v in measured.get("prefill", {}).get("medians", {}).items()]
    for name, value in measured.get("share_of_read", {}).items():
        rows.append((f"{name}: bytes a second, of a read test's", f"{value:.2f}"))
    for name, value in measured.get("share_of_matrix_products", {}).items():
        rows.append((f"{name}: its matrix products alone", f"{value:.2f} of its time"))
    if "within_limit" in measured:
        limit = f"within the weights + {measured['limit_above_weights']:.0f} MB"
        rows.append((limit, "yes" if measured["within_limit"] else "no"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
