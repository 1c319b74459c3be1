"""What runs in the actors of Ray Data: a worker loads a backbone once, and then answers shards, one in each call."""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..cli import evaluate, generate
from ..cli.options import place
from ..io import atomic
from ..io.checks import printable
from ..io.storage.bucket import Place
from ..serving.jobs import run_job
from .claim import DEATHS
from .command import parsed

#: Workers that a shard may lose in a call before it counts as failed. Ray itself would replace them for ever.
MOST_DEATHS = 4
#: Bytes that are read of a file of deaths.
MAX_BYTES = 2**16


class ShardWorker:
    """Answers shards. A user's mistake becomes the row's `error`. After any other exception, such as that of a device
    that failed, the process ends: Ray starts another one, which goes on with the shard from what was answered."""

    def __init__(self, line: Sequence[str], folder: str, count: int):
        """
        Args:
            line: the command line with the options.
            folder: relative paths are relative to it, if this host has it.
            count: of all shards.
        """
        self.line, self.count = list(line), count
        self.loaded: Any = None
        if os.path.isdir(folder):
            os.chdir(folder)

    def __call__(self, batch: dict) -> dict:
        index, output = int(batch["index"][0]), str(batch["output"][0])
        try:
            error = self.tried(index, place(output))
        except (ValueError, OSError) as problem:
            error = str(problem) or type(problem).__name__
        return {"index": [index], "error": [error]}

    def tried(self, index: int, output: Place) -> str:
        """Answers a shard. Returns the error of one that has lost too many workers."""
        deaths = output.with_name(output.name + DEATHS)
        before = read_deaths(deaths)
        if len(before) >= MOST_DEATHS:
            return f"{len(before)} workers ended at it; the last one: {before[-1]}"
        atomic.write_text(deaths, json.dumps([*before, "it was killed, or its host was lost"]))
        try:
            options = parsed([*self.line, f"--shard={index}/{self.count}", f"--output={output}"])
            if self.loaded is None:
                self.loaded = self.load(options)
            self.answer(options)
        except (ValueError, OSError):
            deaths.unlink(missing_ok=True)  # the same call, made twice, removes it too
            raise
        except Exception as error:
            traceback.print_exc()
            atomic.write_text(deaths, json.dumps([*before, printable(f"{type(error).__name__}: {error}", 300)]))
            os._exit(1)
        deaths.unlink(missing_ok=True)
        return ""

    def load(self, options: argparse.Namespace) -> Any:
        """What all shards use, from the options of one."""
        raise NotImplementedError

    def answer(self, options: argparse.Namespace) -> None:
        raise NotImplementedError


class EvaluationWorker(ShardWorker):
    def load(self, options: argparse.Namespace) -> Any:
        config = evaluate.config_of(options)
        config = replace(config, runtime=replace(config.runtime, distributed="off"))
        return config, evaluate.load(options, config)

    def answer(self, options: argparse.Namespace) -> None:
        config, loaded = self.loaded
        evaluate.answered(options, config, loaded, options.output)


class GenerationWorker(ShardWorker):
    def load(self, options: argparse.Namespace) -> Any:
        sources, tenants = generate.checked(options)
        return generate.engine_of(options, *generate.load(options, sources), tenants=tenants)

    def answer(self, options: argparse.Namespace) -> None:
        engine, default = self.loaded
        run_job(engine, options.input, options.output, default, shard=options.shard, read_body=generate.read_body)


def read_deaths(file: Place) -> list[str]:
    """How the workers of a shard have ended, one after the other."""
    try:
        found = json.loads(file.read_bytes()[:MAX_BYTES])
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    return [str(one) for one in found] if isinstance(found, list) else []
