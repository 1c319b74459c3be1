"""What the documentation names is there: functions beside files, links, and commands' options."""

import re
from pathlib import Path

import pytest

from para_jax.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_each_equation_is_where_the_page_of_the_method_says():
    found = re.findall(r"`(para_jax/\S+\.py)`: ((?:`[\w.]+`(?:, )?)+)", (ROOT / "docs" / "method.md").read_text())
    assert len(found) >= 8
    for file, names in found:
        text = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^\s*(?:def|class) {part}\b", text, re.MULTILINE), (file, name)


@each_page
def test_links_lead_to_files_that_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@each_page
def test_commands_name_subcommands_and_configs_that_exist(page):
    commands = next(a for a in parser()._actions if a.dest == "command").choices
    for line in re.findall(r"^para-jax .*$", page.read_text(), re.MULTILINE):
        assert line.split()[1] in commands, line
        for config in re.findall(r"\bconfigs/[\w.-]+\.yaml", line):
            assert (ROOT / config).is_file(), line
        for option in re.findall(r"\s(--[\w-]+)", line.split(" #")[0]):
            assert option in commands[line.split()[1]]._option_string_actions or line.split()[1] == "lm-eval", line
