"""Gives tests eight virtual CPU devices, quick compiles, and the marker `core`."""

import gc
import os
import signal
import tempfile

import quick_compiler

if "PARA_JAX_TEST_DEVICES" not in os.environ:  # tests/accelerator: the machine's own devices, and its full optimiser
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick_compiler.FLAGS
    os.environ["XLA_FLAGS"] = " ".join(flags) + quick_compiler.OLD_EMITTERS
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and the processes that tests start inherit it
        programs = tempfile.TemporaryDirectory(prefix="para_jax_compiled_", ignore_cleanup_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from itertools import count
from pathlib import Path

import hypothesis
import jax
import pytest
from long_cases import first_cases

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ours")  # the same examples in every session, however slow the machine is

if "PARA_JAX_TEST_DEVICES" not in os.environ:
    gc.set_threshold(50_000, 10, 10)  # JAX's traces make many objects; looking for cycles took a twelfth of the time
    jax.devices()  # XLA has now read its flags; libtpu, which a test may load, reads the same variable
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(quick_compiler.OLD_EMITTERS)
    # A folder of its own: JAX's keys hold the variable as it is now, as in a process without the flag.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] + "/tests")
    quick_compiler.reuse_contexts()


@pytest.fixture(scope="session", autouse=True)
def messages():
    """Messages are shown on stderr, as the command line does it, so that tests can read them."""
    from para_jax import log_to_stderr

    log_to_stderr()


@pytest.fixture
def compiled():
    """The names of the programs that XLA has compiled since the test began."""
    found = []

    def note(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="session")
def bucket():
    """gs://para-jax: an empty bucket of an emulator on loopback, which processes started from here find too."""
    import buckets

    from para_jax.io.storage.bucket import bucket_path

    server, port = buckets.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment(port).items():
            patch.setenv(name, value)
        yield bucket_path(f"gs://{buckets.BUCKET}")
    server.stop()


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="of each file, run the first case")
    parser.addoption("--soak-seconds", type=float, default=5, help="seconds of tests/server/test_soak.py's long day")


#: Files of few but long tests. They start first: a worker that began one last would keep the others waiting.
LONG_FILES = (
    "runs/test_kills.py", "runs/test_bucket_runs.py", "runs/test_tenants.py", "test_processes.py",
    "training/test_packing.py", "quickstart/test_quickstart.py", "runs/test_packed_runs.py", "cli/test_cli.py",
    "runs/test_train.py", "scripts/test_rehearse.py", "training/test_prompt_cache.py", "training/test_tails.py",
)  # fmt: skip


#: What `pytest -m core` runs: backbone, model, adapters, step and engine.
CORE = (
    "backbone/",
    "model/",
    "adapters/",
    "training/test_step",
    "training/test_loss",
    "serving/test_engine",
    "test_isolation",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        inside = item.path.relative_to(Path(__file__).parent).as_posix()
        if inside.startswith(CORE) and not {"long", "slow"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker("core")
    yield  # -m leaves cases out
    if config.getoption("first_cases"):
        items[:] = first_cases(items, whole="test_adapted.py")  # the golden numbers of every family
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG_FILES))


def pytest_runtest_teardown(nextitem, ended=count(1)):  # noqa: B008
    """Drops compiled programs before they use up the memory maps that Linux allows a process (65530 by default; the
    compiler then fails with "Cannot allocate memory"). Looks after every tenth test, since counting takes 10 ms."""
    maps = Path("/proc/self/maps")
    if next(ended) % 10 == 0 and nextitem is not None and maps.exists():
        if maps.read_bytes().count(b"\n") > 30_000:
            jax.clear_caches()
