"""Every method of the command line has the evidence of the law it declares, by enumeration."""

import itertools
import math

import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.design.checks import InputError
from ppl_diffusion.design.methods import HeldFill, infer
from ppl_diffusion.design.program import Target
from ppl_diffusion.design.question import Job
from ppl_diffusion.design.search import METHODS, Search, with_defaults
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.potentials import GCContent, Potential
from ppl_diffusion.smc.twists import ArgmaxFill

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
    {"method": "soft-value", "children": 3, "alpha": 0.5},
    {"method": "steering", "kind": "max", "every": 2},
    {"method": "twisted"},
    {"method": "twisted", "twist": "persistent", "fills": 2},
    {"method": "corrector"},
    {"method": "corrector", "power": 2.0},
    {"method": "corrector", "twist": "none"},
]
CASES = [
    *((Absorbing, options, pattern) for options in MASKED for pattern in (None, FIXED)),
    (Uniform, {"method": "smc"}, FIXED),
    (Uniform, {"method": "soft-value"}, FIXED),
    (Uniform, {"method": "steering", "kind": "add"}, None),
    (Uniform, {"method": "twisted"}, None),
    (Uniform, {"method": "corrector"}, None),
]


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
    search = with_defaults(
        Search(num_particles=16, num_runs=NUM_RUNS, num_steps=4, seed=3, **options),
        masked=target.masked,
        fixed=pattern is not None,
    )
    posterior = infer(target, search)
    ordered = target.masked and search.method in ("twisted", "corrector")
    exact = exact_log_evidence(target, ordered=ordered, power=options.get("power", 1.0))
    ratio = (posterior.log_evidence - exact).exp()
    error = float(ratio.std()) / NUM_RUNS**0.5
    assert posterior.exact
    assert error < 0.1  # the check has power
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert ("reveals" in posterior.target) == ordered
    assert ("1 fixed bases" in posterior.target) == (pattern is not None)
    if pattern is not None:
        assert bool((posterior.x0[posterior.weights > 0][:, 1] == 2).all())


def test_one_law_is_declared_in_one_sentence():
    def declared(process, method):
        search = Search(num_particles=4, num_runs=1, num_steps=4, method=method)
        target = make_target(process(4))
        return infer(target, with_defaults(search, masked=target.masked, fixed=False)).target

    grid = {declared(Absorbing, method) for method in ("smc", "soft-value", "steering")}
    ordered = {declared(Absorbing, method) for method in ("twisted", "corrector")}
    uniform = {
        declared(Uniform, m) for m in ("smc", "soft-value", "steering", "twisted", "corrector")
    }
    assert (len(grid), len(ordered), len(uniform)) == (1, 1, 1)
    assert grid != ordered


@pytest.mark.parametrize("method", ["best-of-n", "soft-value"])
def test_what_declares_no_law_says_so_and_holds_the_bases(method):
    options = {"weighted": False} if method == "soft-value" else {"keep": 3}
    search = Search(num_particles=8, num_runs=5, num_steps=4, method=method, **options)
    posterior = infer(make_target(Absorbing(4), FIXED), search)
    held = posterior.weights > 0
    assert not posterior.exact
    assert "which every draw holds" in posterior.target
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
    assert fill.fill(open_law, None)[0, :, 0, 1].tolist() == [2, 0]


def test_defaults_depend_on_the_method():
    assert Search().settings() == {
        "num_particles": 64,
        "num_runs": 4,
        "num_steps": 64,
        "seed": 0,
        "method": "smc",
        "twist": "persistent",
        "fills": 4,
        "resampler": "systematic",
        "ess_threshold": 0.5,
    }
    for method, options in METHODS.items():
        settings = Search(method=method).settings()
        assert set(settings) >= {name for name, value in options.items() if value is not None}
    assert Search(method="steering", fills=8).twist == "persistent"
    assert "resampler" not in Search(method="soft-value", weighted=False).settings()


def test_twisted_looks_ahead_as_the_prior_needs_it():
    asked = Search(method="twisted")
    assert with_defaults(asked, masked=True, fixed=True).twist == "argmax"
    uniform = with_defaults(asked, masked=False, fixed=False)
    assert (uniform.twist, uniform.fills) == ("persistent", 16)
    own = with_defaults(Search(method="twisted", fills=2), masked=False, fixed=False)
    assert own.fills == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "mcmc"}, "no method called 'mcmc'"),
        ({"children": 3}, "--children is no option of smc: .* --method soft-value"),
        ({"weighted": False}, "--unweighted is no option of smc"),
        ({"method": "twisted", "power": 2.0}, "--power is no option of twisted"),
        ({"method": "best-of-n", "twist": "argmax"}, "--twist is no option of best-of-n"),
        ({"method": "best-of-n", "fills": 4}, "--fills is no option of best-of-n"),
        ({"method": "best-of-n", "keep": 65}, "Of 64 draws per run 65 cannot be kept"),
        ({"method": "best-of-n", "keep": 0}, "must be at least 1, not 0"),
        ({"method": "soft-value", "children": 0}, "must be at least 1, not 0"),
        ({"method": "soft-value", "alpha": -1.0}, "at least 0, not -1.0"),
        ({"method": "soft-value", "alpha": math.nan}, "finite number, not nan"),
        ({"method": "soft-value", "alpha": 0.0}, "add --unweighted"),
        ({"method": "soft-value", "weighted": False, "resampler": "ssp"}, "nothing is ever resam"),
        ({"method": "steering", "kind": "best"}, "no kind of steering called 'best'"),
        ({"method": "steering", "every": 0}, "must be at least 1, not 0"),
        ({"method": "steering", "twist": "none"}, "does nothing but look ahead"),
        ({"method": "corrector", "power": 0.0}, "must be above 0, not 0.0"),
        ({"twist": "argmax", "fills": 4}, "argmax has none"),
    ],
)
def test_impossible_methods(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Search(**options)


def test_what_a_uniform_prior_cannot_do_is_refused():
    for method in ("twisted", "corrector"):
        with pytest.raises(InputError, match="holds fixed bases on masked priors alone"):
            with_defaults(Search(method=method), masked=False, fixed=True)
    with pytest.raises(InputError, match="learns from random completions"):
        with_defaults(Search(method="twisted", twist="argmax"), masked=False, fixed=False)
