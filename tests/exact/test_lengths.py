"""Sequences of several lengths, held to the enumeration of all their paths."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import LettersOnly, TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import clamp, unroll
from ppl_diffusion.handlers.held import ClampProposal
from ppl_diffusion.inference import SMC, ParticleGibbs, methods
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel, Padded
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, OrderRefresh, Refill, SiteGibbs, SuffixRefresh
from ppl_diffusion.smc.path_state import PathModel
from ppl_diffusion.testing import chi_square_p_value
from ppl_diffusion.testing.path_laws import PathLaw
from ppl_diffusion.testing.toys import random_joint

SIZE, LENGTH, LAW = 3, 3, [0.1, 0.2, 0.3, 0.4]
ALPHA = 1e-4  # of every chi-square test here
WITHIN = 4.0  # standard errors: 1 in 16,000 fails by chance
WORTH = torch.randn([SIZE] * LENGTH, generator=torch.Generator().manual_seed(1)).double()
WORTH_OF_ALL = Potential(lambda x0: WORTH[x0.unbind(-1)], name="worth")


def network():
    # Trained by nobody: it would put fillings anywhere, were it not for the wrapper.
    return LettersOnly(TableDenoiser(random_joint(SIZE, LENGTH, seed=2), Absorbing(SIZE)))


def grid(process=None):
    return InterpolatingKernel(process or Padded(SIZE, LAW), network(), num_steps=3)


def ordered(process=None):
    return OrderedKernel(process or Padded(SIZE, LAW), network(), length=LENGTH, group_size=2)


KERNELS = {"ancestral": grid, "ordered": ordered}


def length(x0):
    return (x0 != SIZE - 1).sum(-1)


def by_length(x0, weights):
    found = torch.zeros(LENGTH + 1, dtype=torch.float64)
    return found.index_add(0, length(x0).flatten(), weights.flatten())


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_paths_are_scored_exactly_and_their_lengths_have_the_law(make):
    chain = ReverseChain(make(), LENGTH)
    law = PathLaw.of(chain)
    assert law.log_z == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(chain.log_prob(law.paths).exp(), law.probs, rtol=0, atol=1e-12)
    lengths = by_length(law.paths[:, -1], law.probs)
    torch.testing.assert_close(lengths, torch.tensor(LAW, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_draws_have_the_law_of_lengths(make):
    chain = ReverseChain(make(), LENGTH)
    path = chain.sample((20_000,), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(length(chain.x0(path)), minlength=LENGTH + 1).double()
    assert chi_square_p_value(counts, torch.tensor(LAW, dtype=torch.float64)) > ALPHA
    remembered = chain.log_prob(path)
    torch.testing.assert_close(remembered, chain.log_prob(path.clone()), rtol=0, atol=1e-12)


def test_a_prompt_and_a_range_of_lengths():
    prompt = torch.tensor([-1, 1, -1])
    law = PathLaw.of(ReverseChain(grid(), LENGTH, prompt=prompt))
    lengths = by_length(law.paths[:, -1], law.probs)
    torch.testing.assert_close(lengths, torch.tensor([0, 0, 3 / 7, 4 / 7], dtype=torch.float64))
    short = PathLaw.of(ReverseChain(grid(Padded(SIZE, LAW).between(0, 1)), LENGTH))
    lengths = by_length(short.paths[:, -1], short.probs)
    torch.testing.assert_close(lengths, torch.tensor([1 / 3, 2 / 3, 0, 0], dtype=torch.float64))


def test_the_marginal_its_bound_and_its_estimate():
    chain = ReverseChain(grid(), LENGTH)
    law = PathLaw.of(chain)
    x0, index = law.paths[:, -1].unique(dim=0, return_inverse=True)
    p = torch.zeros(len(x0), dtype=torch.float64).index_add(0, index, law.probs)
    marginal = chain.marginal()
    torch.testing.assert_close(marginal.log_prob(x0), p.log(), rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [marginal.log_prob_estimate(x0, num_particles=8, generator=generator) for _ in range(500)]
    ).exp()
    error = draws.std(0) / 500**0.5
    assert ((draws.mean(0) - p).abs() <= WITHIN * error + 1e-12).all()
    terms = marginal.bound_samples(x0, num_samples=3000, generator=generator)
    # The spread overstates the error, as the steps are stratified.
    assert (terms.mean(0) - WITHIN * terms.std(0) / 3000**0.5 <= p.log()).all()


def test_unrolled_sites_have_the_same_density():
    chain = ReverseChain(grid(), LENGTH)
    pyro.set_rng_seed(0)
    with pyro.plate("rows", 50):
        trace = pyro.poutine.trace(unroll(lambda: pyro.sample("path", chain))).get_trace()
    trace.compute_log_prob()
    total = sum(trace.nodes[f"path_{k}"]["log_prob"] for k in range(4))
    path = trace.nodes["path"]["value"]
    torch.testing.assert_close(total, chain.log_prob(path.clone()), rtol=0, atol=1e-12)
    support = chain.kernel.prior_step((), LENGTH).enumerate_support()
    assert chain.kernel.prior_step((), LENGTH).log_prob(support).exp().sum() == pytest.approx(1)


def exact_methods():
    return [name for name, cls in methods().items() if cls.exact and name != "aps-smc"]


@pytest.mark.parametrize("name", exact_methods())
def test_every_method_of_the_registry(name):
    chain = ReverseChain(grid(), LENGTH)
    if methods()[name]().name == "corrector":  # it counts reveals instead of time
        chain = ReverseChain(OrderedKernel(chain.kernel.process, network(), length=3), LENGTH)
    law = PathLaw.of(chain, WORTH_OF_ALL)
    try:
        runner = SMC(chain, WORTH_OF_ALL, method=name, num_particles=64, num_runs=200)
        posterior = runner.run(seed=3)
    except CapabilityError as error:
        pytest.skip(str(error))  # gradients, or uniform noise
    z = posterior.log_evidence.exp()
    assert abs(z.mean() - np.exp(law.log_z)) < WITHIN * z.std() / 200**0.5
    weights = posterior.weights
    shares = torch.stack([by_length(x, w) for x, w in zip(posterior.x0, weights, strict=True)])
    estimate = (z[:, None] * shares).mean(0) / z.mean()  # a ratio of unbiased means
    residual = z[:, None] * (shares - estimate) / z.mean()
    wanted = by_length(law.paths[:, -1], law.probs)
    assert ((estimate - wanted).abs() < WITHIN * residual.std(0) / 200**0.5).all()
    ends = (posterior.x0 == SIZE - 1).int().diff(dim=-1)
    assert (ends >= 0).all()


@pytest.mark.parametrize("name", ["smc", "twisted", "corrector", "soft-value", "refinement"])
def test_no_reward_is_asked_about_what_is_no_sequence(name):
    asked = []

    def worth(x0):
        asked.append(x0)
        return WORTH_OF_ALL(x0)

    chain = ReverseChain(ordered(Padded(SIZE, LAW).between(1)), LENGTH)
    SMC(chain, Potential(worth), method=name, num_particles=32, num_runs=4).run(seed=0)
    rows = torch.cat([x0.reshape(-1, LENGTH) for x0 in asked])
    assert ((rows == SIZE - 1).int().diff(dim=-1) >= 0).all()
    assert (rows[:, 0] != SIZE - 1).all()


def test_a_law_of_lengths_that_is_left_out_is_seen(monkeypatch):
    chain = ReverseChain(grid(), LENGTH)
    law = PathLaw.of(chain)
    monkeypatch.setattr(InterpolatingKernel, "_log_length", lambda *_: 0.0)
    assert (chain.log_prob(law.paths).exp() - law.probs).abs().max() > 0.01


def moved(move, chain, num=20_000):
    """Return lengths and worth of exact draws before and after a move."""
    law = PathLaw.of(chain, WORTH_OF_ALL)
    generator = torch.Generator().manual_seed(5)
    path = law.draw(num, generator).reshape(num // 100, 100, *law.paths.shape[1:])
    model = PathModel(chain, WORTH_OF_ALL)
    state, _ = move(model, model.state(path), generator=generator)
    x0, index = law.paths[:, -1].unique(dim=0, return_inverse=True)
    p = torch.zeros(len(x0), dtype=torch.float64).index_add(0, index, law.probs)
    found = (state.x0.reshape(-1, 1, LENGTH) == x0).all(-1)
    assert found.any(-1).all(), "a move left the support"
    return found.sum(0).double(), p


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(
    "move",
    [
        OrderRefresh(),
        OrderRefresh(window=2),
        OrderRefresh(window=2, tail=True),
        Refill(),
        SiteGibbs(),
        SuffixRefresh(2),
    ],
    ids=repr,
)
def test_moves_of_paths_leave_the_posterior_alone(move, make):
    counts, p = moved(move, ReverseChain(make(), LENGTH))
    assert chi_square_p_value(counts, p) > ALPHA


def test_programs_and_particle_gibbs():
    chain = ReverseChain(grid(), LENGTH)

    def program():
        path = pyro.sample("path", chain)
        size = pyro.deterministic("size", length(chain.x0(path)).double())
        pyro.sample("y", dist.Normal(size, 0.8), obs=torch.tensor(1.2))

    p = torch.tensor(LAW, dtype=torch.float64)
    p = p * dist.Normal(torch.arange(4.0).double(), 0.8).log_prob(torch.tensor(1.2)).exp()
    posterior = SMC(program, num_particles=64, num_runs=200).run(seed=0)
    z = posterior.log_evidence.exp()
    assert abs(z.mean() - p.sum()) < WITHIN * z.std() / 200**0.5
    gibbs = ParticleGibbs(program, num_particles=16, num_samples=1, num_runs=2000, num_warmup=5)
    sizes = gibbs.run(seed=0).samples["size"].flatten().long()
    counts = torch.bincount(sizes, minlength=4).double()
    assert chi_square_p_value(counts, p / p.sum()) > ALPHA


def test_a_clamp_counts_within_the_lengths_that_reach_it():
    process = Padded(SIZE, LAW).between(2)
    chain = ReverseChain(grid(process), LENGTH)
    tokens, mask = torch.tensor([0, 1, 0]), torch.tensor([False, True, False])
    law = PathLaw.of(chain)
    p = float(law.probs[law.paths[:, -1, 1] == 1].sum())
    held = clamp(lambda: pyro.sample("path", chain), tokens=tokens, mask=mask)
    z = SMC(held, num_particles=64, num_runs=100).run(seed=0).log_evidence.exp()
    assert abs(z.mean() - p) < WITHIN * z.std() / 100**0.5


def test_a_clamp_where_sequences_may_have_ended_is_refused():
    chain = ReverseChain(grid(), LENGTH)
    tokens, mask = torch.tensor([0, 1, 0]), torch.tensor([False, True, False])
    said = (
        "clamp: a letter is held at position 1, but sequences of 0 letters have probability; "
        "restrict the lengths first, prior.between(2)."
    )
    proposal = ClampProposal(tokens, mask, SIZE)
    with pytest.raises(ValueError) as caught:
        FeynmanKac(chain, WORTH_OF_ALL, proposal=proposal)
    assert str(caught.value) == said
    with pytest.raises(ValueError, match="a letter is held at position 1"):
        clamp(lambda: pyro.sample("path", chain), tokens=tokens, mask=mask)()


def test_a_network_that_may_guess_fillings_is_refused():
    table = TableDenoiser(random_joint(SIZE, LENGTH), Absorbing(SIZE))
    with pytest.raises(CapabilityError) as caught:
        InterpolatingKernel(Padded(SIZE, LAW), table, num_steps=2)
    assert str(caught.value) == (
        "token 2 only fills sequences up, and TableDenoiser may predict it among the letters; "
        "build the network with num_padding=1, or wrap it in LettersOnly."
    )
