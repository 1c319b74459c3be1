"""A batch job answers every line once, also when it is killed at any moment and started again."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
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
from para_jax.serving import decoder, job_lines, jobs, prefills
from para_jax.serving.answers import HEAD, Answers, KeptAnswer, bounded_lines
from para_jax.serving.job_lines import KeyParts, LineSample, key_parts, samples, unknown_field
from para_jax.serving.jobs import run_job
from para_jax.serving.open_requests import QueueFull


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
        | ({"id": f"line-{i}"} if i % 2 else {})
        | ({"n": 2, "temperature": 1.0, "seed": i} if i % 7 == 0 else {})
        for i in range(count)
    ]


def command(folder, output, source="in.jsonl"):
    names = [f"{name}={folder / name}" for name in "AB"]
    return [str(part) for part in (
        "generate", "--backbone", folder / "backbone", "--adapters", *names, "--input", folder / source,
        "--output", output, "--slots", 3, "--max-length", 32, "--allow-cpu", "--no-compilation-cache",
    )]  # fmt: skip


def start(arguments, room=2**40, **options):
    """A child process that may write at most `room` bytes to a file."""
    environment = os.environ | own_flags() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    limited = "import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, [int(sys.argv[1])] * 2)"
    code = f"{limited}; from para_jax.cli import main; sys.exit(main(sys.argv[2:]))"
    line = [sys.executable, "-c", code, str(room), *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, text=True, **options)


def read(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def by_sample(output):
    """The answers by line and sample; none may be there twice."""
    rows = read(output)
    found = {(row["line"], row["index"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def write(file, *rows):
    """Lines of a job: objects, or texts as they are."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def whole(folder):
    """The answers of a job that was not disturbed, by line and sample."""
    output = folder / "whole.jsonl"
    assert main(command(folder, output)) == 0
    return by_sample(output)


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
    assert by_sample(tmp_path / "out.jsonl") == whole
    loads.clear()
    job()
    assert sorted(loads) == ["A", "B"]


def test_every_line_is_answered_once_as_generate_does(folder, whole):
    asked = lines(40)
    assert set(whole) == {(i, j) for i, line in enumerate(asked, 1) for j in range(line.get("n", 1))}
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    adapters = {name: load_adapter(folder / name, model.config) for name in "AB"} | {None: None}
    for (i, j), row in whole.items():
        line = asked[i - 1]
        assert (row["tenant"], row.get("id")) == (line.get("tenant"), line.get("id"))
        if i % 5 == 0:
            options = dict(max_new_tokens=line["max_new_tokens"], temperature=line.get("temperature", 0.0))
            seed, adapter = line.get("seed", 0) + j, adapters[line.get("tenant")]
            text = generate(
                model, [line["prompt"]], tokenizer=tokenizer, adapters=adapter, seed=seed, **options
            )  # fmt: skip
            assert [row["text"]] == text


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
    assert by_sample(output) == whole
    before = output.read_bytes()
    assert main(command(folder, output)) == 0  # nothing is left to do
    assert output.read_bytes() == before


def test_a_job_goes_on_from_an_output_that_was_cut_at_any_byte(folder, whole, engine, tmp_path):
    output, complete = tmp_path / "out.jsonl", (folder / "whole.jsonl").read_bytes()
    for cut in random.Random(0).sample(range(len(complete)), 12):
        output.write_bytes(complete[:cut])
        assert not run_job(engine, folder / "in.jsonl", output, Request(""))
        assert by_sample(output) == whole


def test_a_sample_that_a_kill_left_out_is_answered_and_the_others_stay(folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = (folder / "whole.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["index"] == 0]
    assert len(kept) < len(rows)
    output.write_text("".join(kept))
    assert main(command(folder, output)) == 0
    assert output.read_text().startswith("".join(kept))
    assert by_sample(output) == whole


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
    assert by_sample(output) == whole


def test_a_round_that_fails_is_made_again_twice(folder, whole, engine, tmp_path, monkeypatch):
    output, real, rounds = tmp_path / "out.jsonl", Engine.step, iter(range(999))
    failing = {2, 3, 9}

    def step(engine):
        if next(rounds) in failing:
            raise RuntimeError("out of memory")
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    assert not run_job(engine, folder / "in.jsonl", output, Request(""))
    assert by_sample(output) == whole
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
    assert errors == {"the prompt could not be prefilled": 6}
    assert [bool(answer.get("error")) for _, answer in sorted(by_sample(output).items())] == [False, True] * 6


def test_a_job_that_ends_early_leaves_the_engine_without_its_requests(folder, engine, tmp_path, monkeypatch):
    def full(answers, record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Answers, "add", full)
        run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))
    assert engine.open == 0
    engine.submit(Request("w20 w21", max_new_tokens=2, id="mine"))
    assert [one.id for one in engine.run()] == ["mine"]
    engine.submit(Request("w20 w21", max_new_tokens=2))
    with pytest.raises(ValueError, match="engine: 1 requests"):
        run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))


@pytest.mark.long
def test_a_full_disk_ends_a_job_with_2_and_more_room_lets_it_go_on(folder, whole, tmp_path):
    output, room = tmp_path / "out.jsonl", len((folder / "whole.jsonl").read_bytes()) // 2
    child = start(command(folder, output), room, stderr=subprocess.PIPE)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 2 and str(output) in said.splitlines()[-1] and "Traceback" not in said, said
    kept = output.read_bytes()
    assert 0 < len(kept) <= room and kept.endswith(b"}\n")
    assert main(command(folder, output)) == 0
    assert output.read_bytes().startswith(kept) and by_sample(output) == whole


def test_a_device_that_takes_nothing_ends_a_job_with_2(folder, capsys):
    assert main(command(folder, "/dev/full")) == 2
    assert "/dev/full" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------- one job per output


@pytest.mark.long
def test_a_second_job_on_an_output_is_refused_until_the_first_ends(folder, whole, tmp_path, capsys):
    source, output = tmp_path / "in.fifo", tmp_path / "out.jsonl"
    os.mkfifo(source)
    child = start(command(folder, output, source), stderr=subprocess.DEVNULL)
    with source.open("wb", buffering=0) as lines:  # when the child has opened it, too
        lines.write((folder / "in.jsonl").read_bytes()[:-1])
        while len(output.read_bytes()) < 200:
            time.sleep(0.01)
        assert main(command(folder, output)) == 2
        assert f"{output}: another process" in capsys.readouterr().err
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert main(command(folder, output)) == 0
    assert by_sample(output) == whole


def test_the_lock_holds_a_file_that_was_replaced_meanwhile(tmp_path):
    """Whoever opened the old file before it was replaced must not write there, unseen."""
    output = write(tmp_path / "out.jsonl", answer(1, error="bad"), answer(1))
    with Answers(output) as answers:
        with pytest.raises(ValueError, match="another process"):
            Answers(output)
        assert answers.stale == {1}
        answers.finish()
        with Answers(output) as other:  # of the new file
            other.add(answer(2))
    assert [row["line"] for row in read(output)] == [1, 2]


# ----------------------------------------------------------------------------------------------- what an answer is for


def answer(line, index=0, key="0" * 32, **fields):
    reason = {"finish_reason": "error"} if "error" in fields else {"finish_reason": "stop"}
    return {"line": line, "index": index, "request": key, "text": "", "tokens": 0} | reason | fields


PLAIN, ANYONE = Request(""), KeyParts(None, "text", "chat")


def keys(line, defaults=PLAIN, by=ANYONE, number=1):
    found = samples(number, json.dumps({"prompt": "w20"} | line).encode(), defaults, by)
    assert all(one.error is None for one in found), found
    return [one.key for one in found]


def test_a_key_changes_with_everything_that_an_answer_depends_on():
    hot = {"temperature": 1.0, "seed": 3}
    different = [
        *({}, {"prompt": "w21"}, {"max_new_tokens": 5}, {"stop": ["a"]}, {"stop": ["a", "b"]}, {"id": 1}, {"id": "1"}),
        *(hot, hot | {"seed": 4}, hot | {"top_k": 2}, hot | {"top_p": 0.5}, hot | {"temperature": 0.5}),
    ]
    assert len({keys(line)[0] for line in different}) == len(different)
    chat = {"messages": [{"role": "user", "content": "w20"}]}

    def of(line, by):
        return samples(1, json.dumps(line).encode(), Request(""), by)[0].key

    a, other_template, other_model = KeyParts(None, "a", "b"), KeyParts(None, "a", "c"), KeyParts(None, "d", "e")
    assert len({of(chat, by) for by in (a, other_template, other_model)}) == 3
    assert of({"prompt": "w20"}, a) == of({"prompt": "w20"}, other_template) != of({"prompt": "w20"}, other_model)


def test_a_key_does_not_change_with_anything_else():
    everything = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 7, "stop": "a"}
    others = Request("", None, 9, 0.5, 2, 0.9, 5, ("b",))
    assert keys(everything) == keys(everything, others) == keys(everything | {"stop": ["a", "a"], "tenant": "base"})
    assert keys({}, others) != keys({})
    assert keys({"seed": 1}) == keys({"seed": 2}) == keys({}, number=2) == keys({"top_k": 5, "top_p": 0.5})  # greedy
    assert keys({"temperature": 1}) == keys({"temperature": 1.0})
    assert keys(everything | {"n": 3})[:2] == keys(everything | {"n": 2})
    assert keys(everything | {"n": 2})[1] == keys(everything | {"seed": 8})[0]
    assert keys({}, Request("", alone=True)) == keys({})  # without strip=False


def test_a_key_changes_with_adapter_dtype_and_tenant(folder):
    model = load_backbone(folder / "backbone")
    a, b = (load_adapter(folder / name, model.config) for name in "AB")
    banks = [AdapterBank.holding(held, model.config) for held in ({"A": a, "C": a}, {"A": b})]
    banks.append(AdapterBank.holding({"A": a}, model.config, dtype="bfloat16"))
    found = [keys({"tenant": "A"}, by=KeyParts(bank, "text", "chat"))[0] for bank in banks]
    found += [keys({"tenant": tenant}, by=KeyParts(banks[0], "text", "chat"))[0] for tenant in ("C", None)]
    assert len(set(found)) == 5
    banks[1].replace("A", a)
    assert keys({"tenant": "A"}, by=KeyParts(banks[1], "text", "chat"))[0] == found[0]


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ bos_token }}{{ messages }}"])
def test_a_chats_key_changes_with_the_special_tokens_that_its_template_writes_by_their_roles(engine, template):
    keys = []
    for swapped in (False, True):
        tokenizer = deepcopy(engine.tokenizer)
        tokenizer.chat_template = template
        if swapped:
            tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token or "<s>"
        same = {name: getattr(engine, name) for name in ("model", "bank", "stop_ids")}
        keys.append(key_parts(SimpleNamespace(**same, tokenizer=tokenizer)))
    assert keys[0].text == keys[1].text and (keys[0].chat == keys[1].chat) == ("bos_token" not in template)


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
    for text in ("a shopping list\n", '{"a": 1}'):
        output.write_text(text)
        with pytest.raises(ValueError, match="line 1 is not an answer"):
            Answers(output)
        assert output.read_text() == text


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
    assert by_sample(output) == whole


DATED = (
    "{{ 'w' + strftime_now('%-d') + ' ' }}{% for m in messages %}{{ m.content + ' ' }}"
    "{{ '</s> ' if m.role == 'assistant' }}{% endfor %}"
)


def test_a_job_writes_the_date_of_its_first_day_in_all_chats(folder, engine, tmp_path, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chats = [{"messages": [{"role": "user", "content": f"w{40 + i}"}], "max_new_tokens": 9} for i in range(2)]
    texts = [{"prompt": f"w25 w{40 + i} ", "max_new_tokens": 9} for i in range(2)]  # the same prompts on the 25th
    write(source, *chats, *texts)
    run_job(engine, source, tmp_path / "undated.jsonl", Request(""))
    undated = by_sample(tmp_path / "undated.jsonl")
    engine.tokenizer.chat_template = DATED
    monkeypatch.setattr(jobs, "today", lambda: "2026-07-25")
    run_job(engine, source, output, Request(""))
    found, rows = by_sample(output), output.read_text().splitlines(keepends=True)
    assert [found[line, 0]["text"] for line in (1, 2)] == [found[line, 0]["text"] for line in (3, 4)]
    assert [found[line, 0].get("date") for line in (1, 2, 3, 4)] == ["2026-07-25"] * 2 + [None] * 2
    assert found[1, 0]["request"] != undated[1, 0]["request"] and found[3, 0] == undated[3, 0]
    assert "date" not in undated[1, 0] and engine.tokenizer.chat_template == DATED
    monkeypatch.setattr(jobs, "today", lambda: "2026-07-26")
    output.write_text("".join(row for row in rows if json.loads(row)["line"] != 2))
    run_job(engine, source, output, Request(""))
    assert by_sample(output) == found
    output.write_text(rows[0].replace("2026-07-25", "2026-07-24"))
    with pytest.raises(ValueError, match="was answered as another request"):
        run_job(engine, source, output, Request(""))


@pytest.mark.long
def test_a_longer_max_length_keeps_answers_and_retries_long_lines(folder, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, {"prompt": "w20", "max_new_tokens": 2}, {"prompt": "w20 w21 w22", "max_new_tokens": 30, "id": "long"})
    assert main(command(folder, output, source)) == 1
    first, long = read(output)
    if first["line"] == 2:
        first, long = long, first
    assert "max_length 32" in long["error"] and long["id"] == "long"
    before = output.read_bytes()
    assert main(command(folder, output, source)) == 1 and output.read_bytes() == before  # the same error again
    assert main([*command(folder, output, source), "--max-length", "64"]) == 0
    assert by_sample(output)[1, 0] == first and by_sample(output)[2, 0]["finish_reason"] == "length"


def test_the_adapter_in_the_key_answers_even_if_the_tenant_is_replaced(folder, engine, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", {"prompt": "w20 w21 w22 w23", "tenant": "A", "max_new_tokens": 8, "n": 12})
    real, b = Engine.step, load_adapter(folder / "B", engine.model.config)

    def step(engine):
        engine.bank.replace("A", b)
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    assert not run_job(engine, source, tmp_path / "out.jsonl", Request(""))
    texts = {row["text"] for row in read(tmp_path / "out.jsonl")}
    options = dict(tokenizer=engine.tokenizer, adapters=load_adapter(folder / "A", engine.model.config))
    assert texts == set(generate(engine.model, ["w20 w21 w22 w23"], max_new_tokens=8, **options))


def test_lines_without_a_seed_are_drawn_apart_and_the_same_again(folder, engine, tmp_path):
    line = {"prompt": "w20 w21", "max_new_tokens": 6, "temperature": 1.5}
    source = write(tmp_path / "in.jsonl", *[line] * 5, line | {"n": 2}, line | {"seed": 11, "n": 2})
    for output in ("first", "second"):
        run_job(engine, source, tmp_path / output, Request("", seed=4))
    found = by_sample(tmp_path / "first")
    assert found == by_sample(tmp_path / "second")
    assert len({row["text"] for row in found.values()}) > 6
    run_job(engine, source, tmp_path / "other", Request("", seed=5))
    other = by_sample(tmp_path / "other")
    assert [place for place in found if found[place]["text"] == other[place]["text"]] == [(7, 0), (7, 1)]
    for (number, index), row in found.items():
        seed = (11 if number == 7 else derived_seed(4, number)) + index
        options = dict(tokenizer=engine.tokenizer, temperature=1.5, max_new_tokens=6, seed=seed % 2**32)
        assert [row["text"]] == generate(engine.model, [line["prompt"]], **options)


# ------------------------------------------------------------------------------------------------------------ bad lines


def test_a_bad_line_is_answered_with_an_error_and_the_others_are_served(folder, tmp_path, capsys):
    good = {"prompt": "w20 w21", "max_new_tokens": 2}
    nested = "[" * 90 + "]" * 90
    bad = [
        ("not json", "not JSON"),
        ("[" * 100_000, "nests deeper"),
        ("[1]", "a JSON list"),
        (good | {"tenant": "C"}, "no tenant 'C'"),
        (good | {"temprature": 1}, "no field 'temprature'; did you mean temperature?"),
        (good | {"messages": []}, "either prompt"),
        ({"max_new_tokens": 2}, "either prompt"),
        (good | {"max_new_tokens": 99}, "2 tokens and max_new_tokens 99"),
        (good | {"top_p": 2}, "top_p is 2"),
        (good | {"prompt": "w20 \ud83d"}, "ud83d"),
        (good | {"prompt": 5}, "prompt: 5"),
        ({"messages": "w20 w21"}, "messages: 'w20 w21' is not a list"),
        (json.dumps(good)[:-1] + ', "tenant": "A", "tenant": "B"}', "line: 'tenant' is there twice"),
        (good | {"temperature": 10**400}, "temperature is 1000"),
        (good | {"n": 129}, "n is 129"),
        (good | {"stop": ["a"] * 17}, "stop: 17 texts"),
        (good | {"seed": -1}, "seed is -1"),
        (json.dumps(good)[:-1] + f', "stop": {nested}}}', "line: it nests deeper"),
    ]
    unusable = [
        (good | {"id": "\ud83d"}, "ud83d"),
        (json.dumps(good)[:-1] + f', "id": {nested}}}', "id: it nests deeper"),
        (json.dumps(good)[:-1] + ', "id": [1e999]}', "id: a number in it is not finite"),
        (good | {"id": "x" * 70_000}, "id: 70002 characters"),
    ]
    bad = [(line | {"id": [i, "é"]} if isinstance(line, dict) else line, error) for i, (line, error) in enumerate(bad)]
    count = len(bad) + len(unusable)
    rows = [line for line, _ in bad + unusable]
    write(folder / "bad.jsonl", good, *rows, "", good | {"tenant": "A"}, good | {"tenant": "base", "stop": "w9"})
    assert main(command(folder, tmp_path / "out.jsonl", "bad.jsonl")) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"{count} answers are errors: 6 line, 4 prompt, 4 id, 1 tenant" in captured.err
    where = f"the first error, line 2 of {folder / 'bad.jsonl'}: line: not JSON: Expecting value at character 1\n"
    assert where in captured.err
    found = by_sample(tmp_path / "out.jsonl")
    assert set(found) == {(i, 0) for i in (*range(1, count + 2), count + 3, count + 4)}
    for i, (line, error) in enumerate(bad + unusable, 2):
        row = found[i, 0]
        assert row["finish_reason"] == "error" and error in row["error"] and len(row["error"]) <= 1000, row
        assert row.get("id") == (line["id"] if isinstance(line, dict) and i < len(bad) + 2 else None)
    served = [found[i, 0] for i in (1, count + 3, count + 4)]
    assert [row["finish_reason"] for row in served] == ["length"] * 3
    assert [row["tenant"] for row in served] == [None, "A", None] and served[0]["text"] == served[2]["text"]


def test_a_null_counts_as_missing_and_a_table_may_write_whole_numbers_as_floats():
    """As pandas writes rows of different kinds."""
    defaults = Request("", "A", max_new_tokens=5, temperature=0.5, top_k=7)
    nulls = dict.fromkeys(set(job_lines.FIELDS) - {"id", "tenant"})
    expected = job_lines.request_of(3, {"prompt": "w20", "max_new_tokens": 8, "n": 2}, defaults)
    assert job_lines.request_of(3, nulls | {"prompt": "w20", "max_new_tokens": 8.0, "n": 2.0}, defaults) == expected
    turns = [{"role": "user", "content": "w20"}]
    found = job_lines.request_of(3, nulls | {"messages": turns, "tenant": None}, defaults)
    assert (found.prompt, found.tenant, found.top_k, found.max_new_tokens) == (turns, None, 7, 5)
    assert found.temperature == 0.5 and found.seed is not None
    with pytest.raises(ValueError, match="max_new_tokens is 8.5"):
        job_lines.request_of(3, {"prompt": "w20", "max_new_tokens": 8.5}, defaults)


@pytest.mark.parametrize(("line", "said"), [
    ({"prompt": [20, 30]}, r"prompt: \[20, 30\] is not a text"),
    ({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "w20"}}, "OpenAI's batch.*id"),
])  # fmt: skip
def test_lines_of_other_servers_are_named(line, said):
    with pytest.raises(ValueError, match=said):
        job_lines.request_of(1, line, Request(""))


def test_an_answered_line_that_can_no_longer_be_served_says_why():
    gone = LineSample(3, 0, "now", None, None, error="tenant: no tenant 'C'")
    with pytest.raises(ValueError, match="line 3 of the input was answered as another request: tenant: no tenant 'C'"):
        jobs.require_same(gone, KeptAnswer("before", None, 1), "out.jsonl")


def test_a_field_of_another_server_is_named_with_ours():
    for name, meant in (("max_tokens", "max_new_tokens"), ("tempature", "temperature")):
        assert unknown_field(name) == f"no field '{name}'; did you mean {meant}?"
    assert unknown_field("\x1b") == f"no field '\\x1b'; the fields are {', '.join(job_lines.FIELDS)}"


def test_an_id_that_comes_twice_is_named_once(monkeypatch):
    said = []
    monkeypatch.setattr(jobs, "warn", said.append)
    lines = {}
    for number, id in ((1, "a"), (2, 1), (3, [1])):
        lines = jobs.with_id(lines, LineSample(number, 0, "", id, None))
    assert said == [] and jobs.with_id(lines, LineSample(4, 0, "", 1, None)) is None
    assert said == ["line 4 has the id of line 2, 1; `line` tells their answers apart"]
    monkeypatch.setattr(jobs, "MOST_IDS", 4)
    assert jobs.with_id(lines, LineSample(5, 0, "", "b", None)) is None and len(said) == 1


@pytest.mark.long
def test_an_exception_while_a_line_is_rendered_is_that_lines_error(folder, tmp_path):
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    counted = "{% if m.calls is defined %}{{ m.calls | length }}{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{counted}{{{{ m.content }}}} {{% endfor %}}"
    turn = {"role": "user", "content": "w20"}
    rows = [
        {"messages": [turn | extra], "max_new_tokens": 2, "id": i} for i, extra in enumerate([{}, {"calls": 5}, {}])
    ]
    source, output = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    engine = Engine(model, None, tokenizer, slots=3, max_length=32)
    assert run_job(engine, source, output, Request("")).total() == 1
    found = by_sample(output)
    assert [found[i, 0]["finish_reason"] for i in (1, 2, 3)] == ["length", "error", "length"]
    assert found[2, 0]["id"] == 1 and "int" in found[2, 0]["error"]


def test_a_job_has_no_log_probabilities_and_keeps_its_keys(folder, engine, tmp_path):
    for name in ("logprobs", "prompt_logprobs", "context_length"):
        (refused,) = samples(1, json.dumps({"prompt": "w20", name: 1}).encode(), PLAIN, ANYONE)
        assert f"no field '{name}'" in refused.error
    for name in ("logprobs", "prompt_logprobs"):
        assert keys({}, Request("", **{name: 1})) == keys({})
        with pytest.raises(ValueError, match=f"^{name} is 1"):
            run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request("", **{name: 1}))


def test_a_tenant_of_the_bank_called_base_is_refused(folder, tmp_path):
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({"base": load_adapter(folder / "A", model.config)}, model.config)
    engine = Engine(model, bank, load_tokenizer(folder / "backbone"), slots=3, max_length=32)
    with pytest.raises(ValueError, match="tenant 'base'"):
        run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))


def test_a_tenant_whose_queue_is_full_waits(folder, whole, engine, tmp_path, monkeypatch):
    real = Engine.submit

    def submit(engine, request, **options):
        if engine.open >= 2:
            raise QueueFull("the queue of this tenant is full")
        return real(engine, request, **options)

    monkeypatch.setattr(Engine, "submit", submit)
    assert not run_job(engine, folder / "in.jsonl", tmp_path / "out.jsonl", Request(""))
    assert by_sample(tmp_path / "out.jsonl") == whole


def test_fixed_lines_are_answered_again_and_errors_reported_again(folder, whole, tmp_path, capsys):
    good = lines(4)
    source, output = folder / "fixed.jsonl", tmp_path / "deep" / "out.jsonl"
    write(source, good[0], "not json", good[2] | {"tenant": "C"}, "{}")
    for _ in range(2):  # the second time nothing is left to do, and the errors are still there
        assert main(command(folder, output, source)) == 1
        assert "3 answers are errors" in capsys.readouterr().err
        assert len(read(output)) == 5
    kept = [row for row in read(output) if row["line"] == 1]
    write(source, *good[:3], "{}")
    assert main(command(folder, output, source)) == 1
    assert "1 answer is an error" in capsys.readouterr().err
    found = by_sample(output)
    assert [row for row in read(output) if row["line"] == 1] == kept and len(found) == len(kept) + 3
    assert {place: row for place, row in found.items() if place[0] < 4} == {
        place: row for place, row in whole.items() if place[0] < 4
    }


def test_outdated_errors_are_removed_and_answers_stay(folder, tmp_path, capsys):
    source, output, link = folder / "fewer.jsonl", tmp_path / "out.jsonl", tmp_path / "link"
    line = {"prompt": "w20 w21", "max_new_tokens": 2}
    write(source, line | {"max_new_tokens": 99, "n": 2}, line, line, "no json")
    output.touch(mode=0o600)
    link.symlink_to(output)
    assert main(command(folder, link, source)) == 1
    assert "3 answers are errors: 2 prompt, 1 line" in capsys.readouterr().err
    write(source, line | {"tenant": "A"}, line)
    assert main(command(folder, link, source)) == 0
    said = capsys.readouterr().err
    assert "answers are errors" not in said and "keeps 1 answers that no line" in said
    assert {place: row["finish_reason"] for place, row in by_sample(output).items()} == {
        (i, 0): "length" for i in (1, 2, 3)
    }
    assert sorted(tmp_path.iterdir()) == [link, output] and link.is_symlink()
    assert output.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda row: row | {"line": [1]}, r"line: \[1\]"),
        (lambda row: row | {"line": True}, "line: True"),
        (lambda row: row | {"index": {}}, "index: {}"),
        (lambda row: row | {"request": 5}, "request: 5"),
        (lambda row: HEAD.decode() + "[" * 5000, "nested too deeply|not an answer"),
        (lambda row: HEAD.decode() + "\0" * 50, "not an answer"),
        (lambda row: row | {"line": 1}, "line 1 answer different requests for line 1"),
    ],
)
def test_a_damaged_answer_is_refused_with_its_file_and_line_and_what_to_do(tmp_path, damage, said):
    output = tmp_path / "out.jsonl"
    write(output, answer(1), damage(answer(2, key="1" * 32)), answer(3))
    before = output.read_bytes()
    with pytest.raises(ValueError, match=said) as caught:
        Answers(output)
    assert str(caught.value).startswith(f"{output}: line 2 ") and "Choose another file" in str(caught.value)
    assert output.read_bytes() == before


def test_a_line_that_was_cut_off_before_it_came_to_a_bucket_is_refused(bucket):
    """Further answers would be added to it."""
    answer = {"line": 1, "index": 0, "request": "0" * 32, "text": "a", "tokens": 1, "finish_reason": "stop"}
    line = json.dumps(answer).encode() + b"\n"
    for name, rest in (("one", line[:-1]), ("two", line[:20])):
        (bucket / "cut" / name).write_bytes(line + rest)
        with pytest.raises(ValueError, match=f"{name}: line 2 was cut off"):
            Answers(bucket / "cut" / name)
    (bucket / "cut/whole").write_bytes(line)
    with Answers(bucket / "cut/whole") as answers:
        assert len(answers.kept) == 1


def test_a_repeated_answer_counts_once_and_replaces_errors(tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [answer(1, error="a"), answer(1, error="b"), answer(2), answer(2), answer(3, error="c"), answer(3)]
    write(output, *rows, answer(3, error="d"))
    with Answers(output) as answers:
        assert {place: kept.error for place, kept in answers.kept.items()} == {(1, 0): "b", (2, 0): None, (3, 0): None}
        answers.finish()
    assert read(output) == [rows[1], rows[2], rows[5]]


def test_a_line_that_is_too_long_is_never_held_whole(folder, engine, tmp_path, monkeypatch):
    class Stream(io.BytesIO):
        longest = 0

        def readline(self, most=-1):
            assert 0 < most <= 2**20
            return super().readline(most)

    text = b"a\n" + b"x" * 5_000_000 + b"\nbb\n" + b"y" * 11
    assert list(bounded_lines(Stream(text), 10)) == [b"a\n", None, b"bb\n", None]
    monkeypatch.setattr("para_jax.serving.jobs.MAX_LINE", 1000)
    line = {"prompt": "w20", "max_new_tokens": 2}
    source = write(tmp_path / "in.jsonl", line, line | {"id": "x" * 1000}, line)
    assert run_job(engine, source, tmp_path / "out.jsonl", Request("")) == {"line": 1}
    assert {(row["line"], row["finish_reason"]) for row in read(tmp_path / "out.jsonl")} == {
        (1, "length"), (2, "error"), (3, "length"),
    }  # fmt: skip
    monkeypatch.setattr("para_jax.serving.answers.MAX_ANSWER", 1000)
    write(tmp_path / "out.jsonl", answer(1), answer(2, id="x" * 1000))
    with pytest.raises(ValueError, match="line 2 is not an answer .*longer than 1000 bytes"):
        Answers(tmp_path / "out.jsonl")


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
    assert {(row["line"], row["index"]): row for row in found} == whole
    capfd.readouterr()
    assert main(command(folder, "/dev/stdout")) == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]  # nothing else is there
    assert {(row["line"], row["index"]): row for row in printed} == whole


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
    assert [row["tenant"] for row in first] == [row["tenant"] for row in second] == ["B", None]
    assert [row["text"] for row in first] == [row["text"] for row in second]
    assert first[0]["text"] != first[1]["text"]
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
    first, second = sorted(read(tmp_path / "out.jsonl"), key=lambda row: row["line"])
    assert [first["tenant"], second["tenant"]] == ["adapter", None] and first["text"] != second["text"]


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
