"""The packages of the extra `serve`, which the server needs."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = ("starlette", "uvicorn", "httptools", "prometheus_client", "pydantic")


def require_packages(command: str) -> None:
    """Raises ValueError with the packages that are missing and how to install them."""
    missing = [name.replace("_", "-") for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"{command} needs {', '.join(missing)}\nrun `pip install 'para_jax[serve]'`")
