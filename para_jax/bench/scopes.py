"""`para-jax bench scopes`: the training step with scope response compared with scope all."""

from __future__ import annotations

from collections.abc import Callable

from ..backbone.load import load_backbone
from ..config import Ia3Config, LoraConfig, ParaConfig, TrainSection
from ..model import init_adapter
from ..training.step import state_of_one, step_of_one
from .rounds import interleaved, measurement, milliseconds, paired, single
from .train import CONFIG, random_batch

#: LoRA has PARA's sites and about its number of parameters.
METHODS: dict[str, Callable] = {
    "PARA r=12": lambda scope: ParaConfig(r=12, scope=scope),
    "(IA)^3": lambda scope: Ia3Config(scope=scope),
    "LoRA r=9 on q, v, up": lambda scope: LoraConfig(r=9, target_modules=("q_proj", "v_proj", "up_proj"), scope=scope),
}
SCOPES = ("all", "response")


def bench_scopes(
    backbone: str,
    *,
    rows: tuple[int, ...] = (8,),
    lengths: tuple[tuple[int, int], ...] = ((48, 16), (240, 16)),
    rounds: int = 5,
) -> dict:
    """Milliseconds of the whole training step, by method, scope and length. scope_window is 1.

    Args:
        rows: of a step; one number.
        lengths: (prompt tokens, completion tokens) of each row.
    """
    count = single(rows)
    model = load_backbone(backbone, layout="stacked")
    sides, pairs = {}, []
    for prompt, completion in lengths:
        batch = random_batch(model.config.vocab_size, count, 1, prompt, completion)
        for method, make in METHODS.items():
            names = [f"{method}, {scope}, {prompt} + {completion}" for scope in SCOPES]
            for name, scope in zip(names, SCOPES, strict=True):
                sides[name] = step_time(model, make(scope), batch, prompt, completion)
            pairs.append((f"{method}, {prompt} + {completion}: response / all", *reversed(names)))
    found = measurement("ms", interleaved(sides, rounds))
    ratios = {name: paired(found["rounds"], late, everywhere) for name, late, everywhere in pairs}
    return found | {"ratios": ratios, "dtype": str(model.dtype), "rows": count}


def step_time(model, adapter_config, batch, prompt: int, completion: int) -> Callable[[], float]:
    """A side that trains an adapter of its own, one step each time."""
    config = TrainSection()
    state = state_of_one(init_adapter(adapter_config, model.config), config)

    def step():
        nonlocal state
        state, _ = step_of_one(state, model, batch, completion=completion, prompt=prompt, config=config, **CONFIG)
        return state

    return milliseconds(step)
