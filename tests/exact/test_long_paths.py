"""M2 at 200 positions, continued: correctors, certain weights, conditional SMC and path moves.

The testbed is :class:`motif_problem.MotifProblem` with a prompt, four tokens, exact draws
of whole paths. Means are held at four standard errors: false alarm 6e-5 each for a normal mean,
below .1 % for the file, once, at the fixed seeds; what the exact value makes certain to round-off.
"""

from dataclasses import replace

import pytest
import torch
from motif_problem import MotifProblem

from ppl_diffusion.inference import SMC, Power, Product
from ppl_diffusion.potentials import Constraint
from ppl_diffusion.smc import FeynmanKac, rejuvenation
from ppl_diffusion.smc.conditional import conditional_smc, two_sided_evidence
from ppl_diffusion.smc.rejuvenation import OrderRefresh, PathModel, SuffixRefresh
from ppl_diffusion.testing import z_score

MAX_Z = 4.0
LONG = MotifProblem.random(4, 200).with_gaps(2, 10)
OTHER = replace(MotifProblem.random(4, 200, seed=5, sharpness=0.5), prompt=LONG.prompt)


def log_mass(initial, transition, tokens):
    """Sum a product along a chain over all ways to fill the masks; returns its log."""
    size = len(initial)
    allowed = (tokens[:, None] == torch.arange(size)) | (tokens == size)[:, None]
    law, scale = initial * allowed[0], 0.0
    for site in range(1, len(tokens)):
        total = law.sum()
        scale, law = scale + float(total.log()), (law / total) @ transition * allowed[site]
    return scale + float(law.sum().log())


def composed_log_z(experts):
    """``log sum_x prod_m P_m(x | prompt)**b_m``: elementwise powers of the transition matrices."""
    state = LONG.start[0]
    initial, transition = torch.ones(4).double(), torch.ones(4, 4).double()
    given = 0.0
    for expert, exponent in experts:
        initial = initial * expert.initial**exponent
        transition = transition * expert.transition**exponent
        given += exponent * log_mass(expert.initial, expert.transition, state)
    return log_mass(initial, transition, state) - given


@pytest.mark.parametrize("sites", ["random", "left-to-right", "confidence"])
@pytest.mark.parametrize("kind", ["power", "product"])
def test_correctors_have_the_closed_form(kind, sites):
    """T3.3, T3.4, T3.8: the mean of ``Z_hat`` under every order of reveals."""
    if kind == "power":
        composition, experts = Power(LONG.chain, 2.0), [(LONG, 2.0)]
    else:
        composition = Product(LONG.chain, OTHER.chain)
        experts = [(LONG, 1.0), (OTHER, 1.0)]
    options = {"num_particles": 4, "num_runs": 40, "store_path": False, "ess_threshold": 0.9}
    found = SMC(composition, method="corrector", sites=sites, **options).run(seed=1).log_evidence
    ratio = (found - composed_log_z(experts)).exp()
    assert abs(z_score(ratio, 1.0)) < MAX_Z
    assert float(ratio.std()) < 1.0


def certain(problem, **options):
    sampler = SMC(
        problem.chain,
        problem.potential,
        method="twisted",
        num_particles=2,
        num_runs=2,
        twist=lambda carry, k: problem.log_value(carry["tokens"]),
        store_path=False,
        **options,
    )
    log_z = sampler.run(seed=1).log_evidence
    expected = torch.full_like(log_z, problem.log_z)
    torch.testing.assert_close(log_z, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("surprise", [False, True])
def test_the_true_value_leaves_no_variance(surprise):
    """The clamped look-ahead at the exact value: every particle's weight is the evidence."""
    certain(LONG, surprise=surprise)


@pytest.mark.slow
def test_the_true_value_leaves_no_variance_without_a_prompt():
    """All 200 positions are revealed."""
    certain(MotifProblem.random(4, 200))


def test_an_observed_token_has_its_marginal():
    """T6.7: ``log G = log 1[x_l = c]``, against forward-backward."""
    site = int((LONG.prompt < 0).nonzero()[7])
    prior = replace(LONG, weight=0.0)
    token = int(prior.marginals[site].argsort()[1])
    seen = Constraint(lambda x0: (x0[..., site] != token).double(), penalty=3.0, name="seen")
    options = {"num_particles": 4, "num_runs": 100, "store_path": False}
    z_hat = SMC(LONG.chain, seen, method="twisted", **options).run(seed=2).log_evidence.exp()
    assert abs(z_score(z_hat, float(prior.marginals[site, token]))) < MAX_Z


def test_conditional_smc_keeps_the_posterior():
    """T7.1: from exact draws of paths, the mean number of motifs after one sweep."""
    generator = torch.Generator().manual_seed(0)
    path = LONG.draw_paths(100, generator)
    fk = FeynmanKac(LONG.chain, LONG.potential)
    run = conditional_smc(fk, path, num_particles=4, ess_threshold=0.9, generator=generator)
    after = LONG.occurrences(run.path[:, -1])
    assert abs(z_score(after, LONG.mean_occurrences)) < MAX_Z
    assert float((run.path[:, -1] != path[:, -1]).any(-1).double().mean()) > 0.5


def test_evidence_from_both_sides():
    """T7.7: one exact draw per run brackets ``log Z``, and both means are exact."""
    generator = torch.Generator().manual_seed(1)
    bounds = two_sided_evidence(
        FeynmanKac(LONG.chain, LONG.potential),
        LONG.draw_paths(60, generator),
        num_particles=4,
        generator=generator,
    )
    assert z_score(bounds.lower, LONG.log_z) < 0 < z_score(bounds.upper, LONG.log_z)
    assert abs(z_score((bounds.lower - LONG.log_z).exp(), 1.0)) < MAX_Z
    assert abs(z_score((LONG.log_z - bounds.upper).exp(), 1.0)) < MAX_Z


def test_masking_again_keeps_the_posterior():
    """T7.3, T7.4: a new order is always accepted; a suffix of reveals by the change of ``G``."""
    generator = torch.Generator().manual_seed(2)
    model = PathModel(LONG.chain, LONG.potential)
    start = model.state(LONG.draw_paths(150, generator)[:, None])
    state, ordered = OrderRefresh()(model, start, generator=generator)
    assert bool(ordered.all())
    assert torch.equal(state.x0, start.x0)
    # The last 190 steps of the chain hold the last 10 of its 20 reveals.
    state, accepted = SuffixRefresh(190)(model, state, generator=generator)
    assert abs(z_score(LONG.occurrences(state.x0[:, 0]), LONG.mean_occurrences)) < MAX_Z
    assert 0.2 < float(accepted.double().mean()) < 1
    assert bool((state.x0 != start.x0).any())


def test_a_suffix_that_is_always_accepted_loses_motifs(monkeypatch):
    """The failing twin: paths drift towards the prior, and one move is enough to see it."""

    def accept_all(state, proposed, log_ratio, generator):
        return proposed, torch.ones_like(log_ratio, dtype=torch.bool)

    monkeypatch.setattr(rejuvenation, "accept", accept_all)
    generator = torch.Generator().manual_seed(2)
    model = PathModel(LONG.chain, LONG.potential)
    state = model.state(LONG.draw_paths(150, generator)[:, None])
    state, _ = SuffixRefresh(190)(model, state, generator=generator)
    assert z_score(LONG.occurrences(state.x0[:, 0]), LONG.mean_occurrences) < -MAX_Z
