"""The documentation as a site: ``make docs``. The pages read as well without it, on the host of the repository."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import zmqcore

sys.path.insert(0, str(Path(__file__).with_name("images")))
from diagrams import picture_of

project = "zmqcore"
version = release = zmqcore.__version__
project_copyright = "the zmqcore authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]

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
html_static_path = ["site/static"]
html_css_files = ["zmqcore.css"]
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


class Diagram(SphinxDirective):
    """A diagram in Mermaid, shown by its picture."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        page, text = Path(self.env.doc2path(self.env.docname)), "\n".join(self.content)
        picture = picture_of(page, text)
        if not picture.exists():
            raise self.error("this diagram has no picture; draw it by `python docs/images/diagrams.py`")
        self.env.note_dependency(picture)
        return [nodes.image(uri=f"/{picture.relative_to(self.env.srcdir)}", alt=text, classes=["diagram"])]


@cache
def stub_of(module: str) -> dict[str, tuple[str, str]]:
    """Return the arguments and the result of each function in a compiled module's stub, by its qualified name."""
    path = Path(zmqcore.__file__).with_name(f"{module}.pyi")
    if not path.exists():
        return {}
    signatures = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            signatures[node.name] = signature_in(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    signatures[f"{node.name}.{method.name}"] = signature_in(method, bound=True)
            if f"{node.name}.__init__" in signatures:
                signatures[node.name] = signatures[f"{node.name}.__init__"][0], ""
    return signatures


def signature_in(function: ast.FunctionDef, *, bound: bool = False) -> tuple[str, str]:
    arguments = function.args
    if bound and "staticmethod" not in map(ast.unparse, function.decorator_list):
        del (arguments.posonlyargs or arguments.args)[0]
    return f"({ast.unparse(arguments)})", ast.unparse(function.returns or ast.Constant(None))


def signature_from_stub(app: Sphinx, what: str, name: str, thing: Any, *_: Any) -> tuple[str, str] | None:  # noqa: ARG001
    """Show compiled functions as their stubs have them: what Cython writes into docstrings is half C."""
    if what not in ("class", "function", "method"):
        return None
    # Where it was defined, which for an inherited method is another module.
    return stub_of(thing.__module__.removeprefix("zmqcore.")).get(thing.__qualname__)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", signature_from_stub)
    app.connect("source-read", navigation)
    app.add_directive("mermaid", Diagram)
    # What a block prints, on the pages.
    app.add_lexer("output", TextLexer)
