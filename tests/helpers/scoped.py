"""Strong adapters with a scope, and prompts of three lengths."""

import numpy as np
from golden_models import backbone, strong

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter

PROMPT = np.array([7, 2, 10])
CONFIGS = [
    ParaConfig(r=4, scope="response"),
    ParaConfig(r=4, scope="response", pooler="constant"),
    LoraConfig(r=4, scope="response", scope_window=3),
    Ia3Config(scope="response", scope_window=2),
]


def adapter_of(config, family, seed=0):
    return strong(init_adapter(config, backbone(family).config, seed=seed), seed)


def name_of(config) -> str:
    return f"{type(config).__name__}-{config.scope_window}"
