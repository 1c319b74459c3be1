"""A pool gives each shard to one worker, and to another one when that died."""

import pytest
from local_ray import cluster
from stub_worker import StubWorker

from para_jax.ray.pool import run_shards


@pytest.mark.long
def test_each_shard_is_answered_once_also_those_that_lost_workers(tmp_path):
    pytest.importorskip("ray.data")
    outputs = [tmp_path / str(index) for index in range(12)]
    with cluster(2):
        run_shards(StubWorker, [], outputs, "trying", 2, {"num_cpus": 1})
    tries = [output.read_text().split() for output in outputs]
    assert [len(one) for one in tries] == [1, 3, 1, 1, 1, 3, 1, 1, 1, 3, 1, 1]
    assert all(len(set(one)) == len(one) for one in tries)
