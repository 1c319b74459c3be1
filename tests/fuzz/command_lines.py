"""The command line, in this process: a mistake gives a line or two and exit code 2, whatever the arguments."""

import io
import os
import random
import shutil
import threading
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path

import tiny_run

from para_jax import load_model_config
from para_jax.cli import main
from para_jax.config import save_config

from . import adapters, mutate, run_folders
from .cases import Trial, Wrong, is_control, shared_folder

#: No path out of the folder: what is written stays there.
WORDS = (
    *(text for text in mutate.TEXTS if not text.startswith(("/", "..", "~"))),
    "0", "-5", "1.5", "1e400", "99999999999", "--", "-", "x=y", "=", "a=", "base", "A", "run", "in.jsonl", "run.yaml",
    "nowhere", "seed=7", "train.max_steps=x", "adapter.method=lora", "eval.metric=accuracy", "data=[1]", "backbone=1",
    "--prompt", "--adapter", "--tenant", "--chat", "--data", "--limit", "--split", "--top-p", "--seed", "--help",
)  # fmt: skip
OUTPUTS = ("out.jsonl", "no/out.jsonl", "run", "run.yaml", "pipe", "/dev/full", "/dev/null", ".", "x.png", "\x1b[31m")
QUICK = ("--allow-cpu", "--no-compilation-cache")
COMMANDS = (
    ("inspect", "run"),
    ("inspect", "adapter"),
    ("inspect", "--data", "run.yaml"),
    ("plot", "run", "--output", "x.png"),
    ("train", "run.yaml", "--dry-run"),
    ("generate", "--backbone", "backbone", "--prompt", "w20 w30", "--max-new-tokens", "3", *QUICK),
    ("generate", "--backbone", "backbone", "--adapter", "adapter", "--prompt", "w20", "--max-new-tokens", "3", *QUICK),
    ("generate", "--backbone", "backbone", "--adapters", "A=adapter", "--tenant", "A", "--input", "in.jsonl",
     "--output", "out.jsonl", "--slots", "2", "--max-length", "32", *QUICK),
    ("evaluate", "run.yaml", "--limit", "2"),
    ("evaluate", "run.yaml", "--adapter", "adapter", "--split", "validation", "--limit", "2"),
)  # fmt: skip


@cache
def good() -> Path:
    """A folder with all that the commands name, by relative paths."""
    folder = shared_folder() / "command"
    tiny_run.run_folder(folder)
    shutil.copytree(adapters.good("para", 0), folder / "adapter")
    (folder / "run").mkdir()
    config = tiny_run.run_config(Path(), "output_dir=run")
    for file in (folder / "run.yaml", folder / "run" / "config.yaml"):
        save_config(config, file)
    lines = "".join(f'{{"step": {step}, "loss": {8 - step}.5}}\n' for step in range(1, 7))
    (folder / "run" / "metrics.jsonl").write_text(lines)
    (folder / "in.jsonl").write_text('{"prompt": "w20", "max_new_tokens": 2}\n{"prompt": "w30", "tenant": "A"}\n')
    assert load_model_config(folder / "backbone").vocab_size == 256
    return folder


@cache
def warm() -> None:
    """Compiles the commands' programs, outside the cases' time."""
    folder = shutil.copytree(good(), shared_folder() / "command-warm")
    for arguments in COMMANDS:
        called(folder, arguments)


def command(draw: random.Random, folder: Path) -> Trial:
    """Changed arguments, or a damaged file among those that the command reads."""
    warm()
    made = shutil.copytree(good(), folder / "work")
    arguments = list(draw.choice(COMMANDS))
    if draw.random() < 0.4:
        files = ("run/metrics.jsonl", "run/metrics.jsonl", "run/config.yaml", "run.yaml", "in.jsonl",
                 "adapter/adapter_config.json", "backbone/config.json", "backbone/tokenizer_config.json")  # fmt: skip
        run_folders.damage(draw, made / draw.choice(files))
    else:
        changed(draw, arguments)
    os.mkfifo(made / "pipe")
    safe_outputs(draw, arguments)

    def run():
        code, out, said = called(made, arguments)
        if any(is_control(character) for character in out if character not in "\t\r"):
            raise Wrong(f"raw control characters on stdout: {out[:200]!r}")
        if code == 2:
            raise ValueError(said[said.rindex("para-jax") :] if "para-jax" in said else said)
        if code not in (0, 1):
            raise Wrong(f"exit code {code}: {said[-300:]}")

    return Trial(run, ("para-jax",))


def changed(draw: random.Random, arguments: list[str]) -> None:
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(1, len(arguments))
        change = draw.choice(("replace", "replace", "insert", "remove", "double", "swap"))
        if change == "replace":
            arguments[at] = draw.choice(WORDS)
        elif change == "insert":
            arguments.insert(at, draw.choice(WORDS))
        elif change == "remove" and len(arguments) > 2:
            del arguments[at]
        elif change == "double":
            arguments.insert(at, arguments[at])
        else:
            arguments[1:] = draw.sample(arguments[1:], len(arguments) - 1)


def safe_outputs(draw: random.Random, arguments: list[str]) -> None:
    """What follows --output is a name in the folder, a pipe or a harmless device."""
    for at, argument in enumerate(arguments[:-1]):
        if argument == "--output" and draw.random() < 0.4:
            arguments[at + 1] = draw.choice(OUTPUTS)


def called(folder: Path, arguments) -> tuple[int, str, str]:
    """The exit code of a command in a folder, and what it said on stdout and stderr; the pipe there has a reader."""
    out, error = io.StringIO(), io.StringIO()
    done = threading.Event()
    reader = threading.Thread(target=drain, args=(folder / "pipe", done), daemon=True)
    reader.start()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(error):
            code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir("/")
        done.set()
        reader.join()
    return code, out.getvalue(), error.getvalue()


def drain(pipe: Path, done: threading.Event) -> None:
    """Reads whatever is written into a pipe, if there is one, until the command has ended."""
    if not pipe.is_fifo():
        return
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    while not done.wait(0.01):
        with suppress(BlockingIOError):
            os.read(descriptor, 2**16)
    os.close(descriptor)
