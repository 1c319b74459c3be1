"""An output belongs to one call: the same call goes on, and another one is refused."""

import pytest

from para_jax.ray.claim import claimed

CALL = ["evaluate", "--limit=3"]


def claim(place, call=CALL, shards=4):
    with claimed(place / "out", place / "out.shards", call, shards):
        pass


def test_the_same_call_goes_on_and_another_is_told_the_difference(tmp_path):
    claim(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base.json").touch()  # a merge that was killed
    claim(tmp_path)
    with pytest.raises(
        ValueError, match=r"""out: .*out.shards has its shards, .*: "shards=4" then, "shards=5" now. Give the same"""
    ):
        claim(tmp_path, shards=5)
    with pytest.raises(ValueError, match="""another call: "--limit=3" then, "--limit=4" now"""):
        claim(tmp_path, [CALL[0], "--limit=4"])


def test_what_another_wrote_is_not_touched(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out: it is there already; choose another"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_call_goes_on_in_a_bucket(bucket):
    claim(bucket / "claimed")
    claim(bucket / "claimed")
    with pytest.raises(ValueError, match="shards=4. then"):
        claim(bucket / "claimed", shards=3)


def test_one_process_at_a_time_works_on_an_output(tmp_path):
    with claimed(tmp_path / "out", tmp_path / "out.shards", CALL, 4):
        with pytest.raises(ValueError, match="another process"):
            claim(tmp_path)
    claim(tmp_path)
