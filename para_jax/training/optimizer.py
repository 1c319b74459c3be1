"""The optimiser: AdamW with clipping and a schedule, made by optax from a run's train section."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from ..adapters.adapter import AdapterParam, is_variable
from ..config import TrainSection


def make_optimizer(config: TrainSection, total_steps: int) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW (arXiv:1711.05101); weight decay touches trained weights only."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            mask=trained,
        ),
        *faster_up(config),
    )


def make_direction(config: TrainSection) -> optax.GradientTransformation:
    """make_optimizer without the learning rate: what is to be multiplied by it and taken from the weights."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=trained),
        *faster_up(config),
    )


def faster_up(config: TrainSection) -> list[optax.GradientTransformation]:
    """The matrices that lead out of the rank (PARA's W_up, LoRA's B) move up_lr_ratio times as far (LoRA+, arXiv
    2402.12354; for PARA our choice). Nothing at 1, so that the optimiser's state is the one it always was."""

    def scaled(variable):
        return variable.replace(variable[...] * config.up_lr_ratio) if variable.axes[0] == "rank" else variable

    faster = optax.stateless(lambda update, _: jax.tree.map(scaled, update, is_leaf=is_variable))
    return [faster] if config.up_lr_ratio != 1 else []


def make_schedule(config: TrainSection, total_steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up over warmup_ratio of the steps, then constant, linear or cosine to
    zero."""
    warmup = warmup_steps(config, total_steps)
    return lambda step: learning_rate_at(step, config.schedule, config.learning_rate, warmup, total_steps)


def warmup_steps(config: TrainSection, total_steps: int) -> int:
    return round(config.warmup_ratio * total_steps)


def learning_rate_at(step, schedule: str, peak, warmup, total) -> jax.Array:
    """The learning rate of the step after `step` steps; numbers, or arrays of one shape (a value a tenant).

    The first step is already a step: it has 1 / warmup of the peak, not none.
    """
    after = jnp.clip((step - warmup) / jnp.maximum(1, total - warmup), 0, 1)
    fall = {"constant": lambda: 1.0, "linear": lambda: 1 - after, "cosine": lambda: (1 + jnp.cos(jnp.pi * after)) / 2}
    return peak * jnp.where(step < warmup, (step + 1) / jnp.maximum(1, warmup), fall[schedule]())


def trained(adapter):
    """A tree like the adapter that says which arrays are trained."""
    return jax.tree.map(lambda v: v.replace(isinstance(v, AdapterParam)), adapter, is_leaf=is_variable)
