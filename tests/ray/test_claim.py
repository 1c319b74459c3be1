"""An output belongs to one call: the same call goes on, and another one is refused."""

import pytest

from para_jax.ray.claim import claim_output

LINE = ["evaluate", "--limit=3"]


def claim(place, line=LINE, shards=4):
    claim_output(place / "out", place / "out.shards", line, shards)


def test_the_same_call_goes_on_and_another_is_told_the_difference(tmp_path):
    claim(tmp_path)
    claim(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base.json").touch()  # a merge that was killed
    claim(tmp_path)
    with pytest.raises(ValueError, match=r"out: .*out.shards has 4 shards of it; give shards=4"):
        claim(tmp_path, shards=5)
    with pytest.raises(ValueError, match=r"other options \('--limit=3' then, '--limit=4' now\); give the same"):
        claim(tmp_path, [LINE[0], "--limit=4"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_wrote_is_not_touched(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "folder":
        place.mkdir()
        place /= "notes"
    place.write_text("mine")
    with pytest.raises(ValueError, match="out: it is there already; choose another"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"shards": "4", "command": []}', '{"shards": 4, "command": [1]}', "[" * 10_000]
)
def test_a_damaged_file_is_named(tmp_path, text):
    claim(tmp_path)
    (tmp_path / "out.shards" / "call.json").write_text(text)
    with pytest.raises(ValueError, match="call.json does not describe a call"):
        claim(tmp_path)


def test_a_call_goes_on_in_a_bucket(bucket):
    claim(bucket / "claimed")
    claim(bucket / "claimed")
    with pytest.raises(ValueError, match="give shards=4"):
        claim(bucket / "claimed", shards=3)
