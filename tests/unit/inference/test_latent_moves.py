"""Kernels that move latents: each leaves a law alone that exact draws show (4 standard errors)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC, LatentMoves
from ppl_diffusion.inference import latent_moves as kernels
from ppl_diffusion.inference.latent_moves import RealMove, Spot, gibbs
from ppl_diffusion.inference.latent_sites import Coordinates, DiscreteSite, RealSite, latent_sites
from ppl_diffusion.programs import Program
from ppl_diffusion.programs.ahead import Ahead, Rated
from ppl_diffusion.testing.oracles import z_score
from ppl_diffusion.testing.toys import toy_chain

DRAWS = 20_000
CHAIN = toy_chain(vocab_size=3, length=3, num_steps=3)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def under(log_density):
    """Return a look-ahead of one under a law of the latents."""

    def rate(kept, latents):
        log_r = log_density(latents)
        return Rated(torch.zeros_like(log_r), log_r, {})

    return Ahead({}, rate)


def spot_of(latents, log_density):
    log_r = log_density(latents)
    return Spot(latents, torch.zeros_like(log_r), log_r, {})


def correlation(n):
    """Return draws of ``LKJCholesky(3, 1.5)``, row by row: torch's do not follow its density."""
    w = 2 * dist.Beta(number(2.0), 2.0).sample(n) - 1
    r, angle = dist.Beta(number(1.0), 1.5).sample(n).sqrt(), 6.283185307179586 * torch.rand(n)
    last = torch.stack([r * angle.cos(), r * angle.sin(), (1 - r * r).sqrt()], -1)
    zero = torch.zeros_like(w)
    first = torch.stack([torch.ones_like(w), zero, zero], -1)
    return torch.stack([first, torch.stack([w, (1 - w * w).sqrt(), zero], -1), last], -2)


NORMAL = dist.Normal(number(0.0), 1.0)
HALF, MIX = dist.HalfNormal(number(1.0)), dist.Dirichlet(number([2.0, 3.0, 0.5]))
LKJ = dist.LKJCholesky(3, number(1.5))


def ordered(n):
    return NORMAL.sample((*n, 3)).sort(-1).values


def ordered_log_prob(x):
    return NORMAL.log_prob(x).sum(-1)


LAWS = {
    "positive": (HALF.sample, HALF.log_prob, constraints.positive),
    "simplex": (MIX.sample, MIX.log_prob, constraints.simplex),
    "ordered": (ordered, ordered_log_prob, dist.constraints.ordered_vector),
    "correlation": (correlation, LKJ.log_prob, constraints.corr_cholesky),
}


@pytest.mark.parametrize("kernel", ["random-walk", "hmc"])
@pytest.mark.parametrize("name", LAWS)
def test_a_move_leaves_a_law_on_a_support_alone(name, kernel):
    torch.manual_seed(1)
    sample, log_prob, support = LAWS[name]
    real = Coordinates((RealSite("x", biject_to(support)),))

    def log_density(latents):
        return log_prob(latents["x"])

    start = {"x": sample((1, DRAWS))}
    spot, flat = spot_of(start, log_density), real.flat(start)
    move = RealMove(kernel, 0.7 * torch.eye(flat.shape[-1], dtype=torch.float64)[None])
    for _ in range(4):
        spot, moved = move(spot, under(log_density), real)
    assert 0.15 < float(moved.double().mean()) < 0.999
    after, fresh = real.flat(spot.latents)[0], real.flat({"x": sample((1, DRAWS))})[0]
    for moment in (lambda x: x, torch.square, torch.tanh, lambda x: x * x.roll(1, -1)):
        for a, b in zip(moment(after).T, moment(fresh).T, strict=True):
            error = ((a.var() + b.var()) / DRAWS).sqrt()
            assert abs(float((a.mean() - b.mean()) / error.clamp_min(1e-12))) < 4.5


def coupled(latents):
    """Three switches in a plate that want to be alike."""
    z = latents["z"].double()
    return z @ number([0.4, -0.3, 0.2]) + 1.5 * (z[..., :-1] == z[..., 1:]).double().sum(-1)


@pytest.mark.parametrize("limit", [64, 2])
def test_gibbs_in_a_plate_of_coupled_elements(limit):
    torch.manual_seed(2)
    grid = torch.cartesian_prod(*[torch.arange(3)] * 3)
    law = torch.softmax(coupled({"z": grid}), 0)
    start = {"z": grid[torch.multinomial(law, DRAWS, replacement=True)][None]}
    spot, site = spot_of(start, coupled), DiscreteSite("z", torch.arange(3))
    for _ in range(3):
        spot, moved = gibbs(spot, under(coupled), site, limit=limit)
    assert float(moved.mean()) > 0.2
    index = (spot.latents["z"][0] * torch.tensor([9, 3, 1])).sum(-1)
    counts = torch.bincount(index, minlength=27).double()
    chi = ((counts - DRAWS * law).square() / (DRAWS * law)).sum()
    assert float(chi) < 26 + 4 * (2 * 26) ** 0.5


def test_elements_drawn_side_by_side_are_found_out():
    """All elements at once, each given the old others: not the joint law."""
    torch.manual_seed(3)
    grid = torch.cartesian_prod(*[torch.arange(3)] * 3)
    law = torch.softmax(coupled({"z": grid}), 0)
    start = {"z": grid[torch.multinomial(law, DRAWS, replacement=True)][None]}
    spot, site = spot_of(start, coupled), DiscreteSite("z", torch.arange(3))
    each = [
        kernels._gibbs_element(spot, under(coupled), site, e, 2, None)[0].latents["z"][..., e]
        for e in range(3)
    ]
    same = (each[0] == each[1]).double()[0]
    expected = float((law * (grid[:, 0] == grid[:, 1])).sum())
    assert abs(z_score(same, expected)) > 8


def sites(model):
    return latent_sites(Program(model, vectorize=False))


def zoo():
    top = pyro.sample("top", dist.Uniform(number(1.0), 2.0))
    below = pyro.sample("below", dist.Uniform(number(0.0), top))
    count = pyro.sample("count", dist.Poisson(number(2.0)))
    kind = pyro.sample("kind", dist.Categorical(number([0.5, 0.5])))
    fixed = pyro.sample("fixed", dist.Delta(number(1.0)))
    mix = pyro.sample("mix", dist.Dirichlet(number([1.0, 1.0])))
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    pyro.factor("f", (x == 0).sum(-1) * top - below - count - kind - fixed - mix[..., 0])


def test_what_cannot_be_moved_is_said_by_name():
    found = sites(zoo)
    assert found.names == ["top", "mix", "kind"]
    assert found.left == {
        "below": "its support depends on other sites",
        "count": "its values cannot be listed",
        "fixed": "it has no density of its own",
    }


def uniform_below():
    """A bound that moves past what it bounds."""
    top = pyro.sample("top", dist.HalfNormal(number(1.0)))
    return top + pyro.sample("below", dist.Uniform(number(0.0), top))


def pareto_above():
    """Its density has numbers outside of its support."""
    low = pyro.sample("low", dist.Uniform(number(0.5), 3.0))
    return low + pyro.sample("above", dist.Pareto(low, number(3.0)))


def binomial_of():
    n = pyro.sample("n", dist.Categorical(torch.ones(4).double()))
    return n + pyro.sample("b", dist.Binomial((n + 1).double(), number(0.5)))


@pytest.mark.parametrize(
    ("draw", "vectorize"),
    [(uniform_below, True), (uniform_below, False), (pareto_above, False), (binomial_of, False)],
)
def test_bounds_do_not_move_past_what_they_bound(draw, vectorize):
    def program():
        level = draw() + (CHAIN.x0(pyro.sample("path", CHAIN)) == 0).sum(-1)
        pyro.sample("y", dist.Normal(level, 0.5), obs=number(2.0))

    size = {"num_particles": 16 if vectorize else 4, "twist": "argmax", "ess_threshold": 2.0}
    posterior = SMC(program, vectorize_particles=vectorize, **size).run(seed=0)
    found, (left,) = posterior.samples, posterior.settings["latent_moves"]["left"]
    assert left in ("below", "above", "b")
    if draw is pareto_above:
        assert bool((found["low"] <= found["above"]).all())
    elif draw is uniform_below:
        assert bool((found["below"] <= found["top"]).all())
    else:
        assert bool((found["b"] <= found["n"] + 1).all())


def test_elements_that_have_other_values_each_are_left():
    def program():
        with pyro.plate("two", 2):
            v = pyro.sample("v", dist.Binomial(number([2.0, 5.0]), number(0.5)))
        total = v.sum(-1, keepdim=v.ndim > 1) + (CHAIN.x0(pyro.sample("path", CHAIN)) == 0).sum(-1)
        pyro.sample("y", dist.Normal(total, 0.5), obs=number(2.0))

    told = SMC(program, num_particles=4).run(seed=0).settings["latent_moves"]
    assert told["left"] == {"v": "its values cannot be listed"}


def plated(y):
    """Latents in a plate, a simplex, a switch: six real coordinates."""
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("site", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        on = pyro.sample("on", dist.Bernoulli(0.4))
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    share = weight.gather(-1, x.expand(*weight.shape[:-1], 3)).sum(-1)
    with pyro.plate("measured", 4):
        pyro.sample("y", dist.Normal(effect * on + share, 0.3), obs=y)


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}, {"store_path": False}])
def test_latents_in_plates_are_moved(options):
    y = torch.tensor([1.0, 0.2, 0.6, 2.0])
    few = {"twist": "argmax"} if options.get("vectorize_particles") is False else {}
    size = {"num_particles": 4 if few else 16, "num_runs": 2, "ess_threshold": 2.0, **few}
    moves = LatentMoves(number=1)
    posterior = SMC(plated, moves=moves, **size, **options).run(y, seed=0)
    chosen = posterior.settings["latent_moves"]
    assert chosen["kernels"] == {"weight": "hmc", "effect": "hmc", "on": "gibbs"}
    assert chosen["schedule"] == [1, 2, 3]
    shape = posterior.samples["effect"].shape
    assert shape == (2, size["num_particles"], 4)
    distinct = [len(run.unique(dim=0)) for run in posterior.samples["effect"]]
    assert few or min(distinct) > shape[1] / 2
    assert posterior.num_move_gradients % 5 == 0
    assert posterior.num_move_rows > posterior.num_move_gradients > 0


def test_rows_of_moves_are_counted(monkeypatch):
    """With a number of moves, and steps that are accepted at once, rows follow from sizes."""
    monkeypatch.setattr("ppl_diffusion.inference.scout.LOW", 0.0)
    size = {"num_particles": 8, "num_runs": 3, "ess_threshold": 2.0}

    def program():
        level = pyro.sample("level", dist.Normal(number(0.0), 1.0))
        on = pyro.sample("on", dist.Categorical(number([0.2, 0.3, 0.5])))
        x = CHAIN.x0(pyro.sample("path", CHAIN))
        pyro.sample("y", dist.Normal(level + on + (x == 0).sum(-1), 1.0), obs=number(1.0))

    moved = SMC(program, moves=LatentMoves(number=3), **size).run(seed=0)
    still = SMC(program, moves=None, **size).run(seed=0)
    fills = 5 + 5 + 1  # at steps 1 and 2 five completions, at the end the sequence
    per_particle = 3 * (1 + 2)  # three moves, each with two other values of the switch
    scout = 8 * (per_particle + 1)  # which compares laws first
    assert moved.num_move_rows == fills * (3 * 8 * per_particle + scout)
    assert moved.num_move_gradients == 0
    assert moved.num_scout_rows >= fills * scout
    assert moved.num_potential_calls > still.num_potential_calls  # the scout's look-aheads
    assert still.num_move_rows == still.num_scout_rows == 0
    assert still.settings["latent_moves"]["left"] == {"level": "moves=None", "on": "moves=None"}


def test_a_law_that_was_misread_is_refused(monkeypatch):
    monkeypatch.setattr("ppl_diffusion.programs.reading._varies", lambda values, rows: False)

    def hidden():
        path = pyro.sample("path", CHAIN)
        with torch.no_grad():
            first = float(CHAIN.x0(path)[..., 0].double().mean())
        level = pyro.sample("level", dist.Normal(number(first), 1.0))
        pyro.sample("y", dist.Normal(level, 0.1), obs=number(2.0))

    with pytest.raises(CapabilityError, match="pass moves=None"):
        SMC(hidden, num_particles=16, vectorize_particles=False, ess_threshold=2.0).run(seed=0)


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown kernel='nuts'"):
        LatentMoves(kernel="nuts")
    with pytest.raises(ValueError, match="number must be >= 1"):
        LatentMoves(number=0)
    with pytest.raises(ValueError, match=r"whole, or None, got 1\.5"):
        LatentMoves(number=1.5)
    for moves in ("hmc", True, False):
        with pytest.raises(TypeError, match=r"SMC: moves=.*pass 'auto', None for not at all"):
            SMC(plated, moves=moves)
