"""A job in shards gives what one worker gives, byte for byte; what does not belong together is refused by name."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from quick_compiler import own_flags
from tiny_run import strong_adapters, words

from para_jax import AdapterBank, Engine, Request, load_adapter, load_backbone, load_tokenizer
from para_jax.cli import main
from para_jax.io.shards import Shard, job_shard_file, read_part, write_part
from para_jax.serving.job_merge import merge_jobs
from para_jax.serving.jobs import run_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, two strong tenants, and 20 lines with a blank one, a wrong one and several samples."""
    folder = tmp_path_factory.mktemp("shards")
    strong_adapters(folder, "AB")
    lines = [{"prompt": words(range(20 + i, 24 + i)), "max_new_tokens": 2 + i % 5} for i in range(20)]
    for i, line in enumerate(lines):
        line |= {"tenant": "AB"[i % 2]} if i % 3 else {"n": 2, "temperature": 1.0}
    texts = [json.dumps(line) for line in lines]
    texts[4], texts[7] = "", "{"
    (folder / "in.jsonl").write_text("\n".join(texts) + "\n")
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({name: load_adapter(folder / name, model.config) for name in "AB"}, model.config)
    return Engine(model, bank, load_tokenizer(folder / "backbone"), slots=3, max_length=32)


def shards_of(engine, folder, to, count):
    outputs = [to / f"{count}-{index}.jsonl" for index in range(count)]
    for index, output in enumerate(outputs):
        run_job(engine, folder / "in.jsonl", output, Request(""), shard=Shard(index, count))
    return outputs


@pytest.fixture(scope="module")
def outputs(engine, folder):
    return shards_of(engine, folder, folder, 3)


@pytest.fixture(scope="module")
def whole(engine, folder):
    """The answers of one worker."""
    run_job(engine, folder / "in.jsonl", folder / "whole.jsonl", Request(""))
    return (folder / "whole.jsonl").read_bytes()


def test_the_paths_of_a_job_may_be_texts(engine, folder, whole, tmp_path):
    errors = run_job(engine, str(folder / "in.jsonl"), str(tmp_path / "out.jsonl"), Request(""), shard=Shard(0, 1))
    assert errors == 1 and (tmp_path / "out.jsonl").read_bytes() == whole


def test_the_merged_answers_are_those_of_one_worker_byte_for_byte(engine, folder, outputs, whole, tmp_path, capsys):
    answers = len(whole.splitlines())
    assert merge_jobs([outputs[2], outputs[0], outputs[1]], tmp_path / "merged.jsonl") == (answers, 1)
    assert (tmp_path / "merged.jsonl").read_bytes() == whole
    merge_jobs(shards_of(engine, folder, tmp_path, 22), tmp_path / "many.jsonl")  # three of them have no request
    assert (tmp_path / "many.jsonl").read_bytes() == whole
    assert main(["merge", *map(str, shards_of(engine, folder, tmp_path, 1)), "--output", str(tmp_path / "one")]) == 1
    assert (tmp_path / "one").read_bytes() == whole
    assert f"{answers} answers, 1 of them errors" in capsys.readouterr().err
    assert run_job(engine, folder / "in.jsonl", tmp_path / "one", Request("")) == 1  # nothing else is asked
    assert (tmp_path / "one").read_bytes() == whole


def test_a_bank_that_loads_one_adapter_at_a_time_gives_the_same_answers(folder, whole, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{folder}/A\n{folder}/B\n")
    line = ["generate", "--backbone", folder / "backbone", "--adapters-from", tmp_path / "list.txt", "--input",
            folder / "in.jsonl", "--output", tmp_path / "out.jsonl", "--slots", "3", "--max-length", "32", "--shard",
            "0/1", "--allow-cpu", "--no-compilation-cache", "--adapter-memory", "0.000001"]  # fmt: skip
    assert main([*map(str, line)]) == 1
    assert "2 tenants, 0.0 MB, loaded when they are asked for" in capsys.readouterr().err
    merge_jobs([tmp_path / "out.jsonl"], tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole


def test_a_shard_without_a_line_says_that_it_writes_nothing(folder, tmp_path, capsys):
    line = ["generate", "--backbone", folder / "backbone", "--input", folder / "in.jsonl", "--output",
            tmp_path / "out.jsonl", "--max-length", "32", "--shard", "999/1000", "--allow-cpu",
            "--no-compilation-cache"]  # fmt: skip
    assert main([*map(str, line)]) == 0
    said = capsys.readouterr().err
    assert f"no line of shard 999/1000, so {tmp_path}/out.jsonl is not written" in said and "wrote" not in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_shard_goes_on_in_its_own_output_only(engine, folder, outputs, tmp_path):
    before, ends = outputs[0].read_bytes(), Engine.step
    run_job(engine, folder / "in.jsonl", outputs[0], Request(""), shard=Shard(0, 3))
    assert outputs[0].read_bytes() == before
    for shard in (Shard(1, 3), Shard(0, 2), None):
        with pytest.raises(ValueError, match="3-0.jsonl is the output of shard 0/3"):
            run_job(engine, folder / "in.jsonl", outputs[0], Request(""), shard=shard)
    output, rounds = tmp_path / "out.jsonl", iter(range(99))

    def step(engine):
        if next(rounds) == 2:
            raise KeyboardInterrupt
        return ends(engine)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "step", step)
        run_job(engine, folder / "in.jsonl", output, Request(""), shard=Shard(0, 3))
    kept = output.read_bytes().splitlines()
    with pytest.raises(ValueError, match="out.jsonl: shard 0/3 has not ended"):
        merge_jobs([output, *outputs[1:]], tmp_path / "merged.jsonl")
    run_job(engine, folder / "in.jsonl", output, Request(""), shard=Shard(0, 3))
    assert kept and set(kept) <= set(before.splitlines()) and output.read_bytes() == before


def test_after_a_change_of_the_input_the_shards_are_answered_again_and_join(engine, tmp_path):
    source, outputs = tmp_path / "in.jsonl", [tmp_path / f"{index}.jsonl" for index in range(2)]
    line = {"prompt": words(range(20, 24)), "max_new_tokens": 2, "temperature": 1.0, "n": 3}
    for count in (6, 4):
        source.write_text("".join(json.dumps(line | {"seed": i}) + "\n" for i in range(count)))
        for index, output in enumerate(outputs):
            run_job(engine, source, output, Request(""), shard=Shard(index, 2))
        merge_jobs(outputs, tmp_path / f"{count}.jsonl")
    run_job(engine, source, tmp_path / "whole.jsonl", Request(""))
    assert (tmp_path / "4.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_input_that_ends_early_costs_no_answer(engine, folder, whole, tmp_path, capsys):
    outputs, source = shards_of(engine, folder, tmp_path, 2), tmp_path / "in.jsonl"
    source.write_text("".join((folder / "in.jsonl").read_text().splitlines(keepends=True)[:3]))
    for index, output in enumerate(outputs):
        run_job(engine, source, output, Request(""), shard=Shard(index, 2))
    assert capsys.readouterr().err.count("answers that no line of") == 2
    merge_jobs(outputs, tmp_path / "short.jsonl")
    assert (tmp_path / "short.jsonl").read_bytes().splitlines() == whole.splitlines()[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", lambda engine, request, **_: pytest.fail("asked again"))
        for index, output in enumerate(outputs):
            run_job(engine, folder / "in.jsonl", output, Request(""), shard=Shard(index, 2))
    merge_jobs(outputs, tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole


def test_a_shard_of_other_settings_is_refused_by_name(engine, folder, outputs, tmp_path):
    other = tmp_path / "other.jsonl"
    run_job(engine, folder / "in.jsonl", other, Request("", seed=3), shard=Shard(1, 3))
    with pytest.raises(ValueError, match="3-0.jsonl and .*other.jsonl differ in defaults.*'seed': 3"):
        merge_jobs([outputs[0], other, outputs[2]], tmp_path / "merged.jsonl")
    (tmp_path / "in.jsonl").write_text((folder / "in.jsonl").read_text() + '{"prompt": "w20"}\n')
    run_job(engine, tmp_path / "in.jsonl", tmp_path / "longer.jsonl", Request(""), shard=Shard(1, 3))
    with pytest.raises(ValueError, match="differ in input.*20.*21"):
        merge_jobs([outputs[0], tmp_path / "longer.jsonl", outputs[2]], tmp_path / "merged.jsonl")
    assert not (tmp_path / "merged.jsonl").exists()
    with pytest.raises(ValueError, match="in.jsonl: it is there already"):
        merge_jobs(outputs, folder / "in.jsonl")


def test_an_output_that_lacks_answers_is_named(outputs, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_bytes(b"".join(outputs[1].read_bytes().splitlines(keepends=True)[:-1]))
    write_part(job_shard_file(short), read_part(job_shard_file(outputs[1]), short))
    with pytest.raises(ValueError, match="short.jsonl lacks answers; run the command of shard 1/3 again"):
        merge_jobs([outputs[0], short, outputs[2]], tmp_path / "merged.jsonl")
    assert not (tmp_path / "merged.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "nowhere", "--output", "x"], "nowhere is not the output of a shard"),
        (["generate", "--input", "in", "--output", "out", "--shard", "2/2"], "'2/2' is no shard I/N"),
    ],
)
def test_a_wrong_command_is_one_error(arguments, said, capsys):
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_shard_is_taken_over_by_another_host_from_a_bucket(folder, whole, bucket, tmp_path, monkeypatch):
    """The first host is killed; the second has an empty disk."""
    (bucket / "jobs/in.jsonl").write_bytes((folder / "in.jsonl").read_bytes())
    for place in ("backbone", "A", "B"):
        for file in (folder / place).iterdir():
            (bucket / "jobs" / place / file.name).write_bytes(file.read_bytes())

    def command(index, disk):
        environment = os.environ | own_flags() | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / disk), "HOME": str(tmp_path / disk)}
        adapters = [f"{name}={bucket}/jobs/{name}" for name in "AB"]
        line = ["generate", "--backbone", f"{bucket}/jobs/backbone", "--adapters", *adapters, "--input",
                f"{bucket}/jobs/in.jsonl", "--output", f"{bucket}/jobs/out-{index}.jsonl", "--shard", f"{index}/2",
                "--slots", "1", "--max-length", "32", "--allow-cpu", "--no-compilation-cache"]  # fmt: skip
        quick = "import para_jax.io.storage.pieces as pieces; pieces.MAX_SECONDS = 0.0"
        code = f"{quick}; import sys; from para_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        given = [sys.executable, "-c", code, *line]
        return subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    first, output = command(0, "a"), bucket / "jobs/out-0.jsonl"
    while first.poll() is None and len(list(output.glob("*.jsonl"))) < 3:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = b"".join(file.read_bytes() for file in sorted(output.glob("*.jsonl"))).splitlines()
    for index, disk in ((0, "b"), (1, "c")):
        second = command(index, disk)
        assert second.wait(timeout=120) == 1 - index, second.stderr.read()  # shard 0 has a wrong line
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "d"))
    merge_jobs([bucket / "jobs/out-0.jsonl", bucket / "jobs/out-1.jsonl"], bucket / "jobs/merged.jsonl")
    assert set(kept) <= set(output.read_bytes().splitlines()) and len(kept) >= 3
    assert (bucket / "jobs/merged.jsonl").read_bytes() == whole
