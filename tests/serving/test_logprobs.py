"""Log-probabilities of new tokens are those of the teacher-forced pass, and change nothing else."""

from dataclasses import replace

import pytest
from logprob_engine import NAMES, TOP, assert_records, expected, made_bank, made_engine
from tiny_engine import answers, answers_despite, fail_after, plain, prompt
from tiny_run import tokenizer

from para_jax import Request
from para_jax.data.examples import encode_prompt
from para_jax.serving import decoder


@pytest.fixture(scope="module")
def bank():
    return made_bank()


@pytest.fixture(scope="module")
def engine(bank):
    return made_engine(bank)


def requests():
    """Greedy and sampled, with several samples and stop texts, of all tenants."""
    return [
        Request(prompt(i, 3 + i), name, 4 + i, i % 2 * 1.0, seed=i, n=1 + i % 3, logprobs=i % (TOP + 1), id=i)
        for i, name in enumerate(NAMES)
    ]


def ask(engine, asked):
    for request in asked:
        engine.submit(request)
    return answers(engine)


@pytest.mark.long
def test_they_are_those_of_the_teacher_forced_pass(engine, bank):
    asked = requests()
    found = ask(engine, asked)
    assert len(found) == sum(request.n for request in asked)
    for (id, _), completion in found.items():
        ids, request = encode_prompt(tokenizer(), asked[id].prompt), asked[id]
        reference = expected(bank, request.tenant, ids + completion.tokens, len(ids))
        assert len(completion.tokens) > 1
        assert_records(completion.logprobs, completion.tokens, reference[len(ids) - 1 : -1], request.logprobs)
        if request.temperature == 0 and request.logprobs:
            assert all(record.top[0][0] == record.token for record in completion.logprobs)


@pytest.mark.long
def test_tokens_are_the_same_without_them_and_neighbours_have_none(engine):
    asked = requests()
    with_all, without = ask(engine, asked), ask(engine, [replace(request, logprobs=None) for request in asked])
    mixed = ask(engine, [replace(request, logprobs=2 if request.id % 2 else None) for request in asked])
    for key, completion in with_all.items():
        assert plain(without[key]) == plain(mixed[key]) == plain(completion)
        assert without[key].logprobs is None and (mixed[key].logprobs is None) == (key[0] % 2 == 0)


def test_a_stop_text_cuts_the_text_and_not_the_tokens(engine):
    free = Request(prompt(1), "para", 9, logprobs=1)
    (whole,) = ask(engine, [free]).values()
    end = f"w{whole.tokens[4]}"
    (cut,) = ask(engine, [replace(free, stop=end)]).values()
    count = whole.tokens.index(whole.tokens[4]) + 1
    assert end not in cut.text and cut.tokens == whole.tokens[:count] and cut.logprobs == whole.logprobs[:count]


def test_pieces_have_those_of_their_tokens(engine):
    asked = replace(requests()[2], stop="w99", max_new_tokens=12)
    found, pieces = ask(engine, [asked]), [*engine.stream(asked)]
    for (_, index), completion in found.items():
        own = [piece for piece in pieces if piece.index == index]
        assert all(len(piece.logprobs) == len(piece.tokens) for piece in own) and len(own) > 1
        assert [record for piece in own for record in piece.logprobs] == completion.logprobs


def test_only_rounds_that_need_them_compute_them(engine, monkeypatch):
    real, seen = decoder.steps, []
    monkeypatch.setattr(decoder, "steps", lambda *arguments: seen.append(arguments[8] is not None) or real(*arguments))
    ask(engine, [Request(prompt(0), "para", 3, logprobs=0, id="asks"), Request(prompt(1), "para", 20, id="doesn't")])
    assert seen[0] and len(seen) > 3 and not any(seen[1:])


@pytest.mark.parametrize("place", ["steps", "first_logprobs"])
def test_an_interrupted_round_gives_the_same_values_again(engine, monkeypatch, place):
    asked = requests()[:4]
    expected = ask(engine, asked)
    fail_after(monkeypatch, decoder, place, (2, 4))
    for request in asked:
        engine.submit(request)
    assert answers_despite(engine) == (expected, 2)


def test_more_than_the_engine_gives_are_refused(engine, bank):
    with pytest.raises(ValueError, match=f"logprobs is {TOP + 1}"):
        engine.open_stream(Request(prompt(0), None, 3, logprobs=TOP + 1))
    with pytest.raises(ValueError, match="logprobs is 0.*max_logprobs"):
        made_engine(bank, max_logprobs=0).open_stream(Request(prompt(0), None, 3, logprobs=0))
