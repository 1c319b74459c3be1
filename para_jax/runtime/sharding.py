"""The device mesh, and the only table from axis names to mesh axes (RULES). No layer mentions a mesh: parameters carry
axis names, activations pass through `constrain`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from itertools import combinations
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Given = ParamSpec("Given")
Made = TypeVar("Made")

#: Axis names to mesh axes. Parameters are split by `tensor` along heads, hidden width and vocabulary and by `fsdp`
#: along the residual width; activations by (data, fsdp) along the batch. All other axes are replicated.
RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor. One size may be -1: all remaining devices.

    Raises ValueError if there are too few devices, or if a run of several processes would leave some of them out.

    >>> dict(make_mesh(tensor=2).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 2}
    """
    must_use_all = devices is None and jax.process_count() > 1  # a process without a device would wait forever
    devices = jax.devices() if devices is None else list(devices)
    asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
    sizes = mesh_sizes(asked, len(devices), must_use_all)
    if sizes is None:
        raise ValueError(
            f"mesh {asked} does not fit {len(devices)} devices; choose sizes whose product is {len(devices)}"
        )
    total = math.prod(sizes.values())
    arranged = arrange(tuple(sizes.values()), devices[:total])
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(asked: dict[str, int], devices: int, must_use_all: bool = True) -> dict[str, int] | None:
    """The sizes with -1 filled in; None if they do not fit this number of devices. With a size of -1 they must always
    use every device."""
    known = math.prod(size for size in asked.values() if size != -1)
    if known < 1 or list(asked.values()).count(-1) > 1:  # 0, or two that are open
        return None
    sizes = {name: devices // known if size == -1 else size for name, size in asked.items()}
    total = math.prod(sizes.values())
    # A part of the devices may be asked for, but not by -1.
    part = not must_use_all and -1 not in asked.values()
    return sizes if total == devices or (part and 0 < total < devices) else None


def arrange(sizes: tuple[int, ...], devices: list) -> np.ndarray:
    """The devices in the shape of the mesh. On a TPU, neighbours in the mesh are neighbours in the slice, as far as JAX
    finds such an order (an axis of the mesh may use a part of an axis of the slice). Devices that do not form a box of
    a slice keep their order. The order affects the speed but no result."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        return np.asarray(devices, dtype=object).reshape(sizes)


def mesh_of(model) -> Mesh | None:
    """The mesh that a model's weights were loaded over; None if there is none."""
    sharding = getattr(next(iter(jax.tree.leaves(model)), None), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def using(mesh: Mesh | None) -> AbstractContextManager:
    """A context in which `mesh` is the current one, in this thread. Without one, or if one is current already, it
    changes nothing."""
    return nullcontext() if mesh is None or not jax.sharding.get_mesh().empty else jax.set_mesh(mesh)


def on_its_mesh(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function of `model` and more, computed on the mesh that the model's weights were loaded over."""

    @wraps(function)
    def on_mesh(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with using(mesh_of(args[0] if args else kwargs.get("model"))):
            return function(*args, **kwargs)

    return on_mesh


def traced_on_its_mesh(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function of `model` and more, traced for the mesh that the model's weights were loaded over. It makes no arrays
    of its own on the mesh. So it can be called inside `jax.grad`, which a function that is `on_its_mesh` can't."""

    @wraps(function)
    def on_mesh(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        known = not jax.sharding.get_abstract_mesh().empty
        mesh = None if known else mesh_of(args[0] if args else kwargs.get("model"))
        with nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x, sharded over the current mesh (`jax.set_mesh`) by the names of its axes. Without a mesh, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh.shape))


def zeros(shape: tuple[int, ...], dtype, axes: tuple[str | None, ...]) -> jax.Array:
    """Zeros, sharded as `constrain` would, without a copy on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.zeros(shape, dtype)
    return jnp.zeros(shape, dtype, device=NamedSharding(mesh, partition(axes, shape, mesh.shape)))


def gather_fsdp(weights: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight with these axis names, gathered over `fsdp`. It stays split over `tensor`."""
    return constrain(weights, tuple(None if name and RULES.get(name) == "fsdp" else name for name in axes))


def partition(axes: tuple[str | None, ...], counts: tuple[int, ...], mesh_shape) -> PartitionSpec:
    """The PartitionSpec of an array with these axis names. An axis is replicated where the mesh does not divide its
    count (for an axis of heads: the number of heads, not their total width)."""

    def mesh_axes(name: str | None, count: int):
        wanted = RULES.get(name) if name else None
        if wanted is None:
            return None
        size = math.prod(mesh_shape[axis] for axis in ((wanted,) if isinstance(wanted, str) else wanted))
        return wanted if count % size == 0 else None  # no head is cut in two

    return PartitionSpec(*map(mesh_axes, axes, counts))


def shard_sizes(axes: tuple[str | None, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one device's shard of an array with these axis names and sizes, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return counts
    return NamedSharding(mesh, partition(axes, counts, mesh.shape)).shard_shape(counts)


def tree_shardings(tree, mesh: Mesh | AbstractMesh, config):
    """The NamedSharding of every array, as a tree like `tree` (NNX modules with `axes` on their parameters).

    Leading axes without a name, which stacking layers or tenants adds, are replicated.
    Raises ValueError for a mesh that is not like those of `make_mesh`.
    """
    if {*mesh.axis_names} != {"data", "fsdp", "tensor"} or AxisType.Explicit in mesh.axis_types:
        raise ValueError(f"{mesh}: para_jax needs the axes data, fsdp and tensor (Auto); use para_jax.make_mesh")

    def one(variable):
        return variable.replace(NamedSharding(mesh, partition(*named_axes(variable, config), mesh.shape)))  # pyright: ignore[reportArgumentType]

    return jax.tree.map(one, tree, is_leaf=is_variable)


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def with_sharding(leaf, sharding) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, with this sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def named_axes(variable, config) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """The names of a parameter's axes (None for the leading axes of a stack), and the counts that the mesh must divide:
    the number of heads for an axis of heads, else the size."""
    shape = variable.get_value().shape
    counts: dict[Any, Any] = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    names: tuple[str | None, ...] = (None,) * (len(shape) - len(variable.axes)) + tuple(variable.axes)
    return names, tuple(counts.get(name, size) for name, size in zip(names, shape, strict=True))


def replicated_lines(tree, mesh: Mesh | AbstractMesh, config) -> list[str]:
    """One line for each mesh axis that does not divide some axes of the parameters, which every device then holds
    whole. Empty if every parameter is split according to RULES.

    Args:
        tree: as for tree_shardings; abstract arrays (jax.ShapeDtypeStruct) are enough.
    """
    unsplit: dict[str, set[str]] = {}
    for variable in jax.tree.leaves(tree, is_leaf=is_variable):
        names, counts = named_axes(variable, config)
        for name, count, over in zip(names, counts, partition(names, counts, mesh.shape), strict=True):
            if name in RULES and over is None:
                unsplit.setdefault(str(RULES[name]), set()).add(f"{name} {count}")
    return [
        f"mesh.{axis}={mesh.shape[axis]} does not divide {', '.join(sorted(unsplit[axis]))}: not split over it"
        for axis in mesh.shape
        if axis in unsplit
    ]


def place(tree, mesh: Mesh, config):
    """The tree with its arrays sharded over the mesh."""
    return jax.device_put(tree, tree_shardings(tree, mesh, config))


def tenant_axes(tenants: int, mesh_shape) -> tuple[str, ...]:
    """The mesh axes over which a stack of this many tenants is sharded: those with the most devices whose number
    divides the number of tenants."""
    choices = [axes for count in range(len(mesh_shape), -1, -1) for axes in combinations(mesh_shape, count)]
    devices = {axes: math.prod(mesh_shape[axis] for axis in axes) for axes in choices}
    return max((axes for axes in choices if tenants % devices[axes] == 0), key=lambda axes: devices[axes])


def tenants_sharding(tenants: int, mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(tenant_axes(tenants, mesh.shape) or None))  # pyright: ignore[reportArgumentType]


def tenants_shardings(tree, mesh: Mesh | AbstractMesh, config):
    """The NamedSharding of every array of a tree whose arrays lead with the tenants (a TrainState, a stack's adapters).
    Tenants are spread over the mesh as far as its devices divide their number. A single tenant's arrays are split by
    the names of their axes, as `tree_shardings` says."""

    def one(node):
        if is_variable(node) and node.get_value().shape[0] == 1:
            return node.replace(NamedSharding(mesh, partition(*named_axes(node, config), mesh.shape)))  # pyright: ignore[reportArgumentType]
        return jax.tree.map(lambda leaf: tenants_sharding(leaf.shape[0], mesh), node)

    return jax.tree.map(one, tree, is_leaf=is_variable)


def place_tenants(tree, mesh: Mesh, config):
    """The tree, sharded over the mesh as `tenants_shardings` says. train_step keeps this sharding."""
    return jax.device_put(tree, tenants_shardings(tree, mesh, config))


def constrain_tenants(tree, axis: int = 0):
    """The tree, constrained to the sharding of place_tenants on the current mesh. Returns the tree itself without a
    mesh, and for a single tenant, whose arrays keep their sharding.

    Args:
        axis: that of the tenants.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def one(leaf):
        if leaf.shape[axis] == 1:  # split by its axis names, as place_tenants has placed it
            return leaf
        spec = tenants_sharding(leaf.shape[axis], mesh).spec
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*[None] * axis, *spec))

    return jax.tree.map(one, tree)


def replicate(tree):
    """The tree, constrained to be replicated on every device of the current mesh. Without a mesh, the tree itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def shard_rows(array, axes: tuple[str | None, ...] = (None, "batch")) -> jax.Array:
    """An array of a batch [passes, rows, ...], its rows sharded over (data, fsdp) of the current mesh. Every process
    passes the full array and copies the shards of its own devices.

    Args:
        axes: the names of its first axes, where they are others. That of the rows is "batch".

    Raises ValueError if the mesh does not divide the rows.
    """
    mesh = jax.sharding.get_mesh()
    rows, devices = array.shape[axes.index("batch")], mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        raise ValueError(
            f"a batch of {rows} rows does not divide evenly over mesh.data x mesh.fsdp = {devices} devices; "
            "use a multiple"
        )
    array, sharding = np.asarray(array), NamedSharding(mesh, partition(axes, array.shape[: len(axes)], mesh.shape))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
