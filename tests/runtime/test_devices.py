"""How a process starts to use its devices, and the error for an accelerator that JAX does not see."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.config import RuntimeSection
from para_jax.runtime import devices
from para_jax.runtime.devices import (
    compiling,
    describe_devices,
    join,
    make_deterministic,
    start,
    unused_accelerator,
)


def machine(root, **files):
    """A root folder with these files: dev_accel0="" is dev/accel0."""
    for name, text in files.items():
        file = root / name.replace("__", ":").replace("_", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(("files", "expected"), [
    ({}, None),
    ({"dev_accel0": ""}, ("TPU", "tpu")),
    ({"dev_nvidia0": ""}, ("NVIDIA GPU", "cuda")),
    ({"dev_vfio_0": "", "sys_bus_pci_devices_0000__00__05.0_vendor": "0x1ae0\n"}, ("TPU", "tpu")),
    ({"dev_vfio_0": "", "sys_bus_pci_devices_0000__00__05.0_vendor": "0x8086\n"}, None),
    ({"sys_bus_pci_devices_0000__00__05.0_vendor": "0x1ae0\n"}, None),  # Google's network card: on all its machines
])  # fmt: skip
def test_an_accelerator_is_detected_by_its_device_files(files, expected, tmp_path):
    assert unused_accelerator(machine(tmp_path, **files)) == expected


def test_an_accelerator_that_jax_sees_is_not_unused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert unused_accelerator(machine(tmp_path, dev_accel0="")) is None


def test_an_unused_accelerator_is_an_error_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(devices, "unused_accelerator", lambda: ("TPU", "tpu"))
    with pytest.raises(
        ValueError, match=r"TPU.*`pip install 'para_jax\[tpu\]'`.*another process.*allow_cpu=true"
    ) as error:
        start(RuntimeSection(compilation_cache=False))
    assert "\n" not in str(error.value) and "devices: 8 x cpu" in capsys.readouterr().err
    start(RuntimeSection(compilation_cache=False, allow_cpu=True))


@pytest.mark.parametrize(("runtime", "given"), [
    (RuntimeSection(), None),
    (RuntimeSection(coordinator="auto"), (None, None, None)),
    (RuntimeSection(coordinator="a:80", num_processes=2, process_id=1), ("a:80", 2, 1)),
])  # fmt: skip
def test_a_run_joins_the_configured_hosts_or_lets_jax_find_them(runtime, given, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    join(runtime)
    assert calls == ([] if given is None else [given])
    assert (f"runtime.coordinator {runtime.coordinator}" in capsys.readouterr().err) == (given is not None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    join(runtime)  # a program that has done so itself
    assert len(calls) == (given is not None)


def test_a_program_that_has_set_up_jax_finds_it_unchanged(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    start(RuntimeSection(distributed="given", allow_cpu=True))
    assert jax.config.jax_compilation_cache_dir == before


def test_hosts_that_jax_can_not_find_are_an_error_that_names_the_fields(monkeypatch):
    def unknown(*_, **__):
        raise ValueError("coordinator_address should be defined.\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", unknown)
    said = r"runtime.coordinator auto: .*coordinator_address.*runtime.num_processes and runtime.process_id"
    with pytest.raises(ValueError, match=said) as error:
        join(RuntimeSection(coordinator="auto"))
    assert "\n" not in str(error.value)


def test_devices_are_counted_and_named():
    assert describe_devices() == f"8 x cpu (cpu), JAX {jax.__version__}"
    weights = [jnp.zeros(8)]
    assert describe_devices(weights) == f"1 of 8 x cpu (cpu), JAX {jax.__version__}"
    assert (
        describe_devices(jax.device_put(weights, NamedSharding(jax.make_mesh((8,), ("tensor",)), P())))
        == describe_devices()
    )


def test_the_compilation_cache_is_in_the_cache_folder_unless_turned_off(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        start(RuntimeSection(compilation_cache=False, allow_cpu=True))
        assert jax.config.jax_compilation_cache_dir is None
        start(RuntimeSection(allow_cpu=True))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "para_jax" / "compiled")
        jax.config.update("jax_compilation_cache_dir", "chosen by JAX_COMPILATION_CACHE_DIR")
        start(RuntimeSection(allow_cpu=True))
        assert jax.config.jax_compilation_cache_dir == "chosen by JAX_COMPILATION_CACHE_DIR"
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_compiling_is_announced_and_timed(capsys):
    with compiling("a step"):
        assert capsys.readouterr().err == "compiling a step ...\n"
    assert re.match(r"compiling a step took \d+\.\d s", capsys.readouterr().err)


# -------------------------------------------------------------------------------------------------- the same bits again


@pytest.mark.long
def test_a_deterministic_run_sets_the_flag_before_the_devices_start():
    """In a process of its own, for here they have started. JAX refuses a flag that it does not know."""
    code = (
        "import os; from para_jax.runtime import devices; from para_jax.config import RuntimeSection\n"
        "devices.start(RuntimeSection(deterministic=True, allow_cpu=True, compilation_cache=False))\n"
        "import jax; jax.jit(lambda x: x + 1)(1.0)\n"
        "devices.start(RuntimeSection(deterministic=True, allow_cpu=True, compilation_cache=False))\n"
        "print(os.environ['XLA_FLAGS'])"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout == "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true\n", found.stderr


def test_deterministic_is_refused_once_a_gpu_is_in_use(monkeypatch):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "")
    make_deterministic()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="runtime.deterministic: .*XLA_FLAGS=--xla_gpu_deterministic_ops=true"):
        make_deterministic()
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_gpu_deterministic_ops=true")
    make_deterministic()
