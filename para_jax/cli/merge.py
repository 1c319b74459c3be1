"""`para-jax merge`: joins what the shards of an evaluation or of a job have written."""

from __future__ import annotations

from ..io.checks import expanded
from ..io.messages import say
from . import options as shared


def add(commands) -> None:
    text = "join the outputs of evaluate --shard or generate --shard"
    example = "runs/shard-0 runs/shard-1 runs/shard-2 --output runs/evaluation"
    parser = shared.add_command(commands, "merge", text, example)
    text = "the --output of each shard: folders of evaluate, or files of generate"
    parser.add_argument("shards", type=shared.place, nargs="+", metavar="OUTPUT", help=text)
    text = "the folder or file that one worker would have written; it must not exist"
    shared.option(parser, "--output", text, expanded, metavar="OUTPUT", required=True)
    parser.set_defaults(run=run)


def run(options) -> int:
    from ..io.shards import SHARD_FILE, job_shard_file

    folders = [(one / SHARD_FILE).is_file() for one in options.shards]
    for one, folder in zip(options.shards, folders, strict=True):
        if not folder and not job_shard_file(one).is_file():
            raise ValueError(
                f"{one} is not the output of a shard: there is no {SHARD_FILE} in it, and no "
                f"{job_shard_file(one).name} next to it\ngive what --shard wrote to --output"
            )
        if folder != folders[0]:
            raise ValueError(
                f"{options.shards[0]} and {one} are a folder of evaluate and a file of generate\nmerge them separately"
            )
    if folders[0]:
        from ..evaluation.merge import merge_folders

        print(merge_folders(options.shards, options.output))
        say(f"wrote {options.output}")
        return 0
    from ..serving.job_merge import merge_jobs

    answers, errors = merge_jobs(options.shards, options.output)
    say(f"wrote {options.output}: {answers} answers, {errors} of them errors")
    return int(errors > 0)
