"""Masked chains on event times: the law of the steps, order statistics, first hitting.

The statistical tests have level 1e-4 each (about 30 of them: 0.3 % for the whole file, once, at the
fixed seeds), except where another rate is stated.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import (
    Absorbing,
    Cosine,
    InterpolatingKernel,
    Linear,
    LogLinear,
    OrderedKernel,
    first_hitting,
)
from ppl_diffusion.kernels.events import RevealPlan, decode, grid_bins
from ppl_diffusion.testing import (
    ExactChain,
    all_states,
    chi_square_p_value,
    random_joint,
    state_index,
    total_variation,
    toy_chain,
)

LEVEL = 1e-4
SCHEDULES = {"linear": Linear(), "log-linear": LogLinear(0.05), "cosine": Cosine()}
GRIDS = {
    "even": [1.0, 0.5, 0.0],
    "fine": [1.0, 0.9, 0.2, 0.0],
    "repeated": [1.0, 1.0, 0.4, 0.4, 0.0, 0.0],
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class Hasty:
    """A denoiser that reads the time, one for all rows or one each: the earlier, the flatter."""

    kind, time_free = "cavity", False

    def __init__(self, denoiser, clock=lambda t: t):
        self.denoiser, self.vocab_size, self.clock = denoiser, denoiser.vocab_size, clock

    def __call__(self, tokens, t):
        time = torch.as_tensor(self.clock(t), dtype=torch.float64).expand(tokens.shape[:-1])
        sharpness = 2.5 - 2 * time[..., None, None]
        return (self.denoiser(tokens, 0.5) * sharpness).log_softmax(-1)


def make(schedule=None, *, vocab_size=2, length=2, prompt=None, timed=True, seed=0, **grid):
    process = Absorbing(vocab_size, schedule)
    exact = TableDenoiser(random_joint(vocab_size, length, seed=seed), process)
    kernel = InterpolatingKernel(process, Hasty(exact) if timed else exact, **grid)
    return ReverseChain(kernel, length, prompt=prompt)


def log_prob_of_steps(chain, paths):
    """Score paths one step at a time, as any kernel can."""
    states = paths.unbind(-2)
    log_p = chain.kernel.prior_log_prob(states[0], chain.prompt)
    for k, tokens in enumerate(states[1:]):
        log_p = log_p + chain.kernel.step({"tokens": states[k]}, k, fixed=chain.fixed).log_prob(
            tokens
        )
    return log_p


def whole_paths(chain, prompt=None):
    """Return every path that reveals each free position once: all that can happen, and more."""
    size, length = chain.kernel.process.vocab_size, chain.length
    steps = all_states(chain.num_steps, length)
    clean = all_states(size, length)
    if prompt is not None:
        steps = steps[(steps[:, prompt >= 0] == 0).all(-1)]
        clean = clean[(clean == prompt)[:, prompt >= 0].all(-1)]
        steps = torch.where(prompt >= 0, -1, steps)
    step_of = steps[:, None].expand(-1, len(clean), -1).reshape(-1, length)
    tokens = clean.repeat(len(steps), 1)
    shown = torch.arange(chain.num_steps + 1)[:, None] > step_of[:, None]
    return torch.where(shown, tokens[:, None], size)


def codes(chain, paths):
    """Return one number per path."""
    step_of = (paths == chain.kernel.process.vocab_size).sum(-2) - 1
    size = chain.kernel.process.vocab_size
    code = state_index(step_of.clamp_min(0), chain.num_steps)
    return code * size**chain.length + state_index(chain.x0(paths), size)


def p_value(chain, drawn, outcomes, law):
    """Chi-square over whole paths; cells below 5 expected are pooled."""
    order = codes(chain, outcomes).argsort()
    known, law = codes(chain, outcomes)[order], law[order]
    found = torch.searchsorted(known, codes(chain, drawn)).clamp_max(len(known) - 1)
    assert torch.equal(known[found], codes(chain, drawn)), "a path that no outcome explains"
    counts = torch.bincount(found, minlength=len(known))
    rare = (law * len(drawn) < 5) & (law > 0)
    kept = ~rare
    counts = torch.cat([counts[kept], counts[rare].sum()[None]])
    return chi_square_p_value(counts, torch.cat([law[kept], law[rare].sum()[None]]))


# the density


@each_schedule
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 1]), torch.tensor([0, 1])])
def test_density_of_every_array_of_states_is_that_of_the_steps(schedule, grid, prompt):
    """All ``3 ** (2 (T + 1))`` of them: equal where possible, ``-inf`` exactly where the steps are.

    Invalid arrays are masked late, unmasked early, remasked, edited, left masked or off prompt.
    """
    if len(grid) > 5:
        grid = grid[1:-1]  # 3 ** 8 arrays, and the two ends below
    chain = make(schedule, times=grid, prompt=prompt)
    paths = all_states(3, 2 * len(grid)).reshape(-1, len(grid), 2)
    here, there = chain.log_prob(paths), log_prob_of_steps(chain, paths)
    assert torch.equal(here > -torch.inf, there > -torch.inf)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)
    assert float(here.exp().sum()) == pytest.approx(1, abs=1e-12)


@each_schedule
def test_times_may_repeat_at_both_ends(schedule):
    chain = make(schedule, times=GRIDS["repeated"], length=3)
    paths = whole_paths(chain)
    here, there = chain.log_prob(paths), log_prob_of_steps(chain, paths)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)
    assert float(here.exp().sum()) == pytest.approx(1, abs=1e-12)
    drawn = chain.sample((50,))
    torch.testing.assert_close(chain.log_prob(drawn), log_prob_of_steps(chain, drawn))


def test_tokens_that_the_denoiser_excludes_are_impossible_not_nan():
    joint = random_joint(3, 2).clone()
    joint[0] = 0
    process = Absorbing(3)
    kernel = InterpolatingKernel(process, TableDenoiser(joint / joint.sum(), process), num_steps=2)
    chain = ReverseChain(kernel, 2)
    paths = whole_paths(chain)
    here = chain.log_prob(paths)
    assert torch.equal(here == -torch.inf, chain.x0(paths)[:, 0] == 0)
    torch.testing.assert_close(here, log_prob_of_steps(chain, paths), rtol=0, atol=1e-12)


def test_states_that_do_not_exist_are_impossible():
    """With validation switched off nothing else stands between them and the density."""
    chain = make(num_steps=2)
    chain._validate_args = False
    path = chain.sample((4,))
    for wrong in (-1, 3, 100):
        broken = path.clone()
        broken[:, -1, 0] = wrong
        assert bool((chain.log_prob(broken) == -torch.inf).all())


@each_schedule
@pytest.mark.parametrize("timed", [True, False])
def test_remembered_density_is_the_scored_one(schedule, timed):
    prompt = torch.tensor([-1, 2, -1, -1])
    for given in (None, prompt):
        chain = make(schedule, vocab_size=3, length=4, prompt=given, timed=timed, num_steps=5)
        path = chain.sample((300,))
        remembered = chain.log_prob(path)
        for scored in (chain.log_prob(path.clone()), log_prob_of_steps(chain, path)):
            torch.testing.assert_close(remembered, scored, rtol=0, atol=1e-12)


class Logits(torch.nn.Module):
    """A trainable denoiser; its output depends on the neighbours and on the time."""

    vocab_size, kind, time_free = 3, "cavity", False

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.table = torch.nn.Parameter(draw)
        self.speed = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, tokens, t):
        time = torch.as_tensor(t, dtype=torch.float64).expand(tokens.shape[:-1])
        sharp = 1 + self.speed * time[..., None, None]
        return (self.table[tokens.roll(1, -1)] * sharp).log_softmax(-1)


def gradients(log_p, network):
    weights = torch.linspace(-1, 2, len(log_p), dtype=torch.float64)  # no symmetry to hide in
    return torch.autograd.grad((weights * log_p).sum(), list(network.parameters()))


@each_schedule
def test_gradients_are_those_of_the_steps(schedule):
    network = Logits()
    kernel = InterpolatingKernel(Absorbing(3, schedule), network, num_steps=4)
    chain = ReverseChain(kernel, 4)
    path = chain.sample((40,))
    here = gradients(chain.log_prob(path), network)
    there = gradients(log_prob_of_steps(chain, path), network)
    for mine, other in zip(here, there, strict=True):
        assert float(mine.abs().max()) > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_impossible_paths_send_no_gradient_and_no_nan():
    network = Logits()
    chain = ReverseChain(InterpolatingKernel(Absorbing(3), network, num_steps=2), 2)
    path = chain.sample((6,))
    path[3:, 0] = 0  # not masked at the start
    log_p = chain.log_prob(path)
    assert bool((log_p[3:] == -torch.inf).all())
    here = gradients(torch.where(log_p > -torch.inf, log_p, 0.0), network)
    good = gradients(torch.cat([chain.log_prob(path[:3]), torch.zeros(3)]), network)
    for mine, other in zip(here, good, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# samples


def test_samples_of_both_engines_have_the_path_law():
    """Chi-square over the full outcomes of ``L = K = 3`` against dense matrices; a twin fails."""
    chain = make(vocab_size=3, length=3, times=[1.0, 0.7, 0.2, 0.0])
    outcomes = whole_paths(chain)
    law = ExactChain.of(chain).path_prob(outcomes)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    shape = torch.Size((40_000,))
    events = chain.sample(shape)
    steps = chain._sample_steps(shape, None, False).path
    assert p_value(chain, events, outcomes, law) > LEVEL
    assert p_value(chain, steps, outcomes, law) > LEVEL
    # twins: a denoiser that is shown one time for all, and another grid
    late = chain.kernel.with_denoiser(Hasty(chain.kernel.denoiser.denoiser, lambda t: 0.4 + 0 * t))
    assert p_value(chain, ReverseChain(late, 3).sample(shape), outcomes, law) < 1e-12
    other = make(vocab_size=3, length=3, times=[1.0, 0.6, 0.2, 0.0])
    assert p_value(chain, other.sample(shape), outcomes, law) < 1e-12


@each_schedule
@pytest.mark.parametrize("prompt", [None, torch.tensor([1, -1, -1])], ids=["free", "prompted"])
def test_samples_for_every_schedule_and_prompt(schedule, prompt):
    times = [1.0, 0.8, 0.8, 0.3, 0.0]
    chain = make(schedule, length=3, prompt=prompt, times=times)
    outcomes = whole_paths(chain, prompt)
    law = ExactChain.of(chain).path_prob(outcomes)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    for drawn in (
        chain.sample((20_000,)),
        chain._sample_steps(torch.Size((20_000,)), None, False).path,
    ):
        assert p_value(chain, drawn, outcomes, law) > LEVEL


@each_schedule
def test_number_of_masks_is_binomial(schedule):
    """At grid time ``t``: ``Binomial(free, 1 - alpha(t))``, whatever the network says."""
    prompt = torch.tensor([-1, -1, 0, -1, -1, -1])
    chain = make(schedule, length=6, prompt=prompt, times=[1.0, 0.85, 0.5, 0.1, 0.0])
    masks = (chain.sample((10_000,)) == 2).sum(-1)
    for k in (1, 2, 3):
        noise = 1 - float(chain.kernel.alphas[k])
        law = torch.from_numpy(binom.pmf(np.arange(6), 5, noise))
        counts = torch.bincount(masks[:, k], minlength=6)
        assert chi_square_p_value(counts, law) > LEVEL
        shifted = torch.from_numpy(binom.pmf(np.arange(6), 5, noise - 0.03))
        assert chi_square_p_value(counts, shifted) < LEVEL


# first hitting


@pytest.mark.parametrize(("size", "length"), [(3, 2), (3, 3), (2, 4)])
@pytest.mark.parametrize("clock", ["mean", "sampled"])
def test_first_hitting_is_the_data_law(size, length, clock):
    """Summed over all orders of all sequences; in pairs it is something else."""
    process, joint = Absorbing(size), random_joint(size, length)
    kernel = first_hitting(process, TableDenoiser(joint, process), length=length, clock=clock)
    chain = ReverseChain(kernel, length)
    paths = whole_paths(chain)
    law = torch.zeros(size**length, dtype=torch.float64)
    law.index_add_(0, state_index(chain.x0(paths), size), chain.log_prob(paths).exp())
    assert total_variation(law, joint.flatten()) < 1e-12
    exact = chain.marginal().log_prob(all_states(size, length)).exp()
    assert total_variation(exact, joint.flatten()) < 1e-12
    pairs = ReverseChain(
        OrderedKernel(process, kernel.denoiser, length=length, group_size=2), length
    )
    parallel = pairs.marginal().log_prob(all_states(size, length)).exp()
    assert total_variation(parallel, joint.flatten()) > 1e-3


def test_first_hitting_samples_are_data():
    """Chi-square over the 27 sequences; ancestral sampling in three steps fails the same test."""
    process, joint = Absorbing(3), random_joint(3, 3, sharpness=2.0)
    denoiser = TableDenoiser(joint, process)
    chain = ReverseChain(first_hitting(process, denoiser, length=3), 3)
    ancestral = ReverseChain(InterpolatingKernel(process, denoiser, num_steps=3), 3)

    def p_of(drawn):
        counts = torch.bincount(state_index(drawn, 3), minlength=27)
        return chi_square_p_value(counts, joint.flatten())

    assert p_of(chain.x0(chain.sample((20_000,)))) > LEVEL
    assert p_of(ancestral.x0(ancestral.sample((20_000,)))) < 1e-8


@each_schedule
def test_one_list_of_events_grouped_by_a_grid_is_ancestral_sampling(schedule):
    """Levels, bins and tokens drawn here by hand; chi-square against dense matrices."""
    chain = make(schedule, vocab_size=3, length=3, times=[1.0, 0.6, 0.0])
    kernel, n = chain.kernel, 30_000
    levels, noise = torch.rand(2, n, 3, dtype=torch.float64)
    step_of = grid_bins(levels, kernel.alphas)
    plan = RevealPlan.of(step_of, torch.from_numpy(kernel.times)[step_of])
    tokens = decode(kernel.denoiser, 3, torch.full((n, 3), 3), plan, noise).tokens
    shown = torch.arange(3)[:, None] > step_of[:, None]
    drawn = torch.where(shown, tokens[:, None], 3)
    outcomes = whole_paths(chain)
    law = ExactChain.of(chain).path_prob(outcomes)
    assert p_value(chain, drawn, outcomes, law) > LEVEL
    singly = RevealPlan.of(levels.argsort(-1, descending=True).argsort(-1), levels)
    alone = decode(kernel.denoiser, 3, torch.full((n, 3), 3), singly, noise).tokens
    assert p_value(chain, torch.where(shown, alone[:, None], 3), outcomes, law) < LEVEL


class Watch:
    """Records the number of masks and the time of every row it is asked about."""

    vocab_size, kind, time_free = 2, "cavity", False

    def __init__(self):
        self.seen = []

    def __call__(self, tokens, t):
        self.seen.append(((tokens == 2).sum(-1), t))
        return torch.full((*tokens.shape, 2), -math.log(2.0), dtype=torch.float64)


@each_schedule
@pytest.mark.parametrize("prompted", [False, True])
def test_first_hitting_levels_are_order_statistics(schedule, prompted):
    """Seen from the network: the call with ``n`` masks has the ``n``-th smallest of ``F`` uniforms.

    Kolmogorov-Smirnov against ``Beta(n, F - n + 1)``, and the ratio of successive levels against
    ``u^(1/n)``; 18 tests of level 1e-4 per schedule, a false alarm in 0.2 % of files.
    """
    length, free, watch = 5, 4 if prompted else 5, Watch()
    prompt = torch.tensor([-1, -1, 1, -1, -1]) if prompted else None
    kernel = first_hitting(Absorbing(2, schedule), watch, length=length, clock="sampled")
    ReverseChain(kernel, length, prompt=prompt).sample((4000,))
    masks, times = zip(*watch.seen, strict=True)
    assert [int(m.unique()) for m in masks] == list(range(free, 0, -1))
    level = torch.stack([torch.as_tensor(schedule.log1m_alpha(t)).exp() for t in times])
    if isinstance(schedule, LogLinear):  # levels beyond 1 - eps all belong to t = 1
        level = torch.where(level == 1, 0.95 + 0.05 * torch.rand(level.shape), level)
        level = level.sort(0, descending=True).values
    for call, n in enumerate(range(free, 0, -1)):
        assert kstest(level[call].numpy(), "beta", (n, free - n + 1)).pvalue > LEVEL
        before = torch.ones(4000) if call == 0 else level[call - 1]
        assert kstest(((level[call] / before) ** n).numpy(), "uniform").pvalue > LEVEL
        assert kstest(level[call].numpy(), "beta", (n, free - n + 2)).pvalue < LEVEL


# the limit of many steps


def exact_first_hitting(denoiser, schedule, size, nodes=40):
    """Return the law of two tokens, integrating over the two reveal times by quadrature."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
    first, second = x[:, None], x[:, None] * x  # the later time as a share of the earlier
    density = 2 * schedule.alpha_prime(first) * schedule.alpha_prime(second) * first
    weight = (w[:, None] * w * density)[..., None, None] / 2  # either order
    states = all_states(size + 1, 2).expand(nodes, nodes, -1, 2)
    early, late = (
        denoiser(states, t.expand(nodes, nodes)[..., None])
        .exp()
        .reshape(nodes, nodes, size + 1, size + 1, 2, size)
        for t in (first, second)
    )
    left = early[:, :, size, size, 0][..., :, None] * late[:, :, :size, size, 1]
    right = early[:, :, size, size, 1][..., None, :] * late[:, :, size, :size, 0].mT
    return (weight * (left + right)).sum((0, 1)).flatten()


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_sampled_clock_is_the_limit_of_ancestral_sampling(schedule):
    """With a denoiser that reads the time: the distance falls like ``1 / N``, to nothing else."""
    process = Absorbing(3, schedule)
    exact = TableDenoiser(random_joint(3, 2, sharpness=1.5), process)
    denoiser = Hasty(exact)
    limit = exact_first_hitting(denoiser, schedule, 3)
    coarse = exact_first_hitting(denoiser, schedule, 3, nodes=30)
    assert total_variation(limit, coarse) < 1e-9
    frozen = exact_first_hitting(Hasty(exact, lambda t: 0.0), schedule, 3)
    mean = ReverseChain(first_hitting(process, denoiser, length=2), 2).marginal()
    gaps = {"limit": [], "time 0": [], "mean": []}
    for num_steps in (64, 128, 256):
        chain = ReverseChain(InterpolatingKernel(process, denoiser, num_steps=num_steps), 2)
        law = ExactChain.of(chain).x0_law()
        gaps["limit"].append(total_variation(law, limit))
        gaps["time 0"].append(total_variation(law, frozen))
        gaps["mean"].append(total_variation(law, mean.log_prob(all_states(3, 2)).exp()))
    for far, near in itertools.pairwise(gaps["limit"]):
        assert 1.9 < far / near < 2.1
    assert gaps["limit"][-1] < 2e-3
    assert min(gaps["time 0"]) > 0.05
    assert min(gaps["mean"]) > 0.01
    # and it is what the sampler does
    kernel = first_hitting(process, denoiser, length=2, clock="sampled")
    chain = ReverseChain(kernel, 2)
    counts = torch.bincount(state_index(chain.x0(chain.sample((100_000,))), 3), minlength=9)
    assert chi_square_p_value(counts, limit) > LEVEL
    assert chi_square_p_value(counts, frozen) < 1e-12
    steps = chain._sample_steps(torch.Size((100_000,)), None, False).path
    counts = torch.bincount(state_index(chain.x0(steps), 3), minlength=9)
    assert chi_square_p_value(counts, limit) > LEVEL


def test_toy_chain_of_this_file_is_not_time_free():
    """Otherwise the tests above would pass whatever time a network is shown."""
    early, late = Hasty(toy_chain().kernel.denoiser), torch.tensor([[3, 0]])
    assert float((early(late, 1.0).exp() - early(late, 0.1).exp()).abs().max()) > 0.05
