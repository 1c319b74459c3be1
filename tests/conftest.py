"""Eight virtual CPU devices, backbones of the golden fixtures, and adapters strong enough that a law can fail."""

import os

import quick_compiler

if "PARA_JAX_TEST_DEVICES" not in os.environ:  # tests/accelerator: the machine's own devices, and its full optimiser
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick_compiler.FLAGS
    os.environ["XLA_FLAGS"] = " ".join(flags) + quick_compiler.OLD_EMITTERS
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

if "PARA_JAX_TEST_DEVICES" not in os.environ:
    jax.devices()  # XLA has now read its flags; libtpu, which a test may load, reads the same variable
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(quick_compiler.OLD_EMITTERS)

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = tuple("llama llama3 mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 smollm2 olmo2 granite".split())


@cache
def backbone(family: str, layout: str = "layers", config: str | None = None):
    """A golden backbone; with `config`, its weights under variants/<config>.json."""
    from para_jax.backbone.families import model_config
    from para_jax.backbone.load import load_backbone

    model = load_backbone(FIXTURES / family, layout="layers")
    if config is not None:
        import json

        from flax import nnx

        from para_jax.backbone.transformer import Transformer

        variant = model_config(json.loads((FIXTURES / family / "variants" / f"{config}.json").read_text()))
        shape = jax.eval_shape(lambda: Transformer(variant, rngs=nnx.Rngs(0)))
        model = jax.tree.unflatten(jax.tree.structure(shape), jax.tree.leaves(model))
    return model.with_layout(layout)


@cache
def golden(family: str, kind: str = "") -> dict:
    """The golden arrays of a family; kind "para": with two PARA tenants."""
    file = FIXTURES / "para" / family / "para_golden.npz" if kind == "para" else FIXTURES / family / "golden.npz"
    with np.load(file) as arrays:
        return dict(arrays)


@cache
def golden_tenants(family: str, activation: str = "gelu") -> list:
    """The two PARA adapters of the golden fixtures."""
    from para_jax import ParaConfig, init_adapter

    adapters = []
    for tenant in range(2):
        arrays = load_file(FIXTURES / "para" / family / f"para_t{tenant}.safetensors")
        config = backbone(family).config
        adapter = init_adapter(ParaConfig(r=4, activation=activation), config)
        up = np.stack([arrays[f"layers.{i}.up"] for i in range(config.num_layers)])
        cuts = np.cumsum([config.site_width(site) for site in adapter.config.target_modules])[:-1]
        adapter.down[...] = jnp.stack([arrays[f"layers.{i}.down"] for i in range(config.num_layers)])
        for site, part in zip(adapter.config.target_modules, np.split(up, cuts, axis=2), strict=True):
            adapter.up[site][...] = jnp.asarray(part)
        adapters.append(adapter)
    return adapters


@pytest.fixture(scope="session", autouse=True)
def messages():
    """Messages are shown on stderr, as the command line does it, so that tests can read them."""
    from para_jax import log_to_stderr

    log_to_stderr()


@pytest.fixture(scope="session")
def bucket():
    """gs://para-jax: an empty bucket of an emulator on loopback, which processes started from here find too."""
    import buckets

    from para_jax.storage.bucket import bucket_path

    server, port = buckets.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment(port).items():
            patch.setenv(name, value)
        yield bucket_path(f"gs://{buckets.BUCKET}")
    server.stop()


def strong(adapter, seed: int = 0, scale: float = 0.1):
    """The adapter with what a fresh one has at zero (at one in (IA)^3) drawn from N(0, scale) around it: with a fresh
    one every law would hold without adapters."""
    made = jax.tree.map(lambda leaf: leaf, adapter)
    weights = next(getattr(made, name) for name in ("up", "b", "scale") if hasattr(made, name))
    for i, site in enumerate(made.config.target_modules):
        drawn = np.random.default_rng([seed, i]).normal(0, scale, weights[site].shape)
        weights[site][...] = jnp.asarray(made.neutral + drawn, jnp.float32)
    return made


def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, default=100, help="cases of each target of tests/fuzz (slow ones: less)")
    parser.addoption("--stress-requests", type=int, default=2000, help="requests of the engine's stress in tests/fuzz")


def pytest_terminal_summary(terminalreporter):
    """Shows how the cases of tests/fuzz ended, by target."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = {}
    for report in reports:
        rows |= dict(report.user_properties).get("fuzz", {})
    if rows:
        from fuzz.runner import table

        terminalreporter.write_line("\n" + table(rows))


#: Files of few but long tests. They start first: a worker that began one last would keep the others waiting.
LONG_FILES = (
    "test_kills.py", "test_bucket_runs.py", "test_tenant_runs.py", "test_processes.py", "test_packing.py",
    "test_quickstart.py", "test_packed_runs.py", "test_cli.py", "test_runs.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def unexpected_skips(skipped: list[str], allowed: str) -> list[str]:
    """The node ids that no line of allowed_skips.txt stands for; a line without a reason allows nothing."""
    lines = [line.partition(" # ") for line in allowed.splitlines() if not line.startswith("#")]
    starts = tuple(start.strip() for start, _, reason in lines if start.strip() and reason.strip())
    return [node for node in skipped if not node.startswith(starts)]


def pytest_sessionfinish(session):
    """Fails the session for a skip that tests/allowed_skips.txt does not allow, so that no test goes quiet unseen."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report.nodeid for report in reporter.stats.get("skipped", [])] if reporter else []
    unexpected = unexpected_skips(skipped, (Path(__file__).parent / "allowed_skips.txt").read_text())
    if unexpected:
        reporter.write_line(f"\nskipped, but not in tests/allowed_skips.txt: {', '.join(unexpected)}", red=True)
        session.exitstatus = 1


def pytest_runtest_teardown(nextitem):
    """Drops compiled programs before they use up the memory maps that Linux allows a process (65530 by default; the
    compiler then fails with "Cannot allocate memory")."""
    maps = Path("/proc/self/maps")
    if nextitem is not None and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


def prompts(model, batch: int = 3, length: int = 12, seed: int = 0) -> np.ndarray:
    """Random tokens int32 [batch, length]."""
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, (batch, length)).astype(np.int32)
