"""The examples of the docstrings of the public names, on a tiny model."""

import doctest
import inspect

import numpy as np
import pytest
from foreign_model import LISTED, Foreign
from guide_world import ADAPTERS, in_world, opened_world
from long_cases import long

import para_jax
from para_jax import ParaConfig, attach, load_adapter, load_backbone

FUNCTIONS = [name for name in para_jax._LATER if not inspect.isclass(getattr(para_jax, name))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The names that the reference says the examples have, in a folder of their own."""
    with opened_world(tmp_path_factory.mktemp("world")) as (model, tokenizer, bank):
        names = {name: getattr(para_jax, name) for name in para_jax._LATER}
        other = load_backbone("backbone")
        yield names | {
            "model": model, "tokenizer": tokenizer, "bank": bank, "np": np,
            "tokens": np.array([tokenizer("The capital of France is")["input_ids"]]),
            "adapter": load_adapter(ADAPTERS[0], model.config), "their_model": Foreign(model), "family": LISTED,
            "attached_model": attach(Foreign(other), ParaConfig(r=12), config=model.config, family=LISTED),
        }  # fmt: skip


def examples(name: str):
    return doctest.DocTestParser().get_examples(in_world(inspect.getdoc(getattr(para_jax, name)) or ""))


def test_each_public_function_has_an_example():
    assert [name for name in [*FUNCTIONS, "Engine", "AdapterBank", "ParaLM"] if not examples(name)] == []


@pytest.mark.parametrize(
    "name", [long(name) if name == "compare_methods" else name for name in para_jax._LATER if examples(name)]
)
def test_the_example_of_a_docstring_gives_what_it_says(name, world):
    test = doctest.DocTest(examples(name), dict(world), name, None, None, None)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
