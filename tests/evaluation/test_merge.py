"""An evaluation in shards and passes gives what one worker gives, byte for byte; what does not fit is refused."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from os import environ, pathsep

import pytest
from golden_models import strong
from quick_compiler import own_flags

from para_jax import ParaConfig, init_adapter, save_adapter
from para_jax.backbone.load import load_model_config
from para_jax.cli import main
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.merge import merge_folders
from para_jax.io.shards import SHARD_FILE, Shard

COUNT = 3
#: Different ranks and sites: the adapters of one shard alone would give smaller programs.
CONFIGS = [ParaConfig(r=4), ParaConfig(r=2, target_modules=("q_proj",)), ParaConfig(r=3), *[ParaConfig(r=1)] * 4]
#: Memory for one adapter at a time.
LITTLE = "0.00001"
NAMES = [f"t{i}" for i in range(len(CONFIGS))]


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """A folder with many tenants, and a list of them in which one has another name."""
    made, config = tmp_path_factory.mktemp("adapters"), load_model_config(folder / "backbone")
    for i, (name, own) in enumerate(zip(NAMES, CONFIGS, strict=True)):
        save_adapter(strong(init_adapter(own, config), i, 0.3), made / name / "adapter")
    lines = ["# all tenants", "", *(f"{made}/{name}/adapter" for name in NAMES[:-1]), f"last={made}/t6/adapter"]
    (made / "list.txt").write_text("\n".join(lines) + "\n")
    return made


def command(folder, adapters, output, *more, tasks=("free",)):
    return [str(part) for part in (
        "evaluate", "--backbone", folder / "backbone", "--adapters-from", adapters / "list.txt", "--tasks",
        *(folder / task for task in tasks), "--output", output, "--rows", 4, "--limit", 3, "--allow-cpu",
        "--no-compilation-cache", *more,
    )]  # fmt: skip


@pytest.fixture(scope="module")
def one(folder, adapters, tmp_path_factory):
    """The folder of one worker, which has everything in one pass."""
    output = tmp_path_factory.mktemp("one") / "out"
    assert main(command(folder, adapters, output)) == 0
    return output


@pytest.fixture(scope="module")
def shards(folder, adapters, tmp_path_factory):
    """The folders of three workers, each with passes of one or two adapters."""
    made = tmp_path_factory.mktemp("shards")
    folders = [made / str(index) for index in range(COUNT)]
    for index, output in enumerate(folders):
        given = ["--shard", f"{index}/{COUNT}", "--adapter-memory", LITTLE]
        assert main(command(folder, adapters, output, *given)) == 0
    return folders


def held(output):
    return json.loads((output / SHARD_FILE).read_text())["content"]["files"]


@pytest.mark.long
def test_the_merged_folder_is_that_of_one_worker_byte_for_byte(folder, adapters, one, shards, tmp_path, capsys):
    assert all(held(output) for output in shards) and sum(len(held(output)) for output in shards) == 1 + len(NAMES)
    merged = tmp_path / "merged"
    assert main(["merge", *map(str, reversed(shards)), "--output", str(merged)]) == 0
    assert (merged / "table.md").read_text() in capsys.readouterr().out
    answers = (merged / "answers.jsonl").read_bytes().splitlines()
    assert answers == sorted(answers) == sorted((one / "answers.jsonl").read_bytes().splitlines())
    assert (merged / "table.csv").read_bytes() == (one / "table.csv").read_bytes()
    assert {path.name for path in merged.iterdir()} == {path.name for path in one.iterdir()}
    for name in ("base", *NAMES[:-1], "last"):
        found = [json.loads((output / f"{name}.json").read_text()) for output in (one, merged)]
        assert found[0]["results"] == found[1]["results"]
    assert main(command(folder, adapters, merged)) == 0  # nothing is asked again
    assert "everything was answered earlier" in (table := (merged / "table.md").read_bytes()).decode()
    merge_folders(shards, tmp_path / "again")
    assert (tmp_path / "again" / "table.md").read_bytes() == table
    scores = [table.splitlines() for table in (table.decode(), (one / "table.md").read_text())]
    assert scores[0][:-1] == scores[1][:-1]  # the last line says how long it took


def test_what_does_not_belong_together_is_refused_by_name(shards, tmp_path):
    output = tmp_path / "merged"
    with pytest.raises(ValueError, match="nowhere is not the folder of a shard"):
        merge_folders([tmp_path / "nowhere"], output)
    changed = shutil.copytree(shards[1], tmp_path / "changed")
    part = json.loads((changed / SHARD_FILE).read_text())
    (changed / SHARD_FILE).write_text(
        json.dumps(part | {"settings": part["settings"] | {"limit": 2, "tasks": "other"}})
    )
    with pytest.raises(ValueError, match="changed differ in limit: 3 and 2"):
        merge_folders([shards[0], changed, shards[2]], output)
    assert not output.exists()  # a merge can be tried again


def test_a_stopped_shard_goes_on_in_its_own_folder_only(folder, adapters, shards, tmp_path, monkeypatch, capsys):
    output, real, passes = tmp_path / "out", Answerer.answer, iter(range(9))
    index = max(range(COUNT), key=lambda index: len(held(shards[index])))

    def answer(answerer, questions, what="scoring"):
        if next(passes) == 1:
            raise KeyboardInterrupt
        return real(answerer, questions, what)

    given = ["--shard", f"{index}/{COUNT}", "--adapter-memory", LITTLE]
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", answer)
        assert main(command(folder, adapters, output, *given)) == 130
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adapters")]
    kept = (output / "answers.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"out: shard {index}/3 has not ended"):
        merge_folders([output if one == shards[index] else one for one in shards], tmp_path / "merged")
    for other in (["--shard", f"{(index + 1) % COUNT}/{COUNT}"], []):
        assert main(command(folder, adapters, output, *other)) == 2
        assert f"out is the output of shard {index}/{COUNT}" in capsys.readouterr().err
    assert main(command(folder, adapters, output, *given)) == 0
    answers = (output / "answers.jsonl").read_bytes()
    assert kept and answers.startswith(kept)
    assert sorted(answers.splitlines()) == sorted((shards[index] / "answers.jsonl").read_bytes().splitlines())


@pytest.mark.long
def test_each_tenants_own_file_is_asked_in_its_shard_also_of_the_base_model(folder, adapters, tmp_path):
    for i, name in enumerate([*NAMES[:-1], "last"]):
        lines = (folder / "free" / "test.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "tenants" / name).mkdir(parents=True)
        (tmp_path / "tenants" / name / "test.jsonl").write_text("".join(lines[i % 2 :]))
    arguments = [command(folder, adapters, tmp_path / "one", "--own", "--log-samples", tasks=[tmp_path / "tenants"])]
    for index in range(2):
        shard = ["--own", "--log-samples", "--shard", f"{index}/2"]
        arguments.append(command(folder, adapters, tmp_path / str(index), *shard, tasks=[tmp_path / "tenants"]))
    assert [main(line) for line in arguments] == [0, 0, 0]
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert main(arguments[0]) == 0  # its table then says that everything was answered earlier
    for path in (tmp_path / "one").iterdir():
        found = (tmp_path / "merged" / path.name).read_bytes()
        if path.suffix == ".json":
            assert json.loads(found)["results"] == json.loads(path.read_text())["results"]
        elif path.name == "answers.jsonl":
            assert sorted(found.splitlines()) == sorted(path.read_bytes().splitlines())
        else:
            assert found == path.read_bytes(), path.name


def test_the_first_shard_may_have_no_adapter_and_so_nothing_to_ask(folder, adapters, tmp_path, monkeypatch):
    """With --own the base model is asked each tenant's questions in that tenant's shard."""
    monkeypatch.setattr(Shard, "has_content", lambda self, digest: self.index == 1)
    shutil.copytree(folder / "free", tmp_path / "tenants" / "t0")

    def line(output, *more):
        one = ["--adapters", f"t0={adapters}/t0/adapter", "--own", *more]
        given = command(folder, adapters, tmp_path / output, *one, tasks=[tmp_path / "tenants"])
        return [part for part in given if part not in ("--adapters-from", str(adapters / "list.txt"))]

    assert [main(line(str(index), "--shard", f"{index}/2")) for index in range(2)] == [0, 0]
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert main(line("one")) == 0
    assert (tmp_path / "merged/table.csv").read_bytes() == (tmp_path / "one/table.csv").read_bytes()


@pytest.mark.slow
def test_a_killed_shard_is_taken_over_by_another_host_from_a_bucket(
    folder, adapters, one, bucket, tmp_path, monkeypatch
):
    """The first host is killed; the second has an empty disk."""
    there = bucket / "evaluation"
    for place in (folder / "backbone", folder / "labels", folder / "free", *(adapters / name for name in NAMES)):
        for file in place.rglob("*"):
            if file.is_file():
                (there / file.relative_to(place.parent).as_posix()).write_bytes(file.read_bytes())
    lines = [f"{there}/{name}/adapter" for name in NAMES[:-1]] + [f"last={there}/t6/adapter"]
    (there / "list.txt").write_bytes("\n".join(lines).encode())

    def start(index, disk):
        environment = environ | own_flags() | {"PYTHONPATH": pathsep.join(sys.path)}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / disk), "HOME": str(tmp_path / disk)}
        given = ["--shard", f"{index}/2", "--adapter-memory", LITTLE]
        code = "import para_jax.io.journal as journal; journal.MAX_SECONDS = 0.0; import sys\n"
        code += "from para_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", code, *command(there, there, there / f"out-{index}", *given)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    first, output, until = start(0, "a"), there / "out-0", time.monotonic() + 300
    try:
        while first.poll() is None and lines_of(output / "answers.jsonl") < 8:
            assert time.monotonic() < until, "it wrote too few answers"
            time.sleep(0.01)
    finally:
        first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    for index, disk in ((0, "b"), (1, "c")):
        second = start(index, disk)
        try:
            _, errors = second.communicate(timeout=120)
        finally:
            second.kill()
        assert second.returncode == 0, errors
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "d"))
    merge_folders([there / "out-0", there / "out-1"], there / "merged")
    assert (there / "merged/table.csv").read_bytes() == (one / "table.csv").read_bytes()
    answers = (there / "merged/answers.jsonl").read_bytes().splitlines()
    assert answers == sorted((one / "answers.jsonl").read_bytes().splitlines())


def lines_of(file) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0
