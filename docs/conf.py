"""Settings of the documentation site. `make docs` builds it into build/docs; warnings are errors."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import megadyn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for config_reference


project = "megadyn"
author = "The megadyn authors"
copyright = f"2026, {author}. Apache-2.0"
release = version = megadyn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # `page.md#a-heading`, as on GitHub
highlight_language = "text"  # indented blocks hold commands and formulas

html_theme = "furo"
html_title = f"megadyn {release}"
html_static_path: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
nitpicky = False

KIND_PAGE = re.compile(r"\(\.\./megadyn/kinds/(\w+)/README\.md\)")
"""Sources link to the kinds' own files, so that links work in the repository; on the site each kind has a page."""


def link_kind_pages(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = KIND_PAGE.sub(r"(kinds/\1.md)", source[0])


def write_configuration(app: Sphinx) -> None:
    import config_reference

    config_reference.write(HERE / "generated" / "configuration.md")


def double_backticks(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Doubles backticks: docstrings use single ones, as in Markdown, but reStructuredText needs two."""
    text = re.sub(r"(?<!`)`([^`]+?)\s*`(?!`)", r"``\1``", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_configuration)
    app.connect("autodoc-process-docstring", double_backticks)
    app.connect("source-read", link_kind_pages)
