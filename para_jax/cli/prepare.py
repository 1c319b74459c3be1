"""`para-jax prepare`: a public data set for data.train=tfds:NAME."""

from __future__ import annotations


def add(commands) -> None:
    text = "download a public data set for data.train=tfds:NAME"
    parser = commands.add_parser("prepare", help=text, description=text)
    parser.add_argument("source", help="tfds:NAME or tfds:NAME/CONFIG, a data set of tensorflow_datasets")
    parser.add_argument("--data-dir", help="where to; default: tensorflow_datasets' own folder")
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..data.tfds import describe, prepare

    folder = prepare(options.source, options.data_dir)
    use = f"data.train={options.source}" + (f" data.data_dir={options.data_dir}" if options.data_dir else "")
    print(f"{folder}: {describe(folder)}; train on them with {use}")
