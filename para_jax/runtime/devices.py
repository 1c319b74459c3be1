"""The devices of this machine: how a process starts to use them, and their peak rates."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from ..config import SITES, ModelConfig, RuntimeSection
from ..io.hub import cache_folder
from ..io.messages import say

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

#: How long a process that ends waits for the others of its run. After an error on one process, they never come.
SHUTDOWN_SECONDS = 30


def start(runtime: RuntimeSection) -> None:
    """Joins the other processes of the run, logs the devices and turns on the compilation cache, as configured.

    With runtime.distributed=given, the calling program has set up JAX, and only the devices are logged and checked.

    Raises ValueError if the other processes can't be joined, if JAX can't use the accelerator of this machine (unless
    runtime.allow_cpu is set), and for runtime.deterministic if a GPU is already in use.
    """
    if runtime.deterministic:
        make_deterministic()
    join(runtime)
    wanted = runtime.compilation_cache and runtime.distributed != "given"
    if wanted and not jax.config.values["jax_compilation_cache_dir"]:  # JAX_COMPILATION_CACHE_DIR wins
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)  # quicker ones are not worth a file
    say(f"devices: {describe_devices()}")
    unused = unused_accelerator()
    if unused and not runtime.allow_cpu:
        kind, extra = unused
        raise ValueError(
            f"the {kind} of this machine is not used: JAX found no driver for it, or could not start it. Run `pip "
            f"install 'para_jax[{extra}]'`. If that is there, another process may use the {kind}, or its driver may be "
            f"too old (JAX_PLATFORMS={extra} shows the error). Or set runtime.allow_cpu=true (--allow-cpu for a "
            "command without a config) to use the CPU"
        )


def make_deterministic() -> None:
    """Makes XLA use only algorithms that give the same bits each time. Call it before the first use of a device.

    On GPUs the flag replaces sums by atomic additions, turns autotuning off (which may choose other kernels in the next
    process) and asks cuDNN for the deterministic backward pass of attention (openxla/xla pull requests 12520, 14125).
    It changes nothing on CPUs and TPUs.
    """
    from jax._src.xla_bridge import backends_are_initialized  # there is no public function for it

    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in flags.split():
        return
    if not backends_are_initialized():  # XLA reads the flags when it starts
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()
    elif jax.default_backend() == "gpu":
        raise ValueError(
            "runtime.deterministic: this process already uses a GPU; set it before the first use of JAX, or start the "
            f"process with XLA_FLAGS={DETERMINISTIC}"
        )


def join(runtime: RuntimeSection) -> None:
    """Joins the processes of a run on several hosts. Call it before the first use of a device.

    Does nothing for a run on one host, and if the program has already called jax.distributed.initialize.
    """
    if runtime.coordinator is None or runtime.distributed != "auto" or jax.distributed.is_initialized():
        return
    address = None if runtime.coordinator == "auto" else runtime.coordinator  # None: JAX asks the cluster
    given = address, runtime.num_processes, runtime.process_id
    say(f"joining the other processes (runtime.coordinator {runtime.coordinator}); JAX waits five minutes for them")
    try:
        jax.distributed.initialize(*given, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (ValueError, RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"runtime.coordinator {runtime.coordinator}: can't join the other processes ({said}); if JAX can't detect "
            "the hosts, give host:port, runtime.num_processes and runtime.process_id"
        ) from None


def matrix_weights(model: ModelConfig) -> int:
    """The weights of the linear layers. The head is left out, because it is applied to few positions."""
    return model.num_layers * sum(model.site_input_width(site) * model.site_width(site) for site in SITES)


def peak_rate(model: ModelConfig, used: Sequence[Any]) -> float | None:
    """Tokens per second if these devices computed only the backbone's matrix products, at their peak: 2 FLOPs per
    weight and token forward, and 2 backward to the activations (the weights are frozen). None if the peak is unknown.
    """
    peak = PEAK_FLOPS.get(used[0].device_kind)
    return peak and peak * len(used) / (4 * matrix_weights(model))


def describe_devices(model=None) -> str:
    """The devices that JAX sees. If only some of them hold the weights of a given model: "2 of 8 x ..."."""
    devices = jax.devices()
    used = len(devices if model is None else jax.tree.leaves(model)[0].sharding.device_set)
    counted = f"{used} of {len(devices)}" if used < len(devices) else f"{used}"
    return f"{counted} x {devices[0].device_kind} ({devices[0].platform}), JAX {jax.__version__}"


def library_versions() -> dict[str, str]:
    """The versions that a record of a measurement contains."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


def unused_accelerator(root: Path = Path("/")) -> tuple[str, str] | None:
    """The accelerator of this machine and the extra that installs its JAX, if JAX sees only a CPU; else None.

    Looks for the device files of the drivers: /dev/accel*, /dev/vfio/* together with a Google PCI device, /dev/nvidia0.
    """
    if jax.default_backend() != "cpu":
        return None
    vendors = {vendor.read_text().strip() for vendor in (root / "sys/bus/pci/devices").glob("*/vendor")}
    by_vfio = any((root / "dev/vfio").glob("[0-9]*")) and "0x1ae0" in vendors
    if any((root / "dev").glob("accel[0-9]*")) or by_vfio:
        return "TPU", "tpu"
    if any((root / "dev").glob("nvidia[0-9]*")):
        return "NVIDIA GPU", "cuda"
    return None


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Logs "compiling ..." before the body, the first call of a compiled function, and how long it took."""
    begun = time.monotonic()
    say(f"compiling {what} ...")
    yield
    say(f"compiling {what} took {time.monotonic() - begun:.1f} s")
