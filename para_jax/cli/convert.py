"""`para-jax convert`: a .gguf file as a Hugging Face folder."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "write a .gguf file as a Hugging Face folder"
    parser = commands.add_parser("convert", help=text, description=text)
    parser.add_argument("gguf", type=shared.local)
    parser.add_argument("folder", type=shared.local)
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..data.tokenizer import load_tokenizer
    from ..gguf.convert import convert_gguf

    convert_gguf(options.gguf, options.folder, load_tokenizer(options.gguf))
    print(f"wrote {options.folder}")
