"""The TPU's compiler, for tests of what it makes of a program; there need be no TPU."""

from para_jax.topology import parsed_topology, topology_devices


def tpu_devices(topology="v5e:2x2"):
    return topology_devices(topology, parsed_topology(topology)[1])
