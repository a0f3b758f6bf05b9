"""The three-way mixture against the dense definitions, and the edge-case table of the theory."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.kernels import Absorbing, Interpolating, InterpolatingKernel, Uniform
from ppl_diffusion.kernels.kappa_rules import kappa_room
from ppl_diffusion.processes import (
    draw_categorical,
    log_posterior_mean,
    mixture_log_prob,
    mixture_sample,
    posterior_to_cavity,
    three_way,
)
from ppl_diffusion.testing import (
    PROCESSES,
    chi_square_p_value,
    posterior_as_cavity,
    site_rows,
    toy_process,
)

INF = math.inf
TOLERANCE = 1e-12


def random_case(rng, process, kappa_from=0.0):
    """Draw ``(c, a, b, kappa)``; a fifth of the time a level sits at its end."""
    c = rng.dirichlet(np.full(process.vocab_size, 0.5))
    a, b = np.sort(rng.uniform(size=2))
    a = 0.0 if rng.uniform() < 0.2 else a
    b = 1.0 if rng.uniform() < 0.2 else b
    return torch.tensor(c), float(a), float(b), float(rng.uniform(kappa_from, 1))


def dense_and_mixture(process, c, a, b, kappa):
    """Return both kernels as matrices over all states, rows current, columns next."""
    size = process.num_states
    z, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mixed = mixture_log_prob(process, z, j, c.log().expand(size, size, -1), a, b, kappa).exp()
    states = torch.arange(size)
    return site_rows(process, states, c.expand(size, -1), a, b, kappa), mixed


@pytest.mark.parametrize("name", [*PROCESSES, "any"])
def test_mixture_equals_the_definition(name):
    """Random ``(a, b, kappa, c, pi)``, ``kappa`` in [0, 1]."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        vocab = int(rng.integers(2, 6))
        process = (
            Interpolating(rng.dirichlet(np.ones(vocab)))
            if name == "any"
            else toy_process(name, vocab)
        )
        dense, mixed = dense_and_mixture(process, *random_case(rng, process))
        torch.testing.assert_close(mixed, dense, rtol=0, atol=TOLERANCE)
        ones = torch.ones(len(mixed), dtype=torch.float64)
        torch.testing.assert_close(mixed.sum(-1), ones, rtol=0, atol=TOLERANCE)


def test_priors_with_holes():
    """States that the prior cannot produce are known to be clean, as the mask's are."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        process = Interpolating([0.0, 0.3, 0.0, 0.7])
        dense, mixed = dense_and_mixture(process, *random_case(rng, process))
        torch.testing.assert_close(mixed, dense, rtol=0, atol=TOLERANCE)


PRIORS = {
    "absorbing": Absorbing(3),
    "uniform": Uniform(4),
    "skewed": Interpolating([0.1, 0.2, 0.3, 0.4]),
    "holes": Interpolating([0.0, 0.4, 0.6]),
}


def below_zero(process, rng, a, b):
    """Return a kappa between the lowest valid one and zero."""
    room = float(kappa_room(process, np.array([a, b]))[0])
    return rng.uniform(0.7, 1.0) * max(room, -3.0)


@pytest.mark.parametrize("name", PRIORS)
def test_negative_kappa_where_it_is_valid(name):
    """Any prior has some room below zero, and there the mixture still is the definition."""
    rng, process = np.random.default_rng(2), PRIORS[name]
    negative = 0
    for _ in range(200):
        c, a, b, _ = random_case(rng, process)
        kappa = below_zero(process, rng, a, b)
        dense, mixed = dense_and_mixture(process, c, a, b, kappa)
        assert bool((dense > -TOLERANCE).all())
        torch.testing.assert_close(mixed, dense.clamp_min(0), rtol=0, atol=TOLERANCE)
        states = torch.arange(process.num_states)
        c_z = torch.nn.functional.pad(c, (0, process.num_states - process.vocab_size))
        negative += int((three_way(a, b, kappa, c_z, process.prior_prob(states))[0] < 0).sum())
    assert (negative > 0) == (name != "absorbing")  # the case that needs a whole row is met


@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_the_density_below_zero(name):
    """Chi-square per current state, level 1e-4 each; includes states with a negative "stay"."""
    rng, process, n = np.random.default_rng(4), PRIORS[name], 30_000
    a, b = 0.2, 0.6
    kappa = float(kappa_room(process, np.array([a, b]))[0]) * 0.98
    c = torch.tensor(rng.dirichlet(np.full(process.vocab_size, 0.4)))
    for z in range(process.num_states):
        law = site_rows(process, torch.tensor(z), c, a, b, kappa).clamp_min(0)
        noise = torch.rand(2, n, dtype=torch.float64)
        states, log_c = torch.full((n,), z), c.log().expand(n, -1)
        for value in (kappa, torch.full((1,), kappa, dtype=torch.float64)):
            drawn = mixture_sample(process, states, log_c, a, b, *noise, value)
            counts = torch.bincount(drawn, minlength=process.num_states)
            assert chi_square_p_value(counts, law) > 1e-4


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("kappa", [1.0, 0.4, 0.0, -0.05])
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.3), (0.3, 0.7), (0.5, 0.5), (0.6, 1.0)])
def test_kappa_of_every_site_equals_the_number(name, kappa, a, b):
    """Bit for bit: an array that is constant changes neither densities nor samples."""
    process, rng = PRIORS[name], np.random.default_rng(3)
    z, j = torch.tensor(rng.integers(process.num_states, size=(2, 40, 5)))
    log_c = torch.tensor(rng.dirichlet(np.ones(process.vocab_size), size=(40, 5))).log()
    u = torch.rand(2, 40, 5, dtype=torch.float64)
    for shape in ((5,), (40, 1), (40, 5)):
        each = torch.full(shape, kappa, dtype=torch.float64)
        ours = mixture_log_prob(process, z, j, log_c, a, b, each)
        assert torch.equal(ours, mixture_log_prob(process, z, j, log_c, a, b, kappa))
        moved = mixture_sample(process, z, log_c, a, b, *u, each)
        assert torch.equal(moved, mixture_sample(process, z, log_c, a, b, *u, kappa))


@pytest.mark.parametrize("name", PRIORS)
def test_kappa_one_is_ancestral(name):
    """Bit for bit with shared uniforms: ``kappa = 1`` at some sites leaves these ancestral."""
    process, rng = PRIORS[name], np.random.default_rng(5)
    z = torch.tensor(rng.integers(process.num_states, size=(200, 6)))
    log_c = torch.tensor(rng.dirichlet(np.ones(process.vocab_size), size=(200, 6))).log()
    u = torch.rand(2, 200, 6, dtype=torch.float64)
    kappa = torch.tensor([1.0, 0.2, 1.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    ancestral = mixture_sample(process, z, log_c, 0.3, 0.7, *u)
    mixed = mixture_sample(process, z, log_c, 0.3, 0.7, *u, kappa)
    assert torch.equal(mixed[:, ::2], ancestral[:, ::2])
    assert not torch.equal(mixed[:, 1::2], ancestral[:, 1::2])


def test_masked_ancestral_sampling_in_closed_form():
    """A mask is revealed where the uniform lies below ``(b - a) / (1 - a)``; a token stays."""
    process, a, b = Absorbing(5), 0.3, 0.7
    z, log_c = torch.randint(6, (300, 8)), torch.randn(300, 8, 5).log_softmax(-1).double()
    u_move, u_token = torch.rand(2, 300, 8, dtype=torch.float64)
    expected = torch.where(
        (z == 5) & (u_move < (b - a) / (1 - a)), draw_categorical(log_c, u_token), z
    )
    assert torch.equal(mixture_sample(process, z, log_c, a, b, u_move, u_token), expected)


def test_comparison_has_power():
    """The posterior mean in place of the cavity, or ``kappa`` forgotten, is far outside 1e-12."""
    process, c = Uniform(3), torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    mixed = dense_and_mixture(process, c, 0.3, 0.6, 0.9)[1]
    z = torch.arange(3)
    posterior = log_posterior_mean(process, z, c.log().expand(3, -1), 0.3).exp()
    assert float((site_rows(process, z, posterior, 0.3, 0.6, 0.9) - mixed).abs().max()) > 1e-2
    assert float((site_rows(process, z, c.expand(3, -1), 0.3, 0.6) - mixed).abs().max()) > 1e-2


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kappa", [1.0, 0.6, 0.0])
def test_weights_are_probabilities(name, kappa):
    process = toy_process(name)
    z = torch.arange(process.num_states)
    c_z = torch.cat([torch.tensor([0.5, 0.3, 0.2]), torch.zeros(process.num_states - 3)]).double()
    for a in (0.0, 0.2, 0.5):
        for b in (0.5, 0.9, 1.0):
            weights = torch.stack(three_way(a, b, kappa, c_z, process.prior_prob(z)))
            assert bool((weights >= 0).all())
            torch.testing.assert_close(weights.sum(0), torch.ones_like(c_z), rtol=0, atol=1e-14)


MASKED, FLAT, HOLES = Absorbing(3), Uniform(3), Interpolating([0.0, 0.4, 0.6])
C = [0.2, 0.3, 0.5]
A, B = 0.3, 0.8
R = A / B
D_FLAT = A * 0.2 + (1 - A) / 3
# (what, process, c, z, a, b, kappa, the law of the next state)
EDGES = [
    ("a=0, masked: reveal with b", MASKED, C, 3, 0.0, B, 1.0, [B * x for x in C] + [1 - B]),
    ("a=0, uniform: blind to z", FLAT, C, 0, 0.0, B, 1.0, [B * x + (1 - B) / 3 for x in C]),
    ("a=0, uniform, other z", FLAT, C, 2, 0.0, B, 1.0, [B * x + (1 - B) / 3 for x in C]),
    ("b=1, masked: reveal all", MASKED, C, 3, A, 1.0, 1.0, [*C, 0.0]),
    ("b=1, masked, kappa<1: reveal all", MASKED, C, 3, A, 1.0, 0.2, [*C, 0.0]),
    ("b=1, masked, visible: no remask", MASKED, C, 1, A, 1.0, 0.2, [0, 1, 0, 0]),
    (
        "b=1, uniform: posterior mean",
        FLAT,
        C,
        0,
        A,
        1.0,
        1.0,
        [(A + (1 - A) / 3) * 0.2 / D_FLAT] + [(1 - A) / 3 * x / D_FLAT for x in C[1:]],
    ),
    ("a=b: identity", FLAT, C, 1, A, A, 1.0, [0, 1, 0]),
    ("a=b, masked: identity", MASKED, C, 3, A, A, 1.0, [0, 0, 0, 1]),
    ("a=b=0: identity", FLAT, C, 1, 0.0, 0.0, 1.0, [0, 1, 0]),
    ("a=b=1: identity", FLAT, C, 1, 1.0, 1.0, 1.0, [0, 1, 0]),
    ("a=b, kappa<1: corrector", MASKED, C, 0, A, A, 0.4, [1 - 0.6 * (1 - A), 0, 0, 0.6 * (1 - A)]),
    ("visible, pi_z=0: stays", MASKED, C, 2, A, B, 1.0, [0, 0, 1, 0]),
    ("visible, pi_z=0, kappa<1", MASKED, C, 2, A, B, 0.5, [0, 0, 1 - 0.5 * (1 - B), 0.5 * (1 - B)]),
    ("visible, c_z=0: stays, no NaN", MASKED, [0.5, 0.5, 0.0], 2, A, B, 1.0, [0, 0, 1, 0]),
    ("hole in the prior, c_z=0: stays", HOLES, [0.0, 0.5, 0.5], 0, A, B, 1.0, [1, 0, 0]),
    ("uniform, c_z=0", FLAT, [0.0, 0.5, 0.5], 0, A, 1.0, 1.0, [0, 0.5, 0.5]),
    ("a=1, c_z=0: impossible, stays", FLAT, [0.0, 0.5, 0.5], 0, 1.0, 1.0, 1.0, [1, 0, 0]),
]


@pytest.mark.parametrize("case", [e[1:] for e in EDGES], ids=[e[0] for e in EDGES])
def test_edge_cases(case):
    """Row by row: the law, exact ``-inf`` where it is zero, samples, gradients."""
    process, c, z, a, b, kappa, law = case
    size = process.num_states
    log_c = torch.tensor(c, dtype=torch.float64).log().expand(size, -1).clone().requires_grad_()
    z_t, j = torch.full((size,), z), torch.arange(size)
    log_p = mixture_log_prob(process, z_t, j, log_c, a, b, kappa)
    expected = torch.tensor(law, dtype=torch.float64)
    torch.testing.assert_close(log_p.exp(), expected, rtol=0, atol=1e-15)
    assert bool((log_p[expected == 0] == -INF).all())
    log_p[expected > 0].sum().backward()
    live = log_c.detach() > -INF
    assert bool(torch.isfinite(log_c.grad[live]).all())
    u = torch.linspace(0, 1 - 2**-53, 41, dtype=torch.float64)
    u_move, u_token = (g.flatten() for g in torch.meshgrid(u, u, indexing="ij"))
    row = log_c.detach()[0].expand(len(u_move), -1)
    drawn = mixture_sample(
        process, torch.full_like(u_move, z).long(), row, a, b, u_move, u_token, kappa
    )
    assert bool((expected[drawn] > 0).all())


def test_impossible_transition_has_zero_gradient():
    log_c = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log().requires_grad_()
    z = torch.tensor([3])
    log_p = mixture_log_prob(MASKED, z, torch.tensor([2]), log_c, A, B)
    assert log_p.item() == -INF
    torch.where(log_p > -INF, log_p, 0.0).sum().backward()
    assert float(log_c.grad[0, :2].abs().sum()) == 0


def test_gradient_matches_finite_differences():
    log_c = torch.randn(4, 3, dtype=torch.float64).log_softmax(-1).requires_grad_()
    z, j = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda c: mixture_log_prob(FLAT, z, j, c, A, B, 0.7), log_c)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kappa", [1.0, 0.5])
def test_samples_follow_the_density(name, kappa):
    """Chi-square per current state, level 1e-4 each."""
    process, n = toy_process(name), 30_000
    log_c = torch.tensor(C, dtype=torch.float64).log()
    for z in range(process.num_states):
        law = site_rows(process, torch.tensor(z), log_c.exp(), A, B, kappa)
        uniforms = torch.rand(2, n, dtype=torch.float64)
        states = torch.full((n,), z)
        drawn = mixture_sample(process, states, log_c.expand(n, -1), A, B, *uniforms, kappa)
        counts = torch.bincount(drawn, minlength=process.num_states)
        if int((law > 0).sum()) > 1:
            assert chi_square_p_value(counts, law) > 1e-4
        else:
            assert bool((drawn == z).all())


def test_one_kappa_per_site():
    """``kappa`` may be an array: every site has its own mixture."""
    log_c = torch.tensor(C, dtype=torch.float64).log().expand(2, -1)
    z, j = torch.tensor([3, 0]), torch.tensor([1, 3])
    both = mixture_log_prob(
        MASKED, z, j, log_c, A, B, torch.tensor([1.0, 0.4], dtype=torch.float64)
    )
    alone = [
        mixture_log_prob(MASKED, z[i : i + 1], j[i : i + 1], log_c[i : i + 1], A, B, kappa)
        for i, kappa in enumerate((1.0, 0.4))
    ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-15)


def test_mask_is_never_kept_at_the_last_step():
    """``u_move`` just below one: round-off in the weights must not leave a mask behind."""
    n = 100_000
    log_c = torch.randn(n, 5).log_softmax(-1)  # float32 rows do not sum to one in float64
    ends = torch.full((n,), 1 - 2**-53, dtype=torch.float64)
    z = torch.full((n,), 5)
    drawn = mixture_sample(Absorbing(5), z, log_c, 0.1, 1.0, ends, torch.rand(n).double())
    assert int(drawn.max()) < 5


def test_draw_categorical_inverts_and_avoids_holes():
    log_c = torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64).log()
    u = torch.tensor([0.0, 0.2499, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert draw_categorical(log_c.expand(4, -1), u).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("name", ["uniform", "skewed"])
@pytest.mark.parametrize("a", [0.0, 0.3, 0.999])
def test_posterior_to_cavity_undoes_bayes(name, a):
    process, rng = toy_process(name), np.random.default_rng(0)
    c = torch.tensor(rng.dirichlet(np.ones(3), size=9))
    z = torch.arange(3).repeat(3)
    g = log_posterior_mean(process, z, c.log(), a)
    torch.testing.assert_close(posterior_to_cavity(process, z, g, a).exp(), c, rtol=0, atol=1e-12)
    dense = posterior_as_cavity(process, z, g.exp(), a)
    torch.testing.assert_close(dense, c, rtol=0, atol=1e-12)


def test_posterior_to_cavity_leaves_masked_chains_alone():
    log_g = torch.randn(4, 3).log_softmax(-1)
    z = torch.tensor([3, 0, 3, 1])
    assert posterior_to_cavity(MASKED, z, log_g, 0.4) is log_g
    assert posterior_to_cavity(FLAT, z % 3, log_g, 1.0) is log_g


@pytest.mark.parametrize("name", PROCESSES)
def test_log_posterior_mean_is_the_bridge_to_zero(name):
    process = toy_process(name)
    z = torch.arange(process.num_states)
    c = torch.tensor(C, dtype=torch.float64).expand(len(z), -1)
    dense = site_rows(process, z, c, A, 1.0)[:, :3]
    torch.testing.assert_close(
        log_posterior_mean(process, z, c.log(), A).exp(), dense, rtol=0, atol=1e-14
    )


def test_denoiser_mass_on_the_mask_is_dropped():
    """SUBS: an output over ``V + 1`` classes is renormalised over clean tokens."""

    class Leaky:
        vocab_size, kind, time_free = 3, "cavity", True

        def __call__(self, tokens, t):
            return torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(*tokens.shape, -1)

    kernel = InterpolatingKernel(MASKED, Leaky(), num_steps=2)
    log_c = kernel.cavity_log_probs({"tokens": torch.full((2, 4), 3)}, 0)
    expected = torch.tensor([1, 2, 3]).double().div(6).expand(2, 4, -1)
    torch.testing.assert_close(log_c.exp(), expected, rtol=0, atol=1e-6)
