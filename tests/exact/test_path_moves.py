"""Moves of finished paths: their matrices, the books they keep, and what pooled runs add up to.

Acceptance ratios are read from the moves themselves and set into matrices whose proposals are
enumerated here; invariance is held to round-off. Laws of draws are held to Pearson's test at
p > 1e-4, means to four standard errors (6e-5 each), once, at the fixed seeds.
"""

from itertools import permutations

import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC, Refinement
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import OrderRefresh, Refill, SiteGibbs, refill, rejuvenation
from ppl_diffusion.smc.path_state import PathModel
from ppl_diffusion.smc.rejuvenation import SuffixRefresh
from ppl_diffusion.testing import PathLaw, toy_chain, toy_potential, z_score
from ppl_diffusion.testing.toys import random_joint

LENGTH, SIZE, BETA = 3, 3, 0.7
GOAL = toy_potential(SIZE, LENGTH, scale=1.5)


class Inconsistent:
    """Conditionals of one joint law, each conditioning set with an error of its own (X1)."""

    kind, time_free, vocab_size = "cavity", True, SIZE

    def __init__(self, delta=0.5):
        joint, mask = random_joint(SIZE, LENGTH, sharpness=0.5), SIZE
        error = torch.Generator().manual_seed(1)
        shape = (*[SIZE + 1] * LENGTH, LENGTH, SIZE)
        self.table = torch.zeros(shape, dtype=torch.float64).log_softmax(-1)
        for state in torch.cartesian_prod(*[torch.arange(SIZE + 1)] * LENGTH):
            known = joint
            for site, token in enumerate(state.tolist()):
                if token != mask:
                    known = known.index_select(site, torch.tensor([token]))
            for site in range(LENGTH):
                others = [d for d in range(LENGTH) if d != site]
                law = known.sum(others)
                noise = torch.randn(SIZE, generator=error, dtype=torch.float64)
                if len(law) == SIZE:
                    self.table[(*state.tolist(), site)] = (law.log() + delta * noise).log_softmax(0)

    def __call__(self, tokens, t, /):
        return self.table[tokens.unbind(-1)]


def ordered(**options):
    kernel = OrderedKernel(Absorbing(SIZE), Inconsistent(), length=LENGTH, **options)
    return ReverseChain(kernel, LENGTH)


def on_grid(prompt=None):
    kernel = InterpolatingKernel(Absorbing(SIZE), Inconsistent(), num_steps=3)
    return ReverseChain(kernel, LENGTH, prompt=prompt)


CHAINS = {
    "ordered": ordered,
    "groups": lambda: ordered(group_size=2),
    "blocks": lambda: ordered(block=2),
    "grid": on_grid,
    "prompt": lambda: on_grid(torch.tensor([1, -1, -1])),
}
MOVES = {
    "order": OrderRefresh(),
    "window": OrderRefresh(window=2),
    "tail": OrderRefresh(window=2, tail=True),
    "suffix": SuffixRefresh(2),
    "refill": Refill((2,)),
}


# ------------------------------------------------------------------------------------------------
# matrices


def places(paths):
    """Positions in the order of their reveals, ``(P, L)``."""
    return (paths == SIZE).sum(1).argsort(-1)


def same(values):
    """Which pairs of rows are equal, ``(P, P)``."""
    return (values[:, None] == values).all(-1)


def proposals(name, law):
    """What each move may propose, by hand: ``(P, P)``, rows sum to one."""
    order, x0 = places(law.paths), law.paths[:, -1]
    prior = law.probs / GOAL(x0).mul(BETA).exp()
    if name in ("suffix", "refill"):
        like = same(law.paths[:, 1])  # after one of the three reveals
        if name == "refill":
            like = like & same(order)
        q = like * prior
        return q / q.sum(-1, keepdim=True)
    windows = {"order": [(0, 1, 2)], "window": [(0, 1), (1, 2)], "tail": [(1, 2)]}[name]
    q = torch.zeros(len(order), len(order), dtype=torch.float64)
    for window in windows:
        dealt = list(permutations(window))
        for places_ in dealt:
            deal = list(range(LENGTH))
            for at, to in zip(window, places_, strict=True):
                deal[at] = to
            reached = same(torch.cat([order, order[:, deal]]))[len(order) :, : len(order)]
            q += (reached & same(x0)) / (len(dealt) * len(windows))
    return q


def ratios(monkeypatch, move, chain, law, tries=1500):
    """The log-ratio that a move computes for each of its proposals, ``(P, P)``."""
    found = torch.full([len(law.paths)] * 2, torch.nan, dtype=torch.float64)

    def index(paths):
        flat = paths.reshape(-1, law.paths[0].numel()).double()
        return nearest[torch.searchsorted(between, flat @ weights)]

    torch.manual_seed(0)
    weights = torch.rand(law.paths[0].numel(), dtype=torch.float64)
    code, nearest = (law.paths.flatten(1).double() @ weights).sort()
    between = (code[1:] + code[:-1]) / 2

    def look(state, proposed, log_ratio, generator):
        found[index(state.path), index(proposed.path)] = log_ratio.flatten()
        return state, torch.zeros_like(log_ratio, dtype=torch.bool)

    for module in (rejuvenation, refill):
        monkeypatch.setattr(module, "accept", look)
    model = PathModel(chain, GOAL)
    state = model.state(law.paths.repeat(tries, 1, 1)[:, None])
    move(model, state, beta=BETA, generator=torch.Generator().manual_seed(0))
    monkeypatch.undo()
    return found


def matrix(monkeypatch, name, law, chain):
    q, log_ratio = proposals(name, law), ratios(monkeypatch, MOVES[name], chain, law)
    possible = q > 0
    assert bool(torch.isfinite(log_ratio[possible]).all())  # all were seen
    assert bool(log_ratio[~possible].isnan().all())  # and nothing else
    move = torch.where(possible, q * log_ratio.nan_to_num().exp().clamp_max(1), 0.0)
    return move + torch.diag(1 - move.sum(-1)), q


def number(x0):
    return (x0 * torch.tensor([9, 3, 1])).sum(-1)


def by_sequence(law, probs):
    """The law of clean sequences, from one of paths."""
    return torch.zeros(SIZE**LENGTH, dtype=torch.float64).index_add(
        0, number(law.paths[:, -1]), probs
    )


def tilted(chain):
    return PathLaw.of(chain, lambda x0: BETA * GOAL(x0))


@pytest.mark.parametrize("name", MOVES)
def test_the_matrix_of_a_move_leaves_the_target_alone(name, monkeypatch):
    chain = ordered()
    law = tilted(chain)
    moves, q = matrix(monkeypatch, name, law, chain)
    torch.testing.assert_close(q.sum(-1), torch.ones(len(q), dtype=torch.float64))
    assert float((law.probs @ moves - law.probs).abs().sum()) < 1e-14


def test_the_published_acceptance_has_another_stationary_law(monkeypatch):
    """Mask any two positions and accept by ``G`` alone: the order is dealt anew for nothing."""
    chain = ordered()
    law = tilted(chain)
    shuffle = proposals("order", law)
    refills, _ = matrix(monkeypatch, "refill", law, chain)
    orders, _ = matrix(monkeypatch, "order", law, chain)

    def stationary(moves):
        found = law.probs
        for _ in range(60):
            found = found @ moves
        return by_sequence(law, found)

    exact, published = stationary(orders @ refills), stationary(shuffle @ refills)
    target = by_sequence(law, law.probs)
    assert float((exact - target).abs().sum() / 2) < 1e-12
    assert float((published - target).abs().sum() / 2) > 0.05


# ------------------------------------------------------------------------------------------------
# draws


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    "moves",
    [
        (OrderRefresh(window=2),),
        (OrderRefresh(window=2, tail=True),),
        (Refill((1, 2)),),
        (SiteGibbs(),),
        (OrderRefresh(window=2), Refill((1, 2)), SiteGibbs(), OrderRefresh(), SuffixRefresh(1)),
    ],
    ids=["window", "tail", "refill", "gibbs", "all"],
)
def test_moves_keep_exact_draws_exact(name, moves):
    chain = CHAINS[name]()
    law, generator = tilted(chain), torch.Generator().manual_seed(1)
    model = PathModel(chain, GOAL)
    state = model.state(law.draw(4000, generator)[:, None])
    for move in moves * 2:
        move.check(chain)
        state, accepted = move(model, state, beta=BETA, generator=generator)
        assert torch.equal(state.log_g, GOAL(state.x0))
        assert bool(accepted.any())
    assert law.p_value(state.path) > 1e-4
    known = PathModel(chain, GOAL).state(state.path)  # what was remembered is what is so
    fresh, _ = OrderRefresh()(PathModel(chain, GOAL), known, generator=generator)
    if state.log_c is not None:
        stay = (fresh.path == state.path).flatten(1).all(-1)
        remembered = state.log_c[stay]
        right = remembered.isnan() | ((remembered - fresh.log_c[stay]).abs() < 1e-12)
        assert bool(right.all())


def test_windows_reach_the_law_of_whole_orders():
    """One sequence whose order starts where it always starts: Pearson's test on its orders."""
    chain = ordered()
    law, generator = tilted(chain), torch.Generator().manual_seed(5)
    one = same(law.paths[:, -1])[0]
    orders = PathLaw(law.paths[one], law.probs[one] / law.probs[one].sum(), 0.0)
    for move, times in ((OrderRefresh(), 12), (OrderRefresh(window=2), 30)):
        model = PathModel(chain, GOAL)
        state = model.state(orders.paths[:1].expand(3000, 1, -1, -1))
        for _ in range(times):
            state, _ = move(model, state, generator=generator)
        assert orders.p_value(state.path) > 1e-4


def test_gibbs_that_forgets_the_potential_is_found_out(monkeypatch):
    monkeypatch.setattr(refill, "tilt", lambda log_g, beta: 0.0 * log_g)
    chain = ordered()
    law, generator = tilted(chain), torch.Generator().manual_seed(1)
    model = PathModel(chain, GOAL)
    state = model.state(law.draw(4000, generator)[:, None])
    state, _ = SiteGibbs()(model, state, beta=BETA, generator=generator)
    assert law.p_value(state.path) < 1e-8


# ------------------------------------------------------------------------------------------------
# refinement


def pooled(chain, runs=3000, **options):
    """The mass of each sequence in each run, on the scale of its evidence, ``(R, V ** L)``."""
    method = Refinement(**options)
    posterior = SMC(chain, GOAL, method=method, num_particles=4, num_runs=runs).run(seed=3)
    ones = torch.nn.functional.one_hot(number(posterior.x0), SIZE**LENGTH).double().mean(1)
    return posterior, posterior.log_evidence.exp()[:, None] * ones


def worst(mass, target, log_z):
    """The largest z-score of ``Z^ mean f = Z pi(f)``: likely sequences, and the rest together."""
    scaled, likely = mass / torch.tensor(log_z).exp(), target > 0.03
    cells = [torch.cat([x[..., likely], x[..., ~likely].sum(-1, keepdim=True)], -1)
             for x in (scaled, target)]  # fmt: skip
    return max(abs(z_score(cells[0][:, i], float(p))) for i, p in enumerate(cells[1]))


def exact_law(chain):
    law = PathLaw.of(chain, GOAL)
    return by_sequence(law, law.probs), law.log_z


@pytest.mark.parametrize("inner", ["smc", "twisted", "importance-sampling"])
def test_runs_pooled_by_their_evidence_stay_exact(inner):
    """``E[Z^ mean f] = Z pi(f)`` for the indicator of every sequence, and of all of them."""
    chain = ordered()
    target, log_z = exact_law(chain)
    posterior, mass = pooled(chain, inner=inner, num_chains=2, num_sweeps=3)
    assert abs(z_score(mass.sum(-1) / torch.tensor(log_z).exp(), 1.0)) < 4
    assert worst(mass, target, log_z) < 4
    found = mass.sum(0) / mass.sum()
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(target, 3000, True, generator=generator)
    floor = (torch.bincount(draws, minlength=len(target)) / 3000 - target).abs().sum() / 2
    assert float((found - target).abs().sum() / 2) < 1.5 * float(floor)
    assert bool(posterior.evidence_variance.isnan().all())


def test_refinement_without_acceptance_is_found_out(monkeypatch):
    def accept_all(state, proposed, log_ratio, generator):
        return proposed, torch.ones_like(log_ratio, dtype=torch.bool)

    monkeypatch.setattr(refill, "accept", accept_all)
    chain = ordered()
    target, log_z = exact_law(chain)
    _, mass = pooled(chain, moves=[Refill((2,))], num_chains=2, num_sweeps=3)
    assert worst(mass, target, log_z) > 8


def test_evidence_and_roots_are_those_of_the_first_half():
    chain, options = ordered(), {"num_particles": 8, "num_runs": 3}
    plain = SMC(chain, GOAL, **options).run(seed=0)
    refined = SMC(chain, GOAL, method=Refinement("smc", num_chains=4), **options).run(seed=0)
    assert torch.equal(plain.log_evidence, refined.log_evidence)
    assert torch.equal(plain.ess, refined.ess)
    torch.testing.assert_close(refined.weights, torch.full((3, 8), 1 / 8, dtype=torch.float64))
    for run in range(3):
        assert set(refined.eve[run].tolist()) <= set(plain.eve[run].tolist())
        assert len(refined.eve[run].unique()) <= 4
    assert "sweep of moves (order, gibbs) that leave it alone" in refined.target
    assert refined.law.base == plain.law.base
    cost = refined.settings["inner_evaluations"], refined.settings["move_evaluations"]
    assert sum(cost) == refined.num_evaluations


def test_both_halves_cost_alike():
    chain = toy_chain(vocab_size=4, length=6, num_steps=6)
    goal = toy_potential(4, 6)
    for share in (0.3, 0.5, 0.8):
        # Few chains: one sweep is the least there is, and that of all would be most of the cost.
        method = Refinement(share=share, num_chains=4)
        post = SMC(chain, goal, method=method, num_particles=64, num_runs=2)
        settings = post.run(seed=0).settings
        part = settings["inner_evaluations"] / (
            settings["inner_evaluations"] + settings["move_evaluations"]
        )
        assert abs(part - share) < 0.25


def test_dead_runs_are_left_as_they_are():
    rare = Potential(lambda x0: torch.where((x0 == 0).sum(-1) > 1, 0.0, -torch.inf))
    method = Refinement("importance-sampling", num_sweeps=2)
    post = SMC(ordered(), rare, method=method, num_particles=4, num_runs=40).run(seed=0)
    dead = (~post.alive).nonzero()[:, 0].tolist()
    assert 0 < len(dead) < 40
    assert post.settings["not_refined"] == dead
    assert bool((post.log_weights[dead] == -torch.inf).all())
    assert bool(((post.x0[post.alive] == 0).sum(-1) > 1).all())


def test_what_cannot_be_refined_is_said():
    with pytest.raises(CapabilityError, match="'best-of-n' as it is asked for are not"):
        SMC(ordered(), GOAL, method=Refinement("best-of-n"), num_particles=4).run(seed=0)
    with pytest.raises(CapabilityError, match="'corrector' moves compositions of chains"):
        SMC(ordered(), GOAL, method=Refinement("corrector"), num_particles=4).run(seed=0)
    with pytest.raises(ValueError, match="unknown inner method 'nonsense'"):
        Refinement("nonsense")
    with pytest.raises(ValueError, match="refined already"):
        Refinement(Refinement())
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1"):
        Refinement(share=1)
    with pytest.raises(CapabilityError, match="Refill: it masks positions again"):
        Refill().check(toy_chain("uniform"))
    with pytest.raises(ValueError, match="window must be >= 2 or None, got 1"):
        OrderRefresh(window=1)
    with pytest.raises(ValueError, match="num_sites must be whole"):
        Refill((0,))


def test_unpaid_orders_are_free_and_said():
    moves = [OrderRefresh(paid=False), SiteGibbs()]
    options = {"num_particles": 8, "num_runs": 2}
    post = SMC(ordered(), GOAL, method=Refinement(moves=moves), **options).run(seed=0)
    assert not post.exact
    assert "leave it alone but for what 'order' does not pay" in post.target
    assert post.settings["num_sweeps"] == 3  # one row each, of three per particle
    with pytest.raises(ValueError, match="does not leave the target alone"):
        SMC(ordered(), GOAL, method="tempering", moves=moves)


def test_uniform_noise_is_refined_by_suffixes():
    chain = toy_chain("uniform", length=2, num_steps=4)
    post = SMC(chain, toy_potential(), method="refinement", num_particles=8, num_runs=4).run(seed=0)
    assert post.settings["moves"] == ["suffix"]
