"""What the command line says when a device, or the machine, runs out of memory."""

from __future__ import annotations

SMALLER_MODEL = "--quantize int8, or --tensor-parallel-size on several chips, needs less for the backbone"
ADVICE = {
    "train": "lower train.per_device_batch_size, or set train.remat=block (docs/training.md#if-it-does-not-fit)",
    "evaluate": f"lower --rows; {SMALLER_MODEL}",
    "generate": f"lower --slots or --max-length; {SMALLER_MODEL}",
    "serve": f"lower --slots, --max-length or --capacity; {SMALLER_MODEL}",
}


def out_of_memory(error: Exception, command: str | None) -> str | None:
    """Two lines for the user; None for any other error, and for one of a chip's small vector memory, which is a fault
    of a program and not of its sizes.

    Args:
        error: JAX's has the status RESOURCE_EXHAUSTED, both where a program is compiled and where it runs.
    """
    _, exhausted, said = str(error).partition("RESOURCE_EXHAUSTED: ")
    if isinstance(error, MemoryError):
        said = str(error)
    elif not exhausted or "vmem" in said:
        return None
    reason = said.strip().partition("\n")[0] or "an allocation failed"
    return f"out of memory: {reason}\n{ADVICE.get(command or '', 'give smaller sizes, or a device with more memory')}"
