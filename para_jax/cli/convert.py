"""`para-jax convert`: a .gguf file as a Hugging Face folder."""

from __future__ import annotations

from ..io.checks import nearest
from . import options as shared


def add(commands) -> None:
    text = "write a .gguf file as a Hugging Face folder"
    parser = shared.add_command(commands, "convert", text, "model.gguf models/converted")
    parser.add_argument("gguf", type=shared.local, metavar="GGUF", help="the file to read")
    parser.add_argument("folder", type=shared.local, metavar="FOLDER", help="a new or empty folder to write")
    parser.set_defaults(run=run)


def run(options) -> None:
    if options.gguf.is_dir():
        raise ValueError(f"{options.gguf} is a folder; give the path of a .gguf file")
    if not options.gguf.is_file():
        raise ValueError(f"{options.gguf}: no such file{nearest(options.gguf) or '; give the path of a .gguf file'}")
    from ..backbone.gguf.convert import check_new_folder, convert_gguf
    from ..data.tokenizer import load_tokenizer

    check_new_folder(options.folder)
    convert_gguf(options.gguf, options.folder, load_tokenizer(options.gguf))
    print(f"wrote {options.folder}")
