"""What is looked up often starts without what computes."""

import json
import subprocess
import sys

import pytest

COMPUTES = ("arviz", "jax", "matplotlib", "networkx", "numpy", "numpyro", "pandas", "pyro", "scipy")
LOADED = """
import sys
{code}
print(__import__("json").dumps(sorted({{name.partition(".")[0] for name in sys.modules}})),
      file=sys.__stderr__)
"""
COMMAND = "from ppl_diffusion.cli import run; assert run({words}) == {code}"


def loaded(code):
    """Return the packages that a fresh process has loaded after some code."""
    words = [sys.executable, "-c", LOADED.format(code=code)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["models"], 0),
        (["sample", "--help"], 0),
        (["train", "--help"], 0),
        (["compare", "--help"], 0),
        (["no-such-command"], 2),
    ],
    ids=str,
)
def test_commands_that_compute_nothing(words, code):
    found = loaded(COMMAND.format(words=words, code=code))
    assert "typer" in found
    assert found.isdisjoint({*COMPUTES, "torch", "xarray"})


def test_help_of_design_reads_the_registry():
    """Its flags are the fields of the methods, which need torch; of the rest it needs nothing."""
    found = loaded(COMMAND.format(words=["design", "--help"], code=0))
    assert "torch" in found
    assert found.isdisjoint({*COMPUTES, "xarray"} - {"numpy", "pyro"})


def test_methods_import_no_more_than_torch_and_pyro():
    expected = loaded("import torch, pyro")
    more = loaded("import ppl_diffusion.inference") - expected
    assert more.isdisjoint({*COMPUTES, "Bio", "h5netcdf", "rich", "typer", "xarray"})
    assert more >= {"ppl_diffusion"}
