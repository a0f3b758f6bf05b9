"""A steering rule, a potential: each defined here alone, and at home everywhere.

(A kernel with a latent of its own is in ``kernels/test_blocks.py``, a model program in
``models/test_extension.py``, a rule on the command line in ``test_cli_own_method.py``.)
"""

import inspect
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pytest
import torch

from ppl_diffusion.inference import SMC, Method, check, methods, register
from ppl_diffusion.potentials import AbstractPotential
from ppl_diffusion.programs.method import METHODS
from ppl_diffusion.smc import ParticlePosterior
from ppl_diffusion.testing import PotentialContract
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

CHAIN, GOAL = toy_chain(num_steps=4), toy_potential(3, 2)


@dataclass(frozen=True)
class Tempered(Method):
    """Look ahead at every so many steps, at a power that grows."""

    name: ClassVar[str] = "tempered-looks"
    every: int = 2

    def look(self, run, state, group, generator):
        if group % self.every:
            return None
        return group / len(run.groups) * run.look(state, generator)


@pytest.fixture(autouse=True)
def registered():
    register(Tempered)
    yield
    METHODS.pop("tempered-looks")


def test_the_rule_is_short():
    assert len(inspect.getsource(Tempered).splitlines()) <= 15


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_the_rule_has_the_right_evidence(process):
    """4 standard errors: false alarm 6e-5."""
    chain = toy_chain(process, num_steps=4)
    options = {"num_particles": 16, "num_runs": 400, "ess_threshold": 0.9}
    posterior = SMC(chain, GOAL, method="tempered-looks", every=1, **options).run(seed=1)
    assert posterior.exact
    assert abs(z_score(posterior.log_evidence.exp(), ExactChain.of(chain).evidence(GOAL))) < 4


def test_the_rule_runs_programs():
    def program():
        gain = pyro.sample("gain", pyro.distributions.Normal(0.0, 1.0))
        pyro.factor("goal", GOAL(CHAIN.x0(pyro.sample("path", CHAIN))) + 0.0 * gain)

    posterior = SMC(program, method="tempered-looks", num_particles=8).run(seed=0)
    assert set(posterior.samples) == {"gain", "path"}


def test_the_rule_is_listed_and_tried():
    assert methods()["tempered-looks"].exact
    found = check(CHAIN, GOAL, num_evaluations=4000, seed=0)
    assert "tempered-looks" in str(found)


def test_its_result_is_saved_with_its_options(tmp_path):
    posterior = SMC(CHAIN, GOAL, method="tempered-looks", num_particles=8).run(seed=0)
    again = ParticlePosterior.load(posterior.save(tmp_path / "run"))
    assert again.settings["method"] == "tempered-looks"
    assert again.settings["every"] == 2
    assert again.law == posterior.law


def test_a_name_is_taken_once():
    @dataclass(frozen=True)
    class Other(Method):
        name: ClassVar[str] = "smc"

    with pytest.raises(ValueError, match="the method name 'smc' is taken by Bootstrap"):
        register(Other)


def test_options_are_those_of_the_method():
    with pytest.raises(TypeError, match=r"'tempered-looks' has no option 'kind'; it has every"):
        SMC(CHAIN, GOAL, method="tempered-looks", kind="max")
    with pytest.raises(ValueError, match="unknown method 'steer'; choose one of"):
        SMC(CHAIN, GOAL, method="steer")
    with pytest.raises(TypeError, match="given beside a method that is made already"):
        SMC(CHAIN, GOAL, method=methods()["tempered-looks"](), every=3)


class Alternates(AbstractPotential):
    """Likes neighbours that differ."""

    name = "alternates"

    def log_potential(self, x0):
        return (x0[..., 1:] != x0[..., :-1]).sum(-1).double()


class TestAlternates(PotentialContract):
    def make_potential(self):
        return Alternates()

    def make_sequences(self):
        return torch.cartesian_prod(*[torch.arange(3)] * 3)


def test_the_potential_is_tilted_by():
    posterior = SMC(CHAIN, Alternates(), num_particles=8).run(seed=0)
    assert "log G = alternates" in posterior.target
    assert torch.isfinite(posterior.log_evidence).all()
