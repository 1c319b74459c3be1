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
    if options.shards[0].is_dir():
        from ..evaluation.merge import merge_folders

        print(merge_folders(options.shards, options.output))
        say(f"wrote {options.output}")
        return 0
    from ..serving.job_merge import merge_jobs

    answers, errors = merge_jobs(options.shards, options.output)
    say(f"wrote {options.output}: {answers} answers, {errors} of them errors")
    return int(errors > 0)
