"""Scores are what one computes by hand from the teacher-forced pass, whatever the batches and the layout."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, strong
from long_cases import long, slow
from tiny_run import rows_of_text, tokenizer, words, write_rows
from tiny_scores import samples, score

from para_jax import (
    Ia3Config,
    LoraConfig,
    ParaConfig,
    evaluate,
    forward,
    generate,
    init_adapter,
    load_backbone,
    stack_adapters,
    vectors,
)
from para_jax.data.examples import Example, encode_completion, encode_example, encode_prompt
from para_jax.data.records import read_records
from para_jax.evaluation import likelihood, writing
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.batch_adapters import StackBank
from para_jax.evaluation.score import Score
from para_jax.evaluation.scoring import derangement
from para_jax.evaluation.shapes import plan_shapes
from para_jax.evaluation.tasks import EncodedTask, EvalTask, encode_task
from para_jax.inference.generate import before_stop, generate_tokens
from para_jax.inference.sampling import Sampling

CHOICES = ("w9", "w9 w10", "w30 w31 w32 w33", "w77")
BATCH = 4  # of 7 records: the last batch is filled up


@cache
def model(layout="layers"):
    return load_backbone(FIXTURES / "llama", layout=layout)


@cache
def adapter(seed=1):
    return strong(init_adapter(ParaConfig(r=4), model().config), seed)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """7 records, prompts of 3 to 9 words, in no order of length."""
    rows = rows_of_text(7, seed=4)
    draw = np.random.default_rng(5)
    for row, length in zip(rows, (6, 3, 9, 4, 8, 5, 7), strict=True):
        row["prompt"] = words(draw.integers(20, 256, length))
    return read_records(write_rows(tmp_path_factory.mktemp("data") / "test.jsonl", rows))


def scored(task, layout="layers", seed=1, **options):
    return score(model(layout), adapter(seed), task, tokenizer(), rows=BATCH, **options)


def by_hand(prompt_ids, completion_ids):
    """The summed nats of a completion, from the logits of one unpadded row (padded to one shape at its end)."""
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(prompt_ids) + len(completion_ids)] = prompt_ids + completion_ids
    logits = forward(model(), adapter(), ids, len(prompt_ids), len(prompt_ids) + len(completion_ids))
    predicted = jax.nn.log_softmax(logits[0, len(prompt_ids) - 1 :][: len(completion_ids)])
    return -float(predicted[jnp.arange(len(completion_ids)), jnp.array(completion_ids)].sum())


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.long
def test_the_loss_is_the_mean_over_all_completion_tokens(records):
    examples = [encode_example(tokenizer(), r.prompt, r.completion) for r in records]
    tokens = sum(len(e.completion_ids) for e in examples)
    expected = sum(by_hand(*example) for example in examples) / tokens
    found = scored(EvalTask("held out", records, "loss"))
    assert found == Score("held out", "loss", -found.loss, found.loss, 7)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert all(e.completion_ids[-1] == tokenizer().eos_token_id for e in examples)  # the end is in the loss


@pytest.mark.long
def test_the_stacked_layout_scores_as_the_layers(records):
    way = dict(metric="exact_match", max_new_tokens=4)
    task = EvalTask("t", right_answers(adapter(), records, way)[:3] + records[3:], **way)
    layers, stacked = scored(task), scored(task, layout="stacked")
    assert stacked.score == layers.score > 0 and stacked.loss == pytest.approx(layers.loss, rel=1e-5)
    assert model("stacked").layout == "stacked"


def test_the_adapter_is_used_and_a_limit_takes_the_first(records):
    task = EvalTask("t", records, "loss")
    assert abs(scored(task).loss - scored(task, seed=3).loss) > 0.1
    assert scored(task, limit=3) == scored(task._replace(records=records[:3]))
    assert scored(task, limit=3).count == 3


# -------------------------------------------------------------------------------------------------------------- answers


def test_exact_match_counts_what_greedy_decoding_writes(records):
    prompts = [record.prompt for record in records]
    batches = prompts[:BATCH], [*prompts[BATCH:], prompts[0]]
    written = [
        text
        for batch in batches
        for text in generate(model(), batch, tokenizer=tokenizer(), adapters=adapter(), max_new_tokens=4)
    ][: len(prompts)]
    assert len(set(written)) > 3
    right = [r._replace(references=("w3", text.strip())) for r, text in zip(records, written, strict=True)]
    task = EvalTask("t", right, "exact_match", max_new_tokens=4)
    assert scored(task).score == 1
    assert scored(task._replace(records=[*right[:3], *records[3:]])).score == pytest.approx(3 / 7)


def test_a_completion_known_to_be_greedy_is_not_decoded(records, monkeypatch):
    prompts = [encode_prompt(tokenizer(), record.prompt) for record in records]
    greedy = generate_tokens(model(), adapter(), prompts, Sampling(4))
    ends = [[*ids[:-1], (ids[-1] + 1) % 256] if i < 3 else ids for i, ids in enumerate(greedy)]
    answers = [tokenizer().decode(before_stop(ids, end[-1:])) for ids, end in zip(greedy, ends, strict=True)]
    right = [r._replace(references=(text,)) for r, text in zip(records, answers, strict=True)]
    examples = [Example(*pair) for pair in zip(prompts, ends, strict=True)]
    decoded, real = [], writing.generate_tokens
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, **s: decoded.extend(a[2]) or real(*a, **s))
    task = EvalTask("t", right, "exact_match", max_new_tokens=4, examples=examples)
    assert scored(task).score == 1 and len(set(answers)) > 3
    assert {tuple(prompt) for prompt in decoded} == {tuple(prompt) for prompt in prompts[:3]}


def test_accuracy_ranks_whole_completions_with_their_end(records):
    def likeliest(record):
        prompt = encode_prompt(tokenizer(), record.prompt)
        return min(CHOICES, key=lambda c: by_hand(prompt, encode_completion(tokenizer(), record.prompt, c)))

    best = [likeliest(record) for record in records]
    assert len(set(best)) > 1
    right = [r._replace(references=(choice,)) for r, choice in zip(records, best, strict=True)]
    task = EvalTask("t", right, "accuracy", choices=CHOICES)
    assert scored(task).score == 1
    wrong = next(choice for choice in CHOICES if choice != best[0])
    assert scored(task._replace(records=[right[0]._replace(references=(wrong,)), *right[1:]])).score == pytest.approx(
        6 / 7
    )


def test_ranking_reads_each_prompt_once_and_scores_as_whole_rows_do(records, monkeypatch):
    read, real = [], likelihood.of_contexts
    monkeypatch.setattr(likelihood, "of_contexts", lambda *a: read.extend(map(tuple, a[2])) or real(*a))
    encoded = encode_task(EvalTask("t", records, "accuracy", choices=CHOICES), tokenizer())
    task, examples, ranked, _ = encoded
    assert len(ranked) == len(CHOICES) * len(records)
    in_rows = EncodedTask(task._replace(metric="loss"), [*examples, *ranked], [])
    bank, questions = StackBank(stack_adapters([adapter()])), [(0, one) for one in encoded.questions()]
    once, whole = (
        Answerer(model(), bank, tokenizer(), rows=BATCH, shapes=plan_shapes([planned])).answer(questions)
        for planned in (encoded, in_rows)
    )
    np.testing.assert_allclose([one.logprob for one in once], [one.logprob for one in whole], rtol=1e-5)
    assert [one.greedy for one in once] == [one.greedy for one in whole]
    assert sorted(read) == sorted({tuple(example.prompt_ids) for example in examples})


def padded(ids):
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


def test_a_task_reports_several_metrics_of_the_same_answers(records):
    task = EvalTask("t", records, "accuracy", choices=CHOICES, also=("macro_f1", "matthews"))
    right = [r._replace(references=(CHOICES[i % 2],)) for i, r in enumerate(records)]
    found = scored(task._replace(records=right))
    assert found == scored(task._replace(records=right, also=()))
    assert [one.metric for one in found.also] == ["macro_f1", "matthews"]
    hits = found.score
    assert found.stderr == pytest.approx((hits * (1 - hits) / 6) ** 0.5)  # s / sqrt(n) of 7 rights and wrongs
    assert scored(task._replace(records=right, metric="macro_f1", also=())).score == found.also[0].score
    assert found.values() == {"loss": found.loss, "accuracy": hits, "accuracy_stderr": found.stderr} | {
        name: value for m, v, e in found.also for name, value in ((m, v), (f"{m}_stderr", e))
    }
    assert found.record()["also"]["matthews"] == {"score": found.also[1].score, "stderr": found.also[1].stderr}


def test_a_loss_with_a_further_metric_also_writes_answers(records):
    way = dict(max_new_tokens=4)
    written, loss = (scored(EvalTask("t", records, metric, **way)) for metric in ("f1", "loss"))
    found = scored(EvalTask("t", records, "loss", also=("f1",), **way))
    assert (found.score, found.stderr, found.loss) == (loss.score, loss.stderr, loss.loss)
    assert (found.also[0].score, found.also[0].stderr) == (written.score, written.stderr)
    assert found.samples == written.samples and not loss.samples
    assert found.values().keys() == {"loss", "loss_stderr", "f1", "f1_stderr"}
    logged = samples(model(), adapter(), EvalTask("t", records, "loss", also=("f1",), **way), tokenizer(), rows=BATCH)
    assert all({"given", "f1", "loss"} <= sample.keys() for sample in logged) and len(logged) == 7
    assert np.mean([sample["f1"] for sample in logged]) == pytest.approx(found.also[0].score)
    assert "f1" in str(found) and f"loss {found.loss:.4f} ± {found.stderr:.4f}" in str(found)


@pytest.mark.parametrize("metric", ["loss", "accuracy", "f1", "macro_f1"])
def test_the_rows_of_a_score_have_its_standard_error(records, metric):
    """So differences of rows are differences of scores, and a paired test sees what ± shows."""
    right = [r._replace(references=(CHOICES[i % 2],)) for i, r in enumerate(records)]
    choices = CHOICES if metric in ("accuracy", "macro_f1") else ()
    found = scored(EvalTask("t", right, metric, choices=choices, max_new_tokens=4))
    assert len(found.rows) == 7 and found.stderr == pytest.approx(np.std(found.rows, ddof=1) / 7**0.5, abs=1e-12)
    if metric != "macro_f1":
        assert np.mean(found.rows) == pytest.approx(found.loss if metric == "loss" else found.score)


def test_what_is_no_adapter_of_the_backbone_is_refused(records):
    one, own = EvalTask("t", records[:1], "loss"), adapter()
    theirs = init_adapter(ParaConfig(r=4), load_backbone(FIXTURES / "qwen2").config)
    for made, named in ((theirs, "another backbone"), (stack_adapters([own]), "Stack"), ([own], "list")):
        with pytest.raises(ValueError, match=named):
            evaluate(model(), made, [one], tokenizer=tokenizer())


def test_an_example_without_room_or_with_an_unknown_token_is_named(records):
    most = model().config.max_positions
    for wrong, said in (
        (Example([300], [9]), "token id 300: .* 0 to 255"),
        (Example([5], [9, 256]), "token id 256: .* 0 to 255"),
        (Example([5], [9] * most), f"{most + 1} tokens .* {most} "),
        (Example([5] * (most - 3), [9]), f"{most + 1} tokens .* {most} "),
    ):
        task = EvalTask("t", records[:2], "exact_match", max_new_tokens=4, examples=[Example([5], [9]), wrong])
        with pytest.raises(ValueError, match=f"{records[1].place}: {said}"):
            scored(task)


def test_the_error_of_the_loss_is_that_of_a_ratio(records):
    found = scored(EvalTask("t", records, "loss"))
    examples = [encode_example(tokenizer(), r.prompt, r.completion) for r in records]
    nll, tokens = np.array([(by_hand(*e), len(e.completion_ids)) for e in examples]).T
    without = [(nll.sum() - a) / (tokens.sum() - b) for a, b in zip(nll, tokens, strict=True)]
    jackknifed = np.sqrt(6 / 7 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.stderr == pytest.approx(jackknifed, rel=0.1)
    assert scored(EvalTask("t", records[:1], "loss")).stderr is None


# ----------------------------------------------------------------------------------------------------- shuffled prompts

WRITES = dict(metric="exact_match", max_new_tokens=4)
RANKS = dict(metric="accuracy", choices=CHOICES)
each_way = pytest.mark.parametrize("way", [WRITES, RANKS], ids=["written", "ranked"])


def both(adapter, task, layout="layers"):
    """The task's score with each example's own factors, and with another's."""
    own, other = (
        score(model(layout), adapter, task, tokenizer(), shuffle=shuffle, rows=BATCH) for shuffle in (None, 0)
    )
    return own, other


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_shuffling_gives_every_example_another_prompt(count):
    drawn = [derangement("t", count, seed) for seed in range(20)]
    for order in drawn:
        assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()
    assert len({tuple(order) for order in drawn}) > 1 or count == 2
    np.testing.assert_array_equal(derangement("t", count, 3), drawn[3])


@each_way
@pytest.mark.parametrize(
    "config",
    [long(ParaConfig(r=4, pooler="constant")), slow(Ia3Config()), slow(LoraConfig(r=4, lora_alpha=64))],
    ids=["constant", "ia3", "lora"],
)
def test_shuffling_changes_nothing_for_adapters_that_ignore_the_prompt(records, config, way):
    unaware = strong(init_adapter(config, model().config))
    right = right_answers(unaware, records, way)
    own, other = both(unaware, EvalTask("t", right, **way))
    assert other.loss == pytest.approx(own.loss, rel=1e-6) and other.score == own.score > 0
    assert abs(score(model(), None, EvalTask("t", right, **way), tokenizer(), rows=BATCH).loss - own.loss) > 0.01


@pytest.mark.long
@each_way
@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_shuffling_changes_the_score_of_para(records, layout, way):
    task = EvalTask("t", right_answers(adapter(), records, way), **way)
    own, other = both(adapter(), task, layout)
    assert own.score == 1 and other.score < 1
    assert abs(other.loss - own.loss) > 1e-3


def right_answers(adapter, records, way):
    """The records with what the adapter answers as the reference."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        said = lambda metric, answers, _: found.append(answers) or (0, [0])  # noqa: E731
        patch.setattr("para_jax.evaluation.score.measure_rows", said)
        score(model(), adapter, EvalTask("t", records, **way), tokenizer(), rows=BATCH)
    return [r._replace(references=(answer,)) for r, answer in zip(records, found[0], strict=True)]


def test_a_shuffled_loss_uses_the_factors_of_the_other_prompt(records):
    """By hand: the other prompt's factors, as an (IA)^3 adapter, on the example's own tokens."""
    from para_jax.adapters.ia3 import from_factors

    examples = [encode_example(tokenizer(), r.prompt, r.completion) for r in records]
    others = [examples[i].prompt_ids for i in derangement("t", len(records), 0)]
    nll = []
    for (prompt, completion), other in zip(examples, others, strict=True):
        made = vectors(model(), adapter(), padded(other), len(other))
        fixed = from_factors({site: factors[:, 0] for site, factors in made.items()}, model().config)
        ids = np.zeros((1, 24), np.int32)
        ids[0, : len(prompt) + len(completion)] = prompt + completion
        logits = jax.nn.log_softmax(forward(model(), fixed, ids, len(prompt))[0, len(prompt) - 1 :])
        nll.append(-float(logits[jnp.arange(len(completion)), jnp.array(completion)].sum()))
    _, other = both(adapter(), EvalTask("t", records, "loss"))
    assert other.loss == pytest.approx(sum(nll) / sum(len(e.completion_ids) for e in examples), rel=1e-5)


def test_one_example_has_no_other_prompt(records):
    task = EvalTask("held out", records, "loss")
    with pytest.raises(ValueError, match="^held out: 1 example; to shuffle prompts at least 2 are needed$"):
        scored(task, limit=1, shuffle=0)
