"""A method that a user registers is on the command line, with its own options."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from ppl_diffusion.cli import app, run
from ppl_diffusion.jobs.options import options
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.programs.method import METHODS

LENGTH = 8
RULE = '''
"""A steering rule: look ahead once, with a say of its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ppl_diffusion.inference import register
from ppl_diffusion.inference.bootstrap import LookingAhead


@register
@dataclass(frozen=True)
class Once(LookingAhead):
    """Look ahead once.

    :param num_trust: percent of the look-ahead that counts.
    :param half: in which half of the steps, "first" or "last".
    :param sd: a name that the command has already.
    :param eager: do it at the start of that half.
    """

    num_trust: int = 50
    half: Literal["first", "last"] = "last"
    sd: float | None = None
    eager: bool = True

    name: ClassVar[str] = "once"

    def __post_init__(self):
        super().__post_init__()
        if self.num_trust < 0:
            raise ValueError(f"Once: num_trust must be at least 0, got {self.num_trust}.")

    def look(self, run, state, group, generator):
        steps = len(run.groups) // 2
        at = steps * (self.half == "last") + (not self.eager)
        return self.num_trust / 100 * self.rate(run, state, generator) if group == at else None
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a prior and the rule in it, the working folder of the test."""
    (tmp_path / "my_methods.py").write_text(RULE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = MaskedDiffusion.build(list("ACGT"), LENGTH, name="tiny", dim=8, depth=1, heads=1)
    program.save(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    METHODS.pop("once", None)
    sys.modules.pop("my_methods", None)


QUICK = ["design", "tiny", "--particles", "6", "--runs", "3", "--steps", "4", "--gc", "0.4", "0.6"]
WEIGH = ["--ess-threshold", "1"]  # look-aheads matter where particles are resampled
OWN = ["--method-module", "my_methods", "--method", "once"]


def designed(folder, name, *words):
    out = folder / name
    done = CliRunner().invoke(app, [*QUICK, *OWN, *words, "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    return json.loads((out / "summary.json").read_text())


def test_its_options_are_flags_and_decide_what_it_does(folder):
    chosen = designed(folder, "a", "--trust", "100", "--half", "first", "--no-eager", *WEIGH)
    plain = designed(folder, "b", *WEIGH)
    assert chosen["method"] == plain["method"] == "once"
    asked = {"num_trust": 100, "half": "first", "eager": False}
    assert asked.items() <= chosen["settings"]["search"].items()
    usual = {"num_trust": 50, "half": "last", "eager": True}
    assert usual.items() <= plain["settings"]["search"].items()
    settings = json.loads((folder / "a" / "particles" / "particles.json").read_text())["settings"]
    assert asked.items() <= settings.items()
    # One law, another way there.
    assert chosen["exact"]
    assert chosen["law"] == plain["law"]
    assert chosen["log_evidence"] != plain["log_evidence"]


def test_a_field_called_as_a_flag_of_the_command_stands_beside_it(folder):
    summary = designed(folder, "a", "--method-sd", "5")
    assert summary["settings"]["question"]["rewards"] == []
    settings = json.loads((folder / "a" / "particles" / "particles.json").read_text())["settings"]
    assert settings["sd"] == 5


def test_its_runs_are_compared_with_others(folder, tmp_path, capsys):
    designed(folder, "a")
    assert (
        run([*QUICK, "--method", "smc", "--seed", "7", "--out", str(folder / "b"), "--quiet"]) == 0
    )
    assert run(["compare", "a", "b", "--json", "c.json"]) == 0
    rows = json.loads((folder / "c.json").read_text())["runs"]
    assert [row["method"] for row in rows] == ["once", "smc"]
    assert [row["target"] for row in rows] == ["A", "A"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trust", "-1"], "once: --trust must be at least 0, got -1"),
        (["--half", "middle"], "There is no half called 'middle': choose one of first, last"),
        (["--trust", "some"], "valid integer"),
        (["--children", "3"], "--children is no option of once"),
        (["--method-module", "nowhere"], "No module named 'nowhere'"),
    ],
)
def test_what_it_does_not_take_is_refused_in_one_sentence(words, sentence, folder, capsys):
    assert run([*QUICK, *OWN, *words]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert sentence in error
    assert error.count("\n") == 1


def test_it_is_no_method_where_nobody_imported_it(folder, capsys):
    assert run([*QUICK, "--method", "once"]) == 2
    assert "There is no method called 'once'" in capsys.readouterr().err


def test_importing_it_for_all_commands_does_too(folder):
    assert run(["--import", "my_methods", *QUICK, "--method", "once", "--quiet"]) == 0


def test_every_option_is_in_the_help(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    said = CliRunner().invoke(app, ["design", *OWN[:2], "--help"]).output
    assert "once (50): percent of the look-ahead that counts." in " ".join(said.split())
    for option in options().values():
        assert option.flag in said or f"--method{option.flag[1:]}" in said
