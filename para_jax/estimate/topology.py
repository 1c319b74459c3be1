"""`para-jax train CONFIG --dry-run --topology v5e:4x4`: a run's step, compiled by the TPU's compiler for a slice that
need not exist. It reports the memory of a chip. Without libtpu that is an estimate, and labelled as one."""

from __future__ import annotations

import math
import os
import re
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from ..backbone.load import load_model_config
from ..config import RunConfig
from ..io.checks import require
from ..runtime.sharding import make_mesh, mesh_sizes, replicated_lines, tenants_sharding
from ..training.passes import lay_out
from ..training.step import train_step
from .longest_row import examples_in_row, kernel_of_run, longest_split
from .memory import (
    CHIP_GIB,
    GIB,
    USABLE,
    abstract_mesh,
    abstract_model,
    choose_mesh,
    describe_mesh,
    estimate_memory,
    shard_bytes,
    step_arguments,
    tree_size,
)

TOO_MUCH = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)G hbm|\(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)G\)")


class ProgramMemory(NamedTuple):
    """Bytes on one chip of the mesh."""

    arguments: int
    """padding included"""
    outputs: int
    """that do not reuse a donated argument"""
    temporaries: int
    code: int


class Compiled(NamedTuple):
    """What the compiler made of a program for one chip of the mesh."""

    memory: ProgramMemory | None
    """None: it does not fit"""
    needed: int
    """bytes"""
    limit: float | None
    """bytes that the compiler allows a program that does not fit"""
    seconds: float
    """that the compiler took"""
    program: jax.stages.Compiled | None = None

    @property
    def fits(self) -> bool:
        return self.memory is not None


def topology_report(config: RunConfig, topology: str, tenants: int = 1) -> str:
    """The lines that the dry run prints for a slice such as "v5e:4x4".

    Args:
        tenants: how many a run of many trains (data.tenants, sweep).

    Raises ValueError for a name, a mesh or rows that don't fit.
    """
    kind, chips = parsed_topology(topology)
    chosen = choose_mesh(config, chips, CHIP_GIB[kind] * GIB, tenants)
    sizes = mesh_sizes(chosen.sizes, chips)
    expected = f"sizes whose product is the topology's {chips} chips, such as data={chips}, or data=1 and fsdp={chips}"
    require(sizes is not None, "mesh", chosen.sizes, expected)
    assert sizes
    why = [f"mesh       {chosen.why}"] if chosen.why else []
    try:
        libtpu = version("libtpu")
    except PackageNotFoundError:
        mesh = abstract_mesh(sizes)
        head = header(config, topology, mesh, tenants)
        return "\n".join([head[0], *why, *head[1:], *estimate_lines(config, mesh, kind, tenants)])
    mesh = make_mesh(**sizes, devices=topology_devices(topology, chips))
    head = header(config, topology, mesh, tenants)
    return "\n".join([head[0], *why, *head[1:], compiled_line(compile_step(config, mesh, tenants), libtpu)])


def parsed_topology(topology: str) -> tuple[str, int]:
    """The kind of a slice's chips, and how many there are."""
    match = re.fullmatch(r"(v\d\w*):(\d+(?:x\d+){1,2})", topology)
    known = bool(match) and match[1] in CHIP_GIB
    require(known, "--topology", topology, f"a kind of {', '.join(CHIP_GIB)} and its shape, such as v5e:4x4")
    assert match
    return match[1], math.prod(map(int, match[2].split("x")))


def topology_devices(topology: str, chips: int):
    """The devices of a slice, as its compiler sees them; JAX itself stays on the CPU."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a server that only TPU hosts have
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two dry runs at once are harmless
    small = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1)}
    options: dict[str, Any] = {}
    if topology.startswith(("v5e", "v6e")) and chips in small:
        options["chips_per_host_bounds"] = small[chips]
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # one device per chip, as on real v4 slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--topology: the TPU's compiler does not take {topology!r}; choose another slice ({said[:200]})"
        ) from None


# ------------------------------------------------------------------------------------------------------------- the step


def compile_step(config: RunConfig, mesh: Mesh, tenants: int = 1, *, split: tuple[int, int] | None = None) -> Compiled:
    """The run's own training step for its longest rows, compiled.

    Args:
        split: the maximum number of prompt tokens, and of completion tokens, in a row; default: `longest_split`.
    """
    prompt, completion = split or longest_split(config)
    static: dict[str, Any] = dict(completion=completion, prompt=prompt, config=config.train)
    with jax.set_mesh(mesh):
        return ask_compiler(train_step.lower(*step_arguments(config, mesh, tenants), **static))


def ask_compiler(lowered: jax.stages.Lowered) -> Compiled:
    """What the compiler makes of a program."""
    begun = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        match = TOO_MUCH.search(str(error))
        if match is None:
            raise
        used, unit, limit = match.groups()[:3] if match[1] else match.groups()[3:]
        needed = float(used) * (GIB if unit == "G" else 2**20)
        return Compiled(None, int(needed), float(limit) * GIB, time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    sizes: Any = compiled.memory_analysis()
    memory = ProgramMemory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,  # donated arguments are counted once
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    return Compiled(memory, sum(memory), None, seconds, compiled)


# ------------------------------------------------------------------------------------------------------------ the lines


def header(config: RunConfig, topology: str, mesh: Mesh | AbstractMesh, tenants: int = 1) -> list[str]:
    layout, longest = lay_out(config, mesh, tenants), config.data.assumed_length
    rows = f"{layout.passes} x {layout.pass_rows} rows of {longest} tokens{config.data.assumed}"
    model, (_, completion) = load_model_config(config.backbone.source), longest_split(config)
    completions = "any" if completion == longest else f"up to {completion}"
    kernel, why = kernel_of_run(config, model)
    return [
        f"slice      {topology}: {mesh.size} chips; mesh {describe_mesh(mesh)}",
        f"a step     {rows}, {completions} of them completion; "
        f"remat {config.train.remat}" + (f"; packed, {examples_in_row(config)} examples per row" * config.data.packing),
        f"attention  {kernel} ({why})",
        *([tenants_line(config, mesh, tenants)] if config.many else []),
        *(f"not split  {line}" for line in replicated_lines(abstract_model(config, mesh), mesh, model)),
    ]


def tenants_line(config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int) -> str:
    """How much memory the tenants of a run take on a chip, and how they are spread."""
    layout = lay_out(config, mesh, tenants)
    state = step_arguments(config, mesh, tenants)[0]
    each = tree_size(state) / layout.slots
    spread = layout.slots // tenants_sharding(layout.slots, mesh).shard_shape((layout.slots,))[0]
    uneven = ""
    if spread < mesh.size:
        uneven = f", because {mesh.size} chips do not divide {layout.slots} tenants"
    return (
        f"tenants    {tenants}, {layout.slots} at once; {layout.groups} of {layout.rows} rows each in a pass; weights "
        f"and optimiser state {each / 1e6:.1f} MB per tenant, {each / spread / 1e6:.2f} MB per tenant and chip, "
        f"{shard_bytes(state) / GIB:.2f} GiB per chip (spread over {spread} chips{uneven})"
    )


def compiled_line(found: Compiled, libtpu: str) -> str:
    by = f"compiled by libtpu {libtpu} in {found.seconds:.0f} s"
    if found.memory is None:
        assert found.limit
        over = (found.needed - found.limit) / GIB
        needed = f"{found.needed / GIB:.2f} of {found.limit / GIB:.2f} GiB"
        return f"HBM        for a training step a chip needs {needed}: {over:.2f} GiB too much; {by}"
    parts = ", ".join(
        f"{name} {getattr(found.memory, name) / GIB:.2f}" for name in ("arguments", "temporaries", "outputs")
    )
    return f"HBM        for a training step a chip needs {found.needed / GIB:.2f} GiB: it fits ({parts}; {by})"


def estimate_lines(config: RunConfig, mesh: AbstractMesh, kind: str, tenants: int) -> list[str]:
    """What can be known without the compiler: the arguments exactly, the rest by its largest parts."""
    found = estimate_memory(config, mesh, tenants)
    total = found.total
    room = CHIP_GIB[kind]
    verdict = "it should fit" if total < USABLE * room * GIB else "it may not fit" if total < room * GIB else "too much"
    return [
        f"HBM        ESTIMATE, not compiled: for a training step a chip needs about {total / GIB:.2f} of {room} GiB: "
        f"{verdict} (arguments {found.arguments / GIB:.2f}, kept activations and one layer at work "
        f"{found.temporaries / GIB:.2f})",
        "           for the compiler's own numbers: pip install 'para_jax[aot]'",
    ]
