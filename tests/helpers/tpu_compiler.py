"""The TPU's compiler on a machine without a TPU."""

from para_jax.estimate.topology import parsed_topology, topology_devices


def tpu_devices(topology: str = "v5e:2x2"):
    """The devices of a slice, for which programs can be compiled but not run."""
    return topology_devices(topology, parsed_topology(topology)[1])
