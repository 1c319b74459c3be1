"""A worker of para_jax.ray.jobs without a model."""

import os
from pathlib import Path


class StubWorker:
    """Writes its process to each output. Shards 1, 5, 9, ... end their first two workers."""

    def __init__(self, call, folder, count):
        pass

    def __call__(self, batch):
        index, output = int(batch["index"][0]), Path(batch["output"][0])
        with output.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if index % 4 == 1 and output.read_text().count("\n") <= 2:
            os._exit(1)
        return {"index": [index]}
