"""Flags of XLA for tests, also for the processes that they start.

Tests compile many small programs and run each once: the compiler's optimisations cost more than they save.
"""

import os
import threading
from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"

#: Compiles in half the time. JAX 0.11 and libtpu lack this flag, and XLA ends a process for a flag that it lacks.
OLD_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""


def reuse_contexts() -> None:
    """Makes JAX 0.10 lower several programs in a row in one MLIR context, as JAX 0.12 does. Making a context takes
    longer than lowering a small program in it."""
    if not OLD_EMITTERS:
        return
    from jax._src.interpreters import mlir

    make, kept = mlir.make_ir_context, threading.local()

    def reused():
        context, uses = getattr(kept, "context", (None, 10))
        kept.context = (context, uses + 1) if uses < 10 else (make(), 0)
        return kept.context[0]

    mlir.make_ir_context = reused


def own_flags() -> dict[str, str]:
    """What makes a process that is started here compile as this one does, bit for bit."""
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + OLD_EMITTERS}


#: `compiler_options` for a test that looks at the program that users get.
USERS_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if OLD_EMITTERS else {}
