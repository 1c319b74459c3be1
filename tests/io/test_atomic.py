"""A file is replaced whole or not at all, and locked against a second writer."""

import errno
import os
import re

import pytest

from para_jax.io.atomic import files_left, folders_left, lock, replacing, temporary_name, write_text


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    write_text(file, "new é")
    assert file.read_text(encoding="utf-8") == "new é"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.write(b"ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{tmp_path}/a") as error:
        write_text(tmp_path / "a", "new")
    assert error.value.errno == errno.ENOSPC and (tmp_path / "a").read_text() == "old"


def test_what_a_kill_left_is_found_by_the_name_it_belongs_to(tmp_path):
    file = tmp_path / "a[1].txt"
    left = temporary_name(file)
    assert re.fullmatch(r"\.a\[1\]\.txt\.[0-9a-f]{8}", left.name) and left != temporary_name(file)
    left.write_text("half")
    (tmp_path / ".a[1].txt.other").write_text("mine")
    assert files_left(file) == [left]
    folders = [temporary_name(tmp_path / "run") for _ in range(2)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        os.utime(folder, (i, i))
    assert sorted(folders_left(tmp_path / "run")) == sorted(folders) and folders_left(tmp_path / "ru") == []


def test_a_locked_file_is_named_to_a_second_writer(tmp_path):
    file = tmp_path / "log"
    with file.open("w") as first, file.open("a") as second:
        lock(first, file)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            lock(second, file)
    with file.open("a") as third:
        lock(third, file)
