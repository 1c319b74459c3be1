"""The site: `pip install '.[docs]'`, then `sphinx-build -W docs OUTPUT`. .readthedocs.yaml builds it."""

import os
import re
import sys
from pathlib import Path

import para_jax

project, author, release = "para_jax", "the para_jax developers", para_jax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",
]
myst_enable_extensions, myst_heading_anchors = ["deflist"], 4
exclude_patterns = ["_build"]
html_theme, html_title, html_show_copyright = "furo", "para_jax", False
autodoc_member_order, autodoc_typehints = "bysource", "description"
autodoc_preserve_defaults, default_role = True, "code"

#: Where the files are that pages link to and the site does not hold.
REPOSITORY = os.environ.get("READTHEDOCS_GIT_CLONE_URL", "https://github.com/para-jax/para_jax").removesuffix(".git")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))


def prepare(app, page: str, source: list[str]) -> None:
    """Fills the page of the config's fields. On other pages, links to files of the repository, such as
    ../configs/gsm8k.yaml, become links to its page on the web, and notebooks open in Colab."""
    from config_reference import config_reference

    def on_the_web(match: re.Match) -> str:
        if match[1].endswith(".ipynb"):
            return f"]({REPOSITORY.replace('github.com', 'colab.research.google.com/github')}/blob/main/{match[1]}"
        kind = "tree" if (ROOT / match[1]).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{match[1]}"

    if page == "reference/config":
        source[0] += config_reference()
    source[0] = re.sub(r"\]\((?:\.\./)+([^)]*)", on_the_web, source[0])


def setup(app) -> None:
    app.connect("source-read", prepare)
