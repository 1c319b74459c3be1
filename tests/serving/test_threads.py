"""Any thread may submit, cancel and stream at any time, and whatever interrupts a round, no answer is lost or wrong."""

import os
import signal
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jax
import pytest
from golden_models import strong
from tiny_engine import (
    CONFIGS,
    LENGTH,
    SLOTS,
    answers,
    answers_despite,
    bank_of,
    engine_of,
    fail_after,
    plain,
    prompt,
    tenants_of,
)
from tiny_run import tokenizer

from para_jax import Engine, Request, init_adapter
from para_jax.inference.answer_text import AnswerText
from para_jax.serving import decoder, prefills
from para_jax.serving.queue import FairQueue

NAMES = [*CONFIGS, None]
#: The compiled programs, and where the engine looks them up.
PLACES = {
    "prefill": decoder, "insert": decoder, "steps": decoder, "insert_prompt": decoder, "prefill_chunk": prefills,
    "take_rows": prefills, "one_row": prefills,
}  # fmt: skip


@pytest.fixture(scope="module")
def tenants(model):
    return tenants_of(model)


@pytest.fixture(scope="module")
def bank(model, tenants):
    return bank_of(model, tenants)


def requests():
    """Different requests of all kinds: greedy and sampled, with stop texts, of several samples."""
    made = []
    for i in range(12):
        options = dict(temperature=i % 2 * 1.0, top_p=0.9 if i % 3 else 1.0, seed=i, n=1 + i % 2)
        stop = (f"w{20 + i}", "w9") if i % 4 == 1 else ()
        made.append(Request(prompt(i, 3 + i), NAMES[i % 5], 3 + i, stop=stop, **options))
    return made


@pytest.fixture(scope="module")
def alone(model, bank):
    """What each of `requests` gets when nothing else is there: by its number, its samples' answers."""
    engine, found = engine_of(model, bank), []
    for request in requests():
        engine.submit(request)
        found.append([plain(completion) for _, completion in sorted(answers(engine).items())])
    return found


# ------------------------------------------------------------------------------------------------------------- threads


def test_four_threads_submit_cancel_and_stream_and_every_answer_is_its_own(model, bank, alone):
    engine, asked, rounds = engine_of(model, bank), requests(), 30
    left, wrong, cancelled = threading.Semaphore(0), [], set()

    def client(thread):
        for i in range(rounds):
            number = (thread * 5 + i) % len(asked)
            request = asked[number]
            if i % 3 == 0:
                texts, tokens = {}, {}
                for piece in engine.stream(request):
                    texts[piece.index] = texts.get(piece.index, "") + piece.text
                    tokens.setdefault(piece.index, []).extend(piece.tokens)
                if [(tokens[j], texts[j]) for j in sorted(texts)] != [one[:2] for one in alone[number]]:
                    wrong.append((number, texts))
            else:
                id = (thread, i, number)
                engine.submit(Request(**{**vars(request), "id": id}))
                if i % 3 == 1:
                    time.sleep(0.002 * (i % 4))
                    if engine.cancel(id):
                        cancelled.add(id)
        left.release()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    found = {}
    while any(thread.is_alive() for thread in threads) or engine.open:
        for completion in engine.run():
            key = completion.id, completion.index
            assert key not in found, "answered twice"
            found[key] = completion
    assert not wrong
    expected = {
        ((t, i, n), j) for t in range(4) for i in range(rounds) if i % 3 for n in [(t * 5 + i) % len(asked)]
        for j in range(asked[n].n)
    }  # fmt: skip
    assert set(found) == expected
    for (id, index), completion in found.items():
        if completion.finish_reason == "error":
            assert id in cancelled and completion.error == "cancelled"
        else:
            assert plain(completion) == alone[id[2]][index]
    assert cancelled and any(c.finish_reason == "error" for c in found.values())


@pytest.mark.parametrize("victim", range(3))
def test_a_request_cancelled_during_its_prefill_affects_no_other(model, bank, alone, monkeypatch, victim):
    engine, asked, real, calls = engine_of(model, bank), requests(), decoder.prefill, []

    def hooked(*arguments, **options):
        calls.append(1)
        made = real(*arguments, **options)
        assert len(calls) != victim + 1 or engine.cancel(victim)
        return made

    monkeypatch.setattr(decoder, "prefill", hooked)
    for i in range(5):
        engine.submit(Request(**{**vars(asked[i]), "id": i}))
    found = answers(engine)
    for (id, index), completion in found.items():
        if id == victim:
            assert completion.error == "cancelled"
        else:
            assert plain(completion) == alone[id][index]
    assert len(found) == sum(request.n for request in asked[:5])


def test_a_cancel_while_tokens_are_fetched_ends_that_request_alone(model, bank, alone, monkeypatch):
    engine, asked, real = engine_of(model, bank), requests(), jax.device_get
    for i in range(3):
        engine.submit(Request(**{**vars(asked[i]), "id": i}))
    monkeypatch.setattr(jax, "device_get", lambda tree: engine.cancel(1) and None or real(tree))
    found = answers(engine)
    assert found[1, 0].error == "cancelled" and not found[1, 0].tokens
    assert plain(found[0, 0]) == alone[0][0] and plain(found[2, 0]) == alone[2][0]


def test_streams_go_on_while_the_caller_of_run_handles_an_answer(model, bank, alone):
    engine, asked = engine_of(model, bank), requests()
    for i in range(2):
        engine.submit(Request(prompt(i), max_new_tokens=1 + 8 * i, id=i))
    with ThreadPoolExecutor(1) as other, closing(engine.run()) as running:  # closed first, so a stream can't wait
        found = [next(running)]
        found += engine.step()  # by the same thread; run still waits for its caller
        text = other.submit(lambda: "".join(piece.text for piece in engine.stream(asked[0]))).result(timeout=60)
        found += running
    assert text == alone[0][0][1] and {one.id for one in found} == {0, 1} and not engine.open


def test_streams_in_threads_drive_by_themselves(model, bank, alone):
    engine, asked = engine_of(model, bank), requests()

    def texts(number):
        made = {}
        for piece in engine.stream(asked[number]):
            made[piece.index] = made.get(piece.index, "") + piece.text
        return [made[i] for i in sorted(made)]

    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(texts, range(len(asked))))
    assert found == [[text for _, text, _ in one] for one in alone]
    assert engine.open == 0


def test_requests_without_a_seed_differ_and_are_reproducible(model, bank):
    def drawn(seed):
        engine = engine_of(model, bank, seed=seed)
        ids = [engine.submit(Request(prompt(0), max_new_tokens=6, temperature=1.5)) for _ in range(6)]
        found = answers(engine)
        return [tuple(found[id, 0].tokens) for id in ids]

    first = drawn(3)
    assert len(set(first)) == 6 and drawn(3) == first and not set(drawn(4)) & set(first)


def test_two_engines_in_one_process_answer_as_each_alone_and_change_nothing_around_them(model, tenants, bank, alone):
    """As actors and plug-ins need it: no state is shared, and the program's handlers and settings stay."""

    def around():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, dict(os.environ), dict(jax.config.values)

    before, threads = around(), set(threading.enumerate())
    swapped = bank_of(model, tenants)
    swapped.replace("A", strong(init_adapter(CONFIGS["A"], model.config), 99, 0.3))
    ready = threading.Barrier(2)

    def run(bank):
        engine, found = engine_of(model, bank), {}
        ids = [engine.submit(request) for request in requests()]
        ready.wait()
        for completion in engine.run():
            found.setdefault(completion.id, {})[completion.index] = plain(completion)
        return [[one for _, one in sorted(found[id].items())] for id in ids]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, (bank, swapped))
    assert one == alone
    same = [one[i] == other[i] for i in range(len(one))]
    assert same == [request.tenant != "A" for request in requests()]
    assert around() == before and set(threading.enumerate()) <= threads


# ---------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", [*PLACES, "device_get", "text"])
def test_an_exception_anywhere_in_a_round_loses_nothing_and_changes_nothing(
    model, bank, alone, monkeypatch, place, error
):
    engine, asked = engine_of(model, bank), requests()
    for i, request in enumerate(asked):
        engine.submit(Request(**{**vars(request), "id": i}))
    owner = PLACES.get(place) or {"device_get": jax, "text": AnswerText}[place]
    name = {"text": "add"}.get(place, place)
    fail_after(monkeypatch, owner, name, (1, 3), error)
    found, raised = answers_despite(engine, error)
    ended = [key for key, completion in found.items() if completion.finish_reason == "error"]
    of_one_request = place in ("text", "prefill") and error is not KeyboardInterrupt
    assert (raised, len(ended)) == ((0, 2) if of_one_request else (2, 0))
    assert len(found) == sum(request.n for request in asked)
    for key in found.keys() - ended:
        assert plain(found[key]) == alone[key[0]][key[1]]


@pytest.mark.parametrize("place", ["prefill", "steps", "prefill_chunk"])
def test_ctrl_c_waits_for_the_end_of_the_round(model, bank, alone, monkeypatch, place):
    """The round is not made again: no prompt is prefilled twice."""
    engine, asked, real, calls = engine_of(model, bank), requests(), getattr(PLACES[place], place), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(PLACES[place], place, interrupted)
    monkeypatch.setattr(decoder.Decoder, "drop", lambda _: pytest.fail("the round was made again"))
    for i, request in enumerate(asked):
        engine.submit(Request(**{**vars(request), "id": i}))
    found, raised = answers_despite(engine)
    assert raised == 1 and len(found) == sum(request.n for request in asked)
    assert all(plain(found[i, j]) == alone[i][j] for i, j in found)


def test_a_second_ctrl_c_ends_the_round_at_once(model, bank, alone, monkeypatch):
    engine, asked, real, after = engine_of(model, bank), requests(), decoder.steps, []

    def interrupted(*arguments):
        monkeypatch.setattr(decoder, "steps", real)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        after.append(1)

    monkeypatch.setattr(decoder, "steps", interrupted)
    id = engine.submit(asked[0])
    found, raised = answers_despite(engine)
    assert raised == 1 and not after and plain(found[id, 0]) == alone[0][0]


def interrupting(function, times):
    """The function, and Ctrl-C so many times at the end of its first call."""
    left = [None] * times

    def call(*arguments):
        given = function(*arguments)
        while left:
            left.pop()
            signal.raise_signal(signal.SIGINT)
        return given

    return call


def test_two_interrupts_while_an_answer_is_given_do_not_give_it_twice(model, bank, alone):
    class Done(OrderedDict):
        __setitem__ = interrupting(OrderedDict.__setitem__, 2)

    engine, (asked, *_) = engine_of(model, bank), requests()
    engine._requests.done = Done()
    id = engine.submit(asked)
    found, raised = answers_despite(engine)
    assert raised == 1 and len(found) == asked.n and plain(found[id, 0]) == alone[0][0]


def test_an_interrupt_while_a_request_is_submitted_leaves_no_half_of_it(model, bank, monkeypatch):
    engine = engine_of(model, bank)
    monkeypatch.setattr(FairQueue, "put", interrupting(FairQueue.put, 1))
    with pytest.raises(KeyboardInterrupt):
        engine.submit(Request(prompt(0), "A", 2, n=2, id="first"))
    engine.submit(Request(prompt(1), "A", 2, id="second"))
    assert engine.open == 2 and len(answers(engine)) == 3


def fail_for_prompts_of_five(monkeypatch):
    """Prefilling raises for prompts of five tokens. Returns the lengths that it was called for."""
    real, calls = decoder.prefill, []

    def failing(model, rows, tokens, lengths, **options):
        calls.append(int(lengths[0]))
        if lengths[0] == 5:
            raise ZeroDivisionError("a division")
        return real(model, rows, tokens, lengths, **options)

    monkeypatch.setattr(decoder, "prefill", failing)
    return calls


def test_prompts_that_fail_to_prefill_disturb_no_others(model, bank, alone, monkeypatch):
    """No answer starts again: not for one such prompt, and not for many. A round raises only if nothing else could be
    computed: perhaps the device is lost."""
    engine, asked = engine_of(model, bank), requests()[11]
    calls = fail_for_prompts_of_five(monkeypatch)
    id = engine.submit(asked)
    engine.step()
    bad = [engine.submit(Request(prompt(i, 5), "ABC"[i % 3], 5)) for i in range(6)]
    found = {}
    while engine.open:
        found |= {(completion.id, completion.index): completion for completion in engine.step()}
    assert [plain(found[id, index]) for index in range(2)] == alone[11]
    assert all("division" in found[one, 0].error for one in bad)
    assert sorted(calls) == [5] * 6 + [14]
    bad = engine.submit(Request(prompt(1, 5), "A", 5))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert "division" in answers(engine)[bad, 0].error


def test_a_tokenizer_that_fails_is_one_requests_error(model, bank, alone):
    class PanicException(BaseException):
        """As the tokenizers library raises it."""

    class Failing:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __len__(self):
            return len(self.inner)

        def __call__(self, text, **options):
            if "panic" in str(text):
                raise PanicException("index out of range")
            if "type" in str(text):
                raise TypeError("of the tokenizer")
            return self.inner(text, **options)

        def decode(self, tokens, **options):
            if len(tokens) == 4:
                raise PanicException("no such token")
            return self.inner.decode(tokens, **options)

    engine = Engine(model, bank, Failing(tokenizer()), slots=SLOTS, max_length=LENGTH)
    panic, kind = engine.submit(Request("w30 panic")), engine.submit(Request("w30 type"))
    bad, good = engine.submit(Request(prompt(0), "A", 4)), engine.submit(Request(prompt(0, 3), "A", 3))
    found = answers(engine)
    assert "index out of range" in found[panic, 0].error and "of the tokenizer" in found[kind, 0].error
    assert "no such token" in found[bad, 0].error and found[good, 0].error is None


# ------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_never_shows_a_stop_text_or_its_beginning(model, bank):
    engine = engine_of(model, bank)
    free = engine.submit(Request(prompt(1), "A", 12))
    whole = answers(engine)[free, 0]
    end = "".join(f"w{token}" for token in whole.tokens[5:8])
    request = Request(prompt(1), "A", 12, stop=end)
    shown = ""
    for piece in engine.stream(request):
        shown += piece.text
        assert whole.text[: whole.text.index(end)].startswith(shown)
    assert shown == whole.text[: whole.text.index(end)] and piece.finish_reason == "stop"


def test_an_exception_in_a_streams_own_round_cancels_its_request_alone(model, bank, alone, monkeypatch):
    engine, asked = engine_of(model, bank), requests()
    other = engine.submit(asked[0])
    fail_after(monkeypatch, decoder, "steps", (2,))
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream(asked[11]))
    found = answers(engine)
    assert set(found) == {(other, 0)} and plain(found[other, 0]) == alone[0][0]


# ------------------------------------------------------------------------------------------------------------ fairness


def test_one_tenants_flood_costs_another_at_most_one_place_per_free_slot(model, bank):
    engine = engine_of(model, bank)
    for i in range(30):
        engine.submit(Request(prompt(i), "A", 3, id=("A", i)))
    for i in range(4):
        engine.submit(Request(prompt(i), "B", 3, id=("B", i)))
    started = [completion.id for completion in engine.run()]  # short answers end in the order they start
    assert started[:8] == [(tenant, i) for i in range(4) for tenant in "AB"]
