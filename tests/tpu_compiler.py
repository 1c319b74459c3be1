"""The devices of a TPU slice that need not be there, for tests that read what its compiler makes of a program."""

from para_jax.topology import parsed_topology, topology_devices


def tpu_devices(topology: str = "v5e:2x2"):
    return topology_devices(topology, parsed_topology(topology)[1])
