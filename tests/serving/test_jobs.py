"""A batch job answers every line once, also when it is killed at any moment and started again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from functools import partial
from types import SimpleNamespace

import jax
import pytest
from long_cases import long, slow
from quick_compiler import own_flags
from tiny_run import strong_adapters, words

from para_jax import AdapterBank, Engine, Request, generate, load_adapter, load_backbone, load_tokenizer
from para_jax.adapters.loading_bank import LoadingBank
from para_jax.adapters.preview import previews
from para_jax.backbone import load
from para_jax.cli import main
from para_jax.inference.sampling import derived_seed
from para_jax.server.batch import batch_request
from para_jax.serving import answers, decoder, job_lines, jobs, prefills
from para_jax.serving.answers import Answers
from para_jax.serving.job_lines import Reader
from para_jax.serving.open_requests import QueueFull

run_job = partial(jobs.run_job, read_body=batch_request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, two strong tenants, and 40 lines of requests."""
    folder = tmp_path_factory.mktemp("jobs")
    strong_adapters(folder, "AB")
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(40)))
    return folder


def lines(count):
    draw = random.Random(0)
    return [
        {"prompt": words(draw.sample(range(20, 256), 4)), "max_new_tokens": 3 + i % 9}
        | ({"tenant": draw.choice("AB")} if i % 3 else {})
        | ({"custom_id": f"id-{i}"} if i % 2 else {})
        | ({"n": 2, "temperature": 1.0, "seed": i} if i % 7 == 0 else {})
        for i in range(count)
    ]


def command(folder, output, source="in.jsonl"):
    names = [f"{name}={folder / name}" for name in "AB"]
    return [str(part) for part in (
        "generate", "--backbone", folder / "backbone", "--adapters", *names, "--input", folder / source,
        "--output", output, "--slots", 3, "--max-length", 32, "--allow-cpu", "--no-compilation-cache",
    )]  # fmt: skip


def start(arguments, **options):
    """A child process."""
    environment = os.environ | own_flags() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", "import sys; from para_jax.cli import main; sys.exit(main(sys.argv[1:]))", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, text=True, **options)


def read(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def by_id(output):
    """The answers by custom_id; none may be there twice."""
    rows = read(output)
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def texts(row):
    """The texts of an answer's samples."""
    return [choice["text"] for choice in row["response"]["body"]["choices"]]


def message(row):
    """An error's message."""
    return row["error"]["message"]


def write(file, *rows):
    """Lines of a job: objects, or texts as they are."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def whole(folder):
    """The answers of a job that was not disturbed, by line and sample."""
    output = folder / "whole.jsonl"
    assert main(command(folder, output)) == 0
    return by_id(output)


@pytest.fixture
def engine(folder):
    """An engine of its own, which shares its programs with the others."""
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({name: load_adapter(folder / name, model.config) for name in "AB"}, model.config)
    return Engine(model, bank, load_tokenizer(folder / "backbone"), slots=3, max_length=32)


def test_lines_that_are_answered_already_need_no_adapter_again(folder, whole, tmp_path):
    """Nor is one loaded for the key of each line: with room for one adapter, that would be two loads a line."""
    model, loads = load_backbone(folder / "backbone"), []

    def load(name):
        loads.append(name)
        return load_adapter(folder / name, model.config)

    def job():
        found = dict(zip("AB", previews([str(folder / name) for name in "AB"], model.config), strict=True))
        bank = LoadingBank.of(found, model.config, load, 1)
        engine = Engine(model, bank, load_tokenizer(folder / "backbone"), slots=3, max_length=32)
        assert len(bank) == 0 and not run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))

    job()
    assert by_id(tmp_path / "out.jsonl") == whole
    loads.clear()
    job()
    assert sorted(loads) == ["A", "B"]


def test_every_line_is_answered_once_as_generate_does_and_in_order(folder, whole):
    asked = lines(40)
    assert list(whole) == [line.get("custom_id", f"line-{i}") for i, line in enumerate(asked, 1)]
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    adapters = {name: load_adapter(folder / name, model.config) for name in "AB"} | {None: None}
    for i, (line, row) in enumerate(zip(asked, whole.values(), strict=True)):
        body, count = row["response"]["body"], line.get("n", 1)
        assert (body["model"], len(body["choices"])) == (line.get("tenant", "base"), count) and row["error"] is None
        if i % 5 == 0:
            options = dict(max_new_tokens=line["max_new_tokens"], temperature=line.get("temperature", 0.0))
            options |= dict(tokenizer=tokenizer, adapters=adapters[line.get("tenant")])
            seeds = [line.get("seed", 0) + index for index in range(count)]
            assert texts(row) == [generate(model, [line["prompt"]], seed=seed, **options)[0] for seed in seeds]


def test_lines_of_openais_batch_format_are_answered_as_the_short_form(folder, engine, tmp_path):
    from para_jax import run_batch

    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    settings = {"max_tokens": 4, "temperature": 0, "model": "A"}
    chat = {"messages": [{"role": "user", "content": "w20 w21"}]}

    def batch(name, url, body):
        return {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}

    source = write(
        tmp_path / "in.jsonl",
        batch("text", "completions", settings | {"prompt": "w20 w21 ", "n": 2}),
        batch("chat", "chat/completions", settings | chat),
        batch("unbounded", "chat/completions", {"model": "base"} | chat),
        {"custom_id": "short", "prompt": "w20 w21 ", "max_new_tokens": 4, "tenant": "A"},
        batch("model", "completions", settings | {"prompt": "w20", "model": "C"}),
        batch("field", "completions", settings | {"prompt": "w20", "stop": 5}),
        batch("streamed", "completions", settings | {"prompt": "w20", "stream": True}),
        batch("url", "embeddings", {"input": "w20"}),
    )
    assert run_batch(engine, source, tmp_path / "out.jsonl") == 4
    found = by_id(tmp_path / "out.jsonl")
    row = found["chat"]
    assert set(row) == {"id", "custom_id", "response", "error"}
    assert set(row["response"]) == {"status_code", "request_id", "body"} and row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert body["object"] == "chat.completion" and body["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6,
    }  # fmt: skip
    said = body["choices"][0]["message"]
    assert said["role"] == "assistant" and said["content"].strip() == texts(found["short"])[0]
    assert [text.strip() for text in texts(found["text"])] == texts(found["short"]) * 2
    assert found["unbounded"]["response"]["body"]["usage"]["total_tokens"] <= 32
    expected = {
        "model": "no tenant 'C'",
        "field": "stop[0] is 5",
        "streamed": "without stream",
        "url": "/v1/embeddings",
    }
    for name, error in expected.items():
        assert error in message(found[name]) and found[name]["response"]["status_code"] == 400


# --------------------------------------------------------------------------------------- kills, interrupts, full disks


@pytest.mark.parametrize("seed", [long(0), slow(1), slow(2), slow(3)])
def test_a_job_that_is_killed_goes_on_without_repeating_or_losing_a_line(folder, whole, tmp_path, seed):
    """A child process is killed when its output has reached a drawn size; at last it may finish."""
    output, draw = tmp_path / "out.jsonl", random.Random(seed)
    for goal in sorted(draw.sample(range(1, 1500), 2)):
        child = start(command(folder, output), stderr=subprocess.DEVNULL)
        while child.poll() is None and (not output.exists() or output.stat().st_size < goal):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        os.truncate(output, output.stat().st_size - draw.randrange(200))
    assert main(command(folder, output)) == 0
    assert by_id(output) == whole
    assert output.read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_job_goes_on_from_an_output_that_was_cut_at_any_byte(folder, whole, engine, tmp_path):
    output, complete = tmp_path / "out.jsonl", (folder / "whole.jsonl").read_bytes()
    for cut in random.Random(0).sample(range(len(complete)), 12):
        output.write_bytes(complete[:cut])
        assert not run_job(engine, folder / "in.jsonl", output, Request(""))
        assert by_id(output) == whole


def test_ctrl_c_ends_a_job_with_130_and_the_same_command_goes_on(folder, whole, tmp_path, monkeypatch, capsys):
    output, real, rounds = tmp_path / "out.jsonl", Engine.step, iter(range(99))

    def step(engine):
        if next(rounds) == 5:
            raise KeyboardInterrupt
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    assert main(command(folder, output)) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert 0 < len(read(output)) < len(whole)
    assert main(command(folder, output)) == 0
    assert by_id(output) == whole


def test_a_round_that_fails_is_made_again_twice(folder, whole, engine, tmp_path, monkeypatch):
    output, real, rounds = tmp_path / "out.jsonl", Engine.step, iter(range(999))
    failing = {2, 3, 9}

    def step(engine):
        if next(rounds) in failing:
            raise RuntimeError("out of memory")
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    assert not run_job(engine, folder / "in.jsonl", output, Request(""))
    assert by_id(output) == whole
    failing |= set(range(100, 103))
    rounds = iter(range(98, 999))
    with pytest.raises(RuntimeError, match="out of memory"):
        run_job(engine, folder / "in.jsonl", tmp_path / "other.jsonl", Request(""))


def test_prompts_that_fail_do_not_end_a_job(folder, engine, tmp_path, monkeypatch):
    """Neither those that are prefilled whole nor those in blocks, together with others."""

    def failing(real, tokens_of):
        def program(*arguments, **options):
            if (tokens_of(arguments) == 251).any():
                raise RuntimeError("out of memory")
            return real(*arguments, **options)

        return program

    monkeypatch.setattr(decoder, "prefill", failing(decoder.prefill, lambda arguments: arguments[2]))
    monkeypatch.setattr(
        prefills, "prefill_chunk", failing(prefills.prefill_chunk, lambda arguments: arguments[3].tokens)
    )
    rows = [{"prompt": f"w{251 if i % 2 else 30} w{20 + i}", "tenant": ["base", "A", "B"][i % 3]} for i in range(12)]
    source, output = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    errors = run_job(engine, source, output, Request("", max_new_tokens=4))
    assert errors == 6
    assert [bool(answer["error"]) for answer in read(output)] == [False, True] * 6


def test_a_job_that_ends_early_leaves_the_engine_without_its_requests(folder, engine, tmp_path, monkeypatch):
    def full(answers, record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Answers, "add", full)
        run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))
    assert engine.open == 0
    engine.submit(Request("w20 w21", max_new_tokens=2, id="mine"))
    assert [one.id for one in engine.run()] == ["mine"]


def test_a_device_that_takes_nothing_ends_a_job_with_2(folder, capsys):
    assert main(command(folder, "/dev/full")) == 2
    assert "/dev/full" in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------- what an answer is for


def answer(name, error=None):
    body = None if error else {"created": 1796169600, "choices": []}
    response = {"status_code": 400 if error else 200, "request_id": "0" * 32, "body": body}
    error = error and {"code": "request_failed", "message": error}
    return {"id": "batch_req_" + "0" * 32, "custom_id": name, "response": response, "error": error}


PLAIN = Request("")


def key(line, defaults=PLAIN, bank=None, number=1, **settings):
    reader = Reader(SimpleNamespace(bank=bank), defaults, settings, batch_request)
    found = reader.read(number, json.dumps({"prompt": "w20"} | line).encode())
    assert found.error is None, found
    return found.key


def test_a_key_changes_with_everything_that_an_answer_depends_on():
    hot = {"temperature": 1.0, "seed": 3}
    different = [
        *({}, {"prompt": "w21"}, {"max_new_tokens": 5}, {"stop": ["a"]}, {"stop": ["a", "b"]}, {"n": 2}),
        *(hot, hot | {"seed": 4}, hot | {"top_k": 2}, hot | {"top_p": 0.5}, hot | {"temperature": 0.5}),
    ]
    found = [*map(key, different), key({}, backbone="a"), key({}, backbone="b"), key(hot | {"seed": None}, number=2)]
    assert len(set(found)) == len(found)


def test_a_key_does_not_change_with_anything_else():
    everything = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 7, "stop": "a"}
    others = Request("", None, 9, 0.5, 2, 0.9, 5, ("b",))
    assert key(everything) == key(everything, others) == key(everything | {"tenant": "base", "custom_id": "x"})
    assert key({}, others) != key({}) == key({"seed": 1}) == key({}, number=2)  # greedy


def test_a_key_changes_with_the_adapter(folder):
    model = load_backbone(folder / "backbone")
    a, b = (load_adapter(folder / name, model.config) for name in "AB")
    banks = [AdapterBank.holding(held, model.config) for held in ({"A": a, "C": a}, {"A": b})]
    found = [key({"tenant": "A"}, bank=bank) for bank in banks]
    found += [key({"tenant": tenant}, bank=banks[0]) for tenant in ("C", None)]
    assert len(set(found)) == 4
    banks[1].replace("A", a)
    assert key({"tenant": "A"}, bank=banks[1]) == found[0]


@pytest.mark.long
def test_a_file_with_other_content_is_refused_and_stays_unchanged(folder, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_bytes((folder / "whole.jsonl").read_bytes())
    write(folder / "other.jsonl", *(line | {"prompt": "w20"} for line in lines(40)))
    before = output.read_bytes()
    for source, *other in (
        ("other.jsonl",),
        ("in.jsonl", "--stop", "w9"),
        ("in.jsonl", "--adapters", f"A={folder / 'B'}"),
        ("in.jsonl", "--dtype", "bfloat16"),
        ("in.jsonl", "--quantize", "int8"),
    ):
        assert main([*command(folder, output, source), *other]) == 2
        said = capsys.readouterr().err
        assert f"{output}: line " in said and "of the input was answered as another request" in said
        assert output.read_bytes() == before
    for same in (["--slots", "2"], ["--max-length", "64"], ["--max-new-tokens", "63"], ["--seed", "9"]):
        assert main([*command(folder, output), *same]) == 0  # what is drawn has a seed
        assert output.read_bytes() == before


def test_another_backbone_tokenizer_or_version_does_not_go_on_with_a_job(folder, whole, engine, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    kept = (folder / "whole.jsonl").read_text().splitlines(keepends=True)[5:]  # line 1 is not answered yet
    output.write_text("".join(kept))
    leaves, treedef = jax.tree.flatten(engine.model)
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1e-3)
    other_tokenizer = load_tokenizer(folder / "backbone")
    other_tokenizer.add_tokens(["another"])
    make = partial(Engine, slots=3, max_length=32)
    others = [
        make(jax.tree.unflatten(treedef, leaves), engine.bank, engine.tokenizer),
        make(engine.model, engine.bank, other_tokenizer),
    ]
    for other in others:
        with pytest.raises(ValueError, match="was answered as another request"):
            run_job(other, folder / "in.jsonl", output, Request(""))
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="was answered as another request"):
        patched.setattr(job_lines, "ANSWERS_VERSION", 99)
        run_job(engine, folder / "in.jsonl", output, Request(""))
    assert output.read_text() == "".join(kept)  # nothing was added
    run_job(engine, folder / "in.jsonl", output, Request(""))
    assert by_id(output) == whole


DATED = (
    "{{ 'w' + strftime_now('%-d') + ' ' }}{% for m in messages %}{{ m.content + ' ' }}"
    "{{ '</s> ' if m.role == 'assistant' }}{% endfor %}"
)


def test_a_job_writes_the_date_of_its_first_day_in_all_chats(folder, engine, tmp_path, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chats = [{"messages": [{"role": "user", "content": f"w{40 + i}"}], "max_new_tokens": 9} for i in range(2)]
    same = [{"prompt": f"w25 w{40 + i} ", "max_new_tokens": 9} for i in range(2)]  # the same prompts on the 25th
    write(source, *chats, *same)
    engine.tokenizer.chat_template = DATED

    class Day(date):
        today = classmethod(lambda cls: date(2026, 7, 25))

    monkeypatch.setattr(answers, "date", Day)
    run_job(engine, source, output, Request(""))
    found, rows = by_id(output), output.read_text().splitlines(keepends=True)
    said = [found[f"line-{line}"]["response"]["body"]["choices"][0] for line in (1, 2)]
    assert [one["message"]["content"] for one in said] == [texts(found[f"line-{line}"])[0] for line in (3, 4)]
    assert engine.tokenizer.chat_template == DATED
    Day.today = classmethod(lambda cls: date(2026, 7, 26))
    output.write_text("".join(rows[:1]))
    run_job(engine, source, output, Request(""))
    assert by_id(output) == found
    run_job(engine, source, tmp_path / "next.jsonl", Request(""))
    assert by_id(tmp_path / "next.jsonl")["line-1"]["id"] != found["line-1"]["id"]


def test_the_adapter_in_the_key_answers_even_if_the_tenant_is_replaced(folder, engine, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", {"prompt": "w20 w21 w22 w23", "tenant": "A", "max_new_tokens": 8, "n": 12})
    real, b = Engine.step, load_adapter(folder / "B", engine.model.config)

    def step(engine):
        engine.bank.replace("A", b)
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    assert not run_job(engine, source, tmp_path / "out.jsonl", Request(""))
    (row,) = read(tmp_path / "out.jsonl")
    options = dict(tokenizer=engine.tokenizer, adapters=load_adapter(folder / "A", engine.model.config))
    assert texts(row) == generate(engine.model, ["w20 w21 w22 w23"], max_new_tokens=8, **options) * 12


def test_lines_without_a_seed_are_drawn_apart_and_the_same_again(folder, engine, tmp_path):
    line = {"prompt": "w20 w21", "max_new_tokens": 6, "temperature": 1.5}
    source = write(tmp_path / "in.jsonl", *[line] * 5, line | {"n": 2}, line | {"seed": 11, "n": 2})
    for output in ("first", "second"):
        run_job(engine, source, tmp_path / output, Request("", seed=4))
    found = [texts(row) for row in read(tmp_path / "first")]
    assert found == [texts(row) for row in read(tmp_path / "second")] and len(set(sum(found, []))) > 6
    run_job(engine, source, tmp_path / "other", Request("", seed=5))
    other = [texts(row) for row in read(tmp_path / "other")]
    assert [i for i in range(7) if found[i] == other[i]] == [6]
    options = dict(tokenizer=engine.tokenizer, temperature=1.5, max_new_tokens=6)
    for number, row in enumerate(found, 1):
        seed = 11 if number == 7 else derived_seed(4, number)
        for index, text in enumerate(row):
            assert [text] == generate(engine.model, [line["prompt"]], seed=(seed + index) % 2**32, **options)


# ------------------------------------------------------------------------------------------------------------ bad lines


def test_a_bad_line_is_answered_with_an_error_and_the_others_are_served(folder, tmp_path, capsys):
    good = {"prompt": "w20 w21", "max_new_tokens": 2}
    bad = [
        ("not json", "not JSON"),
        ("[" * 100_000, "recursion"),
        ("[1]", "AttributeError"),
        (good | {"tenant": "C"}, "no tenant 'C'"),
        (good | {"max_tokens": 1}, "no field 'max_tokens'; did you mean max_new_tokens?"),
        (good | {"messages": []}, "either prompt"),
        ({"max_new_tokens": 2}, "either prompt"),
        (good | {"max_new_tokens": 99}, "2 tokens and max_new_tokens 99"),
        (good | {"prompt": "w20 \ud83d"}, "ud83d"),
        (good | {"prompt": [20, 30]}, "prompt: 20 is not a message"),
        (good | {"n": 129}, "n is 129"),
    ]
    rows = [line for line, _ in bad]
    write(folder / "bad.jsonl", good, *rows, "", good | {"tenant": "A"}, good | {"tenant": None, "stop": "w9"})
    assert main(command(folder, tmp_path / "out.jsonl", "bad.jsonl")) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"{len(bad)} answers are errors" in captured.err
    assert f"the first error, line 2 of {folder / 'bad.jsonl'}: line: not JSON: Expecting value" in captured.err
    first, *errors, second, third = read(tmp_path / "out.jsonl")
    for (_, error), row in zip(bad, errors, strict=True):
        assert error in message(row) and len(message(row)) <= 1000 and row["response"]["status_code"] == 400, row
    assert [row["response"]["body"]["model"] for row in (first, second, third)] == ["base", "A", "base"]
    assert texts(first) == texts(third)


def test_a_custom_id_that_comes_twice_ends_the_job_and_loses_nothing(engine, tmp_path):
    line = {"prompt": "w20", "max_new_tokens": 2}
    source = write(tmp_path / "in.jsonl", *[line] * 9, line | {"custom_id": "line-1"})
    with pytest.raises(ValueError, match="line 10 has the custom_id of line 1, 'line-1'"):
        run_job(engine, source, tmp_path / "out.jsonl", Request(""))
    kept = read(tmp_path / "out.jsonl")
    write(source, *[line] * 9, line | {"custom_id": "other"})
    assert not run_job(engine, source, tmp_path / "out.jsonl", Request(""))
    assert kept and read(tmp_path / "out.jsonl")[0] in kept and len(read(tmp_path / "out.jsonl")) == 10


def test_a_tenant_whose_queue_is_full_waits(folder, whole, engine, tmp_path, monkeypatch):
    real = Engine.submit

    def submit(engine, request, **options):
        if engine.open >= 2:
            raise QueueFull("the queue of this tenant is full")
        return real(engine, request, **options)

    monkeypatch.setattr(Engine, "submit", submit)
    assert not run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))
    assert by_id(tmp_path / "out.jsonl") == whole


def test_fixed_lines_are_answered_again_and_errors_reported_again(folder, whole, tmp_path, capsys):
    """A link to the output stays one, and the file keeps its mode."""
    good = lines(4)
    source, output, link = folder / "fixed.jsonl", tmp_path / "out.jsonl", tmp_path / "link"
    output.touch(mode=0o600)
    link.symlink_to(output)
    write(source, good[0], "not json", good[2] | {"tenant": "C"}, "{}")
    for _ in range(2):  # the second time nothing is left to do, and the errors are still there
        assert main(command(folder, link, source)) == 1
        assert "3 answers are errors" in capsys.readouterr().err
        assert [row["custom_id"] for row in read(output)] == [f"line-{i}" for i in (1, 2, 3, 4)]
    kept = read(output)[0]
    write(source, *good[:3], "{}")
    assert main(command(folder, link, source)) == 1
    assert "1 answer is an error" in capsys.readouterr().err
    found = read(output)
    assert found[0] == kept and found[:3] == list(whole.values())[:3]
    write(source, *good[1:2])
    assert main(command(folder, link, source)) == 0  # answers to lines that are gone stay, after the others
    assert link.is_symlink() and output.stat().st_mode & 0o777 == 0o600


# --------------------------------------------------------------------------------------- pipes, options, wrong commands


def test_input_and_output_may_be_pipes(folder, whole, tmp_path, capfd):
    source, output, found = tmp_path / "in.fifo", tmp_path / "out.fifo", []
    for pipe in (source, output):
        os.mkfifo(pipe)
    threads = [
        threading.Thread(target=lambda: source.write_bytes((folder / "in.jsonl").read_bytes())),
        threading.Thread(target=lambda: found.extend(read(output))),
    ]
    for thread in threads:
        thread.start()
    assert main(command(folder, output, source)) == 0
    for thread in threads:
        thread.join(30)
    assert {row["custom_id"]: row for row in found} == whole
    capfd.readouterr()
    assert main(command(folder, "/dev/stdout")) == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]  # nothing else is there
    assert {row["custom_id"]: row for row in printed} == whole


def test_a_pipe_without_a_line_is_refused(folder, tmp_path, capsys):
    source, output = tmp_path / "in.fifo", tmp_path / "out.jsonl"
    os.mkfifo(source)
    thread = threading.Thread(target=lambda: source.write_bytes(b"\n"))
    thread.start()
    assert main(command(folder, output, source)) == 2
    thread.join(30)
    assert f"{source}: no line there" in capsys.readouterr().err and not output.exists()


def test_lines_without_a_tenant_take_the_one_of_the_command(folder, whole, tmp_path, capsys):
    alone = [{"prompt": "w20 w30 w40", "max_new_tokens": 8}, {"prompt": "w20 w30 w40", "tenant": None}]
    (folder / "alone.jsonl").write_text("".join(json.dumps(line | {"max_new_tokens": 8}) + "\n" for line in alone))
    plain = command(folder, tmp_path / "tenant.jsonl", "alone.jsonl")
    assert main([*plain, "--tenant", "B"]) == 0
    one = [part for part in plain if not part.startswith(("A=", "B=", "--adapters"))]
    one[one.index("--output") + 1] = str(tmp_path / "adapter.jsonl")
    assert main([*one, "--adapter", str(folder / "B")]) == 0
    first, second = read(tmp_path / "tenant.jsonl"), read(tmp_path / "adapter.jsonl")
    assert [row["response"]["body"]["model"] for row in first] == ["B", "base"]
    assert [texts(row) for row in first] == [texts(row) for row in second] and texts(first[0]) != texts(first[1])
    capsys.readouterr()
    assert main([*plain, "--tenant", "A", "--tenant", "B"]) == 2
    assert "--tenant is given 2 times" in capsys.readouterr().err


def test_the_adapter_of_all_lines_is_one_folder_whatever_its_name(folder, tmp_path, capsys):
    shutil.copytree(folder / "B", tmp_path / "base" / "adapter")
    shutil.copytree(folder / "A", tmp_path / "run" / "acme" / "adapter")
    shutil.copytree(folder / "B", tmp_path / "run" / "globex" / "adapter")
    write(tmp_path / "run" / "tenants.json", "{}")
    write(tmp_path / "one.jsonl", '{"prompt": "w20 w30 w40"}\n{"prompt": "w20 w30 w40", "tenant": "base"}\n')
    plain = ["generate", "--backbone", str(folder / "backbone"), "--input", str(tmp_path / "one.jsonl")]
    plain += ["--output", str(tmp_path / "out.jsonl"), "--allow-cpu", "--slots", "2", "--max-length", "16"]
    plain += ["--max-new-tokens", "4"]
    assert main([*plain, "--adapter", str(tmp_path / "run")]) == 2
    assert "it is a run of many tenants" in capsys.readouterr().err
    assert main([*plain, "--adapter", str(tmp_path / "base" / "adapter")]) == 0
    first, second = read(tmp_path / "out.jsonl")
    assert [row["response"]["body"]["model"] for row in (first, second)] == ["adapter", "base"]
    assert texts(first) != texts(second)


def test_wrong_job_files_are_refused_before_anything_is_loaded(folder, tmp_path, capsys, monkeypatch):
    (folder / "empty.jsonl").write_text("\n")
    assert main(command(folder, tmp_path / "out.jsonl", "empty.jsonl")) == 2
    assert "empty.jsonl: no line there" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
    notes = write(tmp_path / "notes.txt", "a shopping list")
    monkeypatch.setattr(load, "load_backbone", None)
    assert main(command(folder, notes)) == 2 and f"{notes}: line 1 is not an answer" in capsys.readouterr().err


def test_a_default_that_no_line_could_have_is_refused(folder, tmp_path, capsys):
    assert main([*command(folder, tmp_path / "out.jsonl"), "--top-p", "2"]) == 2
    assert "top_p is 2.0" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_a_job_does_not_take_the_answers_of_open_requests(engine, folder, tmp_path):
    engine.submit(Request("w20 w21", max_new_tokens=2, id="mine"))
    with pytest.raises(ValueError, match="engine: 1 requests are open"):
        run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))
    assert [answer.id for answer in engine.run()] == ["mine"]
