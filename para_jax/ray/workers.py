"""What runs in the actors of Ray Data: a worker loads a backbone once, and then answers shards, one in each call."""

from __future__ import annotations

import os
import traceback
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..cli import generate
from ..cli.options import load_model, place
from ..config import RunConfig
from ..evaluation.options import EvalOptions
from ..io.shards import parse_shard
from ..io.storage.bucket import Place
from ..server.batch import batch_request
from ..serving.jobs import run_job


class Evaluated(NamedTuple):
    """A call of evaluate_on_ray, as its workers get it."""

    config: RunConfig
    adapters: Mapping[str, str]
    tasks: Any
    options: EvalOptions
    tensor_parallel_size: int = 1


class ShardWorker:
    """Answers shards. A user's mistake ends the job. After any other exception, such as that of a device that failed,
    the process ends: Ray starts another one, which goes on with the shard from what was answered."""

    def __init__(self, call: Any, folder: str, count: int):
        """
        Args:
            call: what all shards have in common.
            folder: relative paths are relative to it, if this host has it.
            count: of all shards.
        """
        self.call, self.count = call, count
        self.loaded: Any = None
        if os.path.isdir(folder):
            os.chdir(folder)

    def __call__(self, batch: dict) -> dict:
        index, output = int(batch["index"][0]), place(str(batch["output"][0]))
        try:
            self.answer(f"{index}/{self.count}", output)
        except (ValueError, OSError):
            raise
        except Exception:
            # JAX can't use a device again that has failed. Ray replaces a process that ended, but not one that raised.
            traceback.print_exc()
            os._exit(1)
        return {"index": [index]}

    def answer(self, shard: str, output: Place) -> None:
        raise NotImplementedError


class EvaluationWorker(ShardWorker):
    call: Evaluated

    def answer(self, shard: str, output: Place) -> None:
        from ..evaluation.evaluate import run_evaluation

        if self.loaded is None:
            self.loaded = self.load()
        model, plan, tokenizer = self.loaded
        source = self.call.config.backbone.source
        options = replace(self.call.options, shard=shard)
        run_evaluation(model, plan, tokenizer, output, options, {"backbone": source})

    def load(self) -> tuple:
        from ..backbone.load import load_model_config
        from ..data.tokenizer import run_tokenizer
        from ..evaluation.evaluate import plan_evaluation
        from ..runtime import devices

        config, adapters, tasks, options, _ = self.call
        devices.start(replace(config.runtime, distributed="off"))
        tokenizer, model = run_tokenizer(config), load_model_config(config.backbone.source)
        plan = plan_evaluation(model, adapters, tasks, tokenizer, options, config)
        return load_model(self.call, **vars(config.backbone)), plan, tokenizer


class GenerationWorker(ShardWorker):
    call: Namespace
    """the options of `para-jax generate`, and what `generate.checked` made of them: sources and tenants"""

    def answer(self, shard: str, output: Place) -> None:
        options = self.call
        if self.loaded is None:
            parts = generate.load(options, options.sources)
            self.loaded = generate.engine_of(options, *parts, tenants=options.tenants)
        engine, default = self.loaded
        run_job(engine, options.input, output, default, shard=parse_shard(shard), read_body=batch_request)
