"""A batch job answers every line once, also when it is killed at any moment and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import backbone_folder, words

from para_jax import ParaConfig, generate, init_adapter, load_adapter, load_backbone, load_tokenizer, save_adapter
from para_jax.cli import main
from para_jax.serving.jobs import answered


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, two strong tenants, and 40 lines of requests."""
    from conftest import strong

    folder = tmp_path_factory.mktemp("jobs")
    backbone_folder(folder / "backbone")
    model = load_backbone(folder / "backbone")
    for i, name in enumerate("AB"):
        save_adapter(strong(init_adapter(ParaConfig(r=4), model.config), i, 0.3), folder / name)
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


def read(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder):
    """The answers of a job that was not disturbed, by line and sample."""
    output = folder / "whole.jsonl"
    assert main(command(folder, output)) == 0
    return {(row["line"], row["index"]): row for row in read(output)}


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


@pytest.mark.parametrize("seed", range(3))
def test_a_job_that_is_killed_goes_on_without_repeating_or_losing_a_line(folder, whole, tmp_path, seed):
    """A child process is killed when its output has reached a drawn size; at last it may finish."""
    output, draw = tmp_path / "out.jsonl", random.Random(seed)
    goals = sorted(draw.sample(range(1, 1500), 2))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for goal in goals:
        child = subprocess.Popen(
            [sys.executable, "-m", "para_jax.cli", *command(folder, output)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while child.poll() is None and (not output.exists() or output.stat().st_size < goal):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and answered(output)
        with output.open("ab") as torn:  # a line that it was writing
            torn.write(b'{"line": 4, "ind')
    assert main(command(folder, output)) == 0
    found = read(output)
    assert len(found) == len(whole)
    assert {(row["line"], row["index"]): row for row in found} == whole
    before = output.read_bytes()
    assert main(command(folder, output)) == 0  # nothing is left to do
    assert output.read_bytes() == before


def test_a_sample_that_a_kill_left_out_is_answered_and_the_others_stay(folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = (folder / "whole.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["index"] == 0]
    assert len(kept) < len(rows)
    output.write_text("".join(kept))
    assert main(command(folder, output)) == 0
    assert output.read_text().startswith("".join(kept))
    assert {(row["line"], row["index"]): row for row in read(output)} == whole


def test_a_bad_line_is_answered_with_an_error_and_the_others_are_served(folder, tmp_path, capsys):
    good = {"prompt": "w20 w21", "max_new_tokens": 2}
    bad = [
        "not json",
        "[1]",
        json.dumps(good | {"tenant": "C"}),
        json.dumps(good | {"temprature": 1}),
        json.dumps(good | {"messages": []}),
        json.dumps({"max_new_tokens": 2}),
        json.dumps(good | {"max_new_tokens": 99}),
        json.dumps(good | {"top_p": 2}),
        json.dumps(good | {"prompt": "w20 \ud83d"}),
        json.dumps(good | {"id": "\ud83d"}),
        json.dumps(good | {"temperature": 10**400}),
    ]
    (folder / "bad.jsonl").write_text(
        "\n".join([json.dumps(good), *bad, "", json.dumps(good | {"tenant": "A"})]) + "\n"
    )
    assert main(command(folder, tmp_path / "out.jsonl", "bad.jsonl")) == 0
    assert "11 answers are errors" in capsys.readouterr().out
    found = {row["line"]: row for row in read(tmp_path / "out.jsonl")}
    assert set(found) == {*range(1, 13), 14}
    errors = [
        "not JSON", "expected a JSON object, found list", "no tenant 'C'", "fields: ['temprature']", "either prompt",
        "either prompt", "2 tokens and max_new_tokens 99", "top_p: 2", "half a character", "half a character",
        "temperature: 1000",
    ]  # fmt: skip
    for line, error in enumerate(errors, 2):
        assert found[line]["finish_reason"] == "error" and error in found[line]["error"], found[line]
    assert found[1]["finish_reason"] == found[14]["finish_reason"] == "length"


def test_lines_that_were_mended_are_answered_anew_and_errors_are_told_again(folder, whole, tmp_path, capsys):
    good = [json.dumps(line) for line in lines(4)]
    source, output = folder / "mended.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("\n".join([good[0], "not json", json.dumps(lines(4)[2] | {"tenant": "C"}), "{}"]) + "\n")
    for _ in range(2):  # the second time nothing is left to do, and the errors are still there
        assert main(command(folder, output, source)) == 0
        assert "3 answers are errors" in capsys.readouterr().out
    kept = [row for row in read(output) if row["line"] == 1]
    source.write_text("\n".join([*good[:3], "{}"]) + "\n")
    assert main(command(folder, output, source)) == 0
    assert "1 answers are errors" in capsys.readouterr().out
    found = read(output)
    assert [row for row in found if row["line"] == 1] == kept and len(found) == len(kept) + 3
    answers = {(row["line"], row["index"]): row for row in found if row["line"] < 4}
    assert answers == {place: row for place, row in whole.items() if place[0] < 4}


def test_errors_of_samples_that_a_mended_line_no_longer_asks_for_are_taken_out(folder, tmp_path, capsys):
    source, output = folder / "fewer.jsonl", tmp_path / "out.jsonl"
    line = {"prompt": "w20 w21", "max_new_tokens": 2, "tenant": "C", "n": 2}
    source.write_text(json.dumps(line) + "\n")
    assert main(command(folder, output, source)) == 0
    assert "2 answers are errors" in capsys.readouterr().out
    source.write_text(json.dumps(line | {"tenant": "A", "n": 1}) + "\n")
    assert main(command(folder, output, source)) == 0
    assert "answers are errors" not in capsys.readouterr().out
    (row,) = read(output)
    assert (row["index"], row["tenant"], row["finish_reason"]) == (0, "A", "length")
    assert list(tmp_path.iterdir()) == [output]


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
    assert "--tenant: given 2 times; expected once: A, B, or base" in capsys.readouterr().err


def test_an_empty_input_and_a_foreign_output_are_refused_before_anything_is_loaded(folder, tmp_path, capsys):
    (folder / "empty.jsonl").write_text("\n")
    assert main(command(folder, tmp_path / "out.jsonl", "empty.jsonl")) == 2
    assert "empty.jsonl: no line there" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
    (tmp_path / "notes.txt").write_text("a shopping list\n")
    line = command(folder, tmp_path / "notes.txt")
    line[line.index("--backbone") + 1] = "/nowhere"
    assert main(line) == 2 and "holds something else than answers" in capsys.readouterr().err


def test_an_output_of_other_requests_or_of_something_else_is_refused_and_left_as_it_is(folder, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_bytes((folder / "whole.jsonl").read_bytes())
    (folder / "other.jsonl").write_text("".join(json.dumps(line | {"seed": 99}) + "\n" for line in lines(40)))
    before = output.read_bytes()
    assert main(command(folder, output, "other.jsonl")) == 2
    assert "line 1 answers another request; choose another file" in capsys.readouterr().err
    assert output.read_bytes() == before
    for other in (["--max-new-tokens", "63"], ["--max-length", "31"], ["--adapters", f"A={folder / 'B'}"]):
        assert main([*command(folder, output), *other]) == 2
        assert "answers another request; choose another file" in capsys.readouterr().err
        assert output.read_bytes() == before
    assert main([*command(folder, output), "--slots", "2"]) == 0  # how it is computed changes no answer
    for text in ("a shopping list\n", '{"a": 1}'):
        output.write_text(text)
        with pytest.raises(ValueError, match="holds something else than answers"):
            answered(output)
        assert output.read_text() == text


def test_a_default_that_no_line_could_have_is_refused(folder, tmp_path, capsys):
    assert main([*command(folder, tmp_path / "out.jsonl"), "--top-p", "2"]) == 2
    assert "top_p: 2.0 is not possible" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
