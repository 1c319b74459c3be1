from importlib.util import find_spec

import pytest

from para_jax.server import packages


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    with pytest.raises(ValueError, match=r"serve needs uvicorn\nrun `pip install 'para_jax\[serve\]'`"):
        packages.require_packages("serve")
