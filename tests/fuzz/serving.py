"""A small engine with two tenants, a pool of requests, and each one's answer alone."""

import random
from copy import deepcopy
from dataclasses import replace
from functools import cache

import tiny_run
from golden_models import backbone, strong

from para_jax import Adapter, AdapterBank, Engine, Ia3Config, ParaConfig, Request, init_adapter
from para_jax.serving.request import Completion

LENGTH, SITES = 32, ("q_proj", "v_proj", "up_proj")
TENANTS = ("A", "B", None)
#: Like the templates of models that use tools, it reads a key that a message need not have.
TOOLS = (
    "{% for message in messages %}{{ message.content + ' ' }}{% for call in message.tool_calls %}{{ call.name }} "
    "{% endfor %}{% endfor %}"
)


@cache
def tokenizer():
    made = deepcopy(tiny_run.tokenizer())
    made.chat_template = TOOLS
    return made


@cache
def adapters() -> dict[str, Adapter]:
    model = backbone("llama").config
    return {
        "A": strong(init_adapter(ParaConfig(r=4), model), 0, 0.3),
        "B": strong(init_adapter(Ia3Config(target_modules=("v_proj", "up_proj")), model), 1, 0.3),
    }


@cache
def bank() -> AdapterBank:
    held = AdapterBank(backbone("llama").config, max_r=4, sites=SITES)
    for name, adapter in adapters().items():
        held.add(name, adapter)
    return held


def engine(slots: int = 3, **options) -> Engine:
    return Engine(backbone("llama"), bank(), tokenizer(), slots=slots, max_length=LENGTH, **options)


def words(draw: random.Random, least: int = 1, most: int = 8) -> str:
    return " ".join(f"w{draw.randrange(20, 256)}" for _ in range(draw.randint(least, most)))


def drawn_request(draw: random.Random) -> Request:
    """A good request whose answer depends on nothing else: if it samples, it has a seed."""
    made = Request(words(draw), draw.choice(TENANTS), draw.choice((1, 2, 3, 5, 8, 13)))
    if draw.random() < 0.2:
        made = replace(made, prompt=[{"role": "user", "content": made.prompt}])
    if draw.random() < 0.4:
        sampling = dict(temperature=draw.choice((0.5, 1.0, 2.0)), seed=draw.randrange(1000))
        made = replace(made, **sampling, top_k=draw.choice((0, 0, 5)), top_p=draw.choice((1.0, 0.8)))
        made = replace(made, n=draw.choice((1, 1, 2, 3)))
    if draw.random() < 0.3:  # a word that the model may write, or a part of one
        made = replace(made, stop=tuple(f"w{draw.randrange(10, 256)}"[: draw.choice((3, 4))] for _ in range(2)))
    return made


@cache
def pool() -> tuple[Request, ...]:
    """Requests that the cases share, so that each answer is computed once per process."""
    draw = random.Random("pool")
    return tuple(drawn_request(draw) for _ in range(60))


def answer(request: Request) -> tuple[Completion, ...]:
    """The request's answers, by sample, of an engine that does nothing else."""
    key = repr(request)
    if key not in ANSWERS:
        idle = engine()
        idle.submit(request)
        ANSWERS[key] = tuple(sorted(idle.run(), key=lambda completion: completion.index))
    return ANSWERS[key]


ANSWERS: dict[str, tuple[Completion, ...]] = {}


@cache
def warm() -> None:
    """Compiles what the cases need, outside their time."""
    engine().warm_up()
    for request in pool():
        answer(request)
