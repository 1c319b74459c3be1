"""tenants.json is what a run wrote, or is refused by its name with what to do."""

import pytest

from para_jax.config import load_config, save_config
from para_jax.reports.inspect import folder_report
from para_jax.training.scores_file import read_entries, write_entries

ENTRY = {
    "examples": 20, "steps": 6, "best_step": 3, "best_score": -0.5, "metric": "loss", "test_before": None,
    "test_after": 0.25, "ended": "done", "warning": None, "scores": {},
}  # fmt: skip


def test_entries_are_read_as_they_were_written_and_leave_nothing_else(tmp_path):
    assert read_entries(tmp_path) == {}
    entries = {"initech": ENTRY, "acme": ENTRY, "globex": ENTRY | {"ended": "not finite", "best_score": float("-inf")}}
    for written in ({}, entries):
        write_entries(tmp_path, written)
        assert list(read_entries(tmp_path).items()) == list(written.items())
    assert [path.name for path in tmp_path.iterdir()] == ["tenants.json"]


@pytest.mark.parametrize("content", [b'{"acme": {'])
def test_what_no_run_wrote_is_refused_with_the_file_and_what_to_do(content, tmp_path):
    (tmp_path / "tenants.json").write_bytes(content)
    (tmp_path / "acme").mkdir()
    save_config(load_config(None, [f"data.tenants={tmp_path}"]), tmp_path / "config.yaml")
    for read in (read_entries, folder_report):
        with pytest.raises(ValueError, match=f"{tmp_path}/tenants.json: not JSON.*Delete it") as error:
            read(tmp_path)
        assert len(str(error.value)) < 500 and str(error.value).isprintable()
