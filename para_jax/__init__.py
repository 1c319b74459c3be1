"""para_jax: fine-tune and serve one frozen language model for many tenants with PARA adapters (arXiv:2502.01033)."""

# ruff: noqa: I001 (grouped by what a reader looks for)

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


# transformers says so when it is imported. Its tokenizers, which we use, need no PyTorch. Its other warnings stay.
logging.getLogger("transformers").addFilter(_is_not_about_torch)

# A name is imported when it is first used, so that a config, --help and a user's mistake need no JAX. Type checkers and
# editors read the imports; a test compares them with the table.
if TYPE_CHECKING:
    # backbone
    from .config import LayerKind as LayerKind
    from .config import ModelConfig as ModelConfig
    from .config import RotaryConfig as RotaryConfig
    from .backbone.load import load_backbone as load_backbone
    from .backbone.load import load_model_config as load_model_config
    from .data.tokenizer import load_tokenizer as load_tokenizer
    from .backbone.transformer import Transformer as Transformer

    # adapters
    from .adapters.adapter import Adapter as Adapter
    from .adapters.adapter import Adjustment as Adjustment
    from .adapters.adapter import AdapterParam as AdapterParam
    from .adapters.bank import AdapterBank as AdapterBank
    from .adapters.files import load_adapter as load_adapter
    from .adapters.files import save_adapter as save_adapter
    from .adapters.rows import Rows as Rows
    from .adapters.rows import Stack as Stack
    from .adapters.rows import pick as pick
    from .adapters.rows import stack_adapters as stack_adapters
    from .config import Ia3Config as Ia3Config
    from .config import LoraConfig as LoraConfig
    from .config import ParaConfig as ParaConfig

    # where they meet
    from .model.adapted import adapt as adapt
    from .model.adapted import decode as decode
    from .model.adapted import forward as forward
    from .model.adapted import hidden_states as hidden_states
    from .model.adapted import init_adapter as init_adapter
    from .model.adapted import multi_tenant_forward as multi_tenant_forward
    from .model.adapted import prefill as prefill
    from .model.adapted import right_pad as right_pad
    from .model.adapted import vectors as vectors

    # Transformers that are not ours
    from .foreign.attach import adapter_of as adapter_of
    from .foreign.attach import attach as attach
    from .foreign.attach import detach as detach
    from .foreign.attach import set_adapter as set_adapter
    from .foreign.prompts import EndsWith as EndsWith
    from .foreign.prompts import LeftPadded as LeftPadded

    # runs
    from .config import RunConfig as RunConfig
    from .config import load_config as load_config
    from .io.messages import log_to_stderr as log_to_stderr
    from .runtime.sharding import make_mesh as make_mesh

    # inference and serving
    from .inference.export import export_ia3 as export_ia3
    from .inference.generate import generate as generate
    from .serving.engine import Engine as Engine
    from .serving.request import Completion as Completion
    from .serving.request import Request as Request
    from .server.batch import run_batch as run_batch
    from .server.serve import serve as serve

    # training
    from .runs.compare import compare_methods as compare_methods
    from .reports.inspect import dry_run as dry_run
    from .runs.train import train_tenants as train_tenants
    from .runs.train import train as train

    # evaluation and plots
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.harness.lm import ParaLM as ParaLM
    from .evaluation.options import EvalOptions as EvalOptions
    from .evaluation.results import Results as Results
    from .reports.plots import curves_plot as curves_plot
    from .reports.plots import factors_plot as factors_plot

#: The names that each module has for users.
_NAMES = {
    "config": "LayerKind ModelConfig RotaryConfig Ia3Config LoraConfig ParaConfig RunConfig load_config",
    "backbone.load": "load_backbone load_model_config",
    "data.tokenizer": "load_tokenizer",
    "backbone.transformer": "Transformer",
    "adapters.adapter": "Adapter Adjustment AdapterParam",
    "adapters.bank": "AdapterBank",
    "adapters.files": "load_adapter save_adapter",
    "adapters.rows": "Rows Stack pick stack_adapters",
    "model.adapted": "adapt decode forward hidden_states init_adapter multi_tenant_forward prefill right_pad vectors",
    "foreign.attach": "adapter_of attach detach set_adapter",
    "foreign.prompts": "EndsWith LeftPadded",
    "io.messages": "log_to_stderr",
    "runtime.sharding": "make_mesh",
    "inference.export": "export_ia3",
    "inference.generate": "generate",
    "serving.engine": "Engine",
    "serving.request": "Completion Request",
    "server.batch": "run_batch",
    "server.serve": "serve",
    "runs.compare": "compare_methods",
    "runs.train": "train_tenants train",
    "evaluation.evaluate": "evaluate",
    "evaluation.options": "EvalOptions",
    "evaluation.results": "Results",
    "evaluation.harness.lm": "ParaLM",
    "reports.inspect": "dry_run",
    "reports.plots": "curves_plot factors_plot",
}
_LATER = {name: module for module, names in _NAMES.items() for name in names.split()}
#: What `from para_jax import *` gives: the names that need no extra.
__all__ = [name for name in _LATER if name not in ("serve", "ParaLM")]  # pyright: ignore[reportUnsupportedDunderAll]
#: Packages that come with an extra.
_SERVE = ("starlette", "uvicorn", "httptools", "prometheus_client", "pydantic")
_EXTRAS = {"lm_eval": "eval"} | dict.fromkeys(_SERVE, "serve")


def __getattr__(name: str):
    if name not in _LATER:
        if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module 'para_jax' has no attribute {name!r}")
        return importlib.import_module(f".{name}", __name__)
    try:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        missing, extra = package.replace("_", "-"), _EXTRAS[package]
        raise ImportError(f"para_jax.{name}: {missing} is not installed: pip install 'para_jax[{extra}]'") from None


def __dir__():
    """Without names of extras that are not installed: help(para_jax) asks for all of them."""
    missing = {extra for package, extra in _EXTRAS.items() if importlib.util.find_spec(package) is None}
    needs = {"serve": "serve", "ParaLM": "eval"}
    return sorted(name for name in {*globals(), *_LATER} if needs.get(name) not in missing)
