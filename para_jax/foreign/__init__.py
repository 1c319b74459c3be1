"""Adapters on Flax NNX Transformers that are not ours: Tunix's, MaxText's, yours. Nothing here imports their libraries
but tunix.py."""

from .attach import adapter_of as adapter_of
from .attach import attach as attach
from .attach import detach as detach
from .attach import set_adapter as set_adapter
from .compare import compare_backbones as compare_backbones
from .family import FAMILIES as FAMILIES
from .family import Family as Family
from .family import Linear as Linear
from .prompts import EndsWith as EndsWith
from .prompts import LeftPadded as LeftPadded
from .prompts import prompt_width as prompt_width
