"""What a release needs: workflows that follow their schemas, one version, and a site without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import para_jax
from para_jax.cli import parser

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    ".github/workflows/tests.yml": "vendor.github-workflows",
    ".github/workflows/release.yml": "vendor.github-workflows",
    ".github/ISSUE_TEMPLATE/bug.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/idea.yml": "vendor.github-issue-forms",
    ".readthedocs.yaml": "vendor.readthedocs",
    "CITATION.cff": "vendor.citation-file-format",
}


@pytest.mark.long
@pytest.mark.parametrize("file", SCHEMAS)
def test_a_file_for_other_services_follows_its_schema(file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[file], ROOT / file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_files_name_one_version():
    version = para_jax.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's pages by name, without their tags."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {page.relative_to(folder).as_posix(): page.read_text() for page in folder.rglob("*.html")}


@pytest.mark.long
def test_the_site_has_no_warning_and_its_references_are_complete(site):
    python, commands = site["reference/python.html"], site["reference/commands.html"]
    assert [name for name in para_jax._LATER if f'id="para_jax.{name}"' not in python] == []
    choices = next(action for action in parser()._actions if action.dest == "command").choices
    assert [name for name in choices if f"para-jax {name}" not in commands] == []
    assert "github.com/None" not in "".join(site.values())
