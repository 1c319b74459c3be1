"""`para-jax train CONFIG --dry-run --topology v5e:4x4`: a run's step, compiled by the TPU's compiler for a slice that
need not be there. It tells memory, programs and collectives, never speed. Without libtpu: an estimate, labelled so."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from .adapters.adapter import Adapter
from .backbone.kernel_choice import asked_for, attention_kernel
from .backbone.load import abstract_backbone, load_model_config
from .config import SITES, ModelConfig, RunConfig, require
from .data.batches import Batch
from .data.packing import Packed
from .devices import PEAK_FLOPS
from .hlo import Program, collectives_run, describe_program
from .model import init_adapter
from .sharding import RULES, make_mesh, tenants_sharding, tree_shardings
from .training.step import TrainState, init_state, train_step
from .training.tenants import Settings, TenantsState, init_tenants, lay_out, tenants_step

#: Memory of a chip in GiB (cloud.google.com/tpu/docs, the pages of the versions); the compiler keeps some of it.
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
TOO_MUCH = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)G hbm|\(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)G\)")
GIB = 2**30
#: Packed rows are compiled for as many examples as if each had so many tokens.
TOKENS_AN_EXAMPLE = 64


class Compiled(NamedTuple):
    """What the compiler made of a step for one chip of the mesh."""

    program: Program | None
    """None: it does not fit"""
    needed: int
    """bytes"""
    limit: float | None
    """bytes that the compiler gives a program, as far as it said"""
    collectives: dict[str, int]
    """how often each runs a step, loops unrolled"""
    seconds: float


def topology_report(config: RunConfig, topology: str, tenants: int | None = None) -> str:
    """The lines that the dry run prints of a slice such as "v5e:4x4".

    Args:
        tenants: of a run of many (data.tenants, sweep); None: a run of one adapter.

    Raises ValueError for a name, a mesh or rows that can't be.
    """
    kind, chips = parsed_topology(topology)
    try:
        libtpu = version("libtpu")
    except PackageNotFoundError:
        mesh = abstract_mesh(config, chips)
        return "\n".join([*header(config, topology, mesh, tenants), *estimate_lines(config, mesh, kind, tenants)])
    mesh = make_mesh(**vars(config.mesh), devices=topology_devices(topology, chips))
    found = compile_step(config, mesh, tenants)
    return "\n".join([*header(config, topology, mesh, tenants), *compiled_lines(config, mesh, found, libtpu)])


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

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    small = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1)}
    bounds = {"chips_per_host_bounds": small[chips]} if topology.startswith(("v5e", "v6e")) and chips in small else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"--topology: the TPU's compiler does not take {topology!r}: {said[:200]}") from None


def abstract_mesh(config: RunConfig, chips: int) -> AbstractMesh:
    """The mesh of a run over so many devices that nobody has."""
    sizes = vars(config.mesh)
    known = math.prod(size for size in sizes.values() if size > 0)
    made = {name: size if size > 0 else chips // known for name, size in sizes.items()}
    require(math.prod(made.values()) == chips, "mesh", sizes, f"sizes whose product is the topology's {chips} chips")
    return AbstractMesh(tuple(made.values()), tuple(made), axis_types=(AxisType.Auto,) * 3)


# ------------------------------------------------------------------------------------------------------------- the step


def compile_step(config: RunConfig, mesh: Mesh, tenants: int | None = None) -> Compiled:
    """The run's own training step for its longest rows, compiled; that of so many tenants, where they are given."""
    static: dict[str, Any] = dict(completion=config.data.max_seq_length, config=config.train)
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        if tenants is None:
            lowered = train_step.lower(*step_arguments(config, mesh), **static, total_steps=1000)
        else:
            lowered = tenants_step.lower(*tenants_arguments(config, mesh, tenants), **static)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            match = TOO_MUCH.search(str(error))
            if match is None:
                raise
            used, unit, limit = match.groups()[:3] if match[1] else match.groups()[3:]
            needed = float(used) * (GIB if unit == "G" else 2**20)
            return Compiled(None, int(needed), float(limit) * GIB, {}, time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    program = describe_program(compiled)
    return Compiled(program, program.memory, None, collectives_run(compiled.as_text() or ""), seconds)


def step_arguments(config: RunConfig, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Any, Batch | Packed]:
    """The abstract arguments of train_step as a run on this mesh would hand them over, shardings included."""
    model_config = load_model_config(config.backbone.source)
    fresh = jax.eval_shape(lambda: init_adapter(config.adapter, model_config))
    state = jax.eval_shape(lambda adapter: init_state(adapter, config.train, 1000), fresh)
    adapter_shardings = tree_shardings(fresh, mesh, model_config)

    def placed(node):
        """An adapter, or moments of its shape, as the adapter lies; counters everywhere."""
        if isinstance(node, Adapter):
            return jax.tree.map(with_sharding, node, adapter_shardings)
        return with_sharding(node, sharded(mesh))

    state = jax.tree.map(placed, state, is_leaf=lambda node: isinstance(node, Adapter))
    return state, abstract_model(config, mesh), abstract_batch(config, mesh, batch_rows(config, mesh))


def tenants_arguments(
    config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int
) -> tuple[TenantsState, Any, Batch | Packed, jax.ShapeDtypeStruct, Settings]:
    """The abstract arguments of tenants_step as a run of so many tenants would hand them over, shardings included."""
    layout = lay_out(config, tenants, mesh)
    model_config = load_model_config(config.backbone.source)
    fresh = jax.eval_shape(lambda: init_adapter(config.adapter, model_config))
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layout.slots, *leaf.shape), leaf.dtype), fresh)
    state = jax.eval_shape(partial(init_tenants, config=config.train), stack)
    state = jax.tree.map(partial(with_sharding, sharding=tenants_sharding(layout.slots, mesh)), state)
    batch = abstract_batch(config, mesh, layout.groups * layout.rows)

    def whole(dtype, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharded(mesh))

    settings = Settings(*(whole(dtype, layout.slots) for dtype in (jnp.float32, jnp.int32, jnp.int32)))
    return state, abstract_model(config, mesh), batch, whole(jnp.int32, layout.passes, layout.groups), settings


def abstract_model(config: RunConfig, mesh: Mesh | AbstractMesh) -> Any:
    dtype = jnp.dtype(config.backbone.dtype or "bfloat16")
    model_config = load_model_config(config.backbone.source)
    quantize, attention = config.backbone.quantize, config.backbone.attention
    return abstract_backbone(model_config, dtype, mesh, layout="stacked", quantize=quantize, attention=attention)


def abstract_batch(config: RunConfig, mesh: Mesh | AbstractMesh, rows: int) -> Batch | Packed:
    """A step's batch, so many rows a pass."""
    lead = (config.train.gradient_accumulation_steps, rows)
    whole, one = (config.data.max_seq_length,), (packed_examples(config),) if config.data.packing else ()
    kind, shapes = (Packed, (whole, whole, one, one, one, whole)) if config.data.packing else (Batch, (whole, one, one))
    over = sharded(mesh, None, RULES["batch"])
    arrays: list[Any] = [jax.ShapeDtypeStruct((*lead, *shape), jnp.int32, sharding=over) for shape in shapes]
    return kind(*arrays)


def sharded(mesh: Mesh | AbstractMesh, *axes) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))  # pyright: ignore[reportArgumentType]


def packed_examples(config: RunConfig) -> int:
    """Examples that a packed row is taken to hold, where the data isn't read."""
    return max(1, config.data.max_seq_length // TOKENS_AN_EXAMPLE)


def with_sharding(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def batch_rows(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Rows of one pass, over all chips."""
    return config.train.per_device_batch_size * mesh.shape["data"] * mesh.shape["fsdp"]


# ------------------------------------------------------------------------------------------------------------ the lines


def header(config: RunConfig, topology: str, mesh: Mesh | AbstractMesh, tenants: int | None = None) -> list[str]:
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    passes, longest = config.train.gradient_accumulation_steps, config.data.max_seq_length
    model = load_model_config(config.backbone.source)
    layout = None if tenants is None else lay_out(config, tenants, mesh)
    rows = layout.groups * layout.rows if layout else batch_rows(config, mesh)
    tokens = rows * passes * longest
    flops = 4 * matrix_weights(model) * tokens / mesh.size
    kernel, why = run_kernel(config, model)
    return [
        f"slice      {topology}: {mesh.size} chips; mesh {sizes}",
        f"a step     {passes} x {rows} rows of {longest} tokens, any of them completion; "
        f"remat {config.train.remat}" + (f"; packed, {packed_examples(config)} examples a row" * config.data.packing),
        f"attention  {kernel} ({why})",
        f"FLOPs      {flops / 1e12:.1f} T a chip and step: 4 a weight of the matrix products and token, attention not "
        "counted",
        *([tenants_line(config, mesh, tenants)] if tenants else []),
    ]


def tenants_line(config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int) -> str:
    """What the tenants of a run add to a chip's memory, and how they are spread."""
    layout = lay_out(config, tenants, mesh)
    state = tenants_arguments(config, mesh, tenants)[0]
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / layout.slots
    spread = layout.slots // tenants_sharding(layout.slots, mesh).shard_shape((layout.slots,))[0]
    uneven = f", for the mesh's {mesh.size} do not divide {layout.slots}" if spread < mesh.size else ""
    return (
        f"tenants    {tenants}, {layout.slots} at once; {layout.groups} of {layout.rows} rows each in a pass; weights "
        f"and optimiser state {each / 1e6:.1f} MB a tenant, {each / spread / 1e6:.2f} MB a tenant and chip, "
        f"{shard_bytes(state) / GIB:.2f} GiB a chip (spread over {spread} chips{uneven})"
    )


def compiled_lines(config: RunConfig, mesh: Mesh, found: Compiled, libtpu: str) -> list[str]:
    by = f"compiled by libtpu {libtpu} in {found.seconds:.0f} s"
    if found.program is None:
        assert found.limit
        over = (found.needed - found.limit) / GIB
        needed = f"{found.needed / GIB:.2f} of {found.limit / GIB:.2f} GiB"
        return [f"HBM        a chip needs {needed}: {over:.2f} GiB too much; {by}"]
    program = found.program
    parts = {"arguments": program.arguments, "temporaries": program.temporaries, "outputs": program.outputs}
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    run = ", ".join(f"{count} {name}" for name, count in found.collectives.items()) or "none"
    return [
        f"HBM        a chip needs {program.memory / GIB:.2f} GiB: it fits ({shown}; {by})",
        f"collectives a step: {run}",
    ]


def estimate_lines(config: RunConfig, mesh: AbstractMesh, kind: str, tenants: int | None = None) -> list[str]:
    """What can be known without the compiler: the arguments exactly, the rest by its largest parts."""
    made = step_arguments(config, mesh) if tenants is None else tenants_arguments(config, mesh, tenants)
    state, model = made[:2]
    model_config = load_model_config(config.backbone.source)
    arguments = shard_bytes(state) + shard_bytes(model)
    temporaries = activation_bytes(config, model_config, mesh)
    if isinstance(state, TenantsState):
        temporaries += shard_bytes(state.adapters)  # the gradient of all tenants
    total = arguments + temporaries
    room = CHIP_GIB[kind]
    verdict = "it should fit" if total < 0.9 * room * GIB else "it may not fit" if total < room * GIB else "too much"
    return [
        f"HBM        ESTIMATE, not compiled: a chip needs about {total / GIB:.2f} of {room} GiB: {verdict} (arguments "
        f"{arguments / GIB:.2f}, kept activations and one layer at work {temporaries / GIB:.2f})",
        "           for the compiler's own numbers: pip install 'para_jax[aot]'",
    ]


def run_kernel(config: RunConfig, model: ModelConfig) -> tuple[str, str]:
    """The attention kernel of a run's longest rows on a TPU, and why it is that one."""
    dtype, choice = config.backbone.dtype or "bfloat16", asked_for(config.backbone.attention)
    return attention_kernel(model, config.data.max_seq_length, dtype, "tpu", choice, packed=config.data.packing)


def shard_bytes(tree) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def activation_bytes(config: RunConfig, model: ModelConfig, mesh: AbstractMesh) -> int:
    """What the backward pass keeps of each layer, one layer's attention and linears, and a chunk of the logits."""
    rows, tokens = config.train.per_device_batch_size, config.data.max_seq_length
    size = jnp.dtype(config.backbone.dtype or "bfloat16").itemsize
    linears = sum(map(model.site_width, SITES)) / mesh.shape["tensor"]
    kept = model.width + (0 if config.train.remat == "block" else linears)
    kernel, _ = run_kernel(config, model)
    scores = 4 * rows * model.num_heads / mesh.shape["tensor"] * tokens * tokens * (kernel == "plain")
    at_work = 2 * scores + 3 * rows * tokens * linears * size + 2**28
    return int(rows * tokens * kept * size * model.num_layers + at_work)


def matrix_weights(model: ModelConfig) -> int:
    """Weights that tokens are multiplied by: the linears of all layers; the head works on few positions."""
    return model.num_layers * sum(model.site_input_width(site) * model.site_width(site) for site in SITES)


def peak_rate(model: ModelConfig, used: Sequence[Any]) -> float | None:
    """Tokens a second if these devices did nothing but the backbone's matrix products, at their peak: 2 FLOPs a weight
    and token forwards, 2 backwards (to the activations; the weights are frozen). None for an unknown device."""
    peak = PEAK_FLOPS.get(used[0].device_kind)
    return peak and peak * len(used) / (4 * matrix_weights(model))
