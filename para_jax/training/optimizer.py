"""The optimiser: AdamW with clipping and a learning rate schedule, from a run's train section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..adapters.adapter import AdapterParam, BiasParam
from ..config import TrainSection
from ..runtime.sharding import is_variable


def make_direction(config: TrainSection) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) without its learning rate, for a clipped gradient. The weights move by minus the
    learning rate times this update. Weight decay draws trained weights to where the adapter changes nothing, but no
    biases: a constant may be large where what the prompt makes should stay small."""
    chain = optax.chain(
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )

    def update(updates, state, params=None):
        direction, state = chain.update(updates, state, from_neutral(params))
        # Matrices that lead out of the rank (PARA's W_up, LoRA's B) may move faster (LoRA+, arXiv:2402.12354; for PARA
        # our choice), and so may PARA's biases (our choice).
        direction = scaled(direction, config.up_lr_ratio, lambda variable: variable.axes[0] == "rank")
        return scaled(direction, config.bias_lr_ratio, lambda variable: isinstance(variable, BiasParam)), state

    return optax.GradientTransformation(chain.init, update)


def from_neutral(adapter):
    """The distance of each weight from the value with which it changes nothing: 1 for (IA)^3's vectors, else 0."""
    neutral = getattr(adapter, "neutral", 0.0)
    return jax.tree.map(lambda weight: weight - neutral, adapter) if neutral else adapter


def clipped(gradient, norm: jax.Array, config: TrainSection):
    """The gradient, scaled down to max_grad_norm where its norm, which is given, is larger."""
    limit = config.max_grad_norm
    return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm * limit), gradient)


def scaled(direction, ratio: float, chosen: Callable):
    """The direction, `ratio` times as long for the variables that are chosen."""

    def of(variable):
        return variable.replace(variable[...] * ratio) if chosen(variable) else variable

    return direction if ratio == 1 else jax.tree.map(of, direction, is_leaf=is_variable)


class LearningRates(NamedTuple):
    """The learning rate schedule of each tenant in a compiled step."""

    peak: jax.Array | np.ndarray
    """float32 [tenants], after the warm-up"""
    warmup_steps: jax.Array | np.ndarray
    """int32 [tenants]"""
    total_steps: jax.Array | np.ndarray
    """int32 [tenants]"""

    def at(self, step, schedule: str) -> jax.Array:
        """Each tenant's learning rate for the step after `step` steps, float32 [tenants]: a linear warm-up to the peak,
        then constant, linear or cosine to zero. The first step is not lost: it has 1 / warmup of the peak."""
        warmup, total = self.warmup_steps, self.total_steps
        after = jnp.clip((step - warmup) / jnp.maximum(1, total - warmup), 0, 1)
        fall = {"constant": 1.0, "linear": 1 - after, "cosine": (1 + jnp.cos(jnp.pi * after)) / 2}
        return jnp.where(step < warmup, (step + 1) / jnp.maximum(1, warmup), fall[schedule]) * self.peak


def learning_rates(sections: Sequence[TrainSection], total_steps: Sequence[int]) -> LearningRates:
    """The schedules of tenants with these train sections and numbers of steps."""
    peaks = [section.peak_learning_rate for section in sections]
    warmup = [round(section.warmup_ratio * total) for section, total in zip(sections, total_steps, strict=True)]
    return LearningRates(np.array(peaks, np.float32), np.array(warmup, np.int32), np.array(total_steps, np.int32))


def decayed(adapter):
    """A tree like the adapter that says which arrays have weight decay: those that are trained, except biases."""

    def marked(variable):
        return variable.replace(isinstance(variable, AdapterParam) and not isinstance(variable, BiasParam))

    return jax.tree.map(marked, adapter, is_leaf=is_variable)
