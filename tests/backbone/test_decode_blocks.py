"""A decode step reads the cache up to its longest row: what the TPU's compiler makes of it, and the same program run
here with small blocks, in which a row's bits do not depend on its neighbours."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, strong
from jax.sharding import NamedSharding
from tpu_compiler import tpu_devices

from para_jax import (
    LayerKind,
    ModelConfig,
    ParaConfig,
    RotaryConfig,
    decode,
    init_adapter,
    make_mesh,
    pick,
    prefill,
    stack_adapters,
)
from para_jax.backbone import cache, cache_blocks
from para_jax.backbone.load import abstract_backbone
from para_jax.model.adapted import decode_step
from para_jax.runtime.sharding import partition

ROWS, LENGTH, BLOCK = 8, 2048, 512
KINDS = tuple(LayerKind(rotary=RotaryConfig(dims=128), window=window) for window in (None, 600))
CONFIG = ModelConfig(
    model_type="llama", kinds=KINDS, width=256, hidden_width=256, num_heads=8, num_kv_heads=4, head_dim=128,
    vocab_size=512, max_positions=4096,
)  # fmt: skip


def compiled_for_a_tpu(layout="layers", **sizes) -> str:
    """The text of a decode step for a slice of four chips."""
    mesh = make_mesh(**sizes, devices=tpu_devices())
    counts = {"kv_heads": CONFIG.num_kv_heads}

    def over(*axes):
        def laid_out(leaf):
            sizes = tuple(counts.get(axis, size) for axis, size in zip(axes, leaf.shape, strict=True))
            spec = partition(axes, sizes, mesh.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return laid_out

    model = abstract_backbone(CONFIG, jnp.bfloat16, mesh, layout=layout)
    prompt = jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    state = jax.eval_shape(lambda model, prompt: prefill(model, None, prompt, 16, max_length=LENGTH)[1], model, prompt)
    held = jax.tree.map(over("batch", "kv_heads", None, None), state.cache)
    state = state._replace(cache=held, length=over("batch")(state.length))
    tokens = over("batch")(jax.ShapeDtypeStruct((ROWS,), jnp.int32))
    with jax.set_mesh(mesh):
        return jax.jit(decode_step, donate_argnums=1).lower(model, state, tokens).compile().as_text()


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a compiled program, by its name."""
    parts = re.split(r"\n(?=%|ENTRY)", text)
    return {part.split(" ", 1)[0]: part.splitlines()[1:] for part in parts if part.startswith(("%", "ENTRY"))}


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 2, "tensor": 2}], ids=["data=4", "fsdp=2, tensor=2"])
def test_a_tpu_reads_the_cache_block_by_block(sizes):
    text = compiled_for_a_tpu(**sizes)
    kept, block = (rf"bf16\[\d,\d,{size},128\]" for size in (LENGTH, BLOCK))
    readers = []
    for lines in computations(text).values():
        parameters = [re.match(r"\s*(%\S+) =", line)[1] for line in lines if re.search(rf"= {kept}\S* parameter", line)]
        uses = [line for line in lines if any(re.search(rf"{re.escape(one)}[,)]", line) for one in parameters)]
        readers += [line for line in uses if not re.search(r"scatter| (tuple|get-tuple-element|fusion)\(", line)]
    assert len(readers) == 4, readers  # keys and values of two layers; a fusion's own computation is looked at too
    assert all(re.search(rf"= {block}\S* dynamic-slice\(", line) for line in readers), readers
    bodies = re.findall(r" while\(.*body=(%[^,\s]+)", text)
    assert len(bodies) == 2
    sent = re.compile(r" (all-reduce|all-gather|collective-permute|all-to-all)(-start)?\(")
    assert not [line for body in bodies for line in computations(text)[body] if sent.search(line)]
    numbers = [line for line in text.splitlines() if sent.search(line) and re.search(r"= \(?s32\[\]", line)]
    assert len(numbers) == 2  # the longest row, and for the windows the shortest


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 tokens, on a CPU too."""
    monkeypatch.setattr(cache, "whole_values", cache_blocks.values_in_blocks)
    monkeypatch.setattr(cache_blocks, "SMALLEST", 8)
    monkeypatch.setattr(cache_blocks, "BLOCKS", 64)
    monkeypatch.setattr(cache_blocks, "LANES", 8)
    jax.clear_caches()
    yield
    jax.clear_caches()


def tenants_of(model):
    return stack_adapters([strong(init_adapter(ParaConfig(r=4), model.config, seed=i), seed=i) for i in range(2)])


def written(model, adapters, tokens, lengths, steps=6):
    """The logits of some decode steps [steps, rows, vocab], each after the token that the row's step before chose."""
    logits, state = prefill(model, adapters, tokens, lengths, max_length=64)
    found = []
    for _ in range(steps):
        logits, state = decode(model, state, jnp.argmax(logits, axis=-1))
        found.append(logits)
    return np.stack(found)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param("gemma3_text", "layers", marks=pytest.mark.long),
        pytest.param("gemma2", "layers", marks=pytest.mark.long),
        ("llama", "stacked"),
    ],
)
def test_a_row_decodes_to_the_same_bits_next_to_longer_rows(family, layout, small_blocks):
    model = backbone(family, layout)
    tenants = tenants_of(model)
    tokens = np.random.default_rng(0).integers(3, 200, (3, 48)).astype(np.int32)
    run = partial(written, model, pick(tenants, np.array([0, 1, 0])))
    together, alone = run(tokens, np.array([5, 46, 12])), run(tokens, np.array([5, 3, 12]))
    np.testing.assert_array_equal(together[:, [0, 2]], alone[:, [0, 2]])
    assert not np.array_equal(together[:, 1], alone[:, 1])
