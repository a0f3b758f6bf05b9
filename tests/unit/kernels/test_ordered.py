"""Kernels that count reveals: contracts, every grouping, programs, refusals."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.handlers import clamp, steer, unroll
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import (
    Absorbing,
    Cosine,
    InterpolatingKernel,
    Linear,
    OrderedKernel,
    Uniform,
    first_hitting,
)
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc
from ppl_diffusion.testing import (
    CountingDenoiser,
    KernelContract,
    all_states,
    chi_square_p_value,
    random_joint,
    toy_potential,
    z_score,
)

MASK = 3


class Hasty:
    """A denoiser that reads the time, one for all rows or one each."""

    kind, time_free = "cavity", False

    def __init__(self, denoiser):
        self.denoiser, self.vocab_size = denoiser, denoiser.vocab_size

    def __call__(self, tokens, t):
        time = torch.as_tensor(t, dtype=torch.float64).expand(tokens.shape[:-1])
        return (self.denoiser(tokens, 0.5) * (2.5 - 2 * time[..., None, None])).log_softmax(-1)


def make(length=3, *, vocab_size=3, timed=False, schedule=None, prompt=None, **options):
    process = Absorbing(vocab_size, schedule)
    denoiser = TableDenoiser(random_joint(vocab_size, length, sharpness=1.5), process)
    kernel = OrderedKernel(
        process, Hasty(denoiser) if timed else denoiser, length=length, **options
    )
    return ReverseChain(kernel, length, prompt=prompt)


def log_prob_of_steps(chain, paths):
    states = paths.unbind(-2)
    log_p = chain.kernel.prior_log_prob(states[0], chain.prompt)
    for k, tokens in enumerate(states[1:]):
        log_p = log_p + chain.kernel.step({"tokens": states[k]}, k, fixed=chain.fixed).log_prob(
            tokens
        )
    return log_p


class TestFirstHitting(KernelContract):
    def make_kernel(self):
        return make(2).kernel


class TestPairs(KernelContract):
    length = 3

    def make_kernel(self):
        return make(3, group_size=2, timed=True).kernel


class TestBlocks(KernelContract):
    length = 3

    def make_kernel(self):
        return make(3, group_size=2, block=2, schedule=Cosine()).kernel


# every grouping

GROUPINGS = [
    (length, group_size, block)
    for length in (1, 2, 3, 4)
    for group_size in range(1, length + 2)
    for block in (None, *range(1, length + 2))
]


@pytest.mark.parametrize(("length", "group_size", "block"), GROUPINGS)
def test_number_of_steps(length, group_size, block):
    kernel = make(length, vocab_size=2, group_size=group_size, block=block).kernel
    sizes = [min(block or length, length - s) for s in range(0, length, block or length)]
    assert kernel.num_steps == sum(math.ceil(size / group_size) for size in sizes)
    assert (kernel.times[0], kernel.times[-1]) == (1, 0)
    assert bool((kernel.times[:-1] >= kernel.times[1:]).all())


def prompts(length):
    """Return no prompt, and every set of known positions."""
    known = itertools.product([-1, 1], repeat=length)
    return [None, *(torch.tensor(p) for p in known)]


@pytest.mark.parametrize(("group_size", "block"), [(1, None), (2, None), (1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("prompt", prompts(3), ids=str)
def test_density_is_normalised_and_that_of_the_steps(group_size, block, prompt):
    """For every array of states that starts and ends right, possible or not."""
    chain = make(vocab_size=2, group_size=group_size, block=block, prompt=prompt, timed=True)
    steps = torch.cartesian_prod(
        *[torch.arange(-1, chain.num_steps + 1)] * 3
    )  # too early, too late
    tokens = all_states(2, 3)
    step_of = steps[:, None].expand(-1, 8, -1).reshape(-1, 1, 3)
    shown = torch.arange(chain.num_steps + 1)[:, None] > step_of
    paths = torch.where(shown, tokens.repeat(len(steps), 1)[:, None], 2)
    paths = paths.unique(dim=0)
    here, there = chain.log_prob(paths), log_prob_of_steps(chain, paths)
    assert torch.equal(here > -torch.inf, there > -torch.inf)
    assert 0 < int((here > -torch.inf).sum()) < len(paths)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)
    assert float(here.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("group_size", "block"), [(1, None), (2, None), (3, None), (1, 2), (2, 3)])
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 1, -1, 0]), torch.tensor([2, 2, 0, 1])])
@pytest.mark.parametrize("timed", [False, True])
def test_sampled_paths_have_the_density_that_is_remembered(group_size, block, prompt, timed):
    chain = make(4, group_size=group_size, block=block, prompt=prompt, timed=timed)
    path = chain.sample((60,))
    remembered = chain.log_prob(path)
    assert bool(torch.isfinite(remembered).all())
    for scored in (chain.log_prob(path.clone()), log_prob_of_steps(chain, path)):
        torch.testing.assert_close(remembered, scored, rtol=0, atol=1e-12)
    steps = chain._sample_steps(torch.Size((60,)), None, False)
    torch.testing.assert_close(steps.log_prob, chain.log_prob(steps.path), rtol=0, atol=1e-12)


def p_value(drawn, chain):
    """Chi-square of whole paths against a chain's density; rare paths are one cell."""
    outcomes, index = drawn.flatten(1).unique(dim=0, return_inverse=True)
    law = chain.log_prob(outcomes.reshape(-1, *chain.event_shape)).exp()
    often = law * len(drawn) >= 5
    counts = torch.bincount(index)[often]
    counts = torch.cat([counts, torch.tensor([len(drawn) - int(counts.sum())])])
    return chi_square_p_value(counts, torch.cat([law[often], (1 - law[often].sum())[None]]))


@pytest.mark.parametrize(("group_size", "block"), [(1, None), (2, None), (2, 2)])
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 2, -1])])
def test_both_engines_sample_the_density(group_size, block, prompt):
    """Level 1e-4 for each of 12 cases; the chain that is shown no time fails."""
    options = {"group_size": group_size, "block": block, "prompt": prompt}
    chain, shape = make(timed=True, **options), torch.Size((20_000,))
    for drawn in (chain.sample(shape), chain._sample_steps(shape, None, False).path):
        assert p_value(drawn, chain) > 1e-4
        assert p_value(drawn, make(**options)) < 1e-4


def test_groups_beyond_the_prompt_cost_nothing():
    chain = make(4, prompt=torch.tensor([0, -1, 1, 2]))
    counter = CountingDenoiser(chain.kernel.denoiser)
    counted = ReverseChain(chain.kernel.with_denoiser(counter), 4, prompt=chain.prompt)
    path = counted.sample((5,))
    assert (counter.calls, counter.rows) == (1, 5)
    counted._sample_steps(torch.Size((5,)), None, False)
    assert (counter.calls, counter.rows) == (2, 10)
    assert not counted.kernel.asks_denoiser({"tokens": path[:, 1]}, 1)
    assert counted.kernel.asks_denoiser({"tokens": path[:, 0]}, 0)


def test_blocks_are_finished_from_left_to_right():
    path = make(4, block=2, group_size=1).sample((200,))
    revealed = (path == MASK).sum(-2)  # steps for which a position stays masked
    assert int(revealed[:, :2].max()) < int(revealed[:, 2:].min())
    free = make(4).sample((200,))
    assert bool(((free == MASK).sum(-2)[:, 3] < 3).any())


def test_mean_times_are_the_means_of_order_statistics():
    """``n / (L + 1)`` of the noise for ``n`` masks; the grid begins at 1."""
    kernel = make(4, schedule=Cosine()).kernel
    noise = 1 - torch.from_numpy(kernel.alphas)
    torch.testing.assert_close(noise, torch.tensor([1, 3 / 5, 2 / 5, 1 / 5, 0]).double())
    assert make(1).kernel.times.tolist() == [1, 0]
    pairs = make(4, group_size=2, block=2, schedule=Linear()).kernel
    assert pairs.times.tolist() == pytest.approx([1, 2 / 5, 0])


# marginals


@pytest.mark.parametrize(("group_size", "block"), [(1, None), (2, None), (1, 2)])
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 2, -1])])
def test_marginal_is_the_sum_over_orders(group_size, block, prompt):
    chain = make(group_size=group_size, block=block, prompt=prompt, timed=True)
    tokens = all_states(3, 3)
    law = torch.zeros(27, dtype=torch.float64)
    for steps in all_states(chain.num_steps, 3):
        step_of = steps if prompt is None else torch.where(prompt >= 0, -1, steps)
        if prompt is not None and steps[1] > 0:
            continue  # the prompt's position has no step
        shown = torch.arange(chain.num_steps + 1)[:, None] > step_of
        law += chain.log_prob(torch.where(shown, tokens[:, None], MASK)).exp()
    exact = chain.marginal().log_prob(tokens)
    torch.testing.assert_close(exact.exp(), law, rtol=0, atol=1e-12)
    assert float(exact.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("group_size", "block"), [(1, None), (2, None), (1, 2)])
def test_estimate_of_the_marginal_is_unbiased(group_size, block):
    """Four standard errors for each of 4 sequences: 2.5e-4 per case; a biased twin fails."""
    chain = make(group_size=group_size, block=block, timed=True)
    value = torch.tensor([[0, 0, 0], [1, 2, 0], [2, 2, 2], [0, 1, 2]])
    exact = chain.marginal().log_prob(value).exp()
    runs = value[:, None].expand(4, 3000, 3)
    estimate = chain.marginal().log_prob_estimate(runs, num_particles=2).exp()
    for row in range(4):
        assert abs(z_score(estimate[row] / exact[row], 1.0)) < 4
    other = make(group_size=3, timed=True).marginal().log_prob_estimate(runs, num_particles=2).exp()
    assert max(abs(z_score(other[row] / exact[row], 1.0)) for row in range(4)) > 4


def test_estimate_with_a_prompt_that_contradicts():
    chain = make(prompt=torch.tensor([-1, 2, -1]))
    value = torch.tensor([[0, 2, 0], [0, 1, 0]])
    estimate = chain.marginal().log_prob_estimate(value)
    assert torch.equal(estimate > -torch.inf, torch.tensor([True, False]))


def test_bound_is_refused():
    with pytest.raises(IntractableLogProb, match=r"log_prob_bound: .*use log_prob_estimate"):
        make().marginal().log_prob_bound(torch.zeros(3))


# programs


def test_unrolled_chain_has_the_same_density():
    chain = make(group_size=2, prompt=torch.tensor([-1, 2, -1]))
    trace = poutine.trace(unroll(lambda: pyro.sample("path", chain))).get_trace()
    path = trace.nodes["path"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(path.clone()))
    given = poutine.condition(lambda: pyro.sample("path", chain), {"path": path})
    again = poutine.trace(unroll(given)).get_trace()
    torch.testing.assert_close(again.log_prob_sum(), chain.log_prob(path.clone()))


def evidence(chain, potential):
    law = chain.marginal().log_prob(all_states(3, 3)).exp()
    return float((law * potential(all_states(3, 3)).exp()).sum())


@pytest.mark.parametrize("options", [{}, {"group_size": 2}, {"block": 2}], ids=str)
def test_evidence_is_unbiased(options):
    """Four standard errors, 6e-5 per case; 15 % less would be seen."""
    chain, potential = make(timed=True, **options), toy_potential(3, 3, scale=1.5)
    post = run_smc(FeynmanKac(chain, potential), 8, 2000, store_path=False)
    assert abs(z_score(post.log_evidence.exp(), evidence(chain, potential))) < 4
    assert abs(z_score(post.log_evidence.exp(), 0.85 * evidence(chain, potential))) > 4


def tempered(step, carry, k):
    """Propose with flatter predictions."""
    return step.with_log_probs((0.5 * step.log_probs).log_softmax(-1))


@pytest.mark.parametrize("proposal", [tempered, "kernel"], ids=["function", "kernel"])
def test_proposals_are_weighted(proposal):
    """Four standard errors, 6e-5 per case."""
    chain, potential = make(), toy_potential(3, 3)
    if proposal == "kernel":
        proposal = OrderedKernel(chain.kernel.process, Hasty(chain.kernel.denoiser), length=3)
    post = run_smc(FeynmanKac(chain, potential, proposal=proposal), 8, 2000, store_path=False)
    assert abs(z_score(post.log_evidence.exp(), evidence(chain, potential))) < 4


def test_steered_sites_have_weights():
    """Plain importance weights of a steered site average to ``Z``: 4 s.e., 6e-5."""
    chain, potential = make(), toy_potential(3, 3)

    def program():
        path = pyro.sample("path", chain)
        pyro.factor("reward", potential(chain.x0(path)))

    weights = []
    for _ in range(200):
        with steer(potential=potential, num_particles=4):
            guide = poutine.trace(program).get_trace()
        model = poutine.trace(poutine.replay(program, guide)).get_trace()
        weights.append(
            float(
                (
                    model.log_prob_sum()
                    - guide.nodes["path"]["fn"].log_prob(guide.nodes["path"]["value"])
                ).exp()
            )
        )
    assert abs(z_score(torch.tensor(weights).double(), evidence(chain, potential))) < 4


def test_smc_program_and_saved_posterior(tmp_path):
    chain, potential = make(), toy_potential(3, 3)

    def program():
        path = pyro.sample("path", chain)
        pyro.factor("reward", potential(chain.x0(path)))

    posterior = SMC(program, num_particles=16, num_runs=300).run()
    # four standard errors, 6e-5
    assert abs(z_score(posterior.log_evidence.exp(), evidence(chain, potential))) < 4
    loaded = ParticlePosterior.load(posterior.save(tmp_path / "posterior"))
    torch.testing.assert_close(loaded.log_evidence, posterior.log_evidence)
    assert torch.equal(loaded.x0, posterior.x0)
    assert torch.equal(loaded.times, posterior.times)


# sampled clocks


@pytest.fixture
def timed():
    return make(timed=True, clock="sampled")


def test_what_a_sampled_clock_can_be_asked(timed):
    assert (timed.kernel.capability, timed.kernel.markov) == ("SAMPLE_ONLY", False)
    assert "SAMPLE_ONLY" in repr(timed.kernel)
    path = timed.sample((5,))
    with pytest.raises(IntractableLogProb, match="an integral over reveal times; use clock='mean'"):
        timed.log_prob(path)
    for ask in ("log_prob", "log_prob_bound", "log_prob_estimate"):
        with pytest.raises(IntractableLogProb, match=f"{ask}: .*samples"):
            getattr(timed.marginal(), ask)(timed.x0(path))


def test_what_a_sampled_clock_refuses(timed):
    potential, mask = toy_potential(3, 3), torch.tensor([True, False, False])
    with (
        pytest.raises(CapabilityError, match="OrderedKernel is SAMPLE_ONLY; use a kernel with"),
        steer(potential=potential, num_particles=2),
    ):
        pyro.sample("path", timed)
    with (
        pytest.raises(
            CapabilityError, match="OrderedKernel is SAMPLE_ONLY; condition by a potential"
        ),
        clamp(tokens=torch.zeros(3).long(), mask=mask),
    ):
        pyro.sample("path", timed)
    with pytest.raises(CapabilityError, match="this one is SAMPLE_ONLY; use proposal=None"):
        FeynmanKac(timed, potential, proposal=make(timed=True).kernel)
    with pytest.raises(CapabilityError, match="a proposal needs a density, but OrderedKernel is"):
        FeynmanKac(make(timed=True), potential, proposal=timed.kernel)


def test_smc_on_a_sampled_clock(timed):
    """Reveal times travel with their particles: 4 s.e. against plain averages, 6e-5."""
    potential = toy_potential(3, 3, scale=1.5)
    post = run_smc(FeynmanKac(timed, potential), 8, 2000, store_path=False)
    plain = potential(timed.x0(timed.sample((60_000,)))).exp()
    error = (post.log_evidence.exp().var() / 2000 + plain.var() / 60_000).sqrt()
    assert abs(float((post.log_evidence.exp().mean() - plain.mean()) / error)) < 4


def test_clocks_are_one_chain_where_the_denoiser_does_not_read_them():
    chain = make(clock="sampled")
    assert chain.kernel.capability == "ORDERED"
    path = chain.sample((20,))
    torch.testing.assert_close(chain.log_prob(path), make().log_prob(path.clone()))


def test_another_denoiser_may_read_the_clock():
    kernel = make(clock="sampled").kernel
    reads = kernel.with_denoiser(Hasty(kernel.denoiser))
    assert (reads.capability, reads.markov) == ("SAMPLE_ONLY", False)
    back = reads.with_denoiser(kernel.denoiser)
    assert (back.capability, back.markov) == ("ORDERED", True)
    assert kernel.capability == "ORDERED"


def test_same_as_is_about_the_law():
    kernel = make().kernel
    process, denoiser = kernel.process, kernel.denoiser
    assert kernel.same_as(first_hitting(process, denoiser, length=3))
    for other in (
        {"group_size": 2},
        {"block": 1},
        {"clock": "sampled"},
    ):
        assert not kernel.same_as(OrderedKernel(process, denoiser, length=3, **other))
    assert not kernel.same_as(InterpolatingKernel(process, denoiser, num_steps=3))

    class Backwards(OrderedKernel):
        """Somebody's variant with another step."""

    variant = Backwards(process, denoiser, length=3)
    assert not kernel.same_as(variant)
    assert not variant.same_as(kernel)


# refusals


def test_length_must_fit():
    kernel = make(3).kernel
    with pytest.raises(ValueError, match=r"built for 3 positions, got 4; build .* length=4"):
        ReverseChain(kernel, 4)
    path = torch.zeros(4, 4, dtype=torch.int64)
    for ask in (kernel.path_log_prob, lambda path: kernel.step({"tokens": path[0]}, 0)):
        with pytest.raises(ValueError, match="built for 3 positions, got 4"):
            ask(path)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"length": 0}, ValueError, "OrderedKernel: length must be >= 1, got 0"),
        ({"group_size": 0}, ValueError, "group_size must be >= 1, got 0"),
        ({"block": 0}, ValueError, "block must be >= 1, got 0"),
        ({"group_size": 1.5}, TypeError, "group_size must be a whole number, got 1.5"),
        ({"clock": "wall"}, ValueError, "clock must be 'mean' or 'sampled', got 'wall'"),
    ],
)
def test_bad_settings(options, error, text):
    process = Absorbing(3)
    denoiser = TableDenoiser(random_joint(3, 3), process)
    with pytest.raises(error, match=text):
        OrderedKernel(process, denoiser, **{"length": 3, **options})


def test_only_masks_are_revealed():
    process = Uniform(3)
    with pytest.raises(CapabilityError, match="OrderedKernel: only an absorbing process"):
        first_hitting(process, TableDenoiser(random_joint(3, 3), process), length=3)


def test_repr_says_what_matters():
    assert "num_steps=2, group_size=2, ORDERED" in repr(make(group_size=2).kernel)
    assert "block=2" in repr(make(block=2).kernel)
