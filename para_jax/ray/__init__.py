"""para_jax on a Ray cluster (`pip install 'para_jax[ray]'`). Ray is imported when something here is called."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .jobs import evaluate_on_ray as evaluate_on_ray
    from .jobs import generate_on_ray as generate_on_ray
    from .serve import serve_app as serve_app
    from .train import train_on_ray as train_on_ray

_LATER = {"evaluate_on_ray": "jobs", "generate_on_ray": "jobs", "serve_app": "serve", "train_on_ray": "train"}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'para_jax.ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_LATER])
