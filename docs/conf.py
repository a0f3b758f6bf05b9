"""Sphinx configuration: `make docs`."""

from dataclasses import fields
from importlib.metadata import version as _version

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

project = "ppl-diffusion"
author = "The ppl-diffusion developers"
project_copyright = author
version = release = _version("ppl-diffusion")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "ppl-diffusion"
myst_heading_anchors = 3

# Notebooks carry no outputs: they run when they changed, and what they print is in the pages.
nb_execution_mode = "cache"
nb_execution_cache_path = "../build/notebooks"
nb_execution_timeout = 1200
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "undoc-members": False}
# Upstream base classes document themselves in reST that is not always clean.
autodoc_inherit_docstrings = False

# The README, which is the first page, links to files that only the repository has.
suppress_warnings = ["myst.xref_missing"]


class MethodTable(SphinxDirective):
    """The registry of methods as a table, so that nobody has to keep one."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        from ppl_diffusion.inference import methods

        rows = [
            "| name | class | in one line | exact | options |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, cls in methods().items():
            line = (cls.__doc__ or "").strip().partition("\n")[0]
            options = ", ".join(f"`{field.name}`" for field in fields(cls)) or "none"
            exact = "yes" if cls.exact else "no"
            rows.append(f"| `{name}` | `{cls.__name__}` | {line} | {exact} | {options} |")
        return self.parse_text_to_nodes("\n".join(rows))


def _indent_example(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """Indent again the example of a docstring that holds nothing else below its first line.

    Cleaning a docstring takes away the indentation that all lines but the first share.
    """
    if lines and lines[0].endswith("::") and len(lines) > 2 and not lines[2].startswith(" "):
        lines[1:] = [f"    {line}" if line else line for line in lines[1:]]


def _skip_guests(app, what, name, obj, skip, options):  # type: ignore[no-untyped-def]
    """Describe what a room hands on from another one on the page of the room that defines it."""
    home = str(getattr(obj, "__module__", None)).split(".")
    page = app.env.docname.removeprefix("reference/")
    return True if what == "module" and home[0] == "ppl_diffusion" and home[1] != page else None


def setup(app: Sphinx) -> None:
    """Connect what is defined above."""
    app.add_directive("methods", MethodTable)
    app.connect("autodoc-skip-member", _skip_guests)
    app.connect("autodoc-process-docstring", _indent_example)
