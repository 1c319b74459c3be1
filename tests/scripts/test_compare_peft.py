"""What compare_peft.py hands to the torch side repeats our training, and its figures are those of the curves."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_models import backbone, strong
from tiny_run import tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import compare_peft  # noqa: E402

from para_jax import forward, init_adapter, load_adapter  # noqa: E402
from para_jax.config import LoraConfig, TrainSection  # noqa: E402

STEPS, SECTION = 3, TrainSection(learning_rate=3e-2, max_grad_norm=0.1, adam_eps=1e-3)


def write_rows(folder: Path, completions=("w9", "w10")) -> Path:
    """32 rows of 4 to 6 words that end with the same two, and an answer of one word."""
    folder.mkdir()
    for split in ("train", "test"):
        rows = []
        for i in range(32):
            words = np.random.default_rng([i, split == "test"]).integers(11, 200, 2 + i % 3)
            prompt = " ".join(f"w{n}" for n in [*words, 7, 8])
            rows.append({"prompt": prompt, "completion": completions[i % 2]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_rows(tmp_path_factory.mktemp("data") / "rows")
    return compare_peft.load_data(str(folder), tokenizer(), 0, STEPS, tested=10)


def config_of(name, data):
    config, rate = compare_peft.CASES[name]
    return compare_peft.with_invocation(config, rate, data)[0] if name == "activated LoRA" else config


def repeated(model, folder):
    """The losses of a plain optax loop over the files."""
    given, training = np.load(folder / "given.npz"), json.loads((folder / "training.json").read_text())
    adapter = load_adapter(folder / "start", model.config)
    (b1, b2), rates = training["adam"].pop("betas"), jnp.asarray(given["rates"])
    adamw = optax.adamw(lambda step: rates[step], b1=b1, b2=b2, **training["adam"])
    optimizer = optax.chain(optax.clip_by_global_norm(training["max_grad_norm"]), adamw)

    def loss_of(adapter, tokens, prompt_length, length):
        log_p = jax.nn.log_softmax(forward(model, adapter, tokens, prompt_length, length)[:, :-1])
        place = jnp.arange(1, tokens.shape[1])
        real = (place >= prompt_length[:, None]) & (place < length[:, None])
        return -jnp.where(real, jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0], 0).sum() / real.sum()

    @jax.jit
    def step(adapter, state, batch):
        loss, gradient = jax.value_and_grad(loss_of)(adapter, *batch)
        update, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, update), state, loss

    state, losses = optimizer.init(adapter), []
    for i in range(len(rates)):
        batch = [jnp.asarray(given[f"{name}_{i}"]) for name in ("tokens", "prompt_length", "length")]
        adapter, state, loss = step(adapter, state, batch)
        losses.append(float(loss))
    return losses, adapter


@pytest.mark.long
@pytest.mark.parametrize("name", ["activated LoRA", "LoRA", "(IA)^3"])
def test_the_files_repeat_our_training(data, tmp_path, name):
    model = backbone("llama", "stacked")
    adapter = strong(init_adapter(config_of(name, data), model.config), scale=0.5)
    compare_peft.hand_over(tmp_path, adapter, data, SECTION)
    ours = compare_peft.our_side(model, tmp_path, data, SECTION)
    losses, trained = repeated(model, tmp_path)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    start = load_adapter(tmp_path / "start", model.config)
    assert compare_peft.distance(start, load_adapter(tmp_path / "ours", model.config), trained) < 1e-3


def test_the_control_has_the_same_rows_in_another_order(data):
    for (batch, _), (other, _) in zip(data.batches, compare_peft.in_reverse(data).batches, strict=True):
        rows, others = (sorted(map(bytes, one.tokens)) for one in (batch, other))
        assert rows == others and (batch.tokens[0] == other.tokens[-1]).all() and (batch.tokens != other.tokens).any()
        assert batch.length[0] == other.length[-1] and batch.prompt_length[0] == other.prompt_length[-1]


@pytest.mark.long
def test_the_scores_are_those_of_the_whole_pass(data):
    model = backbone("llama", "stacked")
    adapter = strong(init_adapter(config_of("LoRA", data), model.config), scale=0.5)
    found = compare_peft.scored(model, adapter, data, rows=4)
    for example, scores in zip(data.tested, found, strict=True):
        tokens = np.array([example.prompt_ids], np.int32)
        logits = forward(model, adapter, tokens, len(example.prompt_ids))[0, -1]
        np.testing.assert_allclose(jax.nn.log_softmax(logits)[jnp.array(data.answers)], scores, atol=1e-4)


def test_both_sides_get_the_same_batches_for_a_seed_and_others_for_another(tmp_path):
    folder = str(write_rows(tmp_path / "rows"))
    first, again, other = (compare_peft.load_data(folder, tokenizer(), seed, STEPS) for seed in (0, 0, 1))
    tokens = [np.stack([batch.tokens for batch, _ in one.batches]) for one in (first, again, other)]
    assert (tokens[0] == tokens[1]).all() and (tokens[0] != tokens[2]).any()


def test_the_invocation_is_what_all_prompts_end_with(data):
    config = config_of("activated LoRA", data)
    assert config.alora_invocation_tokens == (7, 8) and config.scope_window == 2 and config.r == 9


@pytest.mark.parametrize("ends, window", [(([1, 7], [2, 8]), None), (([3, 7, 8], [7, 8]), 2), (([7, 8], [7, 8]), 2)])
def test_prompts_may_end_differently_and_may_all_be_equal(ends, window):
    lengths = [len(end) for end in ends]
    tokens = np.array([end + [0] * (max(lengths) - len(end)) for end in ends])
    given = compare_peft.Data([((tokens, lengths), 1)], [SimpleNamespace(prompt_ids=end) for end in ends], [])
    if window is None:
        with pytest.raises(SystemExit, match="activated LoRA"):
            compare_peft.with_invocation(LoraConfig(), 1e-3, given)
    else:
        assert compare_peft.with_invocation(LoraConfig(), 1e-3, given)[0].scope_window == window


def test_answers_of_several_tokens_are_refused(tmp_path):
    folder = str(write_rows(tmp_path / "rows", completions=("w9 w10", "w11")))
    with pytest.raises(SystemExit, match="answers of several tokens"):
        compare_peft.load_data(folder, tokenizer(), 0)


def test_cases_of_other_data_are_not_joined(tmp_path, monkeypatch):
    file = tmp_path / "held.json"
    file.write_text(json.dumps({"data": "data/sst2", "cases": {"LoRA, seed 0": {}}}))
    monkeypatch.setattr(sys, "argv", ["compare_peft.py", "--data", "data/own", "--output", str(file)])
    with pytest.raises(SystemExit, match="holds cases of data/sst2; choose another --output"):
        compare_peft.main()


def test_the_figures_are_those_of_the_two_sides():
    scores = np.log([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    other = np.log([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    ours = compare_peft.Found(np.array([2.0, 1.0, 0.5]), scores, 1.0)
    theirs = compare_peft.Found(np.array([2.0, 1.25, 0.5]), other, 2.0)
    found = compare_peft.compared(ours, theirs, [0, 1, 0])
    assert found["largest_relative_difference"] == pytest.approx(0.2) and found["at_step"] == 2
    assert found["largest_difference"] == 0.25
    assert found["accuracy"] == [1.0, pytest.approx(2 / 3)] and found["rows_that_differ"] == 1
    assert found["test_loss"][1] == pytest.approx(-np.log([0.9, 0.8, 0.4]).mean())
    assert compare_peft.compared(ours, ours, [0, 1, 0])["largest_relative_difference"] == 0
