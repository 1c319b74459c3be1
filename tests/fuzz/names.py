"""Names of backbones, adapters and hub ids: none is taken for another, and nothing is written outside the cache."""

import os
import random
from pathlib import Path
from unittest import mock

from golden_models import FIXTURES, backbone

from para_jax import load_adapter, load_backbone
from para_jax.backbone.load import load_model_config
from para_jax.config import printable
from para_jax.data.tokenizer import load_tokenizer

from . import mutate
from .cases import Trial, Wrong

NAMES = (
    "user/name", "user/name@main", "user/name@../../x", "user/..", "../..", "user/name@\0", "u\0/n", "~", "~root",
    "~x/y", "~nobody-here/a", ".", "..", "/", "//", "", " ", "gs://bucket/x", "http://x/y", "file:///etc",
    "C:\\x\\y", "a\\b", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "x.gguf", "/dev/null.gguf",
    "user/x.gguf", "a/b/c",
    "user/name@x@y", "-", "--help", "user/name ", " user/name", "user/na me", "úser/näme", "user/" + "n" * 5000,
    "a" * 300, "/" + "a" * 300, "a/" * 3000, "user/name@" + "r" * 5000, "\x1b]0;owned\x07", "user/\x1b[31m", "\ud83d/a",
    "%s/%s", "{0}/{1}", "$HOME/x", "`id`/x", "*/x", "smollm2-135m/x", "SMOLLM2-135M", "models--user--name", "a/b\n/c",
)  # fmt: skip


def name(draw: random.Random, folder: Path) -> Trial:
    given = draw.choice(NAMES)
    if draw.random() < 0.4:
        cut = draw.randint(0, len(given))
        given = given[:cut] + draw.choice((*NAMES, *mutate.TEXTS)) + given[cut:]
    loads = {
        "backbone": load_backbone,
        "config": load_model_config,
        "tokenizer": load_tokenizer,
        "adapter": lambda source: load_adapter(source, backbone("llama").config),
    }
    load = loads[draw.choice(list(loads))]
    before = surroundings(folder)

    def run():
        os.chdir(folder)
        try:
            with mock.patch("para_jax.storage.bucket.file_system", no_network):
                load(given)
        finally:
            os.chdir("/")
            if surroundings(folder) != before:
                raise Wrong(f"files appeared for {given[:80]!r}")
        raise Wrong(f"accepted {given[:80]!r}")

    return Trial(
        run,
        (
            given[:12].strip() or "''",
            "expected",
            repr(given)[1:-1][:11],
            printable(given)[:11],
            "no home folder",
            "home folder",
        ),
    )


def no_network():
    """In place of gcsfs, which tries for a minute to reach a bucket."""
    raise OSError("no network in this test")


def surroundings(folder: Path) -> list[str]:
    """What lies where no name may write."""
    held = [folder, folder.parent.parent, FIXTURES, Path(os.environ["XDG_CACHE_HOME"]).parent.parent]
    return [str(path) for place in held for path in place.iterdir()]
