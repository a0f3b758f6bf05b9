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
