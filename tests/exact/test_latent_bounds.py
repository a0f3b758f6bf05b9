"""Bounds of a model with a latent, held to enumeration and to the closed forms of toys.

Monte Carlo estimates must lie within five standard errors of the exact number: one false alarm in
1.7 million each, and seeds are fixed.
"""

import math

import pytest
import torch
from scipy.stats import norm

from ppl_diffusion.denoisers.latent import LatentSpec
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.models import LatentDiffusion
from ppl_diffusion.models.latent_costs import level_masses
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.schedules import Cosine, Polynomial
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents

BITS = corr_bits(0.05)
LAST = Path([(1, 1), (0, 1), (0, 0)])


class Posterior:
    """The encoder of a problem: the law of its codes given a sequence."""

    def __init__(self, problem):
        codes = tuple(range(problem.length, problem.joint.ndim))
        assert len(codes) == 1
        self.table = problem.joint / problem.joint.sum(codes, keepdim=True)

    def log_probs(self, x0):
        return self.table[tuple(x0.unbind(-1))].log()[:, None]

    def __call__(self, x0):
        return self.log_probs(x0).argmax(-1)


def program(problem, encoder=None, denoiser=None, **options):
    letters = "abcdefgh"[: problem.vocab_size]
    return LatentDiffusion(
        denoiser or problem.denoiser(options.get("process")),
        vocabulary=letters,
        length=problem.length,
        encoder=encoder or Posterior(problem),
        **{name: value for name, value in options.items() if name != "process"},
    )


def averaged(problem, bound):
    """Return the mean of a bound over the data, and its standard error."""
    weights = problem.data.flatten()
    return (
        float((weights * bound.loss).sum()),
        float((weights * bound.standard_error).square().sum().sqrt()),
    )


def sequences(problem):
    return all_states(problem.vocab_size, problem.length)


TABLE = [
    (Path.sequential(1, 1), 1.007103),
    (Path.joint(2), 1.454336),
    (Path.joint(4), 1.218870),
    (Path.ordered(2), 1.054502),
    (Path.masked(4), 1.101901),
    (Path.masked(1), 1.386294),
    (LAST, 1.386294),
]


@pytest.mark.parametrize("num_steps", [None, 2], ids=["every-step", "drawn-steps"])
@pytest.mark.parametrize(("path", "expected"), TABLE, ids=str)
def test_bounds_of_two_bits_are_those_of_the_table(path, expected, num_steps):
    assert LatentLaw.of(BITS, path).nelbo == pytest.approx(expected, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    bound = program(BITS).bound(
        sequences(BITS), path, num_samples=2000, num_steps=num_steps, generator=generator
    )
    mean, error = averaged(BITS, bound)
    assert abs(mean - expected) < 5 * error + 1e-6
    assert error < 0.02
    assert bound.is_bound
    assert torch.equal(bound.bound, bound.loss)
    assert torch.allclose(bound.tokens + bound.latent + bound.prior, bound.loss)


PATHS = [
    Path.sequential(2, 3),
    Path.joint(3),
    Path.led(3, 1),
    Path([(1, 1), (0.7, 0.4), (0.2, 0.4), (0.1, 0), (0, 0)]),
]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_sequence_has_its_own_bound(path):
    """The network is of another law than the data: no term vanishes because all is optimal."""
    problem, other = random_latents(3, 2, 3), random_latents(3, 2, 3, seed=1)
    schedules = {"token_schedule": Cosine(), "latent_schedule": Polynomial(2.0)}
    exact = LatentLaw.of(problem, path, other.denoiser(), **schedules).bounds.flatten()
    model = program(
        problem,
        denoiser=other.denoiser(),
        schedule=Cosine(),
        latent_schedule=Polynomial(2.0),
        path=path,
    )
    generator = torch.Generator().manual_seed(1)
    bound = model.bound(sequences(problem), path, num_samples=1000, generator=generator)
    z = (bound.loss - exact) / bound.standard_error
    assert float(z.abs().max()) < 5
    assert 0.3 < float(z.std()) < 2.5  # the errors are of the right size
    terms = model.bound_terms(sequences(problem).repeat(50, 1), num_times=20, generator=generator)
    repeated = terms.mean(0).reshape(50, -1)
    error = repeated.std(0) / 50**0.5
    assert float(((repeated.mean(0) - exact) / error).abs().max()) < 5


CODES = {
    "first bit": (lambda x: x[:, :1], 1.007103),
    "nothing": (lambda x: 0 * x[:, :1], 1.386294),
    "whether equal": (lambda x: (x[:, :1] == x[:, 1:]).long(), 1.700250),
    "everything": (lambda x: 2 * x[:, :1] + x[:, 1:], 1.007103),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_that_are_a_function_of_the_sequence(name):
    encoder, expected = CODES[name]
    problem = BITS.encoded(encoder, 4)
    model = program(problem, encoder=encoder, denoiser=problem.denoiser(unseen="uniform"))
    # One order of reveals: nothing is left to chance.
    bound = model.bound(sequences(problem), Path.sequential(1, 1), num_samples=2)
    assert float((problem.data.flatten() * bound.loss).sum()) == pytest.approx(expected, abs=1e-6)
    assert float(bound.standard_error.max()) < 1e-12
    assert expected > BITS.entropy - 1e-6
    assert bool((bound.prior == 0).all())


def test_the_entropy_of_an_encoder_that_draws_is_part_of_the_bound():
    """Left out, as is usual, the bound would be larger by E H(q(c | x)) = 0.083075 nats."""
    bound = program(BITS).bound(sequences(BITS), Path.sequential(1, 1), num_samples=2)
    prior = float((BITS.data.flatten() * bound.prior).sum())
    assert prior == pytest.approx(-0.083075, abs=1e-6)
    undrawn = program(BITS).bound(sequences(BITS), Path.masked(2), num_samples=2)
    assert bool((undrawn.prior == 0).all())


def test_two_clocks_fall_below_the_entropy():
    """Averaged over independent levels, 1.02698 - 0.08308 nats: no model has that code length."""
    model, generator = program(BITS), torch.Generator().manual_seed(2)
    rows = sequences(BITS)[
        torch.multinomial(BITS.data.flatten(), 60_000, True, generator=generator)
    ]
    several = [model.loss(part, free_share=1.0, generator=generator) for part in rows.split(3000)]
    losses = torch.stack(several)
    error = float(losses.std() / len(losses) ** 0.5)
    assert abs(float(losses.mean()) - (1.02698 - 0.083075)) < 5 * error
    assert float(losses.mean()) + 5 * error < BITS.entropy
    with pytest.raises(TypeError, match=r"a bound is that of the chain on one Path, got 'both'"):
        model.bound(rows[:1], "both")


def test_the_training_loss_is_the_bound_of_seq():
    model, generator = program(BITS), torch.Generator().manual_seed(3)
    rows = sequences(BITS)[
        torch.multinomial(BITS.data.flatten(), 60_000, True, generator=generator)
    ]
    losses = torch.stack([model.loss(part, generator=generator) for part in rows.split(3000)])
    error = float(losses.std() / len(losses) ** 0.5)
    assert abs(float(losses.mean()) - BITS.entropy) < 5 * error
    assert error < 0.02


# Continuous latents.


class Regression:
    """The best prediction of a standard normal latent; tokens are predicted at random."""

    kind, time_free, vocab_size = "cavity", True, 2
    latent = LatentSpec(1, dim=1)

    def __init__(self, process):
        self.process, self.conditions = process, {"latent": 2, "latent_time": 0}

    def joint(self, tokens, t, /, *, latent, latent_time):
        level = torch.as_tensor(latent_time, dtype=torch.float64)[..., None, None]
        clean = self.process.signal(level) * latent
        tokens = torch.full((*tokens.shape, 2), -math.log(2.0), dtype=torch.float64)
        return torch.cat([tokens, clean.expand(*clean.shape[:-1], 2)], -2)

    def head(self, rows):
        return rows

    def latent_head(self, rows):
        return rows[..., :1]

    def __call__(self, tokens, t, /, **given):
        return self.head(self.joint(tokens, t, **given)[..., : tokens.shape[-1], :])


def quantiles(x0):
    """Encode bits by numbers of mean 0 and variance 1, all that a linear chain depends on."""
    index = (x0 * 2 ** torch.arange(x0.shape[-1])).sum(-1)
    count = 2 ** x0.shape[-1]
    values = torch.tensor(norm.ppf((index.numpy() + 0.5) / count))
    moments = torch.tensor(norm.ppf((torch.arange(count).numpy() + 0.5) / count))
    return (values / moments.square().mean().sqrt())[:, None, None]


GAUSSIAN = {1: 4.4956, 2: 2.6568, 4: 1.8196, 16: 1.2900, 64: 1.1833}


@pytest.mark.parametrize("steps", GAUSSIAN)
def test_the_bound_of_a_gaussian_chain(steps):
    """Each step costs half the gain in ratio times the error 1 / (1 + ratio) of the best guess."""
    process, path = Gaussian("linear", 0.1), Path.sequential(steps, 1)
    model = LatentDiffusion(
        Regression(process),
        vocabulary="01",
        length=8,
        encoder=quantiles,
        latent_schedule="linear",
        t_min=0.1,
    )
    masses = level_masses(process, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    prior = -0.5 * math.log1p(-float(process.squared_signal(1.0)))
    exact = float((masses.diff() / (1 + 2 * masses[:-1])).sum()) + prior
    assert exact == pytest.approx(GAUSSIAN[steps], abs=6e-5)
    x0, generator = all_states(2, 8), torch.Generator().manual_seed(4)
    bound = model.bound(x0, path, num_samples=8, generator=generator)
    latent = float((bound.latent + bound.prior).mean())
    assert abs(latent - exact) < 5 * bound.mean_error
    assert bound.mean_error < 0.1
    assert float(bound.tokens.mean()) == pytest.approx(8 * math.log(2.0))


def signs(x0):
    return (2.0 * x0[:, :1, None] - 1.0).double()


VECTORS = BITS.embedded(signs)


def test_tokens_read_the_noisy_latent():
    """The bound of one token step after the latent, by quadrature over where the chain ends."""
    process = Gaussian("linear", 0.4)
    denoiser = VECTORS.denoiser(process)
    model = program(VECTORS, encoder=signs, denoiser=denoiser, latent_schedule="linear", t_min=0.4)
    y = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    masks = torch.full((len(y), 2), 2)
    log_p = denoiser(masks, 1.0, latent=y[:, None, None], latent_time=torch.zeros(len(y)))
    x0 = sequences(VECTORS)
    a, b = float(process.signal(0.0)), float(process.noise(0.0))
    far = (y - a * signs(x0)[:, 0]) / b
    density = torch.exp(-far.square() / 2) / (b * math.sqrt(2 * math.pi))
    nats = -sum(log_p[:, i, x0[:, i]].T for i in range(2))
    exact = torch.trapezoid(density * nats, y)
    generator = torch.Generator().manual_seed(5)
    bound = model.bound(x0, Path.sequential(3, 1), num_samples=4000, generator=generator)
    spread = bound.standard_error
    assert bool(((bound.tokens - exact).abs() < 5 * spread).all())
    assert float(exact.max()) > 5 * float(spread.max())


def nothing(x0):
    return torch.zeros(len(x0), 1, 1)


def whispers(x0):
    """Say all of a sequence, in vectors that are easy to predict because they are short."""
    return 0.3 * (2.0 * x0[..., None] - 1.0).double()


@pytest.mark.parametrize("encoder", [nothing, whispers], ids=["nothing", "whispers"])
def test_no_encoder_brings_the_bound_below_the_entropy(encoder):
    problem = BITS.embedded(encoder)
    model = program(problem, encoder=encoder, denoiser=problem.denoiser(Gaussian()))
    generator = torch.Generator().manual_seed(6)
    bound = model.bound(
        sequences(BITS), Path.sequential(2, 2), num_samples=500, generator=generator
    )
    mean, error = averaged(problem, bound)
    assert mean + 5 * error > BITS.entropy
    if encoder is nothing:  # what is left is a masked model of two steps
        assert abs(mean - 1.196699) < 5 * error + 1e-3


def test_the_published_loss_is_no_bound():
    """Tokens read vectors for whose density nobody pays: even times their number it is too low."""
    problem = BITS.embedded(whispers)
    model = program(problem, encoder=whispers, denoiser=problem.denoiser(Gaussian()))
    generator = torch.Generator().manual_seed(7)
    loss = model.bound(sequences(BITS), Path.sequential(2, 2), surrogate="mse", generator=generator)
    assert 2 * averaged(problem, loss)[0] < 0.5 * BITS.entropy
    assert loss.bound is None
    assert not loss.is_bound
    assert "no bound" in repr(loss)


def test_a_latent_that_is_not_drawn_costs_nothing():
    process = Gaussian()
    model = program(VECTORS, encoder=signs, denoiser=VECTORS.denoiser(process))
    generator = torch.Generator().manual_seed(8)
    bound = model.bound(sequences(BITS), Path.masked(2), num_samples=2000, generator=generator)
    mean, error = averaged(BITS, bound)
    # The network reads noise that by chance looks like a latent, hardly so at this level.
    assert abs(mean - 1.196699) < 5 * error + 1e-3
    assert bool((bound.latent == 0).all() and (bound.prior == 0).all())


def test_surrogates_are_for_continuous_latents_by_name():
    with pytest.raises(TypeError, match="the bound of a discrete latent is exact"):
        program(BITS).bound(sequences(BITS), Path.masked(1), surrogate="mse")
    model = program(VECTORS, encoder=signs, denoiser=VECTORS.denoiser(Gaussian()))
    with pytest.raises(ValueError, match="surrogate must be 'mse' or None, got 'elbo'"):
        model.bound(sequences(BITS), Path.masked(1), surrogate="elbo")
    with pytest.raises(ValueError, match="num_samples and num_steps must be 1 or more"):
        model.bound(sequences(BITS), num_samples=0)
