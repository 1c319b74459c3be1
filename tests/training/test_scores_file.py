"""scores.json is what a run wrote, or is refused by its name."""

import json

import pytest

from para_jax.training.scores_file import logged_records, read_scores, write_scores

RECORD = {"metric": "accuracy", "count": 4, "values": {"loss": 0.5, "accuracy": 0.75}, "samples": [["a", "b", "c"]]}


def test_scores_are_written_and_read(tmp_path):
    assert read_scores(tmp_path) == {}
    write_scores(tmp_path, {"test": RECORD, "test_base": RECORD | {"samples": []}})
    assert read_scores(tmp_path)["test"] == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"{"])
def test_what_no_run_wrote_is_refused_with_the_file(content, tmp_path):
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/scores.json: .*Delete it") as error:
        read_scores(tmp_path)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def test_the_records_of_a_log_are_the_best_validation_score_and_the_last_test_score(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert logged_records(log) == {}
    scored = [(0, 0.75, 9.0), (2, 0.5, 3.0), (4, 0.5, 2.0), (6, 0.25, 1.0)]
    rows = [{"step": step, "validation_loss": loss, "validation_accuracy": hits} for step, hits, loss in scored]
    rows += [{"step": 0, "test_before_loss": 8.0, "test_before_accuracy": 0.1}, {"step": 3, "loss": 5.0}]
    rows += [{"step": 6, "test_after_loss": loss, "test_after_accuracy": 0.4} for loss in (7.0, 6.0)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = logged_records(log, 8)
    assert {(one["metric"], one["count"]) for one in found.values()} == {("accuracy", 8)}
    assert {name: (one["step"], one["values"]["loss"]) for name, one in found.items()} == {
        "validation_base": (0, 9.0),
        "validation": (4, 2.0),
        "test_base": (0, 8.0),
        "test": (6, 6.0),
    }, "of equal scores the lower loss; the base model's never counts"
    free = {"step": 2, "validation_loss": 1.5, "validation_loss_stderr": 0.1, "validation_f1": 0.5}
    worse = free | {"step": 4, "validation_loss": 1.75, "validation_f1": 0.75}
    log.write_text("".join(json.dumps(row) + "\n" for row in (free, worse)))
    (best,) = logged_records(log).values()
    assert (best["metric"], best["step"], best["values"]["f1"]) == ("loss", 2, 0.5)
