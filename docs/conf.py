"""Sphinx's configuration of the site (`make docs`). Nothing is fetched, when it is built or when it is read.

Its sources are the repository, not docs/ alone: links between pages, READMEs and files are those that work on GitHub.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import generate  # noqa: E402

import pipeline  # noqa: E402

project = "CoAtNet pretraining"
copyright = "the CoAtNet pretraining authors, Apache-2.0"
version = release = pipeline.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "*/README.md", "configs/*/README.md"]
include_patterns += ["benchmarks/results/ablations/*.md"]
exclude_patterns = [".*", "docs/_build", "build", "runs", "demo/out"]

html_theme = "furo"
html_title = f"{project} {version}"
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4
highlight_language = "text"
copybutton_prompt_text = "$ "

nitpicky = True
nitpick_ignore_regex = [  # torch's, numpy's and Python's; and of ours what is no part of the API
    ("py:.*", r"(?!(models|data)\.).*"),
    ("py:.*", r"models\.coatnet\.(ConvolutionStem|Head)|data\.order\.Positions"),
]
default_role = "literal"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


def fill_in(app: object, name: str, source: list[str]) -> None:
    """Puts what the code knows where a page says `<!-- generated: NAME -->` (generate.py)."""
    source[0] = re.sub(r"<!-- generated: (\w+) -->", lambda found: getattr(generate, found[1])(), source[0])


def setup(app) -> None:
    app.connect("source-read", fill_in)
