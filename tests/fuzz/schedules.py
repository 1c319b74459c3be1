"""The engine under threads and interrupts: each answer is the one of its request alone, given once, to its asker.

The schedule is a pure function of the case's number; when its operations meet is up to the machine.
"""

import random
import signal
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from para_jax import Request
from para_jax.serving.open_requests import QueueFull

from .cases import Trial, Wrong
from .serving import answer, engine, pool, warm

#: Seconds without an answer after which an episode is stuck.
PATIENCE = 60
BAD = (
    lambda asked: replace(asked, tenant="nobody"),
    lambda asked: replace(asked, max_new_tokens=1000),
    lambda asked: replace(asked, temperature=-1.0),
    lambda asked: replace(asked, n=0),
    lambda asked: replace(asked, prompt=""),
    lambda asked: replace(asked, prompt=(10**6,)),
    lambda asked: replace(asked, stop=("",)),
)


class Step(NamedTuple):
    """What one client does with one request."""

    request: Request
    bad: bool
    """it is refused"""
    kind: str
    """submit | stream | cancel"""
    pause: float
    """seconds before the cancellation, or before the next request"""


class Asked:
    """What became of one request."""

    def __init__(self, step: Step):
        self.step, self.cancelled, self.error = step, False, None
        self.streamed: dict[int, list] = defaultdict(list)
        self.answers: dict[int, list] = defaultdict(list)


def schedule(draw: random.Random, folder: Path) -> Trial:
    """A random schedule of 4 threads."""
    warm()
    steps = [[drawn_step(draw) for _ in range(draw.choice((5, 15)))] for _ in range(4)]
    limit, by_step = draw.choice((None, 8)), draw.random() < 0.5
    return Trial(lambda: episode(steps, queue_limit=limit, by_step=by_step), ("queue", "cancelled"))


def drawn_step(draw: random.Random) -> Step:
    request, bad = draw.choice(pool()), draw.random() < 0.1
    if bad:
        request = draw.choice(BAD)(request)
    kind = draw.choice(("submit", "submit", "stream", "cancel", "cancel"))
    return Step(request, bad, kind, draw.choice((0, 0, 0.0005, 0.002, 0.01)))


def episode(steps: list[list[Step]], *, queue_limit: int | None, by_step: bool, slots: int = 3) -> int:
    """Every client does its steps while this thread drives; the number of answers, all of which are right."""
    made = engine(slots, queue_limit=queue_limit)
    asked: dict = {}
    broken: list[BaseException] = []
    clients = [threading.Thread(target=client, args=(made, own, asked, broken), daemon=True) for own in steps]
    for thread in clients:
        thread.start()
    last, early = time.monotonic(), []
    while not broken and (made.open or any(thread.is_alive() for thread in clients)):
        for completion in made.step() if by_step else made.run():
            last = time.monotonic()
            early.append(completion)
        if time.monotonic() - last > PATIENCE:
            raise Wrong(f"no answer for {PATIENCE} s; {made.open} requests are open")
        if not made.open:
            time.sleep(0.0002)  # the clients have not yet asked again
    if broken:
        raise broken[0]
    early += list(made.run())
    for completion in early:
        if completion.id not in asked:
            raise Wrong(f"an answer to {completion.id!r}, which nobody asked")
        asked[completion.id].answers[completion.index].append(completion)
    for one in asked.values():
        require_right(one)
    return len(early)


def client(made, steps: list[Step], asked: dict, broken: list[BaseException]) -> None:
    try:
        for step in steps:
            one = Asked(step)
            id = submitted(made, step, one, asked)
            if step.kind == "cancel":
                time.sleep(step.pause)
                one.cancelled = made.cancel(id)
            elif step.kind == "stream":
                read_stream(made, id, one)
            else:
                time.sleep(step.pause)
    except BaseException as error:
        broken.append(error)


def submitted(made, step: Step, one: Asked, asked: dict):
    """The id of the request, once the queue has room for it."""
    for _ in range(100_000):
        id = object()  # noted before it is asked, for its answer may come at once
        asked[id] = one
        try:
            return made.submit(replace(step.request, id=id))
        except QueueFull:
            del asked[id]
            time.sleep(0.0005)
    raise Wrong("the queue never had room")


def read_stream(made, id, one: Asked) -> None:
    """Notes the pieces of a stream. A request that has ended already, and a refused one, have none."""
    try:
        for piece in made.stream(id):
            one.streamed[piece.index].append(piece)
    except ValueError as error:
        one.error = error


def require_right(one: Asked) -> None:
    """Raises Wrong unless every sample was answered once, as it is alone; or refused; or cancelled."""
    request = one.step.request
    if one.step.bad:
        errors = [completion.error for given in one.answers.values() for completion in given]
        if len(errors) + (one.error is not None) < 1 or not all(errors) or len(errors) > 1:
            raise Wrong(f"a bad request, {request}, was answered with {errors}")
        return
    alone = answer(request)
    for index, expected in enumerate(alone):
        given, pieces = one.answers.get(index, []), one.streamed.get(index, [])
        if len(given) + bool(pieces) > 1:
            raise Wrong(f"sample {index} of {request} was answered {len(given) + bool(pieces)} times")
        if pieces:
            require_same_text(pieces, expected, one, index)
        elif not given and not one.cancelled:
            raise Wrong(f"sample {index} of {request} was never answered ({one.step.kind}; {one.error})")
        elif given:
            require_same(given[0], expected, one, index)
    if set(one.answers) - set(range(len(alone))):
        raise Wrong(f"{request} was answered for samples {sorted(one.answers)}")


def require_same(found, expected, one: Asked, index: int) -> None:
    if found.finish_reason == "error" and one.cancelled and found.error:
        if expected.tokens[: len(found.tokens)] != found.tokens:
            raise Wrong(f"the cancelled sample {index} of {one.step.request} has foreign tokens: {found.tokens}")
        return
    if (found.tokens, found.text, found.finish_reason) != (expected.tokens, expected.text, expected.finish_reason):
        raise Wrong(f"sample {index} of {one.step.request} got {found}; alone it gets {expected}")


def require_same_text(pieces: list, expected, one: Asked, index: int) -> None:
    text, tokens = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens]
    if (text, tokens) != (expected.text, expected.tokens):
        raise Wrong(f"sample {index} of {one.step.request} streamed {text!r} {tokens}; alone it gets {expected}")


# ----------------------------------------------------------------------------------------------------------- interrupts


def interrupts(draw: random.Random, folder: Path) -> Trial:
    """Ctrl-C at any moment of a round: the driver goes on, and every answer is right."""
    warm()
    requests = [draw.choice(pool()) for _ in range(draw.choice((4, 12)))]
    waits = [draw.uniform(0.0002, 0.03) for _ in range(draw.choice((1, 5, 20)))]

    def run():
        made = engine()
        asked = {made.submit(request): request for request in requests}
        found = []
        while True:
            try:
                with interrupted_after(waits.pop() if waits else 0):
                    for completion in made.run():
                        found.append(completion)
                break
            except (KeyboardInterrupt, SystemError):  # the second is what C code makes of an interrupt
                continue
        return asked, found

    def check(result):
        asked, found = result
        once = {(completion.id, completion.index): completion for completion in found}
        for id, request in asked.items():
            one = Asked(Step(request, False, "submit", 0))
            for index, expected in enumerate(answer(request)):
                if (id, index) not in once:
                    raise Wrong(f"sample {index} of {request} was lost at an interrupt")
                require_same(once[id, index], expected, one, index)
        if len(once) != len(found):
            raise Wrong("a sample was answered twice")

    return Trial(run, ("interrupt",), check)


@contextmanager
def interrupted_after(seconds: float):
    """Raises KeyboardInterrupt in this thread after a while, inside the engine; 0: never. In JAX's own Python code it
    waits a little longer: JAX 0.12 does not survive an interrupt everywhere there."""

    def interrupt(_, frame):
        ours = "/para_jax/" in frame.f_code.co_filename
        while ours and frame is not None:
            if frame.f_code.co_filename.endswith("engine.py"):
                raise KeyboardInterrupt
            frame = frame.f_back
        signal.setitimer(signal.ITIMER_REAL, 0.0002)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------------------- stress


def stress(requests: int, seed: int = 0) -> int:
    """Four clients that ask so many requests together, cancel two of five, and stream one of five; the answers that run
    gave. Raises Wrong for one that differs from its request alone."""
    warm()
    draw = random.Random(f"stress {seed}")
    steps = [[drawn_step(draw) for _ in range(requests // 4)] for _ in range(4)]
    return episode(steps, queue_limit=64, by_step=True, slots=8)
