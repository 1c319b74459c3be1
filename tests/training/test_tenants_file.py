"""tenants.json is what a run wrote, or is refused by its name with what to do."""

from para_jax.training.tenants_file import read_entries, write_entries

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
