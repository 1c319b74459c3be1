"""The optimiser: AdamW with clipping and a schedule, made by optax from a run's train section."""

from __future__ import annotations

import jax
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
    )


def make_schedule(config: TrainSection, total_steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up over warmup_ratio of the steps, then constant, linear or cosine to
    zero."""
    warmup = round(config.warmup_ratio * total_steps)
    rest = max(1, total_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]()
    if warmup == 0:
        return after
    # The first step is already a step: it has 1 / warmup of the learning rate, not none.
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def trained(adapter):
    """A tree like the adapter that says which arrays are trained."""
    return jax.tree.map(lambda v: v.replace(isinstance(v, AdapterParam)), adapter, is_leaf=is_variable)
