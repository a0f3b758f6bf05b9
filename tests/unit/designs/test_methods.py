"""Every method of the command line has the evidence of the law it declares, by enumeration."""

import dataclasses
import itertools
import math

import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.designs.methods import HeldFill, infer
from ppl_diffusion.designs.program import Target
from ppl_diffusion.designs.question import Job
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference import Bootstrap, Refinement, TwistedSampler, methods
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.options import DEFAULTS, options, part_of
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.kernels.completions import TableCompletions
from ppl_diffusion.potentials import GCContent, Potential
from ppl_diffusion.smc.twists import ArgmaxFill, PersistentFill

LENGTH, NUM_RUNS = 4, 600
INITIAL = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
TRANSITION = torch.tensor(
    [[0.5, 0.2, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3], [0.25, 0.25, 0.3, 0.2], [0.2, 0.1, 0.3, 0.4]],
    dtype=torch.float64,
)
FIXED = torch.tensor([-1, 2, -1, -1])
EVERY = torch.tensor(list(itertools.product(range(4), repeat=LENGTH)))


def make_target(process, pattern=None):
    """Return a question about a chain whose denoiser is exact; nobody asks for its prior."""
    kernel = InterpolatingKernel(process, MarkovDenoiser(INITIAL, TRANSITION, process), num_steps=4)
    potentials = {
        "gc": GCContent(0.0, 0.75),
        "tilt": Potential(lambda x0: 0.7 * (x0 == 3).sum(-1), name="tilt"),
    }
    return Target(Job("toy"), None, ReverseChain(kernel, LENGTH), potentials, pattern)


def exact_log_evidence(target, *, ordered, power=1.0):
    """Sum over all sequences: with one site per step an exact denoiser has the data law."""
    if ordered:
        log_p = INITIAL[EVERY[:, 0]].log()
        log_p = log_p + TRANSITION[EVERY[:, :-1], EVERY[:, 1:]].log().sum(-1)
    else:
        log_p = target.chain.marginal().log_prob(EVERY)
    log_g = target.potential(EVERY)
    if target.pattern is not None:
        held = ((target.pattern == EVERY) | (target.pattern < 0)).all(-1)
        log_g = log_g.masked_fill(~held, -math.inf)
    return float(torch.logsumexp(power * log_p + log_g, -1))


MASKED = [
    {"method": "smc"},
    {"method": "soft-value", "num_children": 3, "alpha": 0.5},
    {"method": "steering", "kind": "max", "every": 2},
    {"method": "twisted"},
    {"method": "twisted", "twist": "persistent", "fills": 2},
    {"method": "corrector"},
    {"method": "corrector", "power": 2.0},
    {"method": "corrector", "twist": "none"},
    {"method": "importance-sampling"},
    {"method": "guided-lineages", "proposal": "clamped"},
]
CASES = [
    *((Absorbing, options, pattern) for options in MASKED for pattern in (None, FIXED)),
    (Uniform, {"method": "smc"}, FIXED),
    (Uniform, {"method": "soft-value"}, FIXED),
    (Uniform, {"method": "steering", "kind": "add"}, None),
    (Uniform, {"method": "twisted"}, None),
    (Uniform, {"method": "corrector"}, None),
    (Absorbing, {"method": "twisted", "proposal": "reweighted", "fills": 4}, None),
    (Absorbing, {"method": "corrector", "form": "path"}, None),
    (Absorbing, {"method": "tempering"}, None),
]
REVEALING = ("twisted", "corrector", "guided-lineages")


def make_search(method="smc", *, num_particles=64, num_runs=4, num_steps=4, **options):
    numbers = {"num_particles": num_particles, "num_runs": num_runs, "num_steps": num_steps}
    own = {name: options.pop(name) for name in ("resampler", "ess_threshold") if name in options}
    return Search(method=method, seed=3, **numbers, **own, options=options)


@pytest.mark.parametrize(
    ("process", "options", "pattern"),
    CASES,
    ids=[
        "-".join([p.__name__, *map(str, o.values()), "free" if f is None else "fixed"])
        for p, o, f in CASES
    ],
)
def test_the_evidence_is_that_of_the_declared_law(process, options, pattern):
    """Mean of Z over 600 runs within 4 standard errors: 6e-5 per case by chance."""
    target = make_target(process(4), pattern)
    posterior = infer(target, make_search(num_particles=16, num_runs=NUM_RUNS, **options))
    on_the_grid = "reweighted" in options.values() or "path" in options.values()
    ordered = target.masked and options["method"] in REVEALING and not on_the_grid
    exact = exact_log_evidence(target, ordered=ordered, power=options.get("power", 1.0))
    ratio = (posterior.log_evidence - exact).exp()
    error = float(ratio.std()) / NUM_RUNS**0.5
    assert posterior.exact
    assert error < 0.1  # the check has power
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert ("reveals" in posterior.target) == ordered
    assert ("clamped at 1 of 4 positions" in posterior.target) == (pattern is not None)
    if pattern is not None:
        assert bool((posterior.x0[posterior.weights > 0][:, 1] == 2).all())


@pytest.mark.parametrize("pattern", [None, FIXED], ids=["free", "fixed"])
def test_one_law_is_declared_in_one_sentence(pattern):
    def declared(process, method):
        target = make_target(process(4), pattern)
        return infer(target, make_search(method, num_particles=8, num_runs=1)).law

    on_the_grid = ("smc", "soft-value", "steering")
    grid = {declared(Absorbing, method) for method in on_the_grid}
    ordered = {declared(Absorbing, method) for method in REVEALING}
    # Fixed bases are held on masked priors alone by the others.
    others = ("twisted", "corrector", "guided-lineages") if pattern is None else ()
    uniform = {declared(Uniform, method) for method in (*on_the_grid, *others)}
    assert (len(grid), len(ordered), len(uniform)) == (1, 1, 1)
    assert len({law.base for law in (*grid, *ordered, *uniform)}) == 3
    assert set(map(str, grid)) != set(map(str, ordered))


@pytest.mark.parametrize("method", ["best-of-n", "soft-value"])
def test_what_declares_no_law_says_so_and_holds_the_bases(method):
    options = {"weighted": False} if method == "soft-value" else {"keep": 3}
    search = make_search(method, num_particles=8, num_runs=5, **options)
    posterior = infer(make_target(Absorbing(4), FIXED), search)
    held = posterior.weights > 0
    assert not posterior.exact
    assert "the chain is clamped at 1 of 4 positions" in posterior.target
    assert bool((posterior.x0[held][:, 1] == 2).all())
    if method == "best-of-n":
        best = posterior.log_potential.topk(3, -1).values
        kept = posterior.log_potential[held].reshape(5, 3).sort(-1, descending=True).values
        torch.testing.assert_close(kept, best)


def test_guesses_hold_fixed_bases_wherever_they_can():
    fill = HeldFill(ArgmaxFill(), ClampProposal(FIXED, FIXED >= 0, 4))
    open_law = torch.full((1, 2, LENGTH, 4), 0.25).log()
    wrong = torch.tensor([1.0, 0.0, 0.0, 0.0]).log()
    open_law[0, 1, 1] = wrong  # this particle was given another base already
    filled = fill.fill(TableCompletions(open_law), None)
    assert filled[0, :, 0, 1].tolist() == [2, 0]


def test_defaults_depend_on_the_method():
    assert Search().settings() == {
        "num_particles": 72,
        "num_runs": 4,
        "seed": 0,
        "method": "refinement",
        "ess_threshold": 0.2,
        "inner": "twisted",
        "share": 0.5,
        "num_chains": 16,
        "twist": "auto",
        "surprise": False,
        "kappa": 1.0,
        "cache": True,
    }
    assert Search().make() == Refinement(TwistedSampler(), num_chains=16)
    refined = make_search("refinement", inner="smc", twist_every=2)
    assert refined.make() == Refinement(Bootstrap(twist_every=2), num_chains=16)
    assert refined.settings()["twist_every"] == 2
    assert make_search("steering", fills=8).settings()["twist"] == "persistent"
    assert "fills" not in make_search("steering").settings()
    assert make_search("soft-value").make().num_children == 4
    assert make_search("steering", fills=8).make().twist == PersistentFill(8)
    for name, cls in methods().items():
        if name not in DEFAULTS:
            assert make_search(name).make() == cls()


def test_every_option_is_a_field_of_its_owners_and_documented():
    known = options()
    assert {"twist", "num_children", "alpha", "weighted", "kind", "every", "keep"} < set(known)
    assert "moves" not in known  # objects cannot be said
    for name, option in known.items():
        for owner, use in option.owners.items():
            fields = {f.name: f for f in dataclasses.fields(methods()[owner])}
            if use.part is not None:
                fields = {f.name for f in dataclasses.fields(part_of(fields[use.part]))}
            assert name in fields or name in ("fills", "power")
            assert len(use.text) > 10
            assert "see the method" not in use.text


def test_twisted_looks_ahead_as_the_prior_needs_it():
    def chosen(process, pattern=None, **options):
        search = make_search("twisted", num_particles=4, **options)
        settings = infer(make_target(process(4), pattern), search).settings
        return settings["twist"], settings["num_fills"]

    assert chosen(Absorbing) == ("defensive", 1)
    assert chosen(Absorbing, FIXED) == ("held", 1)
    assert chosen(Uniform) == ("persistent", 16)
    assert chosen(Uniform, fills=2) == ("persistent", 2)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"method": "mcmc"}, "no method called 'mcmc'"),
        ({"num_children": 3}, "--children is no option of smc: .* --method .*soft-value"),
        ({"weighted": False}, "--unweighted is no option of smc"),
        ({"method": "twisted", "power": 2.0}, "--power is no option of twisted"),
        ({"method": "best-of-n", "twist": "argmax"}, "--twist is no option of best-of-n"),
        ({"method": "best-of-n", "fills": 4}, "--fills is no option of best-of-n"),
        ({"method": "best-of-n", "keep": 65}, "Of 64 draws per run 65 cannot be kept"),
        ({"method": "best-of-n", "keep": 0}, "best-of-n: --keep must be >= 1, got 0"),
        ({"method": "best-of-n", "ess_threshold": 0.5}, "no option of best-of-n"),
        ({"method": "soft-value", "num_children": 0}, "soft-value: --children must be >= 1, got 0"),
        ({"method": "soft-value", "alpha": -1.0}, "--alpha must be a finite .* >= 0, got -1.0"),
        ({"method": "soft-value", "alpha": math.nan}, "--alpha must be a finite number .*nan"),
        ({"method": "soft-value", "alpha": 0.0}, "use --unweighted"),
        ({"method": "soft-value", "weighted": False, "resampler": "ssp"}, "nothing is ever resam"),
        ({"method": "steering", "kind": "best"}, "no kind called 'best'"),
        ({"method": "steering", "every": 0}, "steering: --every must be >= 1, got 0"),
        ({"method": "steering", "twist": "none"}, "steering: --twist none scores nothing"),
        ({"method": "corrector", "power": 0.0}, "must be above 0, not 0.0"),
        ({"twist": "argmax", "fills": 4}, "argmax has none"),
        ({"twist": "persistent", "fills": 0}, "must be at least 1, not 0"),
        ({"oracle": 1}, "no option called 'oracle'"),
    ],
)
def test_impossible_methods(asked, sentence):
    with pytest.raises(InputError, match=sentence):
        make_search(**asked)


def test_fixed_bases_on_a_uniform_prior_are_refused_where_they_cannot_be_held():
    for method in ("twisted", "corrector", "guided-lineages", "tempering"):
        with pytest.raises(InputError, match="holds fixed bases on masked priors alone"):
            infer(make_target(Uniform(4), FIXED), make_search(method))
