"""Pyro programs as inference reads them: names, errors, and what is refused before a run."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.handlers import clamp, steer, twist
from ppl_diffusion.inference import SMC, FKSteering, ParticleGibbs, Tempering, TwistedSampler
from ppl_diffusion.inference._program import Program
from ppl_diffusion.testing.toys import toy_chain, toy_potential

GOAL = toy_potential(3, 2)


def design(chain):
    pyro.factor("goal", GOAL(chain.x0(pyro.sample("path", chain))))


def narrow(chain):
    """It does not broadcast: the sum runs over particles too."""
    x = chain.x0(pyro.sample("path", chain))
    pyro.factor("goal", (x == 0).sum().double())


def empty():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def held(program):
    return clamp(program, tokens=torch.tensor([1, 2]), mask=torch.tensor([True, False]))


@pytest.mark.parametrize(
    "wrap",
    [held, lambda program: steer(program, potential=GOAL), lambda program: held(held(program))],
)
def test_a_handler_around_a_program_leaves_its_name(wrap):
    assert Program(wrap(design), (toy_chain(),), {}).name == "design"
    assert Program(partial(wrap(design), toy_chain()), (), {}).name == "design"


def test_a_twisted_program_keeps_its_name():
    twisted = twist(design, proposal=lambda step, carry, k: step)
    assert Program(twisted, (toy_chain(),), {}).name == "design"


def test_an_object_goes_by_its_class():
    class Assay:
        def __call__(self, chain):
            design(chain)

    assert Program(Assay(), (toy_chain(),), {}).name == "Assay"


@pytest.mark.parametrize("method", [SMC, FKSteering, TwistedSampler, Tempering, ParticleGibbs])
def test_errors_name_the_method_and_advise_what_it_has(method):
    with pytest.raises(ValueError, match=f"^{method.__name__}: empty has no unobserved"):
        method(empty, num_particles=4).run()
    with pytest.raises(ValueError, match=f"^{method.__name__}: .*narrow") as caught:
        method(narrow, num_particles=4).run(toy_chain())
    advice = "or pass vectorize_particles=False."
    if method not in (SMC, ParticleGibbs):
        advice = "or use ppl_diffusion.inference.SMC(..., vectorize_particles=False)."
    assert str(caught.value).endswith(advice)
