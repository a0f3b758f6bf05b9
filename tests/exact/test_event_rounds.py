"""Rounds of reveals: the law of the chain's own steps, with particles on their own clocks.

Chi-square tests have level 1e-4 each (16 of them: 0.2 % for the file, once, at the fixed seeds);
means of evidences are held to 4 standard errors (6e-5 each).
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, FKSteering
from ppl_diffusion.kernels import Absorbing, Cosine, EventKernel, EventStep, InterpolatingKernel
from ppl_diffusion.kernels.event_kernel import FUTURE, REVEAL
from ppl_diffusion.kernels.events import grid_bins
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.testing import ExactChain, all_states, chi_square_p_value, random_joint

V, L = 2, 3
LEVEL = 1e-4
GRIDS = {
    "one": [1.0, 0.0],
    "coarse": [1.0, 0.7, 0.2, 0.0],
    "repeated": [1.0, 1.0, 0.4, 0.4, 0.0, 0.0],
    "fine": [1 - k / 12 for k in range(12)] + [0.0],
}


class Hasty:
    """Reads the time of each row: the earlier, the flatter."""

    kind, time_free, vocab_size = "cavity", False, V

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __call__(self, tokens, t):
        time = torch.as_tensor(t, dtype=torch.float64).expand(tokens.shape[:-1])
        return (self.denoiser(tokens, 0.5) * (2.5 - 2 * time[..., None, None])).log_softmax(-1)


def make_chain(times, *, hasty=True, prompt=None) -> ReverseChain:
    process = Absorbing(V, Cosine())
    denoiser = TableDenoiser(random_joint(V, L, seed=1), process)
    kernel = InterpolatingKernel(process, Hasty(denoiser) if hasty else denoiser, times=times)
    return ReverseChain(kernel, L, prompt=prompt)


def rounds(chain, batch, generator, *, copies=(), redrawn=EventKernel.redrawn):
    """Return paths made round by round; before some rounds particles are copied onto themselves."""
    kernel = chain.kernel.on_events(chain.num_free)
    carry = kernel.init_carry(batch, L, prompt=chain.prompt, generator=generator)
    for k in range(kernel.num_steps):
        if k in copies:
            carry = take_particles(carry, torch.arange(batch[1]).expand(batch))
            carry = redrawn(kernel, carry, generator)
        step = kernel.step(carry, k)
        carry = kernel.advance(carry, step.sample(generator=generator), k)
    return kernel.path(carry).to(torch.int64)


def p_value(chain, paths) -> float:
    """Return how well paths fit the exact law of the chain's own steps."""
    flat = paths.flatten(0, -3)
    found, counts = torch.unique(flat, dim=0, return_counts=True)
    law = chain.log_prob(found).exp()
    common = law * len(flat) >= 5  # rarer paths, and those that were not met, are one cell
    law, counts = law[common], counts[common]
    law = torch.cat([law, (1 - law.sum()).clamp_min(0)[None]])
    counts = torch.cat([counts, (len(flat) - counts.sum())[None]])
    return chi_square_p_value(counts, law)


@pytest.mark.parametrize("copies", [(), (1,), (1, 2)], ids=["alone", "once", "twice"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rounds_have_the_law_of_the_steps(grid, copies):
    chain = make_chain(grid)
    paths = rounds(chain, (1, 20_000), torch.Generator().manual_seed(3), copies=copies)
    assert p_value(chain, paths) > LEVEL


def test_a_prompt_stays_and_is_no_reveal():
    chain = make_chain(GRIDS["coarse"], prompt=torch.tensor([-1, 1, -1]))
    kernel = chain.kernel.on_events(chain.num_free)
    assert kernel.num_steps == 2
    paths = rounds(chain, (1, 20_000), torch.Generator().manual_seed(4), copies=(1,))
    assert bool((paths[..., 1] == 1).all())
    assert p_value(chain, paths) > LEVEL


def not_scaled(kernel, carry, generator):
    """Draw what is left as if nothing had been revealed: the mutant."""
    masked = carry["tokens"] == V
    begun = torch.where(masked, -1, carry[REVEAL]).amax(-1, keepdim=True) + 1
    levels = torch.rand(masked.shape, dtype=torch.float64, generator=generator)
    steps = torch.maximum(grid_bins(levels, kernel.grid.alphas), begun)
    return {**carry, REVEAL: torch.where(masked, steps, carry[REVEAL])}


def shared(kernel, carry, generator):
    """Give every copy the reveals to come of the first one: the other mutant."""
    masked = carry["tokens"] == V
    reveal = torch.where(masked, carry[REVEAL][:, :1], carry[REVEAL])
    begun = torch.where(masked, -1, carry[REVEAL]).amax(-1, keepdim=True) + 1
    return {**carry, REVEAL: torch.where(masked, torch.maximum(reveal, begun), reveal)}


@pytest.mark.parametrize("mutant", [not_scaled, shared])
def test_wrong_futures_are_found_out(mutant):
    chain = make_chain(GRIDS["fine"])
    generator = torch.Generator().manual_seed(3)
    paths = rounds(chain, (1, 20_000), generator, copies=(1, 2), redrawn=mutant)
    assert p_value(chain, paths) < 1e-12


def test_copies_get_futures_of_their_own():
    kernel = make_chain(GRIDS["fine"]).kernel.on_events(L)
    generator = torch.Generator().manual_seed(0)
    carry = kernel.init_carry((1, 50), L, generator=generator)
    assert kernel.redrawn(carry, generator) is carry
    copies = take_particles(carry, torch.zeros(1, 50, dtype=torch.int64))
    assert len(copies[REVEAL].unique(dim=1)[0]) == 1
    assert kernel.rounds_left(copies) is None
    fresh = kernel.redrawn(copies, generator)
    assert len(fresh[REVEAL][0].unique(dim=0)) > 10
    planned = kernel.planned(fresh)
    assert planned[FUTURE].reveal is fresh[REVEAL]
    assert sum(len(ahead.sites) for ahead in planned[FUTURE].rounds) == 50 * L


def test_a_new_future_is_predicted_anew():
    """Also of the same states: a look-ahead may have asked about copies before it was drawn."""
    kernel = make_chain(GRIDS["fine"]).kernel.on_events(L)
    generator = torch.Generator().manual_seed(0)
    carry = kernel.init_carry((1, 50), L, generator=generator)
    with torch.no_grad():
        before = kernel.predict(carry, 0).dense()
        assert kernel.predict(carry, 0).dense() is before
        copies = kernel.redrawn({**carry, REVEAL: carry[REVEAL].clone()}, generator)
        assert copies["tokens"] is carry["tokens"]
        found = kernel.predict(copies, 0).dense()
    times = kernel.prediction_time(copies, 0)
    expected = kernel.denoiser(carry["tokens"], times)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, before)


def test_planned_rounds_are_the_pending_ones():
    kernel = make_chain(GRIDS["coarse"]).kernel.on_events(L)
    generator = torch.Generator().manual_seed(1)
    carry = kernel.init_carry((2, 40), L, generator=generator)
    planned = kernel.planned(carry)
    for k in range(kernel.num_steps):
        asked, known = kernel.step(carry, k), kernel.step(planned, k)
        assert torch.equal(asked.sites, known.sites)
        value = asked.sample(generator=generator)
        carry, planned = (kernel.advance(c, value, k) for c in (carry, planned))
    assert kernel.rounds_left(planned) == 0
    assert torch.equal(kernel.step(planned, 2).sample(), planned["tokens"])  # complete rows stay


class TestStep:
    def test_density_and_draws_agree(self):
        tokens = torch.tensor([[V, 0, V], [V, V, V]])
        log_c = torch.randn(2, 3, V, dtype=torch.float64).log_softmax(-1)
        step = EventStep(tokens, log_c, torch.tensor([0, 4, 5]))
        assert step.revealed.tolist() == [[True, False, False], [False, True, True]]
        value = torch.tensor([[1, 0, V], [V, 0, 1]])
        expected = torch.stack([log_c[0, 0, 1], log_c[1, 1, 0] + log_c[1, 2, 1]])
        torch.testing.assert_close(step.log_prob(value), expected)
        for wrong in ([[1, 1, V], [V, 0, V]], [[V, 0, V], [0, 0, 1]]):
            assert bool((step.log_prob(torch.tensor(wrong)) == -torch.inf).all())

    def test_a_larger_batch_is_the_same_step(self):
        tokens, log_c = torch.tensor([V, 0, V]), torch.zeros(3, V).log_softmax(-1)
        step = EventStep(tokens, log_c, torch.tensor([2])).expand((4, 5))
        assert step.sample((7,)).shape == (7, 4, 5, 3)
        assert bool((step.sample()[..., :2] == tokens[:2]).all())
        assert bool((step.log_prob(step.sample((2,))) == log_c[2, 0]).all())

    def test_predictions_of_other_states_are_refused(self):
        with pytest.raises(ValueError, match="are no predictions of tokens of shape"):
            EventStep(torch.tensor([V, 0]), torch.zeros(3, V), torch.tensor([0]))


# Inside of SMC.


def log_g(x0):
    return 1.5 * (x0[..., 0] == x0[..., 2]) - 0.7 * x0.sum(-1)


def exact_evidence(chain) -> float:
    exact = ExactChain.of(chain)
    return float((exact.x0_law() * log_g(exact.states[exact.clean]).exp()).sum())


def require_unbiased(posterior, evidence):
    ratio = posterior.log_evidence.exp() / evidence
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("method", ["smc", "steering", "twisted", "soft-value"])
@pytest.mark.parametrize("hasty", [False, True], ids=["time-free", "timed"])
def test_evidence_is_unbiased(method, hasty):
    chain = make_chain(GRIDS["coarse"], hasty=hasty)
    sampler = SMC(chain, log_g, method=method, num_particles=4, num_runs=6000, ess_threshold=0.9)
    posterior = sampler.run(seed=2)
    assert int(posterior.x0.max()) < V  # children of the last round are complete
    require_unbiased(posterior, exact_evidence(chain))
    assert torch.isfinite(chain.log_prob(posterior.path[:50])).all()


class Flip:
    """Sites that are independent; which token is likely depends on the time alone."""

    kind, time_free, vocab_size = "cavity", False, V

    def __call__(self, tokens, t):
        time = torch.as_tensor(t, dtype=torch.float64).expand(tokens.shape[:-1])[..., None]
        lean = 6 * (time - 0.5) + 0.0 * tokens
        return torch.stack([-lean, lean], -1).log_softmax(-1)


@pytest.mark.parametrize("method", ["smc", "steering"])
def test_latents_move_by_the_future_that_was_looked_ahead_from(method):
    """A copy predicts at another time once its reveals are drawn anew; its twist was made before.

    Moved afterwards, 8,000 runs are 6 and more standard errors off in one of the two means.
    """
    kernel = InterpolatingKernel(Absorbing(V), Flip(), num_steps=20)
    chain, y = ReverseChain(kernel, L), torch.tensor(2.5, dtype=torch.float64)

    def program():
        level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        x = chain.x0(pyro.sample("path", chain))
        pyro.sample("y", dist.Normal(level + x.sum(-1), 0.5), obs=y)

    options = {"num_particles": 6, "num_runs": 8000, "ess_threshold": 2.0, "twist": "argmax"}
    posterior = SMC(program, method=method, store_path=False, **options).run(seed=1)
    assert posterior.settings["latent_moves"]["schedule"]
    x = all_states(V, L)
    lean = torch.as_tensor(6 * (kernel.times[:-1] - 0.5))
    one = float((torch.as_tensor(np.diff(kernel.alphas)) * torch.sigmoid(2 * lean)).sum())
    law = one ** x.sum(-1) * (1 - one) ** (L - x.sum(-1))
    joint = law * dist.Normal(x.sum(-1).double(), 1.25**0.5).log_prob(y).exp()
    level = (joint * (y - x.sum(-1)) / 1.25).sum()
    z_hat = posterior.log_evidence.exp()
    means = (
        (z_hat, joint.sum()),
        ((posterior.weights * posterior.samples["level"]).sum(1) * z_hat, level),
    )
    for found, exact in means:
        assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / len(found) ** 0.5


def test_children_of_the_last_round_are_complete():
    """A round is the last one for all particles; children whose reveals moved on would keep masks.

    Few particles, so that the last round comes early and reveals several positions at once.
    """
    chain = make_chain(GRIDS["coarse"])
    options = {"num_particles": 2, "num_children": 4, "ess_threshold": 0.9}
    for seed in range(60):
        posterior = SMC(chain, log_g, method="soft-value", **options).run(seed=seed)
        assert int(posterior.x0.max()) < V
        assert torch.isfinite(chain.log_prob(posterior.path)).all()


def test_results_have_the_steps_of_the_grid():
    chain = make_chain(GRIDS["fine"], hasty=False)
    posterior = run_smc(FeynmanKac(chain, log_g), 8, 50, ess_threshold=0.9)
    steps, rounds = chain.num_steps, L
    assert posterior.ess.shape == posterior.resampled.shape == (50, steps)
    assert posterior.log_evidence_steps.shape == posterior.log_mass.shape == (50, steps)
    assert posterior.ancestors.shape == (steps, 50, 8)
    assert posterior.path.shape == (50, 8, steps + 1, L)
    assert bool((posterior.path[..., -1, :] == posterior.x0).all())
    identity = torch.arange(8).expand(50, 8)
    moved = [k for k in range(steps) if not torch.equal(posterior.ancestors[k], identity)]
    assert set(moved) <= {steps // rounds, 2 * steps // rounds}
    due = posterior.resampled.any(0).nonzero()[:, 0].tolist()
    assert [k + 1 for k in due] == moved
    # A run that dies says so at the step of the grid at which its last round begins.
    dead = run_smc(FeynmanKac(chain, lambda x: torch.full(x.shape[:-1], -torch.inf)), 4, 2)
    assert dead.died_at.tolist() == [2 * steps // rounds] * 2


def test_steps_that_are_counted_stay_those_of_the_grid():
    chain = make_chain(GRIDS["fine"], hasty=False)
    rare = SMC(chain, log_g, method=FKSteering(every=5), num_particles=8).run(seed=0)
    assert rare.settings["scored_steps"] == [1, 6, 11]
    seen = []

    def twist(carry, k):
        seen.append(k)
        return torch.zeros(carry["tokens"].shape[:2], dtype=torch.float64)

    SMC(chain, log_g, twist=twist, num_particles=8).run(seed=0)
    assert seen == list(range(12))
