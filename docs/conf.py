"""The documentation as a site: ``make docs``. The pages read as well without it, on the host of the repository."""

from __future__ import annotations

import re

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import zmqcore

project = "zmqcore"
version = release = zmqcore.__version__
project_copyright = "the zmqcore authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinxcontrib.mermaid"]

# The sources are the whole checkout: pages link to README.md, CHANGELOG.md, examples/ and bench/ beside docs/.
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "examples/*/README.md",
    "bench/README.md",
    "tests/frame/vectors/README.md",
]
exclude_patterns = [".*", "build", "dist", "*.egg-info", "zmqcore"]

html_theme = "furo"
html_title = f"zmqcore {release}"
html_extra_path = ["site/index.html"]
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e6e", "color-brand-content": "#0b6e6e"},
    "dark_css_variables": {"color-brand-primary": "#4fc3c3", "color-brand-content": "#4fc3c3"},
}

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
# README begins with its title, the sections of other pages may skip a level within a list.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
# A class's options stand in its own docstring.
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True

copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

_SECTION = re.compile(r"^## (.+)\n((?:(?!^## ).*\n?)*)", re.MULTILINE)
_LISTED = re.compile(r"^\* \[([^\]]+)\]\(([^)#]+)\)", re.MULTILINE)


def navigation(app: Sphinx, docname: str, source: list[str]) -> None:  # noqa: ARG001  (the event's signature)
    """Make the lists on docs/index.md the navigation of the site, so that there is one list only."""
    if docname != root_doc:
        return
    for caption, text in _SECTION.findall(source[0]):
        entries = "\n".join(f"{title} <{path}>" for title, path in _LISTED.findall(text))
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", navigation)
    # What a block prints, on the pages.
    app.add_lexer("output", TextLexer)
