"""What a training run keeps on each device, from shapes alone: its abstract arguments, an estimate of its memory, and
the mesh that this memory requires."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ..adapters.methods import method_of
from ..backbone.load import abstract_backbone, load_model_config
from ..config import SITES, ModelConfig, RunConfig
from ..data.batches import Batch
from ..data.packing import Packed
from ..io.messages import say
from ..model.adapted import init_adapter
from ..model.tail import keeps_stream
from ..runtime.processes import on_every_process, on_first_process
from ..runtime.sharding import RULES, make_mesh, mesh_sizes, tenants_shardings, tree_shardings, with_sharding
from ..training.loss import CHUNK
from ..training.optimizer import LearningRates
from ..training.passes import Layout, batch_devices, lay_out
from ..training.step import TrainState, init_state
from .longest_row import examples_in_row, kernel_of_run, parts_of_row

#: Memory of a chip in GiB (cloud.google.com/tpu/docs, the pages of the versions). The compiler reserves some of it.
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
#: The same by device_kind, for a device that does not report its memory.
KIND_GIB = {f"TPU {kind}": gib for kind, gib in CHIP_GIB.items()}
KIND_GIB |= {"TPU v5 lite": CHIP_GIB["v5e"], "TPU v5": CHIP_GIB["v5p"], "TPU v6 lite": CHIP_GIB["v6e"]}
GIB = 2**30
#: The share of a device's memory that an estimate may take.
USABLE = 0.9
#: What the backward pass keeps of a layer by train.remat, in outputs of its linears (none: compiled for v5e).
KEPT_LINEARS = {"block": 0, "dots": 1, "none": 2.2}
#: How often an evaluation holds its caches at once: the prefill makes them layer by layer, and decoding stacks them.
CACHE_COPIES = 3


# ------------------------------------------------------------------------------------------------------------- the mesh


class MeshChoice(NamedTuple):
    sizes: dict[str, int]
    """data, fsdp and tensor, as make_mesh takes them"""
    why: str
    """a sentence; empty where there was nothing to choose"""
    fits: bool = True
    """by the estimate; True where the memory is not known"""


def run_mesh(config: RunConfig, tenants: int = 1) -> Mesh:
    """The mesh of a run on this machine's devices. A logged line says which one it is and why.

    Args:
        tenants: how many the run trains; 1 for a run of one adapter.

    Raises ValueError for sizes that do not fit the devices.
    """
    several, config = jax.process_count() > 1, with_own_kernel(config)
    room = on_first_process(lambda: device_memory(jax.local_devices()[0]))
    found = on_every_process(lambda: choose_mesh(config, jax.device_count(), room, tenants, all_of_them=several))
    mesh = make_mesh(**found.sizes)
    if mesh.size > 1 or jax.device_count() > 1 or not found.fits:
        idle = jax.device_count() - mesh.size
        left = f"{idle} of {jax.device_count()} devices are not used" if idle else ""
        say(". ".join(filter(None, [f"mesh: {describe_mesh(mesh)}", found.why, left])))
    return mesh


def with_own_kernel(config: RunConfig) -> RunConfig:
    """The config, with the kernel of this machine's GPU for the run's rows. Estimates take `auto` for that of a TPU,
    which also stores no scores where the rows' tails attend (scope response)."""
    if jax.default_backend() != "gpu" or config.backbone.attention != "auto":
        return config
    name, _ = kernel_of_run(config, load_model_config(config.backbone.source), "gpu")
    return replace(config, backbone=replace(config.backbone, attention=name))


def choose_mesh(
    config: RunConfig, count: int, room: int | None, tenants: int = 1, *, all_of_them: bool = True
) -> MeshChoice:
    """The sizes of a run's mesh over `count` devices. Where the config leaves mesh.fsdp open, it is the smallest with
    which the run fits a device by the estimate. Sizes that the config gives are kept.

    Args:
        room: bytes of one device's memory; None: not known, which makes fsdp 1.
        all_of_them: whether the mesh must use every device.
    """
    asked = vars(config.mesh)
    if config.mesh.fsdp is not None:
        return MeshChoice(asked, "")
    possible = []
    for fsdp in (n for n in range(1, count + 1) if count % n == 0):  # the smallest first
        sizes = mesh_sizes(asked | {"fsdp": fsdp}, count, all_of_them)
        # Other sizes can't divide the batch.
        if sizes and (config.train.batch_size or 0) % (sizes["data"] * sizes["fsdp"]) == 0:
            possible.append(sizes)
    if not possible:
        return MeshChoice(asked | {"fsdp": 1}, "")  # make_mesh or step_passes say what is wrong
    if room is None:
        why = "The memory of a device is not known, so mesh.fsdp is 1" if len(possible) > 1 else ""
        return MeshChoice(possible[0], why)
    needs: list[int] = []
    for sizes in possible:
        needs.append(run_bytes(config, abstract_mesh(sizes), tenants))  # sizes after the first that fits are not tried
        if needs[-1] <= USABLE * room:
            break
    return MeshChoice(possible[len(needs) - 1], reason(possible, needs, room), needs[-1] <= USABLE * room)


def reason(possible: list[dict[str, int]], needs: list[int], room: int) -> str:
    """Why the last size that was tried was chosen."""
    first, last = (f"about {need / GIB:.1f} GiB" for need in (needs[0], needs[-1]))
    fsdp, fits = possible[len(needs) - 1]["fsdp"], needs[-1] <= USABLE * room
    memory = f"{room / GIB:.1f} GiB"
    if len(needs) == 1 and fits:
        return f"A device needs {first} of its {memory} (estimate, with evaluations)"
    if not fits:
        return (
            f"With mesh.fsdp={fsdp} a device needs {last} of its {memory} (estimate, with evaluations): it may not fit"
        )
    start = f"With mesh.fsdp={possible[0]['fsdp']} a device would need {first} of its {memory}"
    return f"{start}; with {fsdp}, the smallest that fits, {last} (estimate, with evaluations)"


def describe_mesh(mesh: Mesh | AbstractMesh) -> str:
    return ", ".join(f"{name} {size}" for name, size in mesh.shape.items())


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh over devices that need not exist."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def device_memory(device) -> int | None:
    """Bytes of a device's memory that JAX may use; None for a CPU, and if it is not known."""
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        stats = {}
    return stats.get("bytes_limit") or KIND_GIB.get(device.device_kind, 0) * GIB or None


# --------------------------------------------------------------------------------------------------------- the estimate


class Estimate(NamedTuple):
    """Bytes of one device."""

    arguments: int
    """weights, adapters and optimiser state; exact"""
    temporaries: int
    """kept activations, gradients, one layer at work and a chunk of the logits"""

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def estimate_memory(config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int = 1) -> Estimate:
    """The memory of the training step on each device of a mesh, without a compiler."""
    state, model, *_ = step_arguments(config, mesh, tenants)
    temporaries = activation_bytes(config, load_model_config(config.backbone.source), mesh, tenants)
    # The gradients of a stack are sharded as the stack; those of one adapter are complete on each device for a moment.
    alone = state.step.shape[0] == 1
    temporaries += tree_size(state.adapters) if alone else shard_bytes(state.adapters)
    return Estimate(shard_bytes(state) + shard_bytes(model), temporaries)


def run_bytes(config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int = 1) -> int:
    """Bytes that a whole run needs on each device: those of the training step, or of an evaluation's caches with the
    weights and the state, whichever is more."""
    found = estimate_memory(config, mesh, tenants)
    caches = 0 if config.eval.metric == "loss" and not config.eval.also else cache_bytes(config, mesh)
    return found.arguments + max(found.temporaries, CACHE_COPIES * caches)


def cache_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of the keys and values of one evaluation batch on each device."""
    model = load_model_config(config.backbone.source)
    rows = math.ceil(config.eval.batch_size / batch_devices(mesh))
    tokens = min(config.data.assumed_length + (config.eval.max_new_tokens or 32), model.max_positions)
    split = mesh.shape["tensor"] if model.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    heads = model.num_kv_heads // split
    itemsize = jnp.dtype(config.backbone.dtype or "bfloat16").itemsize
    return 2 * itemsize * model.num_layers * rows * tokens * heads * model.head_dim


def activation_bytes(config: RunConfig, model: ModelConfig, mesh: Mesh | AbstractMesh, tenants: int) -> int:
    """What the backward pass keeps of each layer, one layer's attention and linears, the weights that fsdp has gathered
    (of a layer, and the head's), and a chunk of the logits. With scope response, the backward pass covers the tails
    alone, and needs the prompts' keys and values."""
    dtype, tensor = jnp.dtype(config.backbone.dtype or "bfloat16"), mesh.shape["tensor"]
    rows = lay_out(config, mesh, tenants).pass_rows // batch_devices(mesh)
    linears, remat = sum(map(model.site_width, SITES)) / tensor, config.train.remat
    prompts, trained = parts_of_row(config, model)
    values, score = dtype.itemsize * rows, 4 * rows * model.num_heads / tensor  # bytes of an activation and of a score
    kept = values * trained.tokens * (model.width + KEPT_LINEARS[remat] * linears)
    matrices = method_of(config.adapter).carries == "matrices"
    if remat == "dots" and matrices and not config.many:  # those of one adapter: `dots` keeps their products too
        kept += values * trained.tokens * sum(map(model.site_width, config.adapter.target_modules)) / tensor
    kept += 1.5 * score * trained.scores * (remat == "none")
    at_work = 2 * score * trained.scores + 3 * values * trained.tokens * linears
    if prompts:
        kept += values * prompts.tokens * (model.width if keeps_stream(model, remat) else 2 * model.kv_width / tensor)
        at_work = max(at_work, score * prompts.scores + values * prompts.tokens * linears)
    at_work += 4 * CHUNK
    if mesh.shape["fsdp"] > 1:
        layer = sum(model.site_input_width(site) * model.site_width(site) for site in SITES)
        at_work += (layer + model.vocab_size * model.width) * dtype.itemsize / tensor  # those that are gathered
    return int(kept * model.num_layers + at_work)


def shard_bytes(tree) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree) -> int:
    """Bytes of a tree's arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------------- a step's arguments


def step_arguments(
    config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int = 1
) -> tuple[TrainState, Any, Batch | Packed, jax.ShapeDtypeStruct, LearningRates]:
    """The abstract arguments of train_step as a run on this mesh passes them, shardings included."""
    layout, model_config = lay_out(config, mesh, tenants), load_model_config(config.backbone.source)

    def fresh() -> TrainState:
        adapter = init_adapter(config.adapter, model_config)
        stack = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layout.slots, *leaf.shape)), adapter)
        return init_state(stack, config.train)

    state = jax.eval_shape(fresh)
    state = jax.tree.map(with_sharding, state, tenants_shardings(state, mesh, model_config))

    def replicated(dtype, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharded(mesh))

    rates = LearningRates(*(replicated(dtype, layout.slots) for dtype in (jnp.float32, jnp.int32, jnp.int32)))
    tenant_of_group = replicated(jnp.int32, layout.passes, layout.groups)
    return state, abstract_model(config, mesh), abstract_batch(config, mesh, layout), tenant_of_group, rates


def abstract_adapter(config: RunConfig, mesh: Mesh | AbstractMesh) -> Any:
    """One adapter, shardings included."""
    model_config = load_model_config(config.backbone.source)
    adapter = jax.eval_shape(lambda: init_adapter(config.adapter, model_config))
    return jax.tree.map(with_sharding, adapter, tree_shardings(adapter, mesh, model_config))


def abstract_model(config: RunConfig, mesh: Mesh | AbstractMesh) -> Any:
    dtype = jnp.dtype(config.backbone.dtype or "bfloat16")
    model_config = load_model_config(config.backbone.source)
    quantize, attention = config.backbone.quantize, config.backbone.attention
    return abstract_backbone(model_config, dtype, mesh, layout="stacked", quantize=quantize, attention=attention)


def abstract_batch(config: RunConfig, mesh: Mesh | AbstractMesh, layout: Layout) -> Batch | Packed:
    """A step's batch."""
    lead = (layout.passes, layout.pass_rows)
    tokens = (config.data.assumed_length,)
    if config.data.packing:
        segments = (examples_in_row(config),)
        kind, shapes = Packed, (tokens, tokens, segments, segments, segments, tokens)
    else:
        kind, shapes = Batch, (tokens, (), ())
    over = sharded(mesh, None, RULES["batch"])
    arrays: list[Any] = [jax.ShapeDtypeStruct((*lead, *shape), jnp.int32, sharding=over) for shape in shapes]
    return kind(*arrays)


def sharded(mesh: Mesh | AbstractMesh, *axes) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))  # pyright: ignore[reportArgumentType]
