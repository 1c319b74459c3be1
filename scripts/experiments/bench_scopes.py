"""The training step with scope response, also with cached prompts, compared with scope all."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from measure import main

from para_jax.backbone.load import load_backbone
from para_jax.bench.rounds import interleaved, measurement, milliseconds, paired, single
from para_jax.bench.train import CONFIG, random_batch
from para_jax.config import Ia3Config, LoraConfig, ParaConfig, TrainSection
from para_jax.data.batches import Batch
from para_jax.data.example_arrays import ExampleArrays
from para_jax.data.packing import Packed
from para_jax.model.adapted import init_adapter
from para_jax.runtime.sharding import make_mesh
from para_jax.training.prompt_cache import PromptCache, computed
from para_jax.training.step import state_of_one, step_of_one

#: LoRA has PARA's sites and about its number of parameters.
METHODS: dict[str, Callable] = {
    "PARA r=12": lambda scope: ParaConfig(r=12, scope=scope),
    "(IA)^3": lambda scope: Ia3Config(scope=scope),
    "LoRA r=9 on q, v, up": lambda scope: LoraConfig(r=9, target_modules=("q_proj", "v_proj", "up_proj"), scope=scope),
}
LENGTHS = (48, 16), (240, 16)  # tokens of the prompt and of the completion of each row
SCOPES = ("all", "response", "response with cached prompts")


def bench_scopes(backbone: str, *, rows: tuple[int, ...] = (8,), rounds: int = 5) -> dict:
    """Milliseconds of the whole training step, by method, scope and length. scope_window is 1.

    Args:
        rows: of a step; one number.
    """
    count = single(rows)
    model = load_backbone(backbone, layout="stacked")
    sides, pairs = {}, []
    for prompt, completion in LENGTHS:
        batch = random_batch(model.config.vocab_size, count, 1, prompt, completion)
        for method, make in METHODS.items():
            names = [f"{method}, {scope}, {prompt} + {completion}" for scope in SCOPES]
            for name, scope in zip(names, SCOPES, strict=True):
                config, cached = make(scope.split()[0]), "cached" in scope
                sides[name] = step_time(model, config, batch, prompt, completion, cached=cached)
            what = f"{method}, {prompt} + {completion}"
            pairs += [(f"{what}: {scope} / all", name, names[0]) for name, scope in zip(names, SCOPES, strict=True)][1:]
    found = measurement("ms", interleaved(sides, rounds))
    ratios = {name: paired(found["rounds"], late, everywhere) for name, late, everywhere in pairs}
    return found | {"ratios": ratios, "dtype": str(model.dtype), "rows": count}


def step_time(
    model, adapter_config, batch: Batch | Packed, prompt: int, completion: int, *, cached: bool = False
) -> Callable[[], float]:
    """A side that trains an adapter of its own, one step each time. A cached one gathers the states of its prompts on
    the host, as a run's threads do ahead of the step."""
    config = TrainSection()
    state = state_of_one(init_adapter(adapter_config, model.config), config)
    cache = prompts_of(model, batch, prompt) if cached else None

    def step():
        nonlocal state
        states = cache and cache.states(batch, prompt)
        shape = dict(completion=completion, prompt=prompt)
        state, _ = step_of_one(state, model, batch, **shape, config=config, states=states, **CONFIG)
        return state

    return milliseconds(step)


def prompts_of(model, batch: Batch | Packed, prompt: int) -> PromptCache:
    """The states of the prompts of a batch [1, rows, ...], in which each prompt has `prompt` tokens."""
    ids = np.ascontiguousarray(batch.tokens[0, :, :prompt])
    prompts = ExampleArrays(ids.ravel(), np.array([(prompt, 0)] * len(ids), np.int32))
    with jax.set_mesh(make_mesh(data=1, devices=jax.devices()[:1])):
        return computed(model, prompts, len(ids), 0)


if __name__ == "__main__":
    main(bench_scopes)
