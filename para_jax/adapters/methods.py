"""The adapter methods: which class makes an adapter of which config."""

from __future__ import annotations

from ..config import Ia3Config, LoraConfig, ParaConfig
from .adapter import Adapter
from .ia3 import Ia3
from .lora import Lora
from .para import Para

METHODS: dict[type, type[Adapter]] = {ParaConfig: Para, LoraConfig: Lora, Ia3Config: Ia3}
