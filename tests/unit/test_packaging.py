"""The wheel holds every folder of code, which an editable install would not notice."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = {"ppl_diffusion": "ppl_diffusion", "models": "ppl_diffusion.models"}
ROOMS["inference"] = "ppl_diffusion.inference"


def test_every_package_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / room).parts])
        for room, name in ROOMS.items()
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found
