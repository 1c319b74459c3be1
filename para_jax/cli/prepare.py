"""`para-jax prepare`: a public data set for data.train=tfds:NAME."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "download a public data set for data.train=tfds:NAME"
    parser = shared.add_command(commands, "prepare", text, "tfds:glue/sst2")
    text = "tfds:NAME or tfds:NAME/CONFIG, a data set of tensorflow_datasets"
    parser.add_argument("source", metavar="SOURCE", help=text)
    shared.option(parser, "--data-dir", "the folder (default: tensorflow_datasets' own)", metavar="DIR")
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..data.tfds import describe_splits, prepare

    folder = prepare(options.source, options.data_dir)
    use = f"data.train={options.source}" + (f" data.data_dir={options.data_dir}" if options.data_dir else "")
    print(f"{folder}: {describe_splits(folder)}; train on them with {use}")
