"""Batch jobs: hostile lines next to good ones, and answers that were damaged between two runs."""

import json
import random
from pathlib import Path

from para_jax import Request
from para_jax.config import without_repeats
from para_jax.serving.jobs import run_job

from . import mutate
from .cases import Trial, Wrong
from .serving import answer, engine, pool, warm

FIELDS = ("prompt", "messages", "tenant", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n", "id")
DEFAULTS = Request("", max_new_tokens=4)
STRANGE = (
    lambda draw: nested_id(draw.choice((60, draw.randint(900, 1000), draw.randint(980, 990), draw.randint(980, 990)))),
    lambda draw: json.dumps(line(draw) | {"n": draw.choice((0, 128, 129, 10**9))}).encode(),
    lambda draw: json.dumps(line(draw) | {"stop": ["w5"] * draw.choice((16, 17, 50_000))}).encode(),
    lambda draw: json.dumps(line(draw) | {"prompt": "w20 " * draw.choice((31, 32, 100_000))}).encode(),
    lambda draw: json.dumps(
        {"messages": [{"role": "user", "content": "w20"} | {draw.choice(("tool_calls", "name")): mutate.value(draw)}]}
    ).encode(),
    lambda draw: json.dumps(line(draw) | {"tenant": draw.choice(("C", "base", "", "A ", 5, ["A"]))}).encode(),
    lambda draw: json.dumps(line(draw) | {"id": draw.choice(mutate.TEXTS)}).encode(),
    lambda draw: draw.choice(
        (b"\xff\xfe\x00", b"\0", b"{", b"}{", b"NaN", b"[1]", b'"w20"', b"\xef\xbb\xbf{}", b"\x1b[31m")
    ),
)


def nested_id(depth: int) -> bytes:
    """A line whose id is as deep as JSON can be read, or a little deeper or flatter."""
    return b'{"prompt": "w20", "id": ' + b"[" * depth + b"]" * depth + b"}"


def line(draw: random.Random) -> dict:
    """A good line: a request of the pool."""
    asked = draw.choice(pool())
    given = {name: getattr(asked, name) for name in FIELDS[2:-1]} | {"stop": list(asked.stop)}
    given["messages" if isinstance(asked.prompt, list) else "prompt"] = asked.prompt
    return given | ({"id": f"line {draw.randrange(10)}"} if draw.random() < 0.5 else {})


def hostile(draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return draw.choice(STRANGE)(draw).replace(b"\n", b" ")
    return mutate.json_text(draw, line(draw), FIELDS).replace(b"\n", b" ")


def jobs(draw: random.Random, folder: Path) -> Trial:
    """Each line is answered once, as it is alone; damaged answers are repaired or refused by the file's name."""
    warm()
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    lines = [
        json.dumps(line(draw)).encode() if draw.random() < 0.6 else hostile(draw) for _ in range(draw.randint(2, 8))
    ]
    source.write_bytes(b"\n".join(lines) + draw.choice((b"\n", b"", b"\n\n")))
    again = draw.random() < 0.5
    first: list[bytes] = []

    def run():
        run_job(engine(), source, output, DEFAULTS)
        first.extend(output.read_bytes().splitlines())
        require_right(lines, output, first)
        if again:
            output.write_bytes(damaged(draw, output.read_bytes()))
            changed = set(output.read_bytes().splitlines()) - set(first)
            run_job(engine(), source, output, DEFAULTS)
            require_right(lines, output, first, changed)

    return Trial(run, (str(output), "out.jsonl"))


def require_right(lines: list[bytes], output: Path, first: list[bytes], changed: set[bytes] = frozenset()) -> None:
    """Raises Wrong unless every line has one answer per sample, and each good line those that it has alone. `changed`:
    damaged answers, in whose text nobody can see it."""
    found: dict[int, list[dict]] = {}
    unseen = set()
    for text in output.read_bytes().splitlines():
        try:
            row = json.loads(text)
            number = row["line"]
            found.setdefault(number, []).append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Wrong(f"the output holds a damaged line: {text[:100]}") from None
        if text in changed:
            unseen.add(number)
    for number, text in enumerate(lines, 1):
        rows = found.get(number, [])
        if bool(rows) != bool(text.strip()):
            raise Wrong(f"line {number} has {len(rows)} answers: {text[:100]}")
        if len({row["index"] for row in rows}) != len(rows):
            raise Wrong(f"line {number} has two answers of one sample")
        expected = request_of(text)
        if expected is None or number in unseen or any(row["finish_reason"] == "error" for row in rows):
            if expected in pool() and number not in unseen:
                raise Wrong(f"line {number} is good and has an error: {rows[0]}")
            continue
        alone = answer(expected)
        if len(alone) != len(rows):
            raise Wrong(f"line {number} has {len(rows)} answers of {len(alone)} samples")
        for row in rows:
            one = alone[row["index"]]
            if (row["text"], row["finish_reason"]) != (one.text, one.finish_reason):
                raise Wrong(f"line {number} got {row['text']!r}; alone it gets {one.text!r}")


def request_of(text: bytes) -> Request | None:
    """The request of a line whose answer depends on nothing else; None for one that is refused or draws its seed. A
    name that is there twice is refused: readers differ in which value they use, and one of two tenants is wrong."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=without_repeats)
        name = found.pop("id", None)
        if not isinstance(name, (str, int, float, type(None))) or len(str(name).encode()) > 200:
            return None  # it may be refused for its id
        prompt = found.pop("messages") if "messages" in found else found.pop("prompt")
        stop = found.pop("stop", ())
        made = Request(prompt, stop=tuple(stop) if isinstance(stop, list) else stop, **{"max_new_tokens": 4} | found)
        fixed = made.temperature == 0 or made.seed is not None
        return made if fixed and made.tenant in ("A", "B", None) and not answer(made)[0].error else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Answers of which some lines are cut, changed, doubled, lost, or of another kind."""
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    change = draw.choice(("bytes", "cut", "field", "field", "double", "lose", "order", "add"))
    if change == "bytes":
        return mutate.data(draw, content)
    if change == "cut":
        return content[: draw.randrange(len(content))]
    if change == "field":
        row = json.loads(lines[at])
        key = draw.choice(("line", "index", "request", "finish_reason", "text", "id"))
        row[key] = draw.choice((mutate.value(draw), mutate.near(draw, row.get(key)), mutate.nested(900)))
        lines[at] = json.dumps(row).encode(errors="surrogatepass") + b"\n"
    elif change == "double":
        lines.insert(draw.randint(0, len(lines)), lines[at])
    elif change == "lose":
        del lines[at]
    elif change == "order":
        draw.shuffle(lines)
    else:
        lines.insert(
            at, draw.choice((b"\n", b"5\n", b"{}\n", b"\0" * 100, b'{"line": \n', b'{"line": ' + b"[" * 5000 + b"\n"))
        )
    return b"".join(lines)
