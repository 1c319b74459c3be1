"""Flags of XLA for tests, also for the processes that they start.

Tests compile many small programs and run each once: the compiler's optimisations cost more than they save.
"""

import os
from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"

#: Compiles in half the time. JAX 0.11 and libtpu lack this flag, and XLA ends a process for a flag that it lacks.
OLD_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""


def own_flags() -> dict[str, str]:
    """What makes a process that is started here compile as this one does, bit for bit."""
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + OLD_EMITTERS}


#: `compiler_options` for a test that looks at the program that users get.
USERS_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if OLD_EMITTERS else {}
