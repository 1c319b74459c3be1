"""Compares the counts of two compiled programs; scripts/experiments/tpu_compile.py and the tests use it."""

from para_jax.dry_run.hlo_counts import Program


def excess(program: Program, base: Program, *, bytes_share: float) -> list[str]:
    """One line for each count in which `program` exceeds `base`: fusions, matrix products, collectives, and bytes
    accessed beyond a share of the base's (0.005: half a percent). Empty if the program costs no more."""
    counts = {
        "fusions": (sum(program.fusions.values()), sum(base.fusions.values())),
        "matrix products": (program.products, base.products),
        "collectives": (sum(program.collectives.values()), sum(base.collectives.values())),
    }
    lines = [f"{more} {name}, base {fewer}" for name, (more, fewer) in counts.items() if more > fewer]
    if program.bytes_accessed > base.bytes_accessed * (1 + bytes_share):
        lines.append(f"{program.bytes_accessed:.12g} bytes accessed, base {base.bytes_accessed:.12g}")
    return lines
