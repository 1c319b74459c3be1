"""An engine and `generate` over several devices answer as on one, and a TPU splits the work between them."""

from functools import partial
from threading import Thread
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES
from hlo import collective_bytes, collectives_run
from jax.sharding import NamedSharding, PartitionSpec
from tiny_engine import CONFIGS, SITES, answers, engine_of, plain, prompt, tenants_of
from tiny_run import tokenizer
from tpu_compiler import tpu_devices

from para_jax import (
    AdapterBank,
    LayerKind,
    LoraConfig,
    ModelConfig,
    Request,
    RotaryConfig,
    generate,
    load_backbone,
    make_mesh,
)
from para_jax.adapters.adapter import Factors
from para_jax.backbone.cache import HELD
from para_jax.backbone.load import abstract_backbone
from para_jax.inference.draw import row_sampling
from para_jax.model.blocks import Lanes
from para_jax.runtime.sharding import partition
from para_jax.serving import engine as engines
from para_jax.serving.prefills import prefill_chunk
from para_jax.serving.slots import Slots, steps

ALL = CONFIGS | {"L": LoraConfig(r=4, lora_alpha=4, target_modules=SITES)}


def loaded(mesh):
    """The model over a mesh, and a bank of tenants of all methods."""
    model = load_backbone(FIXTURES / "llama", dtype="float32", mesh=mesh)
    bank = AdapterBank(model.config, max_r=4, sites=SITES, methods=("para", "ia3", "lora"))
    for name, adapter in tenants_of(model, ALL).items():
        bank.add(name, adapter)
    return model, bank


def asked(bank):
    """Prompts of all tenants, some with a beginning in common."""
    common = prompt(0, 12)
    for i, tenant in enumerate([None, *bank.names, "R"] * 2):
        yield Request(
            f"{common}{prompt(i, 3)}" if tenant in (None, "R") else prompt(i, 9),
            tenant,
            max_new_tokens=6,
            temperature=0.7 * (i > 5),
            seed=i,
            logprobs=1 if i % 3 else None,
            prompt_logprobs=1 if tenant is None else None,
        )


def served(mesh, compiled=()):
    """Completions of an engine that another thread drives, and how many programs were compiled meanwhile."""
    model, bank = loaded(mesh)
    engine, found = engine_of(model, bank, max_logprobs=1), {}
    if mesh is not None:  # one device is only asked for its answers
        engine.warm_up()
    before = len(compiled)

    def drive():
        for request in asked(bank):
            engine.submit(request)
        found.update(answers(engine))

    thread = Thread(target=drive)
    thread.start()
    thread.join()
    return found, len(compiled) - before, engine


@pytest.fixture(scope="module")
def on_one():
    return served(None)[0]


@pytest.mark.parametrize("sizes", [
    pytest.param((1, 1, 2), marks=pytest.mark.long),
    pytest.param((1, 1, 4), marks=pytest.mark.slow),
    pytest.param((2, 2, 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_an_engine_over_a_mesh_answers_as_one_device_does_and_compiles_nothing_after_warm_up(sizes, on_one, compiled):
    found, later, engine = served(make_mesh(*sizes), compiled)
    assert compiled and later == 0
    assert {key: plain(one) for key, one in found.items()} == {key: plain(one) for key, one in on_one.items()}
    for key, one in found.items():
        for mine, other in zip(one.logprobs or (), on_one[key].logprobs or (), strict=True):
            np.testing.assert_allclose(mine.logprob, other.logprob, atol=2e-4)
        for mine, other in zip(one.prompt_logprobs or (), on_one[key].prompt_logprobs or (), strict=True):
            assert mine is other is None or abs(mine.logprob - other.logprob) < 2e-4
    assert engine.prefix_cache.hits > 0
    for held in jax.tree.leaves(engine._prefills.pool):
        heads = held.addressable_shards[0].data.shape[1]
        assert heads == (1 if sizes[2] == 2 else 2), "a mesh that divides the 2 heads splits keys and values"


@pytest.mark.long
def test_generate_over_a_mesh_writes_what_one_device_writes():
    written = []
    for mesh in (None, make_mesh(tensor=2)):
        model, bank = loaded(mesh)
        tenants = [*bank.names, None]
        prompts = [prompt(i) for i, _ in enumerate(tenants)]
        written.append(
            generate(model, prompts, tokenizer=tokenizer(), adapters=bank, tenants=tenants, max_new_tokens=6)
        )
    assert written[0] == written[1] and len(set(written[0])) == len(written[0])


def test_an_engine_refuses_the_devices_of_several_hosts(monkeypatch):
    model, bank = loaded(None)
    monkeypatch.setattr(engines, "mesh_of", lambda model: SimpleNamespace(is_multi_process=True))
    with pytest.raises(ValueError, match="hosts"):
        engine_of(model, bank)


# ------------------------------------------------------------------------------------------------- the TPU's compiler

SIZES = {"width": 512, "hidden_width": 1024, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "vocab_size": 32000}
CONFIG = ModelConfig(model_type="llama", kinds=(LayerKind(rotary=RotaryConfig(dims=64)),) * 2, **SIZES)
ROWS, LENGTH, DEVICES = 16, 1024, 4
ONE_CACHE = ROWS * LENGTH * CONFIG.kv_width * 2 // DEVICES
"""bytes of a layer's keys on one device, in bfloat16"""


@pytest.fixture(scope="module")
def on_tpu():
    """A mesh of a TPU's devices, and the model on it, flat."""
    mesh = make_mesh(tensor=DEVICES, devices=tpu_devices())
    leaves, treedef = jax.tree.flatten(abstract_backbone(CONFIG, "bfloat16", mesh, "layers"))
    return mesh, leaves, treedef


def weights_on_one(leaves):
    """Bytes of the weights on one device."""
    return sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def held(mesh, rows, length):
    """Abstract keys and values of all layers, sharded as an engine's are."""
    shape = rows, CONFIG.num_kv_heads, length, CONFIG.head_dim
    sharding = NamedSharding(mesh, partition(HELD, shape, mesh.shape))
    one = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    return ((one, one),) * CONFIG.num_layers


@pytest.mark.long
def test_on_a_tpu_decode_splits_the_pool_and_reduces_twice_per_layer(on_tpu):
    mesh, leaves, treedef = on_tpu
    everywhere = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    widths = {site: CONFIG.site_width(site) for site in SITES}
    factors = Factors({site: everywhere((ROWS, width), jnp.bfloat16) for site, width in widths.items()})
    count = everywhere((ROWS,), jnp.int32)
    slots, pool = Slots((factors,) * CONFIG.num_layers, count, count, count), held(mesh, ROWS * LENGTH // 64, 64)
    table = np.zeros((ROWS, LENGTH // 64), np.int32)
    given = slots, pool, table, row_sampling([None] * ROWS), np.ones(ROWS, bool), 1, None
    with jax.set_mesh(mesh):
        compiled = steps.lower(treedef, leaves, *given).compile()
    moved = collective_bytes(compiled.as_text())
    assert 2 * CONFIG.num_layers <= collectives_run(compiled.as_text())["all-reduce"] <= 2 * CONFIG.num_layers + 4
    assert sum(moved.values()) < ONE_CACHE / 8, moved
    assert compiled.memory_analysis().argument_size_in_bytes < 2 * CONFIG.num_layers * ONE_CACHE * 1.2 + weights_on_one(
        leaves
    )


@pytest.mark.long
def test_on_a_tpu_a_chunk_of_prompts_splits_the_pool(on_tpu):
    mesh, leaves, treedef = on_tpu
    blocks, lanes = ROWS * LENGTH // 16, 4
    row, number, counts = (np.zeros(lanes, np.int32) for _ in range(3))
    table = np.zeros((4, LENGTH // 16), np.int32)
    chunk = Lanes(np.zeros((lanes, 16), np.int32), row, number, counts, table, np.zeros(4, np.int32))
    with jax.set_mesh(mesh):
        compiled = prefill_chunk.lower(treedef, leaves, held(mesh, blocks, 16), chunk).compile()
    moved = collective_bytes(compiled.as_text())
    assert collectives_run(compiled.as_text())["all-reduce"] >= 2 * CONFIG.num_layers
    assert sum(moved.values()) < ONE_CACHE / 8, moved
