"""Scores in a mixed pass: those of the teacher-forced pass, the same bits alone and mixed, from the context alone."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from functools import cache

import jax
import numpy as np
import pytest
from conftest import backbone, strong
from tiny_run import tokenizer

from para_jax import AdapterBank, Engine, Ia3Config, LoraConfig, ParaConfig, Request, forward, generate, init_adapter
from para_jax.config import SITES
from para_jax.evaluation import answers as mixed
from para_jax.evaluation import likelihood
from para_jax.evaluation.answers import Pass
from para_jax.evaluation.journal import Journal
from para_jax.evaluation.likelihood import padded_length, together
from para_jax.evaluation.questions import Generation, Likelihood, Scored, Written, backbone_content, key

CONFIGS = {"A": ParaConfig(r=4), "B": ParaConfig(r=4, pooler="mean"), "C": Ia3Config(), "D": LoraConfig(r=4)}
ROWS = 4


@cache
def bank_of(family, names="ABCD"):
    model = backbone(family)
    methods = ("para", "ia3", "lora") if "D" in names else ("para", "ia3")
    made = AdapterBank(model.config, max_r=4, methods=methods, sites=SITES)
    for name in names:
        made.add(name, strong(init_adapter(CONFIGS[name], model.config), ord(name), 0.3))
    return made


def words(draw, least, most):
    return tuple(draw.integers(3, 250, int(draw.integers(least, most))).tolist())


@cache
def asked(contexts=6, seed=0):
    """Contexts of 2 to 24 tokens, which is two padded lengths, each with 3 continuations of 1 to 4."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(contexts):
        context = words(draw, 2, 25)
        made += [Likelihood(context, words(draw, 1, 5)) for _ in range(3)]
    return made


def answers(family, questions, names="ABCD", rows=ROWS, layout="layers"):
    model = backbone(family, layout)
    return Pass(model, bank_of(family, names), tokenizer(), "b", Journal()).answer(questions, rows=rows)


def by_hand(family, names, tenant, one):
    """The log-probability of a continuation and whether it is greedy, from one row, padded to one shape at its end."""
    rows, context, length = bank_of(family, names).rows([tenant]), len(one.context), len(one.context + one.continuation)
    ids = np.zeros((1, 32), np.int32)
    ids[0, :length] = one.context + one.continuation
    logits = forward(backbone(family), rows, ids, context, length)[0, context - 1 : length - 1]
    chosen = np.array(one.continuation)
    nats = jax.nn.log_softmax(logits)[np.arange(len(chosen)), chosen].sum()
    return float(nats), bool((logits.argmax(axis=-1) == chosen).all())


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "layers"), pytest.param("gemma3_text", "stacked", marks=pytest.mark.long)]
)
def test_a_score_is_that_of_the_teacher_forced_pass_with_the_contexts_factors(family, layout):
    names = "ABCD" if family == "llama" else "A"
    long = [one for one in asked() if len(one.context) > 16] if family != "llama" else asked()
    questions = [(tenant, one) for one in long[:6] for tenant in (*names, None)]
    for (tenant, one), found in zip(questions, answers(family, questions, names, layout=layout), strict=True):
        nats, greedy = by_hand(family, names, tenant, one)
        assert found.logprob == pytest.approx(nats, rel=2e-5, abs=2e-4)
        assert found.greedy == greedy


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else():
    context = asked()[0].context
    ids = list(context)
    for _ in range(4):
        padded = np.array([ids + [0] * (32 - len(ids))])
        logits = forward(backbone("llama"), bank_of("llama").rows(["A"]), padded, len(context), len(ids))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    best = tuple(ids[len(context) :])
    tried = [best[:n] for n in (1, 2, 4)] + [(*best[:i], (best[i] + 1) % 200, *best[i + 1 :]) for i in range(4)]
    found = answers("llama", [("A", Likelihood(context, one)) for one in tried])
    assert [one.greedy for one in found] == [True] * 3 + [False] * 4


def test_scores_alone_and_mixed_have_the_same_bits():
    mixed = answers("llama", [(tenant, one) for one in asked() for tenant in ("A", "B", "C", "D", None)])
    assert len({one.logprob for one in mixed}) > 80  # every tenant scores otherwise
    for i, tenant in enumerate(("A", "B", "C", "D", None)):
        assert answers("llama", [(tenant, one) for one in asked()]) == mixed[i::5]
    few = answers("llama", [("B", one) for one in asked()[5:8]])  # nor does it matter what else is asked
    assert few == mixed[1::5][5:8]


def test_the_factors_never_see_the_continuation(monkeypatch):
    """Whatever follows the context, prefill gets the context and nothing else, once for an adapter."""
    seen, real = [], likelihood.prefill

    def noted(model, adapters, tokens, lengths, **options):
        seen.extend(tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True))
        return real(model, adapters, tokens, lengths, **options)

    monkeypatch.setattr(likelihood, "prefill", noted)
    answers("llama", [(tenant, one) for one in asked() for tenant in ("A", "B")])
    contexts = {one.context for one in asked()}
    assert {ids for ids in seen if ids in contexts} == contexts and all(seen.count(ids) == 2 for ids in contexts)
    assert {ids for ids in seen if ids not in contexts} <= {(0,)}  # rows that fill up a batch


def test_each_shape_is_said_once_when_it_is_compiled(capsys):
    asking = Pass(backbone("llama"), None, tokenizer(), "b", Journal())
    for last in (4, 5):
        asking.answer([(None, Likelihood((3,) * 9, (last,)))], rows=ROWS)
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("...")]
    one = together(1, ROWS)
    assert said == [
        f"compiling {ROWS} contexts of 16 tokens ...",
        f"compiling {one} continuations of 1 tokens after 64 ...",
    ]


def test_what_is_written_is_what_generate_writes_alone_and_mixed():
    questions = [(tenant, Generation(one.context[:9], 4)) for one in asked()[::3][:3] for tenant in ("A", None)]
    found = answers("llama", questions, "A")
    texts = [" ".join(f"w{i}" for i in one.context) for _, one in questions]
    options = dict(tokenizer=tokenizer(), adapters=bank_of("llama", "A"), max_new_tokens=4)
    expected = generate(backbone("llama"), texts, tenants=[tenant for tenant, _ in questions], **options)
    assert [one.text for one in found] == expected and len(set(expected)) > 3
    assert answers("llama", questions[::2], "A") == found[::2]


def test_what_is_written_ends_with_the_questions_own_stop_ids():
    one = Generation(asked()[0].context, 6)
    ((text, count),) = answers("llama", [("A", one)], "A")
    found = re.findall("w[0-9]+", text)
    assert count == len(found) == 6
    stopped = one._replace(stop_ids=(int(found[3][1:]), 255))
    first = found.index(found[3])
    assert answers("llama", [("A", stopped)], "A") == [Written("".join(found[:first]), first)]
    assert answers("llama", [("A", stopped._replace(stop=(found[1],)))], "A")[0].text == text[: text.index(found[1])]


def test_equal_questions_are_asked_once_and_a_journal_answers_for_the_same_content_only(tmp_path, monkeypatch):
    model, questions = backbone("llama"), [("A", one) for one in asked()[:4]]
    content = backbone_content(model)

    def answered(names, tenant, backbone=content):
        asking = Pass(model, bank_of("llama", names), tokenizer(), backbone, Journal(tmp_path / "a" / "answers.jsonl"))
        found = asking.answer([(tenant, one) for _, one in questions] * 2, rows=ROWS)
        return found[: len(questions)], asking.tokens

    first, tokens = answered("ABCD", "A")
    contexts = {one.context for _, one in questions}
    assert len(contexts) == 2 and len(questions) == 4  # each is computed once
    assert tokens == sum(map(len, contexts)) + sum(len(one.continuation) - 1 for _, one in questions)
    other, computed = answered("ABCD", "B")
    assert computed and other != first

    def never(model, bank, questions, *_):
        assert not questions, "asked again"
        return iter(())

    monkeypatch.setattr(mixed, "likelihoods", never)
    assert answered("BACD", "A") == (first, 0)  # under another version, in another bank
    with pytest.raises(AssertionError, match="asked again"):
        answered("ABCD", "A", "another backbone")


def test_a_key_knows_the_question_the_adapters_content_and_the_backbone():
    a, b = (bank_of("llama").entry(name) for name in "AB")
    one = Likelihood((3, 4), (5,))
    keys = [key(one, *who, "w") for who in ((a, "x"), (b, "x"), (None, "x"), (a, "y"))]
    others = one._replace(context=(3,)), Generation((3, 4), 5), Generation((3, 4), 5, seed=1)
    keys += [key(other, a, "x", "w") for other in others] + [key(others[1], a, "x", "v")]
    assert len(set(keys)) == len(keys)
    assert key(one, a._replace(version=99), "x", "v") == keys[0]
    assert backbone_content(backbone("llama")) != backbone_content(backbone("qwen2"))


def test_padded_lengths_hold_what_they_pad_and_waste_at_most_a_third():
    model = backbone("llama")
    sizes = {padded_length(n, model): n for n in range(1, model.config.max_positions + 1)}
    assert list(sizes)[:6] == [16, 24, 32, 48, 64, 96]
    assert all(size >= n for size, n in sizes.items()) and max(sizes) == model.config.max_positions
    assert all(padded_length(n, model) <= 1.5 * n + 1 for n in range(16, model.config.max_positions))


def test_what_there_is_no_room_for_is_refused_before_anything_is_computed():
    longest = backbone("llama").config.max_positions
    for one in (Likelihood((3,) * longest, (4, 5)), Generation((3,) * 8, longest)):
        with pytest.raises(ValueError, match="tokens of a request: .* expected at most"):
            answers("llama", [(None, one)])
    assert answers("llama", [(None, Likelihood((3,) * longest, (4,)))])[0].logprob < 0
    with pytest.raises(ValueError, match="continuation: "):
        answers("llama", [(None, Likelihood((3,), ()))])
    for one in (Likelihood((3,), (4, 256)), Likelihood((3, -1), (4,)), Generation((256,), 2)):
        with pytest.raises(ValueError, match=r"token id: \[(256|-1)\] is not possible; expected 0 to 255"):
            answers("llama", [(None, one)])
    with pytest.raises(ValueError, match="no tenant 'E'"):
        answers("llama", [("E", Likelihood((3,), (4,)))])


# -------------------------------------------------------------------------------------------------------------- journal


def test_a_torn_line_is_cut_off_and_anything_else_is_left_alone(tmp_path):
    file = tmp_path / "answers.jsonl"
    journal = Journal(file)
    journal.add("k", Scored(-1.5, True))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "l", "logp')
    assert Journal(file)["k"] == Scored(-1.5, True) and file.read_bytes() == whole
    for other in (
        b"a shopping list\n",
        b"a line without an end",
        b'{"a": 1}',
        b'{"key": 1}\n',
        b'["key"]\n',
        b'{"key": "k", "text": "x", "tokens": 1, "more": 2}\n',
        b'{"key": ["a"], "text": "x", "tokens": 1}\n',
        b'{"key": "k", "logprob": "x", "greedy": true}\n',
        b'{"key": "k", "logprob": -1.0, "greedy": 1}\n',
        b'{"key": "k", "text": 1, "tokens": 1}\n',
        b'{"key": "k", "text": "x", "tokens": true}\n',
        b"[" * 100_000 + b"\n",
    ):
        for before, number in ((b"", 1), (whole, 2)):
            file.write_bytes(before + other)
            with pytest.raises(ValueError, match=f"answers.jsonl: line {number} .* choose another folder") as caught:
                Journal(file)
            assert file.read_bytes() == before + other and len(str(caught.value)) < len(str(file)) + 300


def test_a_line_without_an_end_is_read_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("para_jax.evaluation.journal.LONGEST", 1000)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b'{"key": "k", "text": "' + b"x" * 5000)
    with pytest.raises(ValueError, match="answers.jsonl: line 1 "):
        Journal(file)
    assert file.stat().st_size > 5000
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: no regular file"):
        Journal(tmp_path / "pipe")


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl")
    journal._stream = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left .*answers.jsonl"):
        journal.add("k", Scored(-1.0, True))
    assert "k" not in journal


def test_every_cut_of_a_journal_keeps_its_whole_lines(tmp_path):
    file = tmp_path / "answers.jsonl"
    journal = Journal(file)
    kept = [Scored(float("nan"), False), Written("é\u2028\n\U0001f600", 3), Scored(float("-inf"), True)]
    for i, answer in enumerate(kept):
        journal.add(str(i), answer)
    del journal
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        found = Journal(file)
        count = whole[:cut].count(b"\n")
        assert [repr(found[str(i)]) for i in range(len(found))] == [repr(answer) for answer in kept[:count]]
        found.add("next", kept[1])
        del found
        assert Journal(file)["next"] == kept[1]


def test_an_answer_of_the_wrong_kind_is_an_error(tmp_path):
    model, journal = backbone("llama"), Journal(tmp_path / "answers.jsonl")
    asking = Pass(model, None, tokenizer(), "b", journal)
    for one, other in ((Likelihood((3,), (4,)), Written("x", 1)), (Generation((3,), 4), Scored(-1.0, True))):
        journal.add(key(one, None, "b", asking._writing), other)
        with pytest.raises(ValueError, match="answers.jsonl: answers .* as another question; choose another folder"):
            asking.answer([(None, one)], rows=ROWS)


@pytest.mark.long
def test_one_process_writes_to_a_journal_and_may_open_it_twice(tmp_path):
    file = tmp_path / "answers.jsonl"
    journals = [Journal(file), Journal(file)]
    open_it = f"from pathlib import Path; from para_jax.evaluation.journal import Journal; Journal(Path({str(file)!r}))"
    child = [sys.executable, "-c", open_it]
    for kept in (2, 1):
        del journals[kept:]
        refused = subprocess.run(child, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
        assert b"answers.jsonl: another process" in refused.stderr.splitlines()[-1]
    journals.clear()
    subprocess.run(child, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


def test_an_engine_has_no_request_left_when_a_pass_is_stopped():
    model, bank = backbone("llama"), bank_of("llama", "A")
    engine = Engine(model, bank, tokenizer(), slots=2, max_length=32)
    asking = Pass(model, bank, tokenizer(), "b", Journal())
    questions = [("A", Generation(one.context[:9], 4)) for one in asked()[::3][:5]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "_keep", stop)
        with pytest.raises(KeyboardInterrupt):
            asking.answer(questions, rows=ROWS, engine=engine)
    assert not engine.open
    assert asking.answer(questions, rows=ROWS, engine=engine) == answers("llama", questions, "A")


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("twice", [False, True])
def test_a_pass_that_is_interrupted_in_a_round_leaves_an_engine_that_goes_on(twice):
    """Twice: its cleaning up is interrupted as well."""
    model, bank, words = backbone("llama"), bank_of("llama", "A"), deepcopy(tokenizer())
    engine = Engine(model, bank, words, slots=2, max_length=32)
    asking = Pass(model, bank, words, "b", Journal())
    questions = [("A", Generation(one.context[:9], 4, ("w1 w1",))) for one in asked()[::3][:5]]
    interrupts, decode = iter([False] * 5 + [True]), words.decode
    words.decode = lambda *a, **k: stop() if next(interrupts, False) else decode(*a, **k)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if twice:
            patch.setattr(engine, "cancel", stop)
        asking.answer(questions, rows=ROWS, engine=engine)
    assert bool(engine.open) == twice and next(interrupts, None) is None
    assert asking.answer(questions, rows=ROWS, engine=engine) == answers("llama", questions, "A")
    assert not engine.open


def test_an_adapter_that_is_replaced_meanwhile_changes_no_answer_and_no_key(monkeypatch):
    """The tenant's adapter is replaced while likelihoods are answered; what is written follows them."""
    model = backbone("llama")
    bank = AdapterBank(model.config, max_r=4)
    old, new = (strong(init_adapter(ParaConfig(r=4), model.config), seed, 0.3) for seed in (1, 2))
    bank.add("A", old)
    questions = [("A", asked()[0]), *(("A", Generation(one.context[:9], 4)) for one in asked()[::3][:2])]
    journal, real = Journal(), mixed.likelihoods

    def replaced(*arguments):
        yield from real(*arguments)
        bank.replace("A", new)

    monkeypatch.setattr(mixed, "likelihoods", replaced)
    asking = Pass(model, bank, tokenizer(), "b", journal)
    first = bank.entry("A")
    found = asking.answer(questions, rows=ROWS)
    assert asking.entries["A"] is first is not bank.entry("A")
    bank.replace("A", old)
    monkeypatch.setattr(mixed, "likelihoods", real)
    assert Pass(model, bank, tokenizer(), "b", Journal()).answer(questions, rows=ROWS) == found
    bank.replace("A", new)
    assert Pass(model, bank, tokenizer(), "b", journal).answer(questions, rows=ROWS)[1:] != found[1:]


def test_an_answer_to_somebody_elses_request_is_an_error_by_its_id():
    engine = Engine(backbone("llama"), None, tokenizer(), slots=2, max_length=32)
    asking = Pass(backbone("llama"), None, tokenizer(), "b", Journal())
    run = engine.run
    engine.run = lambda: engine.submit(Request("w20", max_new_tokens=1, id="theirs")) and run()
    with pytest.raises(ValueError, match="engine: .*'theirs'"):
        asking.answer([(None, Generation((3,), 20))], rows=ROWS, engine=engine)


def test_a_changed_version_of_our_answers_asks_again(monkeypatch):
    before = key(Likelihood((3,), (4,)), None, "b", "w")
    monkeypatch.setattr("para_jax.evaluation.questions.ANSWERS_VERSION", -1)
    assert key(Likelihood((3,), (4,)), None, "b", "w") != before


def test_a_resumed_pass_has_an_engine_of_the_same_shapes(monkeypatch):
    asking, sizes = Pass(backbone("llama"), None, tokenizer(), "b", Journal()), []
    monkeypatch.setattr(mixed, "Engine", lambda *a, max_length, **k: sizes.append(max_length) or stop())
    long, short = ((None, Generation((3,) * length, 4)) for length in (40, 5))
    for answered in ((), (long,)):
        for tenant, one in answered:
            asking.journal.add(key(one, tenant, "b", asking._writing), Written("x", 1))
        with pytest.raises(KeyboardInterrupt):
            asking.answer([long, short], rows=ROWS)
    assert sizes == [64, 64]


def test_an_engine_of_few_places_is_enough_and_one_that_serves_others_is_not_used():
    model, bank = backbone("llama"), bank_of("llama", "A")
    engine = Engine(model, bank, tokenizer(), slots=ROWS, max_length=32, queue_limit=2)
    asking = Pass(model, bank, tokenizer(), "b", Journal())
    questions = [("A", Generation(one.context[:9], 4)) for one in asked()[::3][:5]]
    assert asking.answer(questions, rows=ROWS, engine=engine)[:3] == answers("llama", questions[:3], "A")
    engine.submit(Request("w20", "A", 4))
    with pytest.raises(ValueError, match="engine: open requests: 1 is not possible; expected none"):
        asking.answer([("A", Generation((3,), 4))], rows=ROWS, engine=engine)
    assert [one.error for one in engine.run()] == [None]
    with pytest.raises(ValueError, match="tokens of a request: 38 is not possible; expected at most 32"):
        asking.answer([("A", Generation((3,) * 6, 32))], rows=ROWS, engine=engine)
