"""The TPU's own compiler, which needs no TPU: devices of a slice, to compile a program for and read its text."""

from para_jax.topology import parsed_topology, topology_devices


def tpu_devices(topology: str = "v5e:2x2"):
    """The devices of a slice, as its compiler sees them."""
    return topology_devices(topology, parsed_topology(topology)[1])
