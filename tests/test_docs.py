"""The documentation is true where a test can tell, and in plain English: paths, links, commands, and worn-out words."""

import ast
import io
import json
import re
import tokenize
import tomllib
from pathlib import Path

import pytest

from para_jax import load_config
from para_jax.cli import parser
from para_jax.config import ADAPTER_CONFIGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "scripts" / "experiments" / "README.md", ROOT / "results" / "README.md"]
CODE = sorted(file for folder in ("para_jax", "scripts") for file in (ROOT / folder).rglob("*.py"))
CONFIGS, NOTEBOOKS = sorted((ROOT / "configs").glob("*.yaml")), sorted((ROOT / "notebooks").glob("*.ipynb"))

#: Words that a reader has to read twice, and what to write instead.
BANNED = {
    r"\b[Aa]new\b": "again",
    r"\b[Bb]eside\b": "next to, with, or compared with",
    r"\b[Mm]end(s|ed|ing)?\b": "fix",
    r"\b[Oo]f which\b": "two sentences",
    r"\bWhose\b": "the subject first",
    r"(?:^|[.!?] )Of (a|the|an|each|two|what) [\w' ]+, ": "the subject first",
    r"\b[Ss]o many\b": "that many, or the number",
    r"\b[Nn]obody\b": "no one, or none",
    r"\b[Ss]tand(s|ing)? for\b": "is, or means",
    r"\bis not possible; expected\b": "what is wrong, and then what to do",
    r"\b(tokens|rows|bytes|examples|requests) an? (second|chip|device)\b": "per",
}


def names(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=names)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """The commands of a page, without comments and with continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    return [line.split(" #")[0] for line in re.findall(r"^ *(para-jax .*)$", text, re.MULTILINE)]


def test_each_equation_is_where_the_method_page_says():
    found = re.findall(r"`(para_jax/\S+\.py)`: ((?:`[\w.]+`(?:, )?)+)", (ROOT / "docs" / "method.md").read_text())
    assert len(found) >= 8
    for file, symbols in found:
        text = (ROOT / file).read_text()
        for symbol in re.findall(r"`([\w.]+)`", symbols):
            for part in symbol.split("."):
                assert re.search(rf"^\s*(?:def|class) {part}\b", text, re.MULTILINE), (file, symbol)


@each_page
def test_links_lead_to_files_and_headings(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text()):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@each_page
def test_named_files_exist(page):
    named = re.findall(
        r"\b((?:para_jax|tests|scripts|configs|notebooks)/[\w./-]*\w\.(?:py|sh|yaml|txt))", page.read_text()
    )
    written_by_the_reader = {"para_jax/adapters/bias.py"}  # the example of adding_a_method.md
    assert [path for path in named if path not in written_by_the_reader and not (ROOT / path).is_file()] == []


@each_page
def test_commands_name_subcommands_options_and_configs_that_exist(page):
    known = next(a for a in parser()._actions if a.dest == "command").choices
    shipped = {file.stem for file in CONFIGS}
    for line in commands(page):
        name = line.split()[1]
        assert name in known or name.startswith("-") or not name.islower(), line
        if name in known and name != "lm-eval":
            for option in re.findall(r"\s(--[\w-]+)", line):
                assert option in known[name]._option_string_actions, line
        config = re.match(r"para-jax (?:train|inspect|evaluate) +([a-z][\w.-]*)(?= |$)", line)
        assert config is None or config[1] in shipped or config[1].endswith(".yaml"), line


@each_page
def test_config_fields_exist(page):
    config = load_config(None, [])
    for section, field in re.findall(r"\b([a-z]+)\.([a-z_]+)=", page.read_text()):
        if hasattr(config, section) and f"{section}.{field}" != "adapter.method":
            of_section = (
                [kind() for kind in ADAPTER_CONFIGS.values()] if section == "adapter" else [getattr(config, section)]
            )
            assert any(hasattr(one, field) for one in of_section), f"{section}.{field}"


@each_page
def test_extras_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"(?:\.|para_jax)\[([\w,-]+)\]", page.read_text()):
        assert set(named.split(",")) <= set(extras), named


def comments_and_strings(file):
    """Comments and string literals, docstrings among them, with their line numbers."""
    text = file.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def cells(file):
    for cell in json.loads(file.read_text())["cells"]:
        yield 0, "".join(cell["source"])


def texts(file):
    if file.suffix == ".py":
        yield from comments_and_strings(file)
    elif file.suffix == ".ipynb":
        yield from cells(file)
    else:
        yield 0, file.read_text()


def worn_words(text):
    line = re.sub(r"\s+", " ", text)
    return [f"{match[0]!r}: {instead}" for banned, instead in BANNED.items() for match in re.finditer(banned, line)]


@pytest.mark.parametrize("file", [*PAGES, ROOT / "CHANGELOG.md", *CONFIGS, *NOTEBOOKS, *CODE], ids=names)
def test_text_that_people_read_is_plain_english(file):
    found = [f"{names(file)}:{line}: {each}" for line, text in texts(file) for each in worn_words(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "worn"),
    [
        ("It is computed anew.", True),
        ("Whose adapter answers.", True),
        ("A row whose tenant is None.", False),
        ("The most tokens a row may have.", False),
        ("--topology stands beside --dry-run", True),
        ("Of a line, its hash.", True),
        ("Tokens per second.", False),
        ("512 tokens a second", True),
    ],
)
def test_worn_words_are_found_without_false_alarms(text, worn):
    assert bool(worn_words(text)) == worn
