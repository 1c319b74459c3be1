"""The model over blocks: what prefill computes, in any cut, next to any other prompt, and the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, strong
from long_cases import quick, slow

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, pick, prefill, stack_adapters
from para_jax.adapters.rows import Rows
from para_jax.backbone import block_pool
from para_jax.backbone.block_pool import rows_of_blocks
from para_jax.model.adapted import decode_step
from para_jax.model.blocks import Lanes, Tails, decode_blocks, prefill_blocks

SIZE, LONGEST, BLOCKS, LANES, ROWS = 4, 6, 20, 3, 2
FAMILIES = ["llama", "gemma3_text", "gemma2", "olmo2"]
TOKENS = np.random.default_rng(0).integers(3, 200, LONGEST * SIZE)
chunk = jax.jit(prefill_blocks)


@pytest.fixture(autouse=True, params=[8, 128], ids="span {}".format)
def span(request, monkeypatch):
    """Tokens that attention reads at a time: with the smaller one, these prompts have several spans."""
    monkeypatch.setattr(block_pool, "CPU_SPAN", request.param)
    chunk.clear_cache()


def pool_of(model, fill=0.0):
    config = model.config
    shape = BLOCKS, config.num_kv_heads, SIZE, config.head_dim
    return tuple((jnp.full(shape, fill, model.dtype),) * 2 for _ in range(config.num_layers))


def lanes(prompts, parts):
    """The lanes of (row, number of the block) in `parts`, for prompts as {row: (token ids, blocks of the pool)}."""
    made = Lanes(
        np.zeros((LANES, SIZE), np.int32), *(np.zeros(LANES, np.int32) for _ in range(3)),
        np.zeros((ROWS, LONGEST), np.int32), np.zeros(ROWS, np.int32),
    )  # fmt: skip
    for row, (_, blocks) in prompts.items():
        made.table[row, : len(blocks)] = blocks
    for lane, (row, number) in enumerate(parts):
        tokens = prompts[row][0][number * SIZE : (number + 1) * SIZE]
        made.tokens[lane, : len(tokens)] = tokens
        made.row[lane], made.number[lane], made.count[lane] = row, number, len(tokens)
        made.last[row] = lane * SIZE + len(tokens) - 1
    return made


def row_of(pool, blocks, length):
    """The keys and values of a prompt in all layers."""
    rows = [rows_of_blocks(layer, np.array([blocks])) for layer in pool]
    return np.stack([np.stack(row)[:, 0, :, :length] for row in rows])


def in_one_go(model, length, fill=0.0):
    """(pool, blocks, logits of the last token) of the first tokens of TOKENS, three blocks at a time."""
    pool, blocks, last = pool_of(model, fill), list(range(7, 7 + -(-length // SIZE))), None
    for start in range(0, len(blocks), LANES):
        parts = [(0, number) for number in range(start, min(start + LANES, len(blocks)))]
        pool, last, _ = chunk(model, pool, lanes({0: (TOKENS[:length], blocks)}, parts))
    return pool, blocks, last


@pytest.mark.parametrize("family", quick(FAMILIES, "gemma3_text", "olmo2"))
@pytest.mark.parametrize("length", quick([1, 8, 19], 1, 19, slow=(8,)))
def test_blocks_give_what_prefill_gives(family, length):
    model = backbone(family)
    pool, blocks, last = in_one_go(model, length)
    logits, state = prefill(model, None, TOKENS[None, :length], length, max_length=length)
    expected = np.stack([np.stack(layer)[:, 0] for layer in state.cache])
    np.testing.assert_allclose(row_of(pool, blocks, length), expected, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(last[0], logits[0], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("family", quick(FAMILIES, "gemma3_text", "olmo2"))
def test_the_bits_depend_neither_on_the_cut_nor_on_the_company_nor_on_what_the_pool_held(family):
    model, length = backbone(family), 19
    pool, blocks, last = in_one_go(model, length)
    expected = row_of(pool, blocks, length)
    dirty, _, same = in_one_go(model, length, np.nan)
    np.testing.assert_array_equal(row_of(dirty, blocks, length), expected)
    np.testing.assert_array_equal(same[0], last[0])
    other = TOKENS[::-1].copy()
    prompts = {0: (other, [1, 2, 5]), 1: (TOKENS[:length], [9, 3, 15, 4, 12])}
    pool, last_one = pool_of(model), None
    for parts in ([(1, 0)], [(0, 0), (1, 1), (1, 2)], [(0, 1), (0, 2)], [(1, 3)], [(0, 0), (0, 1), (1, 4)]):
        pool, last_one, _ = chunk(model, pool, lanes(prompts, parts))
    np.testing.assert_array_equal(row_of(pool, prompts[1][1], length), expected)
    np.testing.assert_array_equal(last_one[1], last[0])


def test_a_prompt_that_shares_blocks_gets_the_same_bits():
    model, length = backbone("gemma3_text"), 18
    pool, blocks, last = in_one_go(model, length)
    shared = {1: (TOKENS[:length], [*blocks[:3], 1, 2])}
    pool, found, _ = chunk(model, pool, lanes(shared, [(1, 3), (1, 4)]))
    np.testing.assert_array_equal(row_of(pool, shared[1][1], length), row_of(pool, blocks, length))
    np.testing.assert_array_equal(found[1], last[0])


def test_both_layouts_give_the_same():
    found = [in_one_go(backbone("gemma3_text", layout), 19) for layout in ("layers", "stacked")]
    np.testing.assert_allclose(found[0][2][0], found[1][2][0], atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(row_of(found[0][0], found[0][1], 19), row_of(found[1][0], found[1][1], 19), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", 1), ("llama", 18), slow("gemma3_text", 18), slow("llama", 3), slow("gemma3_text", 1)],
)
@pytest.mark.parametrize(
    "config",
    [
        ParaConfig(r=4, scope="response"),
        ParaConfig(r=4, scope="response", pooler="constant"),
        Ia3Config(scope="response", scope_window=3),
        LoraConfig(r=4, scope="response", scope_window=2),
    ],
)
@pytest.mark.parametrize("together", quick([True, False], True))
def test_an_adapter_acts_on_the_tail_as_in_prefill(family, length, config, together):
    """Three blocks at a time, or each alone; next to a prompt of the base model, which stays plain."""
    model, row = backbone(family), 1
    adapter = strong(init_adapter(config, model.config), 1)
    adapters = Rows((stack_adapters([adapter]),), jnp.array([[-1, 0]], jnp.int32))
    blocks, others = list(range(7, 7 + -(-length // SIZE))), list(range(1, 7))
    prompts = {0: (TOKENS[::-1][:20].copy(), others), row: (TOKENS[:length], blocks)}
    pool, plain = pool_of(model, np.nan), max(length - config.scope_window, 0)
    parts = [(row, number) for number in range(len(blocks))]
    for start in range(0, len(parts), LANES - 1 if together else 1):
        chosen = [*parts[start : start + (LANES - 1 if together else 1)], (0, start)]
        tails = Tails(
            np.full(LANES, -1, np.int32), np.zeros(LANES, np.int32), np.zeros(2, np.int32), np.ones(2, np.int32)
        )
        for lane, (of, number) in enumerate(chosen):
            if of == row and min((number + 1) * SIZE, length) > plain:
                tails.of_lane[lane], tails.start[lane] = row, plain
                tails.lane[row], tails.count[row] = lane, min(SIZE, length - number * SIZE)
        pool, last, adjustments = chunk(model, pool, lanes(prompts, chosen), adapters, tails)
    expected, state = prefill(model, adapter, TOKENS[None, :length], length, max_length=length)
    np.testing.assert_allclose(last[row], expected[0], atol=5e-4, rtol=1e-4)
    whole = np.stack([np.stack(layer)[:, 0] for layer in state.cache])
    np.testing.assert_allclose(row_of(pool, blocks, length), whole, atol=2e-4, rtol=1e-4)
    base, _, _ = chunk(model, pool_of(model), lanes(prompts, [(0, 0)]))
    np.testing.assert_array_equal(row_of(pool, others, SIZE), row_of(base, others, SIZE))
    for i, made in enumerate(adjustments):
        carried = jax.tree.map(lambda a, b: np.broadcast_to(np.asarray(b), a[1:].shape), made, unshared(state, i))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, atol=2e-4, rtol=1e-4), made, carried)
        assert not any(np.asarray(a[0]).any() for a in jax.tree.leaves(made))


def unshared(state, layer):
    """A layer's adjustment, also where it is one for all rows."""
    made = state.adjustments[layer]
    return getattr(made, "adjustment", made)


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", ParaConfig(r=4)), ("llama", LoraConfig(r=4)), ("gemma3_text", ParaConfig(r=4))],  # it has windows
    ids=["PARA", "LoRA", "windows"],
)
def test_rows_decode_over_blocks_as_over_a_cache_of_their_own_and_several_tokens_as_one_by_one(family, config):
    model = backbone(family)
    rows = pick(stack_adapters([strong(init_adapter(config, model.config), 0, 0.3)]), [0, -1])
    tokens = np.random.default_rng(0).integers(20, 250, (2, 16)).astype(np.int32)
    _, state = prefill(model, rows, tokens[:, :8], [8, 6], max_length=20)
    table = np.array([[3, 9, 1, 12, 7], [4, 2, 13, 5, 8]])
    pool = pool_of(model, np.nan)

    def put(held, row):
        parts = row.reshape(2, row.shape[1], -1, SIZE, row.shape[3]).swapaxes(
            1, 2
        )  # [rows, blocks, heads, SIZE, width]
        return held.at[table].set(parts)

    pool, length = jax.tree.map(put, pool, state.cache), state.length
    decode = jax.jit(decode_blocks)
    logits, after = decode(model, pool, table, length, state.adjustments, tokens[:, 8:13])
    for i in range(5):
        one, state = decode_step(model, state, jnp.asarray(tokens[:, 8 + i]))
        alone, pool = decode(model, pool, table, length + i, state.adjustments, tokens[:, 8 + i : 9 + i])
        np.testing.assert_allclose(alone[:, 0], one, atol=2e-4)
        np.testing.assert_allclose(logits[:, i], one, atol=2e-4)
    again, _ = decode(model, after, table, length + 3, state.adjustments, tokens[:, 11:13])
    np.testing.assert_allclose(again, logits[:, 3:], atol=2e-4)  # tokens that did not count are written over
