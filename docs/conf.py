"""The documentation as a site: `make docs`. The pages are those of this folder; the table of contents is index.md."""

import re
from pathlib import Path

import cogview_pipelines

DOCS = Path(__file__).parent

project = "cogview_pipelines"
author = copyright = "the authors of cogview_pipelines"
release = version = cogview_pipelines.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"cogview_pipelines {release}"
exclude_patterns = ["images"]
nitpicky = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "literal"


def add_toctree(app, docname: str, source: list[str]) -> None:
    """What index.md and its Chinese sister list is the sidebar, so that nobody has to list it twice."""
    if docname not in ("index", "zh/index"):
        return
    pages = re.findall(r"^- \[[^\]]*\]\(([\w./-]+)\.md\)", source[0], flags=re.MULTILINE)
    source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def lead_out(app, docname: str, source: list[str]) -> None:
    """Links to files beside the docs lead nowhere on a site: their text stays."""
    page = DOCS / f"{docname}.md"

    def plain(match: re.Match) -> str:
        target = (page.parent / match["target"].split("#")[0]).resolve()
        return match[0] if target.is_relative_to(DOCS) else match["text"]

    source[0] = re.sub(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)", plain, source[0])


def markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written as those of transformers: names in single backticks, classes as [`Name`]."""
    text = "\n".join(lines)
    text = re.sub(r"\[`([^`]+)`\]", r"`\1`", text)
    text = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", text)
    # a row of arguments that goes over several lines is one entry
    while (joined := re.sub(r"(?m)^( *[a-z_]+(?:, [a-z_]+)*,)\n +(?=[a-z_]+[,:])", r"\1 ", text)) != text:
        text = joined
    # lists and code need an empty line before them
    text = re.sub(r"(\n[^\n]*:)\n(\s*- )", r"\1\n\n\2", text)
    lines[:] = text.split("\n")


def setup(app) -> None:
    app.connect("source-read", lead_out)
    app.connect("source-read", add_toctree)
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)  # before napoleon
