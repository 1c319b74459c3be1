"""A run's log is read whole, but for a line cut off in a kill; what no run wrote is refused by file and line."""

import json
import resource

import pytest

from para_jax.training.metrics_file import MetricsWriter, keep_rows, read_metrics, write_metrics

ROWS = [{"step": 1, "loss": 2.5}, {"step": 2, "validation_loss": 3}]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


def test_rows_are_read_back_and_more_can_be_added(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", ROWS)
    rows = MetricsWriter(tmp_path / "metrics.jsonl")
    rows.add(3, {"loss": 1.0})
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == ROWS  # kept back, so that not each is a write of its own
    rows.flush()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [*ROWS, {"step": 3, "loss": 1.0}]


def test_a_disk_that_gets_full_takes_no_part_of_the_rows(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", ROWS)
    rows = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in (3, 4):
        rows.add(step, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(TEXT) + 40, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            rows.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == ROWS
    assert (tmp_path / "metrics.jsonl").read_text() == TEXT


@pytest.mark.parametrize("length", [1, 9, 20, len(TEXT.splitlines()[1]) - 1])
def test_a_last_line_cut_off_by_a_kill_is_skipped(length, tmp_path):
    first, second = TEXT.splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(first + second[:length])
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == ROWS[: 1 + (length == len(second) - 1)]


@pytest.mark.parametrize("line", [b'{"step": 1, "loss": 1e', b"\xff\xfe\x00", b"notes"])
def test_a_damaged_line_is_named_by_file_and_number(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(TEXT.encode() + line + b"\n" + TEXT.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}/metrics.jsonl:3: "):
        list(read_metrics(tmp_path / "metrics.jsonl"))


def test_a_resumed_run_keeps_the_rows_before_its_checkpoint_and_measures_the_test_data_again(tmp_path):
    file, tested = tmp_path / "metrics.jsonl", {"step": 2, "test_after_loss": 2.0}
    rows, again = [*ROWS, tested], {"step": 3, "loss": 2.0}
    for ended, expected in ((True, rows), (False, ROWS)):
        write_metrics(file, [*rows, again])
        assert keep_rows(file, 3, ended=ended) == len(expected)
        assert list(read_metrics(file)) == expected
    assert keep_rows(tmp_path / "none.jsonl", 3, ended=False) == 0
