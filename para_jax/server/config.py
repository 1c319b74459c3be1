"""ServerConfig: how the server answers. The flags of `para-jax serve` are made from its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any

from ..config.bounds import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, check_fields

#: What the extra `serve` installs.
PACKAGES = ("starlette", "uvicorn", "httptools", "prometheus_client", "pydantic", "llguidance")


def require_packages(command: str) -> None:
    """Raises ValueError with the packages that are missing and how to install them."""
    missing = [name.replace("_", "-") for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"{command} needs {', '.join(missing)}\nrun `pip install 'para_jax[serve]'`")


def flag(default: Any, text: str, metavar: str | None = None) -> Any:
    """A field with its default and its flag's help."""
    return field(default=default, metadata={"help": text} | ({"metavar": metavar} if metavar else {}))


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server's options."""

    served_model_name: str | None = flag(None, "the base model's name (default: the backbone's)", "NAME")
    """None: base, which works in any case"""
    adapter_root: str | None = flag(
        None, "let clients load adapters from this folder, and unload them, while it runs", "DIR"
    )
    allow_hub: bool = flag(False, "with --adapter-root: let clients load adapters from the hub too")
    host: str = flag("127.0.0.1", "the address to listen at; 127.0.0.1 is this machine alone")
    port: Annotated[int, Bounds(at_least=0, at_most=65535)] = flag(8000, "0 picks a free one")
    api_key_file: str | None = flag(
        None, "one key per line, optionally followed by the tenants that it may use (default: no keys)", "FILE"
    )
    timeout: PositiveFloat = flag(600, "seconds that a request may take", "S")
    drain_seconds: NonNegativeFloat = flag(30, "after SIGTERM or Ctrl-C, seconds that open requests may take", "S")
    max_body: PositiveInt = flag(8 * 2**20, "the largest request", "BYTES")
    log_prompts: bool = flag(False, "log the prompts, not only their lengths")

    def __post_init__(self):
        check_fields(self)
        if self.allow_hub and not self.adapter_root:
            raise ValueError("--allow-hub goes with --adapter-root\ngive that too")
