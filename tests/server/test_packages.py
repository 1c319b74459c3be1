from importlib.util import find_spec

import pytest
from golden_models import FIXTURES

from para_jax import bench
from para_jax.bench import http
from para_jax.server import packages


def test_the_http_benchmark_names_a_missing_package_before_it_loads_anything(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    monkeypatch.setattr(http, "load_backbone", lambda source: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"bench http needs uvicorn\nrun `pip install 'para_jax\[serve\]'`"):
        bench.run("http", str(FIXTURES / "smollm2"))
