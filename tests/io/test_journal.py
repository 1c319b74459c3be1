"""A journal keeps its lines over kills, and nothing else: those of an evaluation, and those of a job."""

import errno
import os
import subprocess
import sys

import pytest

from para_jax.evaluation.journal import AnswerJournal
from para_jax.evaluation.questions import Scored, Written
from para_jax.io import atomic
from para_jax.io.journal import Journal
from para_jax.serving.answers import Answers


def journal(file):
    """A journal of {"key": ...} lines, and the keys that it held."""
    keys = []
    return Journal(file, '{"key": ', lambda row: keys.append(row["key"])), keys


@pytest.mark.parametrize("of", [AnswerJournal, Answers])
def test_other_files_are_refused_and_stay_as_they_are(of, tmp_path):
    file = tmp_path / "answers.jsonl"
    for other in (b"a shopping list\n", b"a line without an end", b'{"a": 1}', b'["key"]\n', b"[" * 100_000 + b"\n"):
        file.write_bytes(other)
        with pytest.raises(ValueError, match="answers.jsonl: line 1 .* choose another output") as caught:
            of(file)
        assert file.read_bytes() == other and len(str(caught.value)) < len(str(file)) + 300


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    full, _ = journal(tmp_path / "answers.jsonl")
    full._stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left .*answers.jsonl"):
        full.add({"key": 1})


def test_a_disk_that_gets_full_within_a_line_takes_no_part_of_it(tmp_path):
    file = tmp_path / "answers.jsonl"
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from para_jax.io.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); journal = Journal(Path(sys.argv[1]), '{', print)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "def full():\n"
        "    try:\n        [journal.add({'key': 'x' * 300}) for i in range(9)]\n"
        "    except OSError as error:\n        return error\n"
        "kept = full(); assert 'answers.jsonl' in str(kept)\n"  # keeps the journal, as a notebook keeps its last error
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "Journal(Path(sys.argv[1]), '{', print).add({'key': 'next'})"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    assert journal(file)[1] == ["x" * 300] * 3 + ["next"]


def test_a_closed_journal_is_unlocked_and_takes_no_lines(tmp_path):
    file = tmp_path / "answers.jsonl"
    (first, _), (other, _) = journal(file), journal(file)
    first.close()
    first.close()
    with pytest.raises(ValueError, match="answers.jsonl: .*closed"):
        first.add({"key": 1})
    other.add({"key": 1})
    other.close()
    with file.open() as stream:
        atomic.lock(stream, file)


def test_lines_are_written_where_the_file_system_can_not_lock(tmp_path, monkeypatch, capsys):
    def without(stream, name):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(atomic, "lock", without)
    journal(tmp_path / "answers.jsonl")[0].close()
    assert "answers.jsonl: this file system can't lock files" in capsys.readouterr().err


def test_every_cut_of_a_journal_keeps_its_whole_lines(tmp_path):
    file = tmp_path / "answers.jsonl"
    answers = AnswerJournal(file)
    kept = [Scored(float("nan"), False), Written("é\u2028\n\U0001f600", 3), Written("", 0, False)]
    for i, answer in enumerate(kept):
        answers.add(str(i), answer)
    del answers
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        found = AnswerJournal(file)
        count = whole[:cut].count(b"\n")
        assert [repr(found[str(i)]) for i in range(len(found))] == [repr(answer) for answer in kept[:count]]
        found.add("next", kept[1])
        del found
        assert AnswerJournal(file)["next"] == kept[1]


def test_sorted_lines_keep_the_last_of_a_place(tmp_path):
    file = tmp_path / "answers.jsonl"
    sorted_one, _ = journal(file)
    for key, value in ((3, "a"), (1, "b"), (3, "c"), (2, "d")):
        sorted_one.add({"key": key, "value": value})
    sorted_one.sort(lambda row: None if row["key"] == 2 else row["key"])
    assert file.read_text() == '{"key": 1, "value": "b"}\n{"key": 3, "value": "c"}\n'
    assert journal(file)[1] == [1, 3] and list(tmp_path.iterdir()) == [file]


@pytest.mark.long
def test_one_process_writes_to_a_journal_and_may_open_it_twice(tmp_path):
    file = tmp_path / "answers.jsonl"
    journals = [journal(file)[0], journal(file)[0]]
    open_it = f"from pathlib import Path; from para_jax.io.journal import Journal; Journal(Path({str(file)!r}), '', id)"
    child = [sys.executable, "-c", open_it]
    for kept in (2, 1):
        del journals[kept:]
        refused = subprocess.run(child, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
        assert b"answers.jsonl: another process" in refused.stderr.splitlines()[-1]
    journals.clear()
    subprocess.run(child, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
