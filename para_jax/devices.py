"""The machine's devices: what a run prints first, a check for accelerators that JAX does not see, the compilation
cache."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from .config import RuntimeSection
from .hub import cache_folder

#: Peak bfloat16 FLOP/s of one device, dense, by its device_kind. TPUs: the versions' pages at cloud.google.com/tpu/docs
#: ("Peak compute per chip (bf16)"). GPUs: the data sheets at nvidia.com, half of what they state "with sparsity".
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}

#: XLA's flag for runtime.deterministic.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

#: How long a process that ends waits for the others of its run. One that stops alone, by an error, waits in vain.
SHUTDOWN_SECONDS = 30


def start(runtime: RuntimeSection) -> None:
    """Joins the run's other processes, prints the devices and turns the compilation cache on, as the config says.

    Raises ValueError where the others can't be joined, on a machine with an accelerator that this JAX can not use,
    unless runtime.allow_cpu is set, and for runtime.deterministic where a GPU is in use already.
    """
    if runtime.deterministic:
        make_deterministic()
    join(runtime)
    if runtime.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    say(f"devices: {describe_devices()}")
    unused = unused_accelerator()
    if unused and not runtime.allow_cpu:
        kind, extra = unused
        raise ValueError(
            f"this machine has a {kind}, but the installed JAX runs on the CPU only; install its JAX with "
            f"`pip install 'para_jax[{extra}]'`, or set runtime.allow_cpu=true (--allow-cpu where a "
            "command has no config) to run on the CPU"
        )


def make_deterministic() -> None:
    """Makes XLA use only algorithms that give the same bits each time; it comes before the first use of a device.

    On GPUs the flag replaces sums by atomic additions, turns autotuning off (which may choose other kernels in the next
    process) and asks cuDNN for the deterministic backward pass of attention (openxla/xla pull requests 12520, 14125).
    It changes nothing on CPUs and TPUs.
    """
    from jax._src.xla_bridge import backends_are_initialized  # no public function says it

    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in flags.split():
        return
    if not backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()
    elif jax.default_backend() == "gpu":
        raise ValueError(
            "runtime.deterministic: JAX has started its GPU already; set it before the first use of JAX in this "
            f"process, or start the process with XLA_FLAGS={DETERMINISTIC}"
        )


def join(runtime: RuntimeSection) -> None:
    """Joins the processes of a run that is started on several hosts; it comes before the first use of a device.

    Does nothing for a run on one host, and where a program has called jax.distributed.initialize by itself.
    """
    if runtime.coordinator is None or jax.distributed.is_initialized():
        return
    address = None if runtime.coordinator == "auto" else runtime.coordinator
    given = address, runtime.num_processes, runtime.process_id
    try:
        jax.distributed.initialize(*given, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (ValueError, RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"runtime.coordinator {runtime.coordinator}: the other processes can't be joined ({said}); on hosts that "
            "JAX does not know give host:port, runtime.num_processes and runtime.process_id"
        ) from None


def describe_devices() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), JAX {jax.__version__}"


def versions() -> dict[str, str]:
    """The versions that a record of a measurement names."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


def unused_accelerator(root: Path = Path("/")) -> tuple[str, str] | None:
    """The machine's accelerator and the extra that brings its JAX, where JAX sees a CPU only; else None.

    It looks for the device files of the drivers: /dev/accel* or /dev/vfio/* beside a Google PCI device, /dev/nvidia0.
    """
    if jax.default_backend() != "cpu":
        return None
    if any((root / "dev").glob("accel[0-9]*")) or (any((root / "dev/vfio").glob("[0-9]*")) and google_pci_device(root)):
        return "TPU", "tpu"
    if any((root / "dev").glob("nvidia[0-9]*")):
        return "NVIDIA GPU", "cuda"
    return None


def google_pci_device(root: Path) -> bool:
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Shows "compiling ..." while the body, the first call of a compiled function, lasts."""
    begun = time.monotonic()
    say(f"compiling {what} ...")
    yield
    say(f"compiling {what} took {time.monotonic() - begun:.1f} s")


def say(text: str) -> None:
    """A line for the user, on stderr of the first process, beside a progress bar if there is one."""
    if jax.process_index() == 0:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
