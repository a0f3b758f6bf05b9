"""A finished run for another target: unbiased evidence by enumeration, identities, refusals.

Every mean is held to its enumerated value within 4 standard errors: false alarm 6e-5 each.
"""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.errors import CapabilityError, ParticleCollapse, PotentialError
from ppl_diffusion.inference import SMC, ParticleGibbs, attach
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, reweighting, run_smc
from ppl_diffusion.testing import ExactChain, toy_chain, toy_potential, z_score

CHAIN = toy_chain(vocab_size=3, length=3, num_steps=3)
OLD, NEW = toy_potential(3, 3, scale=1.0), toy_potential(3, 3, seed=5, scale=1.0)
X0 = torch.cartesian_prod(*[torch.arange(3)] * 3)
LAW = ExactChain.of(CHAIN).x0_law()
ONE = Potential(lambda x: torch.zeros(x.shape[:-1]), name="one")
FORBID = Potential(lambda x: torch.where((x == 0).all(-1), -torch.inf, OLD(x)), name="no zeros")


def many(potential=OLD, runs=1500, n=16, threshold=0.5, seed=0):
    """Many small runs, resampled on the way."""
    generator = torch.Generator().manual_seed(seed)
    model = FeynmanKac(CHAIN, potential, twist="persistent")
    return run_smc(model, n, runs, ess_threshold=threshold, generator=generator)


TARGETS = {
    "temperature 2": ({"temperature": 2.0}, (), OLD, 0.5),
    "temperature 0.5": ({"temperature": 0.5}, (), OLD, 2.0),
    "its inverse": ({}, (Potential(lambda x: -OLD(x), name="inverse"),), OLD, -1.0),
    "prior": ({}, (ONE,), OLD, 0.0),
    "another potential": ({}, (NEW,), NEW, 1.0),
    "a constraint": ({}, (FORBID,), FORBID, 1.0),
}


@pytest.mark.parametrize("threshold", [0.5, 1.1])
@pytest.mark.parametrize("name", TARGETS)
def test_evidence_stays_unbiased(name, threshold):
    options, args, potential, power = TARGETS[name]
    posterior = many(threshold=threshold).reweight(*args, force=True, **options)
    log_g = potential(X0)
    weight = LAW * torch.where(log_g > -torch.inf, power * log_g, -torch.inf).exp()
    assert abs(z_score(posterior.log_evidence.exp(), float(weight.sum()))) < 4
    # and so is the unnormalised mean of anything
    ones = posterior.expectation(lambda x0: (x0 == 1).sum(-1)).nan_to_num(0.0)
    truth = float((weight * (X0 == 1).sum(-1)).sum())
    assert abs(z_score(posterior.log_evidence.exp() * ones, truth)) < 4


@pytest.mark.parametrize(
    "mutant",
    [
        lambda p, w: p.log_evidence + w.log_mean,  # weights counted as if they were not normalised
        lambda p, w: p.log_evidence,  # the old evidence
        lambda p, w: w.log_sum,  # the ratio alone
    ],
)
def test_wrong_evidences_are_found_out(monkeypatch, mutant):
    right = reweighting._with_weights

    def wrong(posterior, weights, new):
        return dataclasses.replace(
            right(posterior, weights, new), log_evidence=mutant(posterior, weights)
        )

    monkeypatch.setattr(reweighting, "_with_weights", wrong)
    posterior = many().reweight(NEW, force=True)
    assert abs(z_score(posterior.log_evidence.exp(), float((LAW * NEW(X0).exp()).sum()))) > 8


def test_a_potential_of_one_gives_the_mass():
    """The free test that the code is right: what is left of the prior is what the run says."""
    posterior = many(runs=20)
    one = posterior.reweight(lambda x0: torch.zeros(x0.shape[:-1]), force=True)
    torch.testing.assert_close(one.log_evidence, posterior.log_mass[:, -1])


def test_the_same_potential_changes_nothing():
    posterior = many(FORBID, runs=20, n=64)
    assert bool((posterior.log_potential == -torch.inf).any())  # 0 / 0 is no NaN
    same = posterior.reweight(FORBID)
    torch.testing.assert_close(same.log_weights, posterior.log_weights)
    torch.testing.assert_close(same.log_evidence, posterior.log_evidence)
    assert same.law == posterior.law
    assert same.settings["reweighted_from"]["target"] == posterior.target
    ratio = torch.tensor(same.settings["log_evidence_ratio"])
    torch.testing.assert_close(ratio, torch.zeros(20), atol=1e-6, rtol=0)


def test_what_was_excluded_cannot_come_back():
    strict, loose = many(FORBID, runs=20, n=64), many(runs=20, n=64)
    with pytest.raises(CapabilityError, match=r"\d+ particles .* were excluded by the old one"):
        strict.reweight(OLD)
    forced = strict.reweight(OLD, force=True)
    assert not forced.exact
    assert "are missing" in forced.target
    assert bool((forced.log_weights[strict.log_potential == -torch.inf] == -torch.inf).all())
    tight = loose.reweight(FORBID)
    assert tight.exact
    assert bool((tight.weights[(loose.x0 == 0).all(-1)] == 0).all())


def test_words_costs_and_lineage():
    posterior = many(runs=4, n=64)
    other = posterior.reweight(NEW)
    assert "log G = toy" in other.target
    assert "(toy) / 2" in posterior.reweight(temperature=2.0).target
    assert torch.equal(other.ancestors, posterior.ancestors)
    assert torch.equal(other.log_mass, posterior.log_mass)
    assert other.num_evaluations == posterior.num_evaluations
    assert other.num_potential_calls > posterior.num_potential_calls
    torch.testing.assert_close(other.ess[:, -1], 1 / (other.weights**2).sum(-1))
    torch.testing.assert_close(other.log_evidence_steps[:, -1], other.log_evidence)
    pooled = other.pooled_log_evidence - posterior.pooled_log_evidence
    assert other.settings["log_evidence_ratio_pooled"] == pytest.approx(pooled)
    assert "reweighted" not in {verdict.kind for verdict in other.warnings}
    twice = other.reweight(OLD)
    torch.testing.assert_close(twice.log_evidence, posterior.log_evidence)


def test_weights_that_are_not_to_be_used_are_refused():
    posterior = many(runs=4, n=64, threshold=1.1)
    steep = Potential(lambda x0: 20.0 * NEW(x0), name="steep")
    with pytest.raises(CapabilityError, match="effective sample size of a run falls to"):
        posterior.reweight(steep)
    forced = posterior.reweight(steep, force=True)
    reasons = forced.settings["reweighted_from"]["forced"]
    assert "effective sample size" in " ".join(reasons)
    assert "earlier resampling followed the old potential" in " ".join(forced.warnings)
    one_root = dataclasses.replace(posterior, eve=torch.zeros_like(posterior.eve))
    with pytest.raises(CapabilityError, match=r"1\.0 root ancestors"):
        one_root.reweight(temperature=1.1)
    never = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf))
    with pytest.raises(ParticleCollapse, match="no particle of the run meets"):
        posterior.reweight(never)


@pytest.mark.parametrize(
    "wrong", [-1, 0.0, math.inf, math.nan, "a", None, True, torch.ones(2)], ids=repr
)
def test_temperatures_are_positive_numbers(wrong):
    with pytest.raises(ValueError, match="reweight: temperature must be a positive, finite number"):
        many(runs=1).reweight(temperature=wrong, force=True)


@pytest.mark.parametrize(("args", "options"), [((), {"y": 1.0}), ((OLD, NEW), {})])
def test_a_bare_chain_has_no_arguments(args, options):
    with pytest.raises(TypeError, match="reweight: the result of a bare chain takes one new"):
        many(runs=1).reweight(*args, **options)


def test_a_heavy_tail_is_refused():
    posterior = many(runs=1, n=512, threshold=0.0)
    pareto = -0.99 * torch.rand(512, generator=torch.Generator().manual_seed(0)).double().log()
    tail = dataclasses.replace(posterior, log_potential=-2 * pareto[None])
    with pytest.raises(CapabilityError, match=r"k-hat of the new weights is .* \(limit 0.7\)"):
        tail.reweight(ONE)


def test_searches_have_no_weights_to_change():
    found = SMC(CHAIN, OLD, method="beam", num_particles=16).run(seed=0)
    with pytest.raises(CapabilityError, match="exact for no law"):
        found.reweight(NEW)


# Programs: the same latents at other arguments.


def assay(y, centre=0.0, chain=CHAIN):
    gain = pyro.sample("gain", dist.Normal(torch.tensor(centre).double(), 1.0))
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    pyro.deterministic("centred", gain - centre)
    late = pyro.sample("late", dist.Normal((x == 0).sum(-1).double(), 0.5))
    pyro.sample("y", dist.Normal(gain + late, 0.7), obs=y)


def evidence(y, centre=0.0):
    mean = centre + (X0 == 0).sum(-1).double()
    return float((LAW * dist.Normal(mean, math.sqrt(1 + 0.25 + 0.49)).log_prob(y).exp()).sum())


Y = torch.tensor(1.0).double()
SIZE = {"num_particles": 24, "num_runs": 1000, "twist": "persistent"}


@pytest.mark.parametrize("changes", [{"y": Y + 0.7}, {"y": Y, "centre": 0.8}])
def test_a_program_at_other_arguments(changes):
    posterior = SMC(assay, **SIZE).run(Y, seed=3)
    other = posterior.reweight(force=True, **changes)
    assert abs(z_score(other.log_evidence.exp(), evidence(**changes))) < 4
    old = float(posterior.log_evidence.exp().mean())
    assert abs(z_score(other.log_evidence.exp(), old)) > 8  # it is another number
    centred = other.samples["gain"] - changes.get("centre", 0.0)
    torch.testing.assert_close(other.samples["centred"], centred)
    again = other.reweight(Y, force=True)
    torch.testing.assert_close(again.log_evidence, posterior.log_evidence)
    assert again.law == posterior.law


def test_a_law_of_latents_that_is_left_out_is_found_out(monkeypatch):
    """The mutant scores observations alone, as if the latents' law had not moved."""
    from ppl_diffusion.programs.run import ProgramRun

    posterior = SMC(assay, **SIZE).run(Y, seed=3)
    plain = ProgramRun.log_density
    monkeypatch.setattr(ProgramRun, "log_density", lambda run, latents: plain(run, []))
    other = posterior.reweight(Y, centre=0.6, force=True)
    assert abs(z_score(other.log_evidence.exp(), evidence(Y, 0.6))) > 6


def test_a_program_whose_chain_changes_is_refused():
    posterior = SMC(assay, num_particles=64, num_runs=2).run(Y, seed=0)
    with pytest.raises(CapabilityError, match="other chains, clamps or latents"):
        posterior.reweight(Y, chain=toy_chain(vocab_size=3, length=3, num_steps=4))
    with pytest.raises(TypeError, match="a program is its own potential"):
        posterior.reweight(NEW)


def replicates(y, scale=0.7):
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    with pyro.plate("replicate", 3):
        pyro.sample("y", dist.Normal((x == 0).sum(-1).double(), scale), obs=y)


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        ((torch.ones(5),), ValueError, r"RuntimeError: The size of tensor a \(5\)"),
        ((torch.full((3,), torch.nan),), PotentialError, "site 'y' of replicates has log-density"),
        ((), TypeError, "missing 1 required positional argument: 'y'"),
        (("a",), ValueError, "AttributeError"),
    ],
)
def test_arguments_that_a_program_fails_at_are_said(args, kind, said):
    posterior = SMC(replicates, num_particles=8, num_runs=1).run(torch.ones(3), seed=0)
    text = rf"reweight: replicates does not run at these arguments \(.*{said}"
    with pytest.raises(kind, match=text) as caught:
        posterior.reweight(*args, scale=0.8)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_a_loaded_posterior_has_to_be_told_its_program(tmp_path):
    posterior = SMC(assay, num_particles=256, num_runs=2, twist=None).run(Y, seed=0)
    loaded = ParticlePosterior.load(posterior.save(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"files do not keep it; .*attach\(posterior, program"):
        loaded.reweight(Y + 0.1)
    cooler = loaded.reweight(temperature=1.5)  # needs no program
    torch.testing.assert_close(
        cooler.log_evidence, posterior.reweight(temperature=1.5).log_evidence
    )
    with pytest.raises(ValueError, match="this is no result of assay at these arguments"):
        attach(loaded, assay, Y + 0.1)
    known = attach(loaded, assay, Y)
    torch.testing.assert_close(
        known.reweight(Y + 0.1).log_evidence, posterior.reweight(Y + 0.1).log_evidence
    )


def test_markov_chains_say_why_not():
    posterior = ParticleGibbs(
        CHAIN, OLD, num_particles=4, num_runs=1, num_samples=2, num_warmup=1
    ).run(seed=0)
    with pytest.raises(CapabilityError, match="carry no weights and no evidence"):
        posterior.reweight(NEW)
