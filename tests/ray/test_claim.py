"""An output belongs to one call: the same call goes on, and another one is refused."""

import pytest

from para_jax.ray.claim import claim_output, claimed

LINE = ["evaluate", "--limit=3"]


def claim(place, line=LINE, shards=4):
    claim_output(place / "out", place / "out.shards", line, shards)


def test_the_same_call_goes_on_and_another_is_told_the_difference(tmp_path):
    claim(tmp_path)
    (tmp_path / "out.shards" / "0.deaths").touch()
    claim(tmp_path)
    assert [file.name for file in (tmp_path / "out.shards").iterdir()] == ["call.txt"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base.json").touch()  # a merge that was killed
    claim(tmp_path)
    with pytest.raises(
        ValueError, match=r"""out: .*out.shards has its shards, .*: "shards=4" then, "shards=5" now. Give the same"""
    ):
        claim(tmp_path, shards=5)
    with pytest.raises(ValueError, match="""another call: "--limit=3" then, "--limit=4" now"""):
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


def test_a_call_goes_on_in_a_bucket(bucket):
    claim(bucket / "claimed")
    deaths = bucket / "claimed" / "out.shards" / "0.jsonl.deaths"
    deaths.write_bytes(b"[]")
    claim(bucket / "claimed")
    assert not deaths.exists()
    with pytest.raises(ValueError, match="shards=4. then"):
        claim(bucket / "claimed", shards=3)


def test_one_process_at_a_time_works_on_an_output(tmp_path):
    """Two calls that begin at the same moment: the second is refused, whether it is the same call or another one."""
    given = tmp_path / "out", tmp_path / "out.shards"
    with claimed(*given, LINE, 4):
        for line in (LINE, [*LINE, "--limit=4"]):
            with pytest.raises(ValueError, match="another process"), claimed(*given, line, 4):
                pass
    with claimed(*given, LINE, 4):
        pass
    with pytest.raises(ValueError, match="another call"), claimed(*given, LINE, 5):
        pass


def test_nothing_is_made_next_to_what_another_wrote(tmp_path):
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(ValueError, match="out: it is there already"),
        claimed(tmp_path / "out", tmp_path / "x", LINE, 4),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
