"""The floors of the house: imports go down only, and nothing private crosses a room."""

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "ppl_diffusion": ROOT / "ppl_diffusion",
    "ppl_diffusion.models": ROOT / "models",
    "ppl_diffusion.inference": ROOT / "inference",
}


ENGINE = "ppl_diffusion.smc.engine"
PLANTED = "ppl_diffusion.handlers.planted"


def sources():
    """The text of every module, by its installed name."""
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]): path.read_text()
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }


def imports(module, tree):
    """The full name of everything a module imports, and the name it is bound to."""
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((f"{origin}.{a.name}", a.asname or a.name) for a in node.names)


def crossings(texts):
    """The private modules and names that a module takes from another room than its own."""
    modules = {name.removesuffix(".__init__") for name in texts}
    found = []
    for module, text in texts.items():
        tree = ast.parse(text)
        taken, bound = [], {}
        for name, alias in imports(module, tree):
            taken.append(name)
            if name in modules:
                bound[alias] = name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in bound:
                taken.append(f"{bound[ast.unparse(node.value)]}.{node.attr}")
        found += [f"{module} takes {n}" for n in taken if is_private(n) and not same(module, n)]
    return found


def is_private(name):
    ours = name.startswith("ppl_diffusion.")
    return ours and any(p.startswith("_") and not p.startswith("__") for p in name.split("."))


def same(module, name):
    return module.split(".")[1] == name.split(".")[1]


def test_nothing_private_crosses_a_room():
    texts = sources()
    assert len(texts) > 100
    assert crossings(texts) == []


@pytest.mark.parametrize(
    ("statement", "taken"),
    [
        (f"from {ENGINE} import _start", f"{ENGINE}._start"),
        ("from ppl_diffusion.smc import _hidden", "ppl_diffusion.smc._hidden"),
        ("def f():\n    from ppl_diffusion.smc._h import g", "ppl_diffusion.smc._h.g"),
        ("from ..smc import _hidden", "ppl_diffusion.smc._hidden"),
        ("import ppl_diffusion.smc._hidden", "ppl_diffusion.smc._hidden"),
        ("from ppl_diffusion import _hidden", "ppl_diffusion._hidden"),
        (
            "from ppl_diffusion.smc import engine as e\ne._start()",
            "ppl_diffusion.smc.engine._start",
        ),
        (f"import {ENGINE} as e\ne._start()", f"{ENGINE}._start"),
    ],
)
def test_a_private_name_of_another_room_is_found(statement, taken):
    assert crossings({ENGINE: "", PLANTED: statement}) == [f"{PLANTED} takes {taken}"]


@pytest.mark.parametrize(
    "statement",
    [
        "from ppl_diffusion.handlers._hidden import _f",
        "from ppl_diffusion import __version__",
        "from torch import _C",
    ],
)
def test_private_names_of_the_room_and_of_others_libraries_are_not(statement):
    assert crossings({ENGINE: "", PLANTED: statement}) == []


@pytest.fixture
def lint(tmp_path):
    """Run import-linter on the sources with a statement planted in one room."""

    def run(room, statement):
        house = tmp_path / "ppl_diffusion"
        house.mkdir()
        for path in [*FOLDERS["ppl_diffusion"].iterdir(), ROOT / "models", ROOT / "inference"]:
            if path.name != room:
                (house / path.name).symlink_to(path)
        folder = ROOT / room if (ROOT / room).is_dir() else FOLDERS["ppl_diffusion"] / room
        (house / room).mkdir()
        for path in folder.iterdir():
            (house / room / path.name).symlink_to(path)
        (house / room / "planted.py").write_text(f"{statement}\n")
        command = "from importlinter.cli import lint_imports_command as run; run()"
        arguments = [sys.executable, "-c", command, str(ROOT / "pyproject.toml"), "--no-cache"]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, " ".join(done.stdout.split())

    return run


def test_imports_go_down_only(lint):
    code, said = lint("kernels", "from ppl_diffusion.denoisers import Denoiser")
    assert code == 0, said


@pytest.mark.parametrize(
    ("room", "statement"),
    [
        ("kernels", "def f():\n    from ppl_diffusion.smc import run_smc"),
        ("processes", "from ppl_diffusion.denoisers import Denoiser"),
        ("handlers", "from ppl_diffusion.diagnostics import summary"),
        ("models", "from ppl_diffusion.inference import SMC"),
        ("inference", "from ppl_diffusion.models import load"),
        ("commands", "from ppl_diffusion.testing import KernelContract"),
        ("smc", "from ppl_diffusion import handlers"),
    ],
)
def test_an_import_upward_is_found(lint, room, statement):
    code, said = lint(room, statement)
    assert code == 1
    assert f"ppl_diffusion.{room}.planted ->" in said
