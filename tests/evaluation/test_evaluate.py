"""Scores are what one computes by hand from the teacher-forced pass, whatever the batches and the layout."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES, strong
from tiny_run import backbone_folder, rows_of_text, run_config, tokenizer, words, write_rows

from para_jax import (
    Ia3Config,
    LoraConfig,
    ParaConfig,
    evaluate,
    forward,
    generate,
    init_adapter,
    load_backbone,
    vectors,
)
from para_jax.data.examples import Example, encode_completion, encode_example, encode_prompt
from para_jax.data.records import Record, read_records
from para_jax.data.tokenizer import load_tokenizer
from para_jax.evaluation.evaluate import (
    EvalTask,
    Measured,
    Report,
    Score,
    derangement,
    evaluate_task,
    score_of,
    task_of_run,
)

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
    return evaluate(model(layout), adapter(seed), [task], tokenizer=tokenizer(), **options).scores[0]


def by_hand(prompt_ids, completion_ids):
    """The summed nats of a completion, from the logits of one unpadded row (padded to one shape at its end)."""
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(prompt_ids) + len(completion_ids)] = prompt_ids + completion_ids
    logits = forward(model(), adapter(), ids, len(prompt_ids), len(prompt_ids) + len(completion_ids))
    predicted = jax.nn.log_softmax(logits[0, len(prompt_ids) - 1 :][: len(completion_ids)])
    return -float(predicted[jnp.arange(len(completion_ids)), jnp.array(completion_ids)].sum())


# ----------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_over_all_completion_tokens(records):
    examples = [encode_example(tokenizer(), r.prompt, r.completion) for r in records]
    tokens = sum(len(e.completion_ids) for e in examples)
    expected = sum(by_hand(*example) for example in examples) / tokens
    found = scored(EvalTask("held out", records, "loss", batch_size=BATCH))
    assert found == Score("held out", "loss", -found.loss, found.loss, 7)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert all(e.completion_ids[-1] == tokenizer().eos_token_id for e in examples)  # the end is in the loss


def test_the_stacked_layout_scores_as_the_layers(records):
    task = EvalTask("t", records, "exact_match", max_new_tokens=4, batch_size=BATCH)
    layers, stacked = scored(task), scored(task, layout="stacked")
    assert stacked.score == layers.score and stacked.loss == pytest.approx(layers.loss, rel=1e-5)
    assert model("stacked").layout == "stacked"


def test_the_adapter_is_used_and_a_limit_takes_the_first(records):
    task = EvalTask("t", records, "loss", batch_size=BATCH)
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
    task = EvalTask("t", right, "exact_match", max_new_tokens=4, batch_size=BATCH)
    assert scored(task).score == 1
    assert scored(task._replace(records=[*right[:3], *records[3:]])).score == pytest.approx(3 / 7)


def test_a_completion_that_is_likeliest_throughout_is_what_is_written_and_is_not_decoded(records, monkeypatch):
    from para_jax.evaluation import evaluate as module

    prompts = [encode_prompt(tokenizer(), record.prompt) for record in records]
    tokens = module.generate_tokens(model(), adapter(), prompts, max_new_tokens=4)
    other = [[*ids[:-1], ids[-1] + 1] if i < 3 else ids for i, ids in enumerate(tokens)]
    task = EvalTask("t", [], "exact_match", max_new_tokens=4, batch_size=BATCH)
    examples = [Example(*pair) for pair in zip(prompts, other, strict=True)]
    rest = (lambda rows: adapter()), examples
    shapes = module.plan_shapes([module.Encoded(task, examples, [])])
    greedy = module.likelihoods(model(), *rest, BATCH, shapes).greedy
    assert greedy.tolist() == [False] * 3 + [True] * 4
    given = task, tokenizer(), shapes
    answers = module.written_answers(model(), *rest, range(7), np.zeros(7, bool), *given)
    decoded, real = [], module.generate_tokens
    monkeypatch.setattr(module, "generate_tokens", lambda *a, **s: decoded.extend(a[2]) or real(*a, **s))
    assert module.written_answers(model(), *rest, range(7), greedy, *given) == answers
    assert {tuple(prompt) for prompt in decoded} == {tuple(prompt) for prompt in prompts[:3]}


def test_accuracy_ranks_whole_completions_with_their_end(records):
    def likeliest(record):
        prompt = encode_prompt(tokenizer(), record.prompt)
        return min(CHOICES, key=lambda c: by_hand(prompt, encode_completion(tokenizer(), record.prompt, c)))

    best = [likeliest(record) for record in records]
    assert len(set(best)) > 1
    right = [r._replace(references=(choice,)) for r, choice in zip(records, best, strict=True)]
    task = EvalTask("t", right, "accuracy", choices=CHOICES, batch_size=BATCH)
    assert scored(task).score == 1
    wrong = next(choice for choice in CHOICES if choice != best[0])
    assert scored(task._replace(records=[right[0]._replace(references=(wrong,)), *right[1:]])).score == pytest.approx(
        6 / 7
    )


def test_an_answer_keeps_its_spaces(monkeypatch):
    """A tokenizer that tidies up would make "a , b" another answer than generate gives."""
    from para_jax.evaluation import evaluate as module

    seen = {}
    monkeypatch.setattr(module, "generate_tokens", lambda *a, **s: [[9, 10]] * 2)

    class Tidy:
        eos_token_id, chat_template = 2, None

        def decode(self, tokens, **options):
            seen.update(options)
            return " w9 w10 "

    task, examples = EvalTask("t", [], batch_size=2), [Example([3], [4, 2])]
    shapes = module.plan_shapes([module.Encoded(task, examples, [])])
    found = module.written_answers(model(), lambda rows: None, examples, [0], [False], task, Tidy(), shapes)
    assert found == {0: "w9 w10"}
    assert seen == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def test_a_written_answer_ends_at_a_chats_end_token_too(monkeypatch):
    """Which ends the completions of its examples, and need not be EOS."""
    from para_jax.evaluation import evaluate as module

    stops = []
    monkeypatch.setattr(module, "generate_tokens", lambda *a, stop_ids, **s: stops.append(set(stop_ids)) or [[9]] * 2)
    examples = [Example([3], [4, 7]), Example([3], [5, 7])]
    task = EvalTask("t", [], batch_size=2)
    given = task, tokenizer(), module.plan_shapes([module.Encoded(task, examples, [])])
    found = module.written_answers(model(), lambda rows: None, examples, [0, 1], [True, False], *given)
    assert {7, tokenizer().eos_token_id} <= stops[0] and found == {0: "w4", 1: "w9"}


def test_the_factors_of_ranked_choices_are_those_of_the_prompt_alone(records, monkeypatch):
    """The vectors never see the continuation: all choices of a prompt are ranked with the same ones."""
    from para_jax.evaluation import evaluate as module

    batches = []
    seen = module.of_contexts

    def recorded(model, adapters, contexts, continuations, *sizes):
        found = list(seen(model, adapters, contexts, continuations, *sizes))
        batches.append((contexts, continuations, dict(found)))
        return found

    monkeypatch.setattr(module, "of_contexts", recorded)
    scored(EvalTask("t", records, "accuracy", choices=CHOICES, batch_size=BATCH))
    ranked = set()
    for contexts, continuations, found in batches:
        for i, (row, ids) in enumerate(continuations):
            assert -found[i].logprob == pytest.approx(by_hand(list(contexts[row]), list(ids)), rel=1e-4)
            ranked.add((tuple(contexts[row]), ids))
    for record in records:
        prompt = tuple(encode_prompt(tokenizer(), record.prompt))
        assert {(prompt, tuple(encode_completion(tokenizer(), record.prompt, c))) for c in CHOICES} <= ranked


def test_ranking_reads_each_prompt_once_and_gives_what_whole_rows_give(records, monkeypatch):
    from para_jax.evaluation import evaluate as module

    read, real = [], module.of_contexts
    monkeypatch.setattr(module, "of_contexts", lambda *a: read.extend(map(tuple, a[2])) or real(*a))
    task, examples, ranked = module.encode_task(EvalTask("t", records, "accuracy", choices=CHOICES), tokenizer())
    asked = [*examples, *ranked]
    assert len(ranked) == len(CHOICES) * len(records)
    loss = task._replace(metric="loss")
    shapes = [
        module.plan_shapes([e]) for e in (module.Encoded(task, examples, ranked), module.Encoded(loss, asked, []))
    ]
    once, whole = (module.likelihoods(model(), lambda rows: adapter(), asked, BATCH, chosen) for chosen in shapes)
    np.testing.assert_allclose(once.nll, whole.nll, rtol=1e-5)
    assert once.tokens.tolist() == whole.tokens.tolist()
    assert once.greedy.tolist() == whole.greedy.tolist()
    assert sorted(read) == sorted({tuple(example.prompt_ids) for example in examples})


def padded(ids):
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


def test_a_task_reports_several_metrics_of_the_same_answers(records):
    task = EvalTask("t", records, "accuracy", choices=CHOICES, batch_size=BATCH, also=("macro_f1", "matthews"))
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


def test_accuracy_without_choices_is_refused(records):
    with pytest.raises(ValueError, match=r"^t: choices: \(\) is not possible; expected 2 or more answers to rank$"):
        scored(EvalTask("t", records, "accuracy", batch_size=BATCH))


def test_an_example_that_the_model_has_no_room_or_no_token_for_is_refused_by_its_place(records):
    most = model().config.max_positions
    for wrong, said in (
        (Example([300], [9]), r"token id: 300 .* less than 256"),
        (Example([5], [9, 256]), r"token id: 256 .* less than 256"),
        (Example([5], [9] * most), rf"tokens: {most + 1} .* at most {most}"),
        (Example([5] * (most - 3), [9]), rf"tokens: {most + 1} .* at most {most}"),
    ):
        task = EvalTask("t", records[:2], "exact_match", max_new_tokens=4, examples=[Example([5], [9]), wrong])
        with pytest.raises(ValueError, match=f"{records[1].place}: {said}"):
            scored(task)


def test_label_metrics_without_choices_are_of_what_is_written(records):
    task = EvalTask("t", records, "macro_f1", max_new_tokens=4, batch_size=BATCH)
    written = scored(task._replace(metric="exact_match", also=("macro_f1",)))
    assert scored(task).score == written.also[0].score


def test_the_error_of_the_loss_is_that_of_a_ratio(records):
    found = scored(EvalTask("t", records, "loss", batch_size=BATCH))
    examples = [encode_example(tokenizer(), r.prompt, r.completion) for r in records]
    nll, tokens = np.array([(by_hand(*e), len(e.completion_ids)) for e in examples]).T
    without = [(nll.sum() - a) / (tokens.sum() - b) for a, b in zip(nll, tokens, strict=True)]
    jackknifed = np.sqrt(6 / 7 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.stderr == pytest.approx(jackknifed, rel=0.1)
    assert scored(EvalTask("t", records[:1], "loss", batch_size=BATCH)).stderr is None


def test_a_choice_that_is_not_a_number_is_not_chosen(records):
    task, some = EvalTask("t", records, "accuracy", ("a", "b")), [Record("p", "b", ("b",), None, "here")] * 2
    nats = np.array([1.0, 1.0, np.nan, 2.0, np.inf, 2.0])
    assert score_of(task._replace(records=some), nats, np.ones(6), []).score == 1


def test_a_report_prints_a_line_a_task():
    report = Report((Score("sst2", "accuracy", 0.885, 0.25, 200), Score("own", "loss", -1.5, 1.5, 3)))
    assert str(report).splitlines() == [
        "sst2: accuracy 0.8850, loss 0.2500 on 200 examples",
        "own: loss -1.5000, loss 1.5000 on 3 examples",
    ]
    also = Score("s", "accuracy", 0.5, 0.25, 200, stderr=0.035, also=(Measured("matthews", -0.25, None),))
    assert str(Report((also,))) == "s: accuracy 0.5000 ± 0.0350, matthews -0.2500, loss 0.2500 on 200 examples"


# ----------------------------------------------------------------------------------------------------- shuffled prompts

WRITES = dict(metric="exact_match", max_new_tokens=4, batch_size=BATCH)
RANKS = dict(metric="accuracy", choices=CHOICES, batch_size=BATCH)
each_way = pytest.mark.parametrize("way", [WRITES, RANKS], ids=["written", "ranked"])


def both(adapter, task, layout="layers"):
    """The task's score with each example's own factors, and with another's."""
    own, other = (
        evaluate(model(layout), adapter, [task], tokenizer=tokenizer(), shuffle_prompts=shuffle).scores[0]
        for shuffle in (False, True)
    )
    return own, other


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_nobody_keeps_its_own_prompt_and_every_prompt_is_read_once(count):
    drawn = [derangement("t", count, seed) for seed in range(20)]
    for order in drawn:
        assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()
    assert len({tuple(order) for order in drawn}) > 1 or count == 2
    np.testing.assert_array_equal(derangement("t", count, 3), drawn[3])


@pytest.mark.long
@each_way
@pytest.mark.parametrize(
    "config",
    [ParaConfig(r=4, pooler="constant"), Ia3Config(), LoraConfig(r=4, lora_alpha=64)],
    ids=["constant", "ia3", "lora"],
)
def test_what_does_not_read_the_prompt_scores_the_same_when_prompts_are_shuffled(records, config, way):
    unaware = strong(init_adapter(config, model().config))
    right = right_answers(unaware, records, way)
    own, other = both(unaware, EvalTask("t", right, **way))
    assert other.loss == pytest.approx(own.loss, rel=1e-6) and other.score == own.score > 0
    assert (
        abs(evaluate(model(), None, [EvalTask("t", right, **way)], tokenizer=tokenizer()).scores[0].loss - own.loss)
        > 0.01
    )


@each_way
def test_one_prompt_in_all_rows_scores_the_same_when_prompts_are_shuffled(records, way):
    same = [record._replace(prompt=records[0].prompt) for record in records]
    own, other = both(adapter(), EvalTask("t", same, **way))
    assert other.loss == pytest.approx(own.loss, rel=1e-6) and other.score == own.score


@each_way
@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_what_reads_the_prompt_scores_otherwise_when_prompts_are_shuffled(records, layout, way):
    task = EvalTask("t", right_answers(adapter(), records, way), **way)
    own, other = both(adapter(), task, layout)
    assert own.score == 1 and other.score < 1
    assert abs(other.loss - own.loss) > 1e-3


def right_answers(adapter, records, way):
    """The records with what the adapter answers as the reference."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "para_jax.evaluation.evaluate.measure", lambda metric, answers, _: found.append(answers) or (0, 0)
        )
        evaluate(model(), adapter, [EvalTask("t", records, **way)], tokenizer=tokenizer())
    return [r._replace(references=(answer,)) for r, answer in zip(records, found[0], strict=True)]


def test_a_shuffled_loss_is_that_of_the_tokens_with_the_factors_of_the_other_prompt(records):
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
    _, other = both(adapter(), EvalTask("t", records, "loss", batch_size=BATCH))
    assert other.loss == pytest.approx(sum(nll) / sum(len(e.completion_ids) for e in examples), rel=1e-5)


def test_one_example_has_no_other_prompt(records):
    task = EvalTask("held out", records, "loss", batch_size=BATCH)
    with pytest.raises(ValueError, match="^held out: 1 example; to shuffle prompts at least 2 are needed$"):
        evaluate(model(), adapter(), [task], tokenizer=tokenizer(), limit=1, shuffle_prompts=True)


# ----------------------------------------------------------------------------------------------------------- from a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    backbone_folder(folder / "backbone")
    write_rows(folder / "data" / "train.jsonl", rows_of_text(4, seed=1))
    write_rows(
        folder / "data" / "test.jsonl", [*rows_of_text(3, seed=2), {"prompt": words(range(30, 50)), "completion": "w9"}]
    )
    return folder


def test_a_run_without_a_split_has_no_task(folder):
    assert task_of_run(run_config(folder), "validation", tokenizer()) is None


def test_a_runs_choices_are_the_completions_of_its_training_data(folder):
    task = task_of_run(run_config(folder, "eval.metric=accuracy"), "test", load_tokenizer(folder / "backbone"))
    assert task.choices == ("w9", "w9 w10", "w9 w10 w11", "w9 w10 w11 w12")
    assert (task.metric, task.max_new_tokens, task.batch_size, len(task.records)) == ("accuracy", 4, 8, 4)


def test_a_runs_own_choices_and_metric_come_before_the_tasks(folder, tmp_path, capsys):
    data = write_rows(tmp_path / "test.jsonl", [{"sentence": "w3", "label": 1}])

    def of(*more):
        return task_of_run(run_config(folder, f"data.test={data}", "data.task=sst2", *more), "test", tokenizer())

    assert of("eval.metric=null")[2:4] == ("accuracy", ("negative", "positive"))
    assert "warning" not in capsys.readouterr().err
    assert of("eval.metric=accuracy", "eval.choices=['no','yes']")[2:4] == ("accuracy", ("no", "yes"))
    told = "test: 1 of 1 answers are not among the choices (no, yes) and count as wrong, the first is 'positive' ("
    assert told in capsys.readouterr().err
    assert of("eval.metric=f1").metric == "f1"


def test_a_task_brings_its_metrics_its_choices_and_the_length_of_its_answers(folder, tmp_path):
    def of(task, *rows, more=()):
        data = write_rows(tmp_path / f"{task}.jsonl", rows)
        none = "eval.metric=null", "eval.max_new_tokens=null"
        return task_of_run(
            run_config(folder, f"data.test={data}", f"data.task={task}", *none, *more), "test", tokenizer()
        )

    spam = of("sms_spam", {"sms": "w3", "label": 1})
    assert (spam.metric, spam.choices, spam.also) == ("accuracy", ("yes", "no"), ("macro_f1", "matthews"))
    own = of("sms_spam", {"sms": "w3", "label": 1}, more=["eval.also=[f1]"])
    assert (own.metric, own.also) == ("accuracy", ("f1",))
    other = of("sms_spam", {"sms": "w3", "label": 1}, more=["eval.metric=exact_match"])
    assert (other.metric, other.also, other.ranks) == ("exact_match", (), False)
    sums = of("gsm8k", {"question": "w3", "answer": "w4 #### 5"})
    assert (sums.metric, sums.max_new_tokens, sums.ranks) == ("final_number", 320, False)
    ready = of("copa", {"prompt": "w3", "completion": "w9"})  # other answers than the task's own templates give
    assert ready.choices == ("w9", "w9 w10", "w9 w10 w11", "w9 w10 w11 w12")


def test_one_choice_is_nothing_to_rank(folder):
    with pytest.raises(ValueError, match="eval.choices: 1 is not possible; expected 2 to 100 answers"):
        task_of_run(run_config(folder, "eval.metric=accuracy", "eval.choices=[w9]"), "test", tokenizer())


def test_examples_that_are_too_long_are_skipped_cut_or_an_error_as_in_training(folder):
    def of(how):
        config = run_config(folder, "data.max_seq_length=16", f"data.truncate={how}")
        return task_of_run(config, "test", tokenizer())

    assert len(of("skip").records) == len(of("skip").examples) == 3
    cut = of("left")
    assert len(cut.records) == 4 and cut.examples[3].prompt_ids == [*range(36, 50)]
    short = Record(words(range(36, 50)), "w9", ("w9",), None, "")
    cut_before = cut._replace(records=[*cut.records[:3], short], examples=None)
    ours, theirs = (evaluate_task(model(), adapter(), task, tokenizer()) for task in (cut, cut_before))
    assert ours.loss == theirs.loss
    with pytest.raises(ValueError, match=r"test.jsonl:4: 22 tokens are more than data.max_seq_length 16"):
        of("error")
