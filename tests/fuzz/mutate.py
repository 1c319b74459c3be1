"""Mutations: JSON trees, texts, bytes and files, each drawn from a `random.Random`."""

import json
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

TEXTS = (
    "", " ", "\0", "\x1b]0;owned\x07", "\n" * 40, "a" * 6000, "é", "日本語", "\u2028", "\ud83d", "\ufeff", "../../x",
    "/etc/passwd", "/dev/zero", "~nobody/x", "${oc.env:PARA_JAX_FUZZ}", "{x}", "%s", "null", "1e9", "NaN", "-1",
    "true", "w20", "gelu", "F16", "q_proj", "\\", "a/b", "<|im_end|>", "</s>",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 4, 7, 64, 1000, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, -(2**63), 10**30, 0.5, 1.0, -0.5, 1e-46,
    1e-300, 3.4e38, 1e308, -0.0, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def value(draw: random.Random, depth: int = 2) -> Any:
    """A value that a field hardly ever has."""
    kind = draw.choice(("text", "number", "number", "constant", "list", "mapping") if depth else ("text", "number"))
    if kind == "text":
        return draw.choice(TEXTS)
    if kind == "number":
        return draw.choice(NUMBERS)
    if kind == "constant":
        return draw.choice((None, True, False, [], {}, [[]], [None], nested(draw.choice((3, 100)))))
    if kind == "list":
        return [value(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    return {draw.choice(TEXTS): value(draw, depth - 1) for _ in range(draw.randint(1, 3))}


def nested(depth: int) -> list:
    made: list = []
    for _ in range(depth):
        made = [made]
    return made


def near(draw: random.Random, old: Any) -> Any:
    """A value close to the old one: of the same kind, or the same thing as another type."""
    if isinstance(old, bool):
        return draw.choice((not old, int(old), str(old).lower()))
    if isinstance(old, (int, float)):
        return draw.choice((old + 1, old - 1, -old, 2 * old, old / 2, old * 1000, float(old), str(old), [old]))
    if isinstance(old, str):
        cut = draw.randint(0, len(old))
        return draw.choice((old[:cut], old + old, old.upper(), old[:cut] + draw.choice(TEXTS)[:50] + old[cut:], [old]))
    if isinstance(old, list) and old:
        return draw.choice((old[1:], old + old[:1], old[::-1], old[0], dict(enumerate(map(str, old)))))
    if isinstance(old, dict) and old:
        return draw.choice((list(old), list(old.values()), {key: old for key in list(old)[:1]}))
    return value(draw)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of dictionaries and lists."""
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    return found


def tree(draw: random.Random, original: Any, extra: tuple[str, ...] = ()) -> Any:
    """A JSON tree with one to three changes; keys that are added come from `extra` too."""
    made = deepcopy(original)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not places(made):
            return value(draw)
        node, key = draw.choice(places(made))
        change = draw.choice(("value", "near", "near", "remove", "add", "swap"))
        if change == "value":
            node[key] = value(draw)
        elif change == "near":
            node[key] = near(draw, node[key])
        elif change == "remove":
            del node[key]
        elif change == "add" and isinstance(node, dict):
            node[draw.choice((*extra, *extra, *TEXTS))] = value(draw)
        else:
            other, theirs = draw.choice(places(made))
            node[key], other[theirs] = deepcopy(other[theirs]), deepcopy(node[key])
    return made


def json_text(draw: random.Random, original: Any, extra: tuple[str, ...] = ()) -> bytes:
    """A JSON document that is changed as a tree, or, one time in four, as a text."""
    if draw.random() < 0.75:
        return json.dumps(tree(draw, original, extra), ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 2))
                          ).encode(errors="surrogatepass")  # fmt: skip
    text = json.dumps(original)
    return draw.choice((
        lambda: b"[" * 100_000,
        lambda: (nest := draw.choice((300, 900, 990, 2000))) and b"[" * nest + text.encode() + b"]" * nest,
        lambda: ("{" + text[1:-1] + ", " + text[1:-1] + "}").encode(),  # every key twice
        lambda: doubled_key(draw, original),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.encode("utf-16"),
        lambda: text[: draw.randrange(len(text))].encode(),
        lambda: (text + draw.choice(("}", " x", "\0", text))).encode(),
        lambda: draw.choice((b"", b"null", b"5", b'"a"', b"[]", b"{}", b"\xff\xfe", b"9" * 5000)),
        lambda: data(draw, text.encode()),
    ))()  # fmt: skip


def doubled_key(draw: random.Random, original: Any) -> bytes:
    """A mapping whose first key stands there again, at the end, with another value."""
    text = json.dumps(original)
    if not isinstance(original, dict) or not original:
        return text.encode()
    key = draw.choice(list(original))
    again = json.dumps({key: draw.choice((value(draw), near(draw, original[key])))})
    return (text[:-1] + ", " + again[1:]).encode(errors="surrogatepass")


def data(draw: random.Random, original: bytes) -> bytes:
    """Bytes with one to four changes."""
    made = bytearray(original)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randint(0, len(made)), draw.choice((1, 1, 4, 8, 64))
        change = draw.choice(("flip", "flip", "set", "insert", "remove", "copy", "cut", "extend"))
        if change == "flip" and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
        elif change == "set":
            made[at : at + length] = bytes([draw.choice((0, 255, 127, 34, 10))]) * min(length, len(made) - at)
        elif change == "insert":
            made[at:at] = draw.randbytes(length)
        elif change == "remove":
            del made[at : at + length]
        elif change == "copy":
            start = draw.randint(0, len(made))
            made[at:at] = made[start : start + length]
        elif change == "cut" and draw.random() < 0.3:
            del made[at:]
        elif change == "extend":
            made += draw.randbytes(length)
    return bytes(made)


KINDS = ("missing", "empty", "folder", "link", "loop", "device", "pipe", "elsewhere", "sparse")


def file(draw: random.Random, path: Path, kinds: tuple[str, ...] = KINDS) -> None:
    """What stands at a path becomes something else than the file that was there."""
    kept = path.read_bytes() if path.is_file() else b""
    path.unlink()
    kind = draw.choice(kinds)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(draw.choice(("/etc/passwd", "/nowhere", "..", "/proc/self/environ")))
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to(draw.choice(("/dev/zero", "/dev/full", "/dev/null")))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, draw.choice((2**32, 2**33)))
    elif kind == "elsewhere":  # a whole copy, behind a link
        other = path.with_name("elsewhere" + path.suffix)
        other.write_bytes(kept)
        path.symlink_to(other)


def copied(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to, symlinks=True)
