"""A journal keeps answers over kills, and nothing else."""

import errno
import os
import subprocess
import sys

import pytest

from para_jax.evaluation.journal import Journal
from para_jax.evaluation.questions import Scored, Written
from para_jax.io import atomic
from para_jax.serving.answers import Answers


def test_a_torn_last_line_is_cut_off_and_other_files_stay_as_they_are(tmp_path):
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
    with pytest.raises(ValueError, match="pipe: "):
        Journal(tmp_path / "pipe")


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl")
    journal._stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left .*answers.jsonl"):
        journal.add("k", Scored(-1.0, True))
    assert "k" not in journal


def test_a_disk_that_gets_full_within_a_line_takes_no_part_of_it(tmp_path):
    file = tmp_path / "answers.jsonl"
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from para_jax.evaluation.journal import Journal; from para_jax.evaluation.questions import Written\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); journal = Journal(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "def full():\n"
        "    try:\n        [journal.add(str(i), Written('x' * 300, 1)) for i in range(9)]\n"
        "    except OSError as error:\n        return error\n"
        "kept = full(); assert 'answers.jsonl' in str(kept)\n"  # keeps the journal, as a notebook keeps its last error
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "Journal(Path(sys.argv[1])).add('next', Written('y', 1))"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    found = Journal(file)
    assert len(found) == 3 and found["1"] == Written("x" * 300, 1) and found["next"] == Written("y", 1)


def test_a_closed_journal_is_unlocked_and_takes_no_answers(tmp_path):
    file = tmp_path / "answers.jsonl"
    journal, other = Journal(file), Journal(file)
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="answers.jsonl: .*closed"):
        journal.add("k", Scored(-1.0, True))
    other.add("k", Scored(-1.0, True))
    other.close()
    with file.open() as stream:
        atomic.lock(stream, file)


@pytest.mark.parametrize("of", [Journal, Answers])
def test_answers_are_written_where_the_file_system_can_not_lock(of, tmp_path, monkeypatch, capsys):
    def without(stream, name):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(atomic, "lock", without)
    of(tmp_path / "answers.jsonl").close()
    assert "answers.jsonl: this file system can't lock files" in capsys.readouterr().err


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
