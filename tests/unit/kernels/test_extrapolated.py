"""Extrapolated predictions: a density of paths, a proposal, and nearer to the data."""

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.handlers import unroll
from ppl_diffusion.kernels import (
    Absorbing,
    Cosine,
    ExtrapolatedKernel,
    InterpolatingKernel,
    OrderedKernel,
    Uniform,
)
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import (
    CountingDenoiser,
    ExactChain,
    KernelContract,
    all_states,
    chi_square_p_value,
    random_joint,
    state_index,
    total_variation,
    toy_potential,
    z_score,
)

MASK = 3


def make(length=3, *, seed=0, prompt=None, schedule=None, kind=ExtrapolatedKernel, **options):
    process = Absorbing(3, schedule)
    denoiser = TableDenoiser(random_joint(3, length, seed=seed, sharpness=1.5), process)
    options = options or {"num_steps": 4}
    return ReverseChain(kind(process, denoiser, **options), length, prompt=prompt)


def whole_paths(chain):
    """Return all paths that reveal each free position once."""
    steps, tokens = all_states(chain.num_steps, chain.length), all_states(3, chain.length)
    if chain.prompt is not None:
        known = chain.prompt >= 0
        steps = steps[(steps[:, known] == 0).all(-1)]
        steps = torch.where(known, -1, steps)
        tokens = tokens[(tokens == chain.prompt)[:, known].all(-1)]
    step_of = steps[:, None].expand(-1, len(tokens), -1).reshape(-1, 1, chain.length)
    shown = torch.arange(chain.num_steps + 1)[:, None] > step_of
    return torch.where(shown, tokens.repeat(len(steps), 1)[:, None], MASK)


def x0_law(chain):
    paths = whole_paths(chain)
    law = torch.zeros(3**chain.length, dtype=torch.float64)
    return law.index_add(0, state_index(chain.x0(paths), 3), chain.log_prob(paths).exp())


class TestContract(KernelContract):
    def make_kernel(self):
        return make(2).kernel


class TestCosine(KernelContract):
    def make_kernel(self):
        return make(2, schedule=Cosine(), num_steps=3).kernel


# the law


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 1}, {"num_steps": 4}, {"times": [1.0, 0.8, 0.8, 0.3, 0.0, 0.0]}],
    ids=str,
)
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 2, -1])])
def test_density_is_normalised_and_remembered(options, prompt):
    chain = make(prompt=prompt, **options)
    assert float(chain.log_prob(whole_paths(chain)).exp().sum()) == pytest.approx(1, abs=1e-12)
    path = chain.sample((40,))
    remembered = chain.log_prob(path)
    torch.testing.assert_close(remembered, chain.log_prob(path.clone()), rtol=0, atol=1e-12)
    grid = path.reshape(2, 20, *chain.event_shape)
    torch.testing.assert_close(chain.log_prob(grid.clone()).flatten(), remembered)


def test_samples_follow_the_density():
    """Chi-square over whole paths of level 1e-4; ancestral paths fail."""
    chain = make(2, num_steps=3)
    outcomes = whole_paths(chain)
    law = chain.log_prob(outcomes).exp()
    order = torch.tensor([4 ** (7 - i) for i in range(8)])
    code, rank = (outcomes.flatten(1) * order).sum(-1).sort()
    law = law[rank]
    for kind, fits in ((ExtrapolatedKernel, True), (InterpolatingKernel, False)):
        drawn = make(2, num_steps=3, kind=kind).sample((50_000,))
        index = torch.searchsorted(code, (drawn.flatten(1) * order).sum(-1))
        counts = torch.bincount(index, minlength=len(law))
        often = law * 50_000 >= 5
        counts = torch.cat([counts[often], counts[~often].sum()[None]])
        p = chi_square_p_value(counts, torch.cat([law[often], law[~often].sum()[None]]))
        assert p > 1e-4 if fits else p < 1e-12


def by_hand(chain, paths):
    """Return path probabilities from the formula of the class, one site at a time."""
    kernel, prob = chain.kernel, torch.ones(len(paths), dtype=torch.float64)
    noise = 1 - kernel.alphas
    for row, path in enumerate(paths):
        last = None
        for k in range(chain.num_steps):
            stay = noise[k + 1] / noise[k]
            p1 = kernel.denoiser(path[k], 0.5).exp()
            p = p1
            if last is not None:
                p2, n2 = last
                weight = ((noise[k] + noise[k + 1]) / 2 - noise[k]) / (noise[k] - n2)
                raw = p1 + (p1 - p2) * weight
                cut = raw.clamp_min(0)
                for site in range(chain.length):
                    lost = float(-raw[site].clamp_max(0).sum())
                    trend = p1[site] if lost > 0.1 else cut[site] / cut[site].sum()
                    p = p.clone()
                    p[site] = 0.95 * trend + 0.05 * p1[site]
            for site in range(chain.length):
                if path[k, site] == MASK:
                    here = int(path[k + 1, site])
                    prob[row] *= stay if here == MASK else (1 - stay) * p[site, here]
            last = (p1, noise[k])
    return prob


def test_density_is_the_formula():
    chain = make(seed=3, num_steps=3)
    paths = chain.sample((60,))
    torch.testing.assert_close(chain.log_prob(paths).exp(), by_hand(chain, paths))


def test_fallback_is_reached_and_matters():
    """A sharp law clips more than a tenth somewhere: otherwise the line above is not tested."""
    process = Absorbing(3)
    denoiser = TableDenoiser(random_joint(3, 3, seed=1, sharpness=4.0), process)
    chain = ReverseChain(ExtrapolatedKernel(process, denoiser, num_steps=3), 3)
    paths = chain.sample((300,))
    clipped = 0
    for k in (1, 2):
        p2, p1 = (denoiser(paths[:, j], 0.5).exp() for j in (k - 1, k))
        raw = p1 + (p1 - p2) * (1 / 3 / 2) / (1 / 3)
        masked = paths[:, k] == MASK
        clipped += int(((-raw.clamp_max(0).sum(-1) > 0.1) & masked).sum())
    assert clipped > 10
    torch.testing.assert_close(chain.log_prob(paths[:60]).exp(), by_hand(chain, paths[:60]))
    total = chain.log_prob(whole_paths(chain)).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("num_steps", [3, 4, 6])
@pytest.mark.parametrize("seed", range(6))
def test_nearer_to_the_data_than_ancestral_sampling(num_steps, seed):
    """Total variation by enumeration, as many network calls."""
    joint = random_joint(3, 2, seed=seed, sharpness=1.5).flatten()
    extrapolated = total_variation(x0_law(make(2, seed=seed, num_steps=num_steps)), joint)
    ancestral = make(2, seed=seed, num_steps=num_steps, kind=InterpolatingKernel)
    assert extrapolated < total_variation(ExactChain.of(ancestral).x0_law(), joint)


# a proposal


def evidence_and_posterior(potential, *, weighted=True, runs=2000, n=8, **options):
    """Run the ancestral chain, moved by the extrapolated one with the same denoiser."""
    chain = make(seed=3, kind=InterpolatingKernel, **options)
    kernel = ExtrapolatedKernel(
        chain.kernel.process, chain.kernel.denoiser, times=chain.kernel.times
    )
    exact = ExactChain.of(chain).evidence(potential)
    if not weighted:
        chain = ReverseChain(kernel, 3)
    fk = FeynmanKac(chain, potential, proposal=kernel if weighted else None, twist=None)
    return exact, run_smc(fk, n, runs, ess_threshold=0.7, store_path=False)


PEAKED = toy_potential(3, 3, scale=2.0)


@pytest.mark.parametrize("num_steps", [2, 4])
def test_evidence_is_unbiased_as_a_proposal(num_steps):
    """Four standard errors, 6e-5 per case; the same moves without weights are off."""
    exact, post = evidence_and_posterior(PEAKED, num_steps=num_steps)
    assert post.exact
    assert "extrapolated" not in post.target
    assert abs(z_score(post.log_evidence.exp(), exact)) < 4
    exact, post = evidence_and_posterior(PEAKED, num_steps=num_steps, weighted=False, runs=20_000)
    assert "predictions extrapolated along time" in post.target
    assert abs(z_score(post.log_evidence.exp(), exact)) > 4


def test_shared_denoiser_is_asked_once_per_state():
    """One object behind model and proposal: half the rows of two objects, on the same paths."""
    chain = make(kind=InterpolatingKernel)
    counter, other = (CountingDenoiser(chain.kernel.denoiser) for _ in range(2))
    model = ReverseChain(chain.kernel.with_denoiser(counter), 3)

    def evaluations(denoiser):
        counter.calls = counter.rows = other.rows = 0
        kernel = ExtrapolatedKernel(chain.kernel.process, denoiser, num_steps=4)
        fk = FeynmanKac(model, toy_potential(3, 3), proposal=kernel, twist=None)
        generator = torch.Generator().manual_seed(1)
        post = run_smc(fk, 8, 20, generator=generator, ess_threshold=0)
        assert post.num_evaluations == counter.rows + other.rows
        return post.num_evaluations

    shared = evaluations(counter)
    assert counter.calls <= 4
    assert evaluations(other) == 2 * shared
    assert counter.rows == other.rows == shared


def test_chain_costs_one_call_per_step_and_no_more_to_advance():
    chain = make(num_steps=5)
    counter = CountingDenoiser(chain.kernel.denoiser)
    counted = ReverseChain(chain.kernel.with_denoiser(counter), 3)
    path = counted.sample((50,))
    counted.log_prob(path)
    assert counter.calls == 5


@pytest.mark.parametrize("twist", [None, "argmax", "persistent"])
def test_the_carry_keeps_what_others_put_there(twist):
    """As the model, under every twist: 4 s.e. (6e-5), and the persistent noise survives."""
    chain = make(seed=3, num_steps=3)
    exact = float((x0_law(chain) * PEAKED(all_states(3, 3)).exp()).sum())
    post = run_smc(FeynmanKac(chain, PEAKED, twist=twist), 8, 1500, store_path=False)
    assert abs(z_score(post.log_evidence.exp(), exact)) < 4
    carry = {"tokens": torch.full((2, 3), MASK), "other": torch.ones(2)}
    moved = chain.kernel.advance(carry, carry["tokens"], 0)
    assert moved["other"] is carry["other"]
    assert set(carry) == {"tokens", "other"}


# programs and gradients


@pytest.mark.parametrize("plate", [None, 3])
def test_unrolled_chain_has_the_same_density(plate):
    """In a plate Pyro expands each step, which must not lose the prediction it was made from."""
    chain = make(num_steps=3)

    def program():
        if plate is None:
            return pyro.sample("path", chain)
        with pyro.plate("rows", plate):
            return pyro.sample("path", chain)

    trace = poutine.trace(unroll(program)).get_trace()
    path = trace.nodes["path"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(path.clone()).sum())


class Logits(torch.nn.Module):
    """Trainable, and certain that token 1 does not exist."""

    vocab_size, kind, time_free = 3, "cavity", True

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def forward(self, tokens, t):
        excluded = torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64)
        return (self.table[tokens.roll(1, -1)] + excluded).log_softmax(-1)


def test_gradients_are_finite_where_tokens_are_excluded():
    network = Logits()
    chain = ReverseChain(ExtrapolatedKernel(Absorbing(3), network, num_steps=4), 3)
    path = chain.sample((20,))
    assert not bool((path == 1).any())
    (gradient,) = torch.autograd.grad(chain.log_prob(path).sum(), network.table)
    assert bool(torch.isfinite(gradient).all())
    with torch.no_grad():  # along a direction, against differences: 1e-6 of a number of order one
        direction = torch.randn_like(network.table)
        values = []
        for shift in (1e-6, -1e-6):
            network.table.add_(shift * direction)
            values.append(chain.log_prob(path.clone()).sum())
            network.table.sub_(shift * direction)
    slope = float((values[0] - values[1]) / 2e-6)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-5)


# what it is not


def test_refusals():
    process = Absorbing(3)
    denoiser = TableDenoiser(random_joint(3, 3), process)
    for kappa in (0.5, [1.0, 0.9], -0.1):
        with pytest.raises(ValueError, match=r"only kappa = 1 is supported; leave kappa out"):
            ExtrapolatedKernel(process, denoiser, num_steps=2, kappa=kappa)
    uniform = Uniform(3)
    with pytest.raises(CapabilityError, match=r"ExtrapolatedKernel: .*process must be absorbing"):
        ExtrapolatedKernel(uniform, TableDenoiser(random_joint(3, 3), uniform), num_steps=2)


def test_no_marginal_by_matrices():
    chain = make()
    assert not chain.kernel.markov
    for ask in ("log_prob", "log_prob_bound", "log_prob_estimate"):
        with pytest.raises(IntractableLogProb, match=ask):
            getattr(chain.marginal(), ask)(torch.zeros(3))


def test_it_is_not_the_ancestral_kernel():
    chain = make()
    ancestral = make(kind=InterpolatingKernel).kernel
    same = InterpolatingKernel(chain.kernel.process, chain.kernel.denoiser, num_steps=4)
    for other in (ancestral, same, OrderedKernel(same.process, same.denoiser, length=3)):
        assert not chain.kernel.same_as(other)
        assert not other.same_as(chain.kernel)
    path = ReverseChain(same, 3).sample((30,))
    assert not torch.allclose(chain.log_prob(path), ReverseChain(same, 3).log_prob(path))
    assert chain.kernel.changes == ("predictions extrapolated along time",)
