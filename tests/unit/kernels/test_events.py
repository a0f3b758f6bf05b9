"""The event-time engine: plans, asynchronous rows, what a network is asked, bad networks."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, Cosine, InterpolatingKernel, Linear, OrderedKernel
from ppl_diffusion.kernels.events import RevealPlan, decode, grid_bins, reveal_ranks, score
from ppl_diffusion.testing import CountingDenoiser, toy_markov_chain, z_score

MASK = 3


class Spy:
    """Keeps what it was shown; predicts from the left neighbour and the time."""

    vocab_size, kind, time_free = 3, "cavity", False

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.shown, self.times, self.dtype = [], [], dtype

    def logits(self, tokens, t):
        self.shown.append(tokens)
        self.times.append(t)
        time = torch.as_tensor(t, dtype=torch.float64).expand(tokens.shape[:-1])
        return self.table[tokens.roll(1, -1)] * (1 + time[..., None, None])

    def __call__(self, tokens, t):
        return self.logits(tokens, t).log_softmax(-1).to(self.dtype)


class SpyWithHead(Spy):
    """The same predictions by way of hidden states, with the rows of its head counted."""

    hidden_size = 4

    def __init__(self):
        super().__init__()
        self.head_rows, self.dense_calls = [], 0

    def __call__(self, tokens, t):
        self.dense_calls += 1
        return self.head(self.hidden(tokens, t))

    def hidden(self, tokens, t):
        logits = self.logits(tokens, t)
        return torch.cat([logits, logits.sum(-1, keepdim=True)], -1)

    def head(self, rows):
        self.head_rows.append(rows[..., 0].numel())
        return rows[..., :3].log_softmax(-1)


# bins and ranks


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_bins_hold_the_levels_between_two_grid_points(schedule):
    times = np.array([1.0, 1.0, 0.9, 0.5, 0.5, 0.2, 0.0, 0.0])
    alphas = np.asarray(schedule.alpha(times))
    levels = torch.cat([torch.rand(500, dtype=torch.float64), torch.zeros(1).double()])
    edges = torch.from_numpy(1 - alphas[(alphas > 0) & (alphas < 1)])
    levels = torch.cat([levels, edges, torch.nextafter(torch.ones(1), torch.zeros(1)).double()])
    step = grid_bins(levels, alphas)
    noise = torch.from_numpy(1 - alphas)
    assert bool((noise[step + 1] <= levels).all())
    assert bool((levels < noise[step]).all())  # so never in a bin without width
    assert grid_bins(levels[:30].reshape(3, 10), alphas).shape == (3, 10)


def test_bins_have_the_probabilities_of_the_schedule():
    """Shares of 1e5 levels on the real grid; 4 s.e. for each of 8 bins, 5e-4 in all."""
    alphas = np.asarray(Cosine().alpha(np.linspace(1, 0, 9)))
    step = grid_bins(torch.rand(100_000, dtype=torch.float64), alphas)
    share = torch.bincount(step, minlength=8) / 1e5
    p = torch.from_numpy(np.diff(alphas))
    assert float(((share - p).abs() / (p * (1 - p) / 1e5).sqrt()).max()) < 4


@pytest.mark.parametrize("block", [None, 1, 2, 4, 5])
def test_ranks_against_sorting_by_hand(block):
    levels, free = torch.rand(40, 5, dtype=torch.float64), torch.rand(40, 5) < 0.7
    of_site = None if block is None else torch.arange(5) // block
    ranks = reveal_ranks(levels, free, of_site)
    for row in range(40):
        sites = [s for s in range(5) if free[row, s]]
        order = sorted(sites, key=lambda s: (s // (block or 5), -float(levels[row, s])))
        assert [int(ranks[row, s]) for s in order] == list(range(len(order)))
        assert sorted(ranks[row].tolist()) == list(range(5))


# plans


def random_groups(rows=12, length=6, groups=5):
    group = torch.randint(groups, (rows, length)) * 3 - 1  # with gaps; some are -1
    group[0], group[1] = -1, 7
    return group, torch.rand(rows, length, dtype=torch.float64)


def test_plan_covers_every_position_once_in_the_order_of_its_groups():
    group, time = random_groups()
    plan = RevealPlan.of(group, time)
    assert sorted(plan.rows.tolist()) == list(range(12))
    counts = [len({g for g in row if g >= 0}) for row in group[plan.rows].tolist()]
    assert counts == sorted(counts, reverse=True)
    assert len(plan.rounds) == max(counts)
    assert plan.num_rows == sum(counts)
    for index, (size, sites) in enumerate(plan.rounds):
        assert size == sum(c > index for c in counts)
        assert bool((sites < size * 6).all())
        for row in range(size):
            home = int(plan.rows[row])
            wanted = sorted({g for g in group[home].tolist() if g >= 0})[index]
            here = sorted(int(s) % 6 for s in sites if int(s) // 6 == row)
            assert here == [s for s in range(6) if group[home, s] == wanted]
            assert float(plan.times[row, index]) == float(time[home, here].max())


def test_plan_of_nothing():
    for group in (torch.full((3, 4), -1), torch.zeros(0, 4, dtype=torch.int64)):
        plan = RevealPlan.of(group, torch.zeros(group.shape, dtype=torch.float64))
        assert plan.rounds == ()
        assert plan.num_rows == 0
        spy, tokens = Spy(), torch.ones_like(group)
        done = decode(spy, 3, tokens, plan, torch.zeros(group.shape).double())
        assert torch.equal(done.tokens, tokens)
        assert not spy.shown


# rows on their own clocks

PROMPTS = torch.full((8, 7), MASK)
for _row in range(8):  # 0 to 7 known tokens, at other places in every row
    PROMPTS[_row, torch.randperm(7, generator=torch.Generator().manual_seed(_row))[:_row]] = 1


PROMPTS = PROMPTS[[3, 0, 5, 1, 7, 2, 6, 4]]  # rows by their number of groups are another order


def ordered_groups(group_size):
    levels = torch.rand(8, 7, dtype=torch.float64)
    free = PROMPTS == MASK
    rank = reveal_ranks(levels, free)
    return torch.where(free, rank // group_size, -1), levels


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_masks_fall_by_the_group_in_every_row_of_every_call(group_size):
    """Eight rows with eight prompts: the published code draws one site for the whole batch."""
    group, levels = ordered_groups(group_size)
    plan, spy = RevealPlan.of(group, levels), Spy()
    decode(spy, 3, PROMPTS, plan, torch.rand(8, 7, dtype=torch.float64))
    free = (PROMPTS == MASK).sum(-1)[plan.rows]
    assert len(spy.shown) == math.ceil(7 / group_size)
    for call, (state, t) in enumerate(zip(spy.shown, spy.times, strict=True)):
        under_way = -(-free // group_size) > call
        assert len(state) == len(t) == int(under_way.sum())
        assert bool(under_way[: len(state)].all())
        assert torch.equal((state == MASK).sum(-1), (free - call * group_size)[: len(state)])
        known = PROMPTS[plan.rows[: len(state)]]
        assert bool(((known == MASK) | (state == known)).all())
        later = state == MASK  # positions that are still masked were not drawn before
        first = torch.where(later, levels[plan.rows[: len(state)]], 0.0).amax(-1)
        torch.testing.assert_close(t, first)


@pytest.mark.parametrize("group_size", [1, 2])
def test_rows_do_not_see_each_other(group_size):
    group, levels = ordered_groups(group_size)
    noise = torch.rand(8, 7, dtype=torch.float64)
    plan = RevealPlan.of(group, levels)
    together = decode(Spy(), 3, PROMPTS, plan, noise)
    assert int(together.tokens.max()) < MASK
    for row in range(8):
        one = slice(row, row + 1)
        alone = decode(Spy(), 3, PROMPTS[one], RevealPlan.of(group[one], levels[one]), noise[one])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.log_c[0], together.log_c[row], rtol=0, atol=1e-12)


def test_states_that_a_denoiser_kept_are_not_edited():
    group, levels = ordered_groups(1)
    spy = Spy()
    decode(spy, 3, PROMPTS, RevealPlan.of(group, levels), torch.rand(8, 7, dtype=torch.float64))
    masks = [int((state == MASK).sum()) for state in spy.shown]
    assert masks == sorted(masks, reverse=True)
    assert len(set(masks)) == len(masks)


def test_log_c_is_of_the_prediction_that_the_token_was_drawn_from():
    group, levels = ordered_groups(2)
    plan = RevealPlan.of(group, levels)
    done = decode(Spy(torch.float32), 3, PROMPTS, plan, torch.rand(8, 7, dtype=torch.float64))
    spy, expected = Spy(torch.float32), torch.zeros(8, 7, dtype=torch.float64)
    for row, site in (PROMPTS == MASK).nonzero().tolist():
        before = (group[row] == -1) | (group[row] < group[row, site])
        state = torch.where(before, done.tokens[row], MASK)
        time = torch.where(before, 0.0, levels[row]).max()
        logits = spy(state[None], time[None])[0, site].double()
        expected[row, site] = (logits - logits.logsumexp(-1))[done.tokens[row, site]]
    torch.testing.assert_close(done.log_c, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1, 3, 5])
def test_calls_of_few_rows_decode_the_same(most):
    group, levels = ordered_groups(3)
    plan, noise = RevealPlan.of(group, levels), torch.rand(8, 7, dtype=torch.float64)
    whole, parts = SpyWithHead(), SpyWithHead()
    parts.rows_per_call = lambda length: most
    expected = decode(whole, 3, PROMPTS, plan, noise)
    done = decode(parts, 3, PROMPTS, plan, noise)
    assert torch.equal(done.tokens, expected.tokens)
    torch.testing.assert_close(done.log_c, expected.log_c, rtol=0, atol=1e-12)
    assert max(len(shown) for shown in parts.shown) == most < len(whole.shown[0])
    assert sum(map(len, parts.shown)) == sum(map(len, whole.shown))
    assert sum(parts.head_rows) == sum(whole.head_rows)


# what it costs


def counted_chain(length=12, num_steps=9, prompt=None):
    chain = toy_markov_chain(length=length, num_steps=num_steps)
    counter = CountingDenoiser(chain.kernel.denoiser)
    return ReverseChain(chain.kernel.with_denoiser(counter), length, prompt=prompt), counter


@pytest.mark.parametrize("prompt", [None, torch.tensor([1] + [-1] * 11)])
def test_empty_bins_cost_nothing_and_rows_are_compacted(prompt):
    chain, counter = counted_chain(prompt=prompt)
    path = chain.sample((50,))
    moved = (path[:, 1:] != path[:, :-1]).any(-1)  # (rows, steps): the bin was not empty
    assert counter.rows == int(moved.sum())
    assert counter.calls == int(moved.sum(-1).max())
    assert int(moved.sum()) < 50 * 9
    counter.rows = 0
    chain.log_prob(path.clone())
    assert counter.rows == int(moved.sum())


@pytest.mark.parametrize("method", ["sample", "log_prob"])
def test_nothing_to_reveal_costs_nothing(method):
    """A full prompt, and paths that are none: no call, not even of zero rows."""
    chain, counter = counted_chain(prompt=torch.zeros(12, dtype=torch.int64))
    path = chain.sample((4,))
    assert bool((path == 0).all())
    assert chain.log_prob(path.clone()).tolist() == [0.0] * 4
    free, other = counted_chain()
    if method == "sample":
        assert free.sample((0,)).shape == (0, 10, 12)
    else:
        assert free.log_prob(torch.zeros(4, 10, 12)).tolist() == [-torch.inf] * 4
    assert counter.calls == other.calls == 0


def test_scoring_keeps_to_its_chunks():
    spy = Spy()
    states = torch.full((10, 4), MASK)
    reveals = torch.zeros(10, 4, dtype=torch.bool)
    reveals[:, 1] = True
    times, answers = torch.rand(10, dtype=torch.float64), torch.randint(3, (10, 4))
    parts = score(spy, 3, states, times, reveals, answers, max_rows=4)
    assert [len(s) for s in spy.shown] == [4, 4, 2]
    whole = score(Spy(), 3, states, times, reveals, answers, max_rows=10)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def expected_calls(num_steps, length):
    """Return ``N (1 - (1 - 1/N)^L)``, the non-empty bins of a linear schedule."""
    return num_steps * (1 - (1 - 1 / num_steps) ** length)


def test_expected_number_of_calls():
    """Spec 2.3 at a scale that runs here, and its figure for ``L = N = 1024`` from bins alone.

    Four standard errors each: 1.3e-4 in all.
    """
    calls = []
    for _ in range(300):
        counter = CountingDenoiser(Broken(lambda z: torch.full((*z.shape, 3), -math.log(3))))
        ReverseChain(InterpolatingKernel(Absorbing(3), counter, num_steps=16), 16).sample()
        calls.append(counter.calls)
    assert abs(z_score(torch.tensor(calls).double(), expected_calls(16, 16))) < 4
    assert abs(z_score(torch.tensor(calls).double(), 16.0)) > 4
    assert round(expected_calls(1024, 1024)) == 647
    bins = grid_bins(torch.rand(200, 1024, dtype=torch.float64), 1 - np.linspace(1, 0, 1025))
    distinct = torch.zeros(200, 1024).scatter_(1, bins, 1.0).sum(-1).double()
    assert abs(z_score(distinct, expected_calls(1024, 1024))) < 4


KERNELS = {
    "ancestral": lambda d: InterpolatingKernel(Absorbing(3), d, num_steps=5),
    "first hitting": lambda d: OrderedKernel(Absorbing(3), d, length=6),
    "groups": lambda d: OrderedKernel(Absorbing(3), d, length=6, group_size=4),
    "own times": lambda d: OrderedKernel(Absorbing(3), d, length=6, clock="sampled"),
}
each_kernel = pytest.mark.parametrize("name", KERNELS)


@each_kernel
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 2, -1, -1, 0, -1])])
def test_head_sees_the_revealed_positions_and_no_others(name, prompt):
    spy = SpyWithHead()
    chain = ReverseChain(KERNELS[name](spy), 6, prompt=prompt)
    path = chain.sample((9,))
    free = 6 if prompt is None else 4
    assert sum(spy.head_rows) == 9 * free
    assert spy.dense_calls == 0
    if name != "own times":
        spy.head_rows.clear()
        chain.log_prob(path.clone())
        assert sum(spy.head_rows) == 9 * free
        assert spy.dense_calls == 0


@each_kernel
def test_head_and_table_give_the_same_paths(name):
    draws = []
    for denoiser in (Spy(), SpyWithHead()):
        chain = ReverseChain(KERNELS[name](denoiser), 6)
        path = chain.sample((30,), generator=torch.Generator().manual_seed(5))
        draws.append((path, None if name == "own times" else chain.log_prob(path.clone())))
    assert torch.equal(draws[0][0], draws[1][0])
    if name != "own times":
        torch.testing.assert_close(draws[0][1], draws[1][1], rtol=0, atol=1e-12)


# networks that misbehave


class Broken:
    """Returns whatever it is told to."""

    vocab_size, kind = 3, "cavity"

    def __init__(self, output, *, time_free=True):
        self.output, self.time_free = output, time_free

    def __call__(self, tokens, t):
        return self.output(tokens)


def poisoned(tokens):
    """Right until a position has been revealed."""
    good = torch.full((*tokens.shape, 3), -math.log(3))
    return good if bool((tokens == MASK).all()) else good * torch.nan


BAD = {
    "unnormalised": (lambda z: torch.zeros(*z.shape, 3), ValueError, "NaN or unnormalised"),
    "NaN": (lambda z: torch.full((*z.shape, 3), torch.nan), ValueError, "NaN or unnormalised"),
    "NaN later": (poisoned, ValueError, "NaN or unnormalised"),
    "no mass": (lambda z: torch.full((*z.shape, 3), -torch.inf), ValueError, "unnormalised"),
    "infinite": (lambda z: torch.full((*z.shape, 3), torch.inf), ValueError, "unnormalised"),
    "classes": (lambda z: torch.zeros(*z.shape, 2), ValueError, r"returned shape \(\d+, 2\), exp"),
    "two columns": (lambda z: torch.zeros(*z.shape, 5), ValueError, "returned shape"),
    "no vocabulary": (
        lambda z: torch.zeros(z.shape),
        ValueError,
        r"returned shape \(\d+, 6\), exp",
    ),
    "batch": (
        lambda z: torch.zeros(1, *z.shape, 3),
        ValueError,
        r"returned shape \(1, \d+, 6, 3\), exp",
    ),
    "numpy": (lambda z: np.zeros((*z.shape, 3)), TypeError, "returned ndarray, expected a torch"),
    "None": (lambda z: None, TypeError, "returned NoneType, expected a torch tensor"),
}


@each_kernel
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("wrap", [lambda d: d, EvaluatedDenoiser], ids=["bare", "evaluated"])
def test_bad_networks_are_named(name, bad, wrap):
    output, error, text = BAD[bad]
    chain = ReverseChain(KERNELS[name](wrap(Broken(output, time_free=name != "own times"))), 6)
    with pytest.raises(error, match=text):
        chain.sample((2,))
    if name != "own times":
        good = ReverseChain(KERNELS[name](Spy()), 6).sample((2,))
        with pytest.raises(error, match=text):
            chain.log_prob(good.clone())


@each_kernel
def test_a_column_for_the_mask_is_dropped(name):
    def output(tokens):
        return torch.tensor([0.2, 0.3, 0.1, 0.4]).log().expand(*tokens.shape, 4)

    chain = ReverseChain(KERNELS[name](Broken(output, time_free=name != "own times")), 6)
    path = chain.sample((4000,))
    assert int(chain.x0(path).max()) < 3
    share = torch.bincount(chain.x0(path).flatten(), minlength=3).double() / 24_000
    p = torch.tensor([2, 3, 1]).double() / 6  # 4 s.e. for each of 3 tokens: 2e-4
    assert float(((share - p).abs() / (p * (1 - p) / 24_000).sqrt()).max()) < 4
