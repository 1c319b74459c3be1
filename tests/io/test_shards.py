"""Shards: each line and adapter has one, and outputs that do not belong together are refused by name."""

import hashlib

import pytest

from para_jax.io.shards import Shard, ShardOutput, begin_part, in_order, parse_shard, read_part, write_part


@pytest.mark.parametrize("count", [1, 3, 7])
def test_each_line_and_each_adapter_has_exactly_one_shard(count):
    shards = [parse_shard(f"{index}/{count}") for index in range(count)]
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(200)]
    for number in range(1, 30):
        assert sum(shard.has_line(number) for shard in shards) == 1
    held = [sum(map(shard.has_content, digests)) for shard in shards]
    assert sum(held) == 200 and min(held) > 100 / count
    assert shards[0].has_line(1)


@pytest.mark.parametrize("text", ["4/4", "-1/4", "a/b", "0/99999999"])
def test_a_wrong_shard_is_named_and_the_error_says_how_to_count(text):
    with pytest.raises(ValueError, match="from 0.*less than N") as error:
        parse_shard(text)
    assert repr(text) in str(error.value)


def part(index, count=3, ended=True, **settings):
    return ShardOutput(f"out-{index}", Shard(index, count), {"seed": 0} | settings, ended, {})


def test_parts_are_put_in_order():
    assert [one.shard.index for one in in_order([part(2), part(0), part(1)])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([part(0), part(2)], "without an output: 1/3;"),
        ([part(0, 9)], "1/9, 2/9, 3/9, 4/9, 5/9 ... (8 in all)"),
        ([part(0), part(1), part(1)], "out-1 and out-1 are both shard 1/3"),
        ([part(0), part(1, 4)], "out-0 is shard 0/3, but out-1 is shard 1/4"),
        ([part(0), part(1, seed=7), part(2)], "out-0 and out-1 differ in seed: 0 and 7"),
        ([part(0), part(1, limit=4), part(2)], "differ in limit: None and 4"),
        ([part(0), part(1, ended=False), part(2)], "out-1: shard 1/3 has not ended"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(parts, said):
    with pytest.raises(ValueError) as error:
        in_order(parts)
    assert said in str(error.value)


def test_a_shard_file_is_read_as_it_was_written_and_keeps_others_out(tmp_path):
    file, written = tmp_path / "shard.json", ShardOutput(tmp_path, Shard(1, 3), {"seed": 0}, True, {"answers": 4})
    begin_part(file, tmp_path, Shard(1, 3))
    write_part(file, written)
    assert read_part(file, tmp_path) == written
    begin_part(file, tmp_path, Shard(1, 3))
    for other in (Shard(0, 3), None):
        with pytest.raises(ValueError, match="output of shard 1/3; give --shard 1/3"):
            begin_part(file, tmp_path, other)


def test_a_file_that_describes_no_shard_is_named(tmp_path):
    (tmp_path / "shard.json").write_text("")
    with pytest.raises(ValueError, match="shard.json.* Remove it"):
        read_part(tmp_path / "shard.json", tmp_path)
