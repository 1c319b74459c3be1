"""scores.json is what a run wrote, or is refused by its name."""

import pytest

from para_jax.training.scores_file import read_scores, write_scores

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
