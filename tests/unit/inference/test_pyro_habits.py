"""What Pyro's users do with a program works on one with chain sites, or says what to do instead.

Comparisons are 4 standard errors: false alarm 6e-5 each (two-sided), at fixed seeds.
"""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.infer.inspect import get_model_relations

import ppl_diffusion as ppd
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import clamp, steer, twist, unroll
from ppl_diffusion.inference import SMC, ParticleGibbs, methods
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.testing import random_joint, toy_chain, toy_potential
from ppl_diffusion.testing.conditional import LabelledTables
from ppl_diffusion.testing.oracles import ExactChain, z_score

CHAIN = toy_chain(num_steps=3)  # 3 tokens, 2 positions
LAW = ExactChain.of(CHAIN).x0_law()
SEQUENCES = torch.cartesian_prod(torch.arange(3), torch.arange(3))
ZEROS = (SEQUENCES == 0).sum(-1).double()
PRIOR_MEAN = float((LAW * ZEROS).sum())
NOISE, SIZE = 0.5, {"num_particles": 8, "num_runs": 100}
Y = torch.tensor([1.5, 2.0], dtype=torch.float64)
GOAL = toy_potential(3, 2)
PROCESS = CHAIN.kernel.process
TABLES = [random_joint(3, 2, seed=seed) for seed in (1, 2, 3)]
LABELLED = OrderedKernel(PROCESS, LabelledTables(TABLES, PROCESS), length=2)
FIXED = {"step_size": 0.7, "adapt_step_size": False, "adapt_mass_matrix": False}
GIBBS = {"num_particles": 4, "num_runs": 1, "num_samples": 2, "num_warmup": 1}


def assay(y=None):
    shift = pyro.sample("shift", dist.Normal(torch.zeros(()).double(), 1.0))
    x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
    count = pyro.deterministic("count", (x == 0).sum(-1).double())
    with pyro.plate("replicate", 2):
        pyro.sample("y", dist.Normal(shift + count, NOISE), obs=y)


def conditioned(**data):
    return pyro.condition(assay, data=data)


# Conditions on deterministic sites.


@pytest.mark.parametrize("method", methods())
def test_a_condition_on_the_clean_sequence_is_sent_to_clamp(method):
    runner = SMC(conditioned(x=torch.tensor([0, 1])), method=method, num_particles=8)
    with pytest.raises(CapabilityError, match=r"'x' observes nothing.*chain 'path'.*clamp\(model"):
        runner.run(Y, seed=0)


def test_so_does_particle_gibbs_and_a_condition_from_outside():
    tokens = torch.tensor([0, 1])
    with pytest.raises(CapabilityError, match=r"ParticleGibbs: in assay: .*clamp\(model"):
        ParticleGibbs(conditioned(x=tokens), **GIBBS).run(Y, seed=0)
    runner = SMC(assay, num_particles=4, vectorize_particles=False)
    with pytest.raises(CapabilityError, match=r"clamp\(model"), pyro.condition(data={"x": tokens}):
        runner.run(Y, seed=0)


def hints(x0):
    return (x0 == 0).sum(-1).double()


HANDLERS = {
    "steer": lambda program: steer(program, potential=hints),
    "twist": lambda program: twist(program, logits=lambda carry, log_probs, k: log_probs),
    "clamp": lambda program: clamp(
        program, tokens=torch.tensor([0, 1]), mask=torch.tensor([True, False])
    ),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("inside", [True, False])
def test_handlers_catch_it_in_plain_pyro(handler, inside):
    wrap, tokens = HANDLERS[handler], torch.tensor([0, 1])
    inner = wrap(conditioned(x=tokens)) if inside else pyro.condition(wrap(assay), {"x": tokens})
    with pytest.raises(CapabilityError, match=f"{handler}: pyro.condition .*clamp"):
        Importance(inner, num_samples=2).run(Y)


def test_a_clean_sequence_is_no_path():
    """In plain Pyro, too: the site of the chain observed as if it were its end."""
    with pytest.raises(ValueError, match=r"expected a path \(\*batch, 4, 2\).*clamp"):
        poutine.trace(conditioned(path=torch.tensor([0, 1]))).get_trace()
    with pytest.raises(ValueError, match=r"expected a path .*clamp"):
        SMC(conditioned(path=torch.tensor([0, 1]))).run(Y)


def test_clamp_answers_what_the_condition_asked():
    """Evidence of the sequence and the data, in closed form; 4 s.e."""
    tokens = torch.tensor([0, 2])
    held = clamp(assay, tokens=tokens, mask=torch.ones(2, dtype=torch.bool))
    posterior = SMC(held, **SIZE).run(Y, seed=0)
    index = int((tokens == SEQUENCES).all(-1).nonzero())
    total = torch.eye(2, dtype=torch.float64) * NOISE**2 + 1
    density = dist.MultivariateNormal(ZEROS[index].expand(2), total).log_prob(Y).exp()
    assert abs(z_score(posterior.log_evidence.exp(), float(LAW[index] * density))) < 4
    assert (posterior.x0 == tokens).all()


def test_a_condition_on_what_is_computed_is_refused_and_an_intervention_is_not():
    with pytest.raises(CapabilityError, match=r"'count' observes nothing.*pyro\.do"):
        SMC(conditioned(count=torch.tensor(1.0).double())).run(Y)
    done = pyro.do(assay, data={"count": torch.tensor(1.0).double()})
    posterior = SMC(done, **SIZE).run(Y, seed=0)
    total = torch.eye(2, dtype=torch.float64) * NOISE**2 + 1
    density = dist.MultivariateNormal(torch.ones(2).double(), total).log_prob(Y).exp()
    assert abs(z_score(posterior.log_evidence.exp(), float(density))) < 4


def test_a_condition_that_changes_nothing_is_no_condition():
    path = torch.tensor([[3, 3], [3, 1], [0, 1], [0, 1]])
    for extra in ({}, {"x": torch.tensor([0, 1])}):
        program = steer(conditioned(path=path, **extra), potential=hints)
        with pytest.raises(ValueError, match="no reverse-chain site"):  # it is observed
            program(Y)
    constant = pyro.condition(
        lambda: (pyro.deterministic("c", torch.ones(())), assay(Y)), {"c": Y[0]}
    )
    SMC(constant, num_particles=2).run(seed=0)


# obs_mask.


def partly(covariate, y, mask):
    """The first of two covariates is known, the second of two readings is missing."""
    with pyro.plate("covariate", 2):
        z = pyro.sample(
            "z", dist.Bernoulli(0.3), obs=covariate, obs_mask=torch.tensor([True, False])
        )
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    mean = (x == 0).sum(-1).double() + z.sum(-1, keepdim=True)
    with pyro.plate("replicate", 2):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y, obs_mask=mask)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("method", ["smc", "importance-sampling", "soft-value", "twisted"])
def test_missing_values_are_latents(method, vectorize):
    """Evidence, the missing covariate and the missing reading, by enumeration; 4 s.e."""
    size = {"num_particles": 8, "num_runs": 100 if vectorize else 12}
    runner = SMC(partly, method=method, vectorize_particles=vectorize, **size)
    data = torch.tensor([1.0, 0.0]), torch.tensor([2.5, math.nan]).nan_to_num().double()
    posterior = runner.run(*data, torch.tensor([True, False]), seed=2)
    other = torch.arange(2).double()
    mean = ZEROS[:, None] + 1 + other
    density = dist.Normal(mean, NOISE).log_prob(data[1][0]).exp()
    weight = LAW[:, None] * torch.tensor([0.7, 0.3]).double() * 0.3 * density
    estimate = posterior.log_evidence.exp()
    assert abs(z_score(estimate, float(weight.sum()))) < 4
    for value, table in (("z", other.expand_as(weight)), ("y", mean)):
        found = posterior.expectation(lambda s, name=value: s[name][..., 1].double())
        found = torch.where(posterior.alive, found, 0.0)
        assert abs(z_score(estimate * found, float((weight * table).sum()))) < 4


def test_what_is_masked_is_no_data_and_the_mask_is():
    def law(y, *mask):
        return (
            SMC(partly, num_particles=2)
            .run(torch.ones(2), torch.tensor(y), torch.tensor(mask), seed=0)
            .law
        )

    first = law([1.0, 2.0], True, False)
    assert law([1.0, 7.0], True, False) == first
    assert law([1.0, 2.0], True, True) != first


def test_fills_keep_to_their_own_law_where_they_are_observed():
    """NUTS would drift along the flat law that Pyro gives them there."""

    def covariate():
        with pyro.plate("measured", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=Y, obs_mask=torch.tensor([True, False]))
        pyro.sample("path", CHAIN)
        pyro.sample("w", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.tensor(1.0))

    posterior = ParticleGibbs(covariate, **{**GIBBS, "num_samples": 30}, nuts=FIXED).run(seed=0)
    fills = posterior.samples["z_unobserved"]
    assert torch.equal(posterior.samples["z"][..., 0], Y[:1].expand(1, 30))
    assert float(fills[..., 0].square().mean()) < 3


def test_a_latent_that_nothing_reads_is_drawn_and_not_moved():
    """Discrete or not; one that is read through a Python number is no such latent."""

    def predicted():
        n = (CHAIN.x0(pyro.sample("path", CHAIN)) == 0).sum(-1).double()
        pyro.sample("y", dist.Normal(n, NOISE), obs=Y[0])
        rate = pyro.sample("rate", dist.LogNormal(n, 0.1))
        pyro.sample("next", dist.Poisson(rate))

    def hidden():
        seen = pyro.sample("seen", dist.Bernoulli(0.5))
        pyro.sample("path", CHAIN)
        pyro.sample("y", dist.Normal(float(seen), NOISE), obs=Y[0])

    draws = ParticleGibbs(predicted, **GIBBS).run(seed=0)
    assert {"rate", "next"} <= set(draws.samples)
    posterior = SMC(predicted, **SIZE).run(seed=1)
    weight = LAW * dist.Normal(ZEROS, NOISE).log_prob(Y[0]).exp()
    mean = float((weight * (ZEROS + 0.005).exp()).sum())
    found = posterior.log_evidence.exp() * posterior.expectation(lambda s: s["next"].double())
    assert abs(z_score(found, mean)) < 4
    with pytest.raises(CapabilityError, match="'seen' of hidden is discrete"):
        ParticleGibbs(hidden, **GIBBS, vectorize_particles=False).run(seed=0)


# Posterior predictive.


def resampled(posterior, num):
    """The recipe of the page: latents alone, and a 1 for the plate that the chain is not in."""
    draws = posterior.resample(num, generator=torch.Generator().manual_seed(1))
    return draws, {"shift": draws["shift"], "path": draws["path"][:, None]}


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_takes_posterior_draws(parallel):
    """New readings scatter about those of their own draw; 4 s.e. of mean and mean square."""
    num = 600 if parallel else 60
    draws, latents = resampled(SMC(assay, num_particles=64, num_runs=4).run(Y, seed=0), num)
    new = Predictive(assay, latents, parallel=parallel)()
    assert new["y"].shape == (num, 2)
    assert torch.equal(new["x"][:, 0], draws["x"])
    own = draws["shift"] + draws["count"]
    assert len(own.unique()) > 20
    errors = (new["y"] - own[:, None]) / NOISE
    assert abs(z_score(errors.flatten(), 0.0)) < 4
    assert abs(z_score(errors.flatten().square(), 1.0)) < 4


def test_predictive_takes_sequences_alone():
    """Without densities a condition on the clean sequence is what comes after it."""
    designs = SEQUENCES[:4, None]
    new = Predictive(assay, {"x": designs, "shift": torch.zeros(4).double()}, parallel=True)()
    assert float((new["y"] - ZEROS[:4, None]).abs().max()) < 5 * NOISE


def test_prior_predictive_draws_chains():
    drawn = Predictive(assay, num_samples=400, parallel=True)()
    assert drawn["path"].shape == (400, 1, 4, 2)
    count = (CHAIN.x0(drawn["path"]) == 0).sum(-1).double()
    assert torch.equal(count, drawn["count"])
    assert abs(z_score(count.flatten(), PRIOR_MEAN)) < 4


# Pictures of a program.


def labelled(y=None):
    label = pyro.sample("label", dist.Categorical(torch.ones(3)))
    with pyro.plate("tube", 2):
        chain = ReverseChain(LABELLED, 2, given={"label": label})
        x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
        pyro.sample("y", dist.Normal((x == 0).sum(-1).double(), NOISE), obs=y)


def test_relations_of_chain_sites_are_seen():
    found = get_model_relations(labelled, model_args=(Y,))
    assert found["sample_sample"]["path"] == ["label"]
    assert found["sample_sample"]["y"] == ["path"]
    assert found["sample_dist"]["path"] == "ReverseChain"
    assert found["plate_sample"] == {"tube": ["path", "x", "y"]}
    steps = get_model_relations(unroll(assay), model_args=(Y,))["sample_sample"]
    assert steps["path_2"] == ["path_1"]


def test_a_program_with_chains_is_drawn():
    pytest.importorskip("graphviz")
    options = {"render_distributions": True, "render_deterministic": True}
    source = pyro.render_model(labelled, model_args=(Y,), **options).source
    assert "label -> path" in source
    assert "label=tube" in source
    assert "path ~ ReverseChain" in source


# Variational inference of what is no sequence.


def around_the_chain(auto):
    """An autoguide of the other latents, with the chain as its own proposal."""
    latents = auto(poutine.block(assay, hide=["path"]))

    def guide(y=None):
        latents(y)
        pyro.sample("path", CHAIN)

    return latents, guide


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_svi_with_a_chain_site(auto):
    """The best Gaussian of the mean field family, in closed form; within .15."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    latents, guide = around_the_chain(auto)
    svi = SVI(assay, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(8, vectorize_particles=True))
    losses = torch.tensor([svi.step(Y) for _ in range(120)])
    precision = 1 + 2 / NOISE**2
    centre = (float(Y.sum()) - 2 * PRIOR_MEAN) / NOISE**2 / precision
    assert abs(float(latents.median()["shift"]) - centre) < 0.15
    assert losses[-20:].mean() < losses[:20].mean()


def test_an_autoguide_of_the_whole_program_says_to_hide_the_chain():
    with pytest.raises(ValueError, match=r"discrete sample site 'path'.*poutine\.block"):
        AutoNormal(assay)(Y)


# Names.


def test_plates_may_have_any_name_and_place():
    def nested():
        with pyro.plate("particles", 2, dim=-2), pyro.plate("chain", 3, dim=-1):
            x = CHAIN.x0(pyro.sample("path", CHAIN))
            pyro.factor("goal", GOAL(x))

    assert SMC(nested, num_particles=2).run(seed=0).samples["path"].shape == (1, 2, 2, 3, 4, 2)
    draws = ParticleGibbs(nested, **GIBBS).run(seed=0)
    assert draws.x0.shape == (1, 2, 2, 3, 2)


def test_the_rooms_are_shown():
    """Before any of them is imported, as a reader's shell would ask."""
    code = "import ppl_diffusion as p; print(*dir(p))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = shown.stdout.split()
    assert {"inference", "diagnostics", "models", "programs", "CapabilityError"} <= set(names)
    assert "import_module" not in names
    assert all(hasattr(ppd, name) for name in names)
