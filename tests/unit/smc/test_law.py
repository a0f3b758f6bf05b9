"""Laws as data: equality, JSON, and one sentence."""

import json
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, FKSteering, Power, Tilt, methods
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import factor
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc
from ppl_diffusion.smc.law import Base, Law
from ppl_diffusion.testing.conditional import LabelledTables
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_potential

GOAL = toy_potential(3, 2)
CHAIN = toy_chain(num_steps=3)
SMALL = {"num_particles": 8, "num_runs": 2}


def law_of(method, chain=CHAIN, **options):
    return SMC(chain, GOAL, method=method, **SMALL, **options).run(seed=0).law


def other_network():
    process = CHAIN.kernel.process
    return ReverseChain(
        CHAIN.kernel.with_denoiser(TableDenoiser(random_joint(3, 2, seed=9), process)), 2
    )


@pytest.mark.parametrize(
    "method", [name for name, cls in methods().items() if cls.needs.any_target]
)
def test_a_law_survives_json(method):
    law = law_of(method)
    again = Law.from_json(json.loads(json.dumps(law.to_json())))
    assert again == law
    assert str(again) == str(law)
    assert hash(again) == hash(law)


def test_methods_with_one_law_are_equal():
    plain = run_smc(FeynmanKac(CHAIN, GOAL), 8).law
    for method in ("smc", "steering", "twisted", "soft-value", "tempering", "importance-sampling"):
        assert law_of(method).base == plain.base
        assert law_of(method).chains[0].steps == 3
    assert law_of("smc") == law_of("twisted")
    assert law_of("corrector") != law_of("smc")  # reveals in lockstep have another path law


@pytest.mark.parametrize(
    "other",
    [
        toy_chain(num_steps=4),
        toy_chain(num_steps=3, prompt=torch.tensor([-1, 2])),
        toy_chain("uniform", num_steps=3),
        other_network(),
    ],
    ids=["steps", "prompt", "noise", "network"],
)
def test_what_is_another_law_differs(other):
    assert FeynmanKac(other, GOAL).law != FeynmanKac(CHAIN, GOAL).law


def test_prompted_tokens_are_part_of_the_law():
    one, two = (toy_chain(prompt=torch.tensor([-1, token])) for token in (1, 2))
    assert FeynmanKac(one, GOAL).law != FeynmanKac(two, GOAL).law


def test_the_sentence_is_the_target_of_a_posterior():
    posterior = SMC(CHAIN, GOAL, **SMALL).run(seed=0)
    assert posterior.target == str(posterior.law)
    assert posterior.target == FeynmanKac(CHAIN, GOAL).target
    assert "p(path) * G(x0) of the 3-step reverse chain, normalised" in posterior.target
    assert "with log G = toy" in posterior.target


def test_what_is_not_exact_says_why():
    published = SMC(CHAIN, GOAL, method=FKSteering(kind="max", closing="published"), **SMALL)
    law = published.run(seed=0).law
    assert not law.exact
    assert str(law).startswith("approximately p(path) * exp(the largest of log G")
    best = law_of("best-of-n")
    assert not best.has_evidence
    assert "there is none to estimate" in str(best)


def test_a_chain_without_a_density_has_no_exact_law():
    class Timed(TableDenoiser):
        time_free = False

        def __init__(self, *args):
            super().__init__(*args)
            self.time_free = False

    denoiser = Timed(random_joint(3, 2, seed=0), Absorbing(3))
    kernel = OrderedKernel(denoiser.process, denoiser, length=2, clock="sampled")
    posterior = SMC(ReverseChain(kernel, 2), GOAL, **SMALL).run(seed=0)
    assert kernel.capability == "SAMPLE_ONLY"
    assert not posterior.exact
    assert "have no density (SAMPLE_ONLY)" in posterior.target


def test_a_composition_says_what_it_multiplies():
    law = SMC(Tilt(Power(CHAIN, 2.0), GOAL), **SMALL).run(seed=0).law
    assert "p^2" in law.product
    assert law.exact
    assert law != SMC(Tilt(Power(CHAIN, 3.0), GOAL), **SMALL).run(seed=0).law


def test_a_law_is_saved_with_its_posterior(tmp_path):
    posterior = SMC(CHAIN, GOAL, **SMALL).run(seed=0)
    assert ParticlePosterior.load(posterior.save(tmp_path / "run")).law == posterior.law


def test_a_damaged_law_is_refused(tmp_path):
    folder = SMC(CHAIN, GOAL, **SMALL).run(seed=0).save(tmp_path / "run")
    meta = json.loads((folder / "particles.json").read_text())
    meta["law"].pop("chains")
    (folder / "particles.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"damaged particle posterior: 'law' in .* is no law"):
        ParticlePosterior.load(folder)


def test_held_positions_are_counted_over_plates():
    base = replace(Base.of(CHAIN.expand([3]), "path"), clamped=3)
    assert base.held == ["clamped at 3 of 6 positions"]


def labelled(label):
    tables = LabelledTables([random_joint(3, 2, seed=seed) for seed in (0, 1)], Absorbing(3))
    kernel = InterpolatingKernel(Absorbing(3), tables, num_steps=3)
    return ReverseChain(kernel, 2, given={"label": torch.tensor(label)})


def observing(y):
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    pyro.sample("y", dist.Normal(x.sum(-1).double(), 1.0), obs=y)


def conditional():
    label = pyro.sample("label", dist.Bernoulli(0.5)).long()
    chain = ReverseChain(TABLES, 2, given={"label": label})
    factor("goal", GOAL, chain.x0(pyro.sample("path", chain)))


TABLES = labelled(0).kernel


def test_conditions_and_data_are_part_of_the_law():
    assert FeynmanKac(labelled(0), GOAL).law != FeynmanKac(labelled(1), GOAL).law
    one, same, two = (SMC(observing, **SMALL).run(torch.tensor(y)).law for y in (1.0, 1.0, 2.0))
    assert one == same != two


def test_conditions_that_are_drawn_are_no_part_of_the_law():
    runs = [("smc", 0), ("smc", 1), ("twisted", 0)]
    assert len({SMC(conditional, method=m, **SMALL).run(seed=s).law for m, s in runs}) == 1


def test_the_classes_of_a_network_have_different_laws():
    prior = MaskedDiffusion.build("abc", 2, dim=8, depth=1, heads=2, num_classes=2)

    def law(label):
        kernel = InterpolatingKernel(Absorbing(3), prior.labelled(label), num_steps=2)
        return FeynmanKac(ReverseChain(kernel, 2), GOAL).law

    assert len({law(label) for label in (0, 1, None)}) == 3
    assert "under label 1" in str(law(1))
