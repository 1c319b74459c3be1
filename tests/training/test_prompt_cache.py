"""Prompts that are computed once: the same loss and gradients as where the step computes them, and each prompt once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, strong
from long_cases import long, slow
from one_adapter import examples_of, value_and_gradient

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_backbone, make_mesh
from para_jax.adapters.para import Para
from para_jax.data.batches import Bucket, Plan, collate, example_lengths
from para_jax.data.examples import Example
from para_jax.data.packing import RowShape, collate_packed
from para_jax.data.schedule import TenantOrder
from para_jax.training import prompt_cache, prompt_file, prompt_states
from para_jax.training.loss import completion_nll
from para_jax.training.prompt_cache import cached_prompts, distinct_prompts
from para_jax.training.prompt_states import pooler_of

#: (prompt, completion) tokens: shorter and longer than the windows, and two different prompts of one length
SIZES = [(9, 4), (3, 1), (12, 2), (1, 3), (5, 6), (3, 2), (8, 1)]
EXAMPLES = examples_of(SIZES)
ROWS = [[0, 1, 3], [4, 6], [2, 5]]
BUCKET, ROW_SHAPE = Bucket(24, 6, 16), RowShape(24, 9, 4, 16)
CASES = [
    long("llama", ParaConfig(r=4, scope="response")),
    long("llama", LoraConfig(r=4, scope="response", scope_window=3)),
    slow("gemma3_text", ParaConfig(r=4, scope="response", scope_window=4, pooler="mean")),
    slow("llama", ParaConfig(r=4, scope="response", pooler="max")),
    slow("llama", ParaConfig(r=4, scope="response", pooler="constant")),
    slow("llama", Ia3Config(scope="response")),
]


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def batches():
    """A padded and a packed batch of all examples, in one pass, with their shapes."""
    padded = collate(EXAMPLES, BUCKET, 8)
    packed = collate_packed([[EXAMPLES[i] for i in row] for row in ROWS], ROW_SHAPE, 4)
    return [(jax.tree.map(lambda a: a[None], batch), shape) for batch, shape in ((padded, BUCKET), (packed, ROW_SHAPE))]


def order_of(made, steps=100, seed=0, rows=2) -> TenantOrder:
    return TenantOrder(made, Plan(example_lengths(made), buckets=(BUCKET,), rows=rows, seed=seed), steps)


def cached(config, model=None, where="memory", held=None, made=None):
    """The cache of all examples' prompts, which are computed four at a time."""
    given = where, model or backbone("llama", "stacked"), config, [order_of(made or EXAMPLES)], (BUCKET, ROW_SHAPE)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        return cached_prompts(*given, step_rows=8, rows=4, held={} if held is None else held)


@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_given_prompts_have_the_loss_and_gradients_of_computed_ones(family, config):
    model = backbone(family, "stacked")
    adapter, prompts = strong(init_adapter(config, model.config)), cached(config, model)
    for batch, shape in batches():
        part, states = (jax.tree.map(lambda a: jnp.asarray(a[0]), tree) for tree in (batch, prompts.states(batch, 16)))

        def nll(adapter, states=None, part=part, completion=shape.completion):
            return completion_nll(model, adapter, part, completion, prompt=16, states=states)[0].sum()

        ours, theirs = (
            value_and_gradient(lambda a, s=states, of=nll: of(a, s), adapter),
            value_and_gradient(nll, adapter),
        )
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4 * float(jnp.abs(other).max()))


def test_each_distinct_prompt_that_the_steps_read_is_kept_once():
    made = EXAMPLES
    again = [Example(prompt, [5]) for prompt, _ in made[:4]]
    distinct = distinct_prompts([order_of(made), order_of(made, seed=1), order_of(again)])
    shortest_first = [list(one.prompt_ids) for one in distinct]
    assert sorted(shortest_first) == sorted(one.prompt_ids for one in made)
    assert [len(ids) for ids in shortest_first] == sorted(len(one.prompt_ids) for one in made)
    order = order_of(made, steps=2)
    read = {i for step in range(2) for i in order.plan.batch_indices(step)[1]}
    expected = sorted((made[i].prompt_ids for i in read), key=len)
    assert [one.prompt_ids for one in distinct_prompts([order])] == expected and len(read) == 4


@pytest.mark.long
def test_the_states_of_a_row_are_those_of_its_prompts_alone():
    model, prompts = backbone("llama", "stacked"), cached(ParaConfig(scope="response"))
    (padded, _), (packed, _) = batches()
    padded, packed = prompts.states(padded, 16), prompts.states(packed, 16)
    for row, made in enumerate(EXAMPLES):
        size = len(made.prompt_ids)
        tokens = jnp.asarray([made.prompt_ids])
        alone = prompt_states.prompt_states(model, pooler_of(ParaConfig(), model.config), tokens, jnp.array([size]))
        place, segment = next((i, one.index(row)) for i, one in enumerate(ROWS) if row in one)
        before = sum(len(EXAMPLES[i].prompt_ids) for i in ROWS[place][:segment])
        for ours, in_packed, theirs in zip(padded[:2], packed[:2], alone[:2], strict=True):
            np.testing.assert_allclose(ours[0, :, row, :, :size], theirs[:, 0], atol=1e-4)
            np.testing.assert_array_equal(ours[0, :, row, :, :size], in_packed[0, :, place, :, before : before + size])
            assert not ours[0, :, row, :, size:].any()
        np.testing.assert_allclose(padded.summaries[0, :, row], alone.summaries[:, 0], atol=1e-4)
        np.testing.assert_array_equal(padded.summaries[0, :, row], packed.summaries[0, :, place, segment])


@pytest.mark.long
def test_the_states_of_int8_weights_in_bfloat16_are_those_that_a_step_computes():
    """With the mean pooler, whose summaries are float32."""
    model = load_backbone(FIXTURES / "llama", layout="stacked", dtype="bfloat16", quantize="int8")
    config = ParaConfig(r=4, scope="response", pooler="mean")
    adapter = strong(init_adapter(config, model.config))
    prompts = cached(config, model, where="disk")
    assert (prompts.states_format.dtype, prompts.states_format.summary_dtype) == ("bfloat16", "float32")
    (batch, shape), _ = batches()
    part, states = (jax.tree.map(lambda a: jnp.asarray(a[0]), tree) for tree in (batch, prompts.states(batch, 16)))
    nll = jax.jit(lambda states: completion_nll(model, adapter, part, shape.completion, prompt=16, states=states)[0])
    np.testing.assert_allclose(nll(states), nll(None), rtol=1e-4)  # those of the weights before: up to 1.6e-2


def test_runs_of_one_command_share_the_cache_of_the_same_summaries_alone():
    held = {}
    first = cached(ParaConfig(scope="response"), held=held)
    assert cached(LoraConfig(scope="response", scope_window=2), held=held) is first
    fewer = cached(ParaConfig(scope="response"), held=held, made=EXAMPLES[:3])
    assert fewer is not first and len(fewer.data) < len(first.data)
    first = cached(ParaConfig(scope="response"), held=held)
    other = cached(ParaConfig(scope="response", pooler="mean"), held=held)
    assert other is not first and list(held.values()) == [other]


# --------------------------------------------------------------------------------------------------------- on the disk


def test_a_file_that_is_not_whole_is_never_read(monkeypatch, capsys):
    config = ParaConfig(scope="response")
    expected = cached(config, where="disk").data.copy()
    (file,) = prompt_file.folder().iterdir()
    whole = file.read_bytes()
    other = whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]
    for damaged in (whole[:-1], whole + b"x", b"x" + whole[1:], whole[:100], b"", other):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(cached(config, where="disk").data, expected)
        assert "damaged" in capsys.readouterr().err and file.read_bytes() == whole

    def killed(*_):
        yield 1, b"half"
        raise KeyboardInterrupt

    file.unlink()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prompt_cache, "computed", killed)
        cached(config, where="disk")
    assert not list(prompt_file.folder().iterdir())


def test_a_file_is_of_one_backbone_pooler_and_set_of_prompts():
    def name(pooler="last", made=None, rows=4, change=lambda weights: weights, **config):
        model = backbone("llama", "stacked")
        changed = jax.tree.map(lambda leaf: leaf, model)
        kernel = changed.layers[0][0].feedforward.down_proj.kernel  # the fingerprint reads q_proj alone
        kernel[...] = change(kernel[...])
        prompts = distinct_prompts([order_of(made or EXAMPLES)])
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            return prompt_file.file_of(
                changed, pooler_of(ParaConfig(pooler=pooler, **config), model.config), prompts, rows
            )

    others = [name("mean"), name("max"), name(made=EXAMPLES[1:]), name(rows=8)]
    others += [name(change=lambda weights: weights * 1.001), name(change=lambda weights: weights[..., ::-1])]
    with jax.default_matmul_precision("bfloat16"):
        others.append(name())
    assert len({name(), *others}) == 1 + len(others)
    assert name() == name(r=4, scope="response", scope_window=3) == name("constant")


def test_poolers_that_differ_for_long_prompts_alone_have_files_of_their_own(monkeypatch):
    def of_last_20(self, x, length, start=0):
        after = jnp.arange(len(x)) - start
        kept = (after >= jnp.maximum(length - 20, 0)) & (after < length)
        return jnp.sum(jnp.where(kept[:, None], x, 0), axis=0) / jnp.minimum(length, 20)

    pooler = pooler_of(ParaConfig(scope="response", pooler="mean"), backbone("llama", "stacked").config)
    mean = prompt_states.pooler_digest(pooler)
    assert mean == prompt_states.pooler_digest(pooler)
    monkeypatch.setattr(Para, "pool", of_last_20)
    assert prompt_states.pooler_digest(pooler) != mean


def test_the_folder_is_bounded(monkeypatch):
    first = cached(ParaConfig(scope="response"), where="disk")
    (old,) = prompt_file.folder().iterdir()
    monkeypatch.setattr(prompt_file, "MAX_BYTES", old.stat().st_size + 1)
    kept = first.data.copy()
    cached(ParaConfig(scope="response", pooler="mean"), where="disk")
    (new,) = prompt_file.folder().iterdir()
    assert new != old
    np.testing.assert_array_equal(first.data, kept)  # a run that reads it still does


# ------------------------------------------------------------------------------------------------------------ refusals


def test_states_that_take_too_much_are_refused_with_the_numbers_before_any_is_computed(monkeypatch, capsys):
    config = ParaConfig(scope="response")
    size = len(cached(config).data)
    assert f"7 distinct prompts with 41 tokens take {size:,} bytes" in capsys.readouterr().err
    monkeypatch.setattr(prompt_cache, "computed", None)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="memory needs .* of the 1,000 .*disk"):
        patched.setattr(prompt_cache, "free_memory", lambda: 1000)
        cached(config)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=f"disk needs {size:,} .* of the 2,000 "):
        patched.setattr(prompt_file, "free_space", lambda: 2000)
        cached(config, where="disk")


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'}.*XDG_CACHE_HOME"):
        cached(ParaConfig(scope="response"), where="disk")


def test_free_memory_and_space_are_known_here():
    assert 2**20 < prompt_cache.free_memory() < 2**50
    assert 2**20 < prompt_file.free_space() < 2**60


def test_files_that_a_container_has_read_once_take_no_memory(tmp_path):
    for name, text in (("max", "8000\n"), ("current", "6000\n"), ("stat", "anon 1500\ninactive_file 4000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert prompt_cache.free_in_group(tmp_path) == [6000]
    (tmp_path / "memory.max").write_text("max\n")
    assert prompt_cache.free_in_group(tmp_path) == []


@pytest.mark.parametrize("name", ["weights", "doubled"])
def test_summaries_that_are_not_the_backbones_alone_are_refused(monkeypatch, name):
    pools = {
        "weights": lambda self, x, length, start=0: x[start] * self.down[...].sum(),
        "doubled": lambda self, x, length, start=0: 2 * x[start],
    }
    monkeypatch.setattr(Para, "pool", pools[name])
    with pytest.raises(ValueError, match="Para .*cache_prompts=off"):
        pooler_of(ParaConfig(scope="response"), backbone("llama", "stacked").config)
