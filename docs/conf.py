"""Sphinx configuration: `make docs`."""

from importlib.metadata import version as _version

project = "ppl-diffusion"
author = "The ppl-diffusion developers"
project_copyright = author
version = release = _version("ppl-diffusion")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = "ppl-diffusion"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "undoc-members": False}
# Upstream base classes document themselves in reST that is not always clean.
autodoc_inherit_docstrings = False

# The README, which is the first page, links to files that only the repository has.
suppress_warnings = ["myst.xref_missing"]


def _indent_example(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """Indent again the example of a docstring that holds nothing else below its first line.

    Cleaning a docstring takes away the indentation that all lines but the first share.
    """
    if lines and lines[0].endswith("::") and len(lines) > 2 and not lines[2].startswith(" "):
        lines[1:] = [f"    {line}" if line else line for line in lines[1:]]


def setup(app):  # type: ignore[no-untyped-def]
    """Connect the hook above."""
    app.connect("autodoc-process-docstring", _indent_example)
