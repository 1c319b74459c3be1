"""`para-jax convert`: a .gguf file as a Hugging Face folder."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "write a .gguf file as a Hugging Face folder"
    parser = shared.add_command(commands, "convert", text, "model.gguf models/converted")
    parser.add_argument("gguf", type=shared.place, metavar="GGUF", help="the file to read")
    parser.add_argument("folder", type=shared.place, metavar="FOLDER", help="a new or empty folder to write")
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..backbone.gguf.convert import convert_gguf
    from ..data.tokenizer import load_tokenizer

    convert_gguf(options.gguf, options.folder, load_tokenizer(options.gguf))
    print(f"wrote {options.folder}")
