"""Rare tokens on fine grids: the draws of the library against the faulty race they replace."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from coarse_race import JAX_FLOOR, TORCH_FLOOR, floored_race, trunc_probs

from ppl_diffusion.kernels import Absorbing
from ppl_diffusion.processes import mixture_sample
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.testing import chi_square_p_value


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf(size, exponent=1.1):
    p = np.arange(1, size + 1.0) ** -exponent
    return p / p.sum()


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def raced_step(tokens, reveal, e0):
    """The law of one masked step drawn by a single race: ``(reveal probability, token law)``."""
    law = trunc_probs(np.append(tokens * reveal, 1 - reveal), e0)
    return law[-1], law[:-1]


# Steps; realised over true reveal probability and entropy of the token, float32 torch and JAX.
RACE = [
    (64, 0.938, 6.03, 0.906, 5.79),
    (256, 0.867, 5.52, 0.828, 5.24),
    (1024, 0.785, 4.94, 0.741, 4.64),
    (10_000, 0.627, 3.91, 0.573, 3.57),
    (50_000, 0.495, 3.11, 0.432, 2.74),
]


@pytest.mark.parametrize("row", RACE, ids=lambda row: f"N={row[0]}")
def test_what_a_float32_race_does(row):
    """Zipf tokens over 50257 classes, half way: reveals go missing and entropy with them."""
    steps, *expected = row
    tokens = zipf(50_257)
    got = []
    for e0 in (TORCH_FLOOR, JAX_FLOOR):
        _, law = raced_step(tokens, 2 / steps, e0)
        got += [law.sum() * steps / 2, entropy(law / law.sum())]
    assert got == pytest.approx(expected, abs=6e-3)
    assert entropy(tokens) == pytest.approx(6.465, abs=1e-3)


def test_flat_sites_starve_first():
    """At 1024 steps a flat site is revealed at .2164 of its rate, a peaked one at .9999."""
    flat = np.full(50_257, 1 / 50_257)
    peaked = np.append(0.9999, np.full(50_256, 1e-4 / 50_256))
    ratios = [raced_step(p, 2 / 1024, TORCH_FLOOR)[1].sum() * 512 for p in (flat, peaked)]
    assert ratios == pytest.approx([0.2164, 0.9999], abs=5e-5)
    assert raced_step(flat, 2e-4, TORCH_FLOOR)[1].sum() < 1e-9


@pytest.mark.parametrize("e0", [0.0, 1e-3, 0.05, 1.0])
def test_closed_form_is_a_law(e0):
    p = np.append(zipf(300), 0.0)
    law = trunc_probs(p, e0)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    assert law[-1] == 0
    if e0 == 0:
        np.testing.assert_allclose(law, p, atol=1e-14)
    else:
        assert law[0] > p[0]


def counts(drawn, size):
    return torch.bincount(drawn, minlength=size)


@pytest.mark.parametrize("e0", [2.0**-9, 2.0**-6])
def test_closed_form_predicts_a_floored_race(e0):
    """Chi-square of 400000 draws at level 1e-4; the true law is refused, so the test has power."""
    p = zipf(20)
    log_p = torch.tensor(np.log(p)).expand(400_000, -1)
    seen = counts(floored_race(log_p, e0, generator()), 20)
    assert chi_square_p_value(seen, torch.tensor(trunc_probs(p, e0))) > 1e-4
    assert chi_square_p_value(seen, torch.tensor(p)) < 1e-12


def test_draws_do_not_follow_the_floored_race():
    """The same chi-square on the library's draws: the true law passes (1e-4), the other fails."""
    p, e0 = zipf(20), 2.0**-9
    seen = counts(draw_categorical(torch.tensor(np.log(p)), uniforms((400_000,))), 20)
    assert chi_square_p_value(seen, torch.tensor(p)) > 1e-4
    assert chi_square_p_value(seen, torch.tensor(trunc_probs(p, e0))) < 1e-12


def test_floored_uniforms_cost_their_floor_only():
    """Uniforms of at least ``h``: inversion errs by ``h`` in all, a race loses the whole flat site.

    Expected frequencies; no randomness.
    """
    h, size, reveal = 2.0**-10, 400, 2.0**-8
    grid = (np.arange(2**16) + 0.5) / 2**16 * (1 - h) + h
    flat = np.full(size, 1 / size)
    drawn = draw_categorical(torch.tensor(np.log(flat)), torch.tensor(grid))
    seen = counts(drawn, size).numpy() / len(grid)
    assert np.abs(np.cumsum(seen) - np.cumsum(flat)).max() <= h + 2.0**-15
    raced = raced_step(flat, reveal, h)[1].sum()
    assert raced < 1e-6 * reveal
    lazy = np.mean(grid < reveal)
    assert abs(lazy - reveal) <= h


def one_step(tokens, sites, steps, seed=0):
    """Draw one masked step at ``alpha = .5`` with the library; return the next states."""
    size = len(tokens)
    log_c = torch.tensor(np.log(tokens)).expand(sites, -1)
    noise = uniforms((2, sites), generator=generator(seed))
    masks = torch.full((sites,), size)
    return mixture_sample(Absorbing(size), masks, log_c, 0.5, 0.5 + 1 / steps, *noise)


def test_peaked_and_flat_sites_are_revealed_alike():
    """Both counts within 4.5 standard errors: false alarm 1e-5; a float32 race is far outside."""
    steps, sites, size = 1024, 50_000, 50_257
    peaked = np.append(0.9999, np.full(size - 1, 1e-4 / (size - 1)))
    flat = np.full(size, 1 / size)
    expected = sites * 2 / steps
    for seed, tokens in enumerate((flat, peaked)):
        revealed = int((one_step(tokens, sites, steps, seed) < size).sum())
        assert abs(revealed - expected) < 4.5 * expected**0.5
    raced = sites * raced_step(flat, 2 / steps, TORCH_FLOOR)[1].sum()
    assert raced + 4.5 * raced**0.5 < expected - 4.5 * expected**0.5


def chain_tokens(tokens, sites, steps):
    """Run the whole masked chain at independent sites; return the clean tokens."""
    size, alphas = len(tokens), np.linspace(0, 1, steps + 1)
    log_c = torch.tensor(np.log(tokens)).expand(sites, -1)
    z, source = torch.full((sites,), size), generator(steps)
    for a, b in itertools.pairwise(alphas):
        noise = uniforms((2, sites), generator=source)
        z = mixture_sample(Absorbing(size), z, log_c, float(a), float(b), *noise)
    return z


def test_entropy_does_not_depend_on_the_grid():
    """256 and 4096 steps: chi-square to the same law at 1e-4 each, and entropies within 4.5 s.e."""
    tokens, sites = zipf(50), 4_000
    found = []
    for steps in (256, 4096):
        seen = counts(chain_tokens(tokens, sites, steps), 50)
        assert chi_square_p_value(seen, torch.tensor(tokens)) > 1e-4
        found.append(entropy(seen.numpy() / sites))
    surprise = -np.log(tokens)
    spread = np.sqrt((tokens * surprise**2).sum() - entropy(tokens) ** 2)
    assert abs(found[0] - found[1]) < 4.5 * spread * (2 / sites) ** 0.5
    raced = [raced_step(zipf(50_257), 2 / n, TORCH_FLOOR)[1] for n in (256, 4096)]
    entropies = [entropy(law / law.sum()) for law in raced]
    assert entropies[0] - entropies[1] > 0.5  # what the race would show


GRAIN = 2.0**-8
COARSE = np.arange(256) / 256


@pytest.mark.parametrize("reveal", [0.004, 0.05, 0.3, 0.77])
def test_coarse_uniforms_cost_their_grain_only(reveal):
    """All 256 x 256 pairs of uniforms of eight bits: rates and frequencies within 2^-8."""
    size = 40
    tokens = zipf(size)
    u_move, u_token = (torch.tensor(g.ravel()) for g in np.meshgrid(COARSE, COARSE, indexing="ij"))
    log_c = torch.tensor(np.log(tokens)).expand(len(u_move), -1)
    masks = torch.full((len(u_move),), size)
    moved = mixture_sample(Absorbing(size), masks, log_c, 0.5, 0.5 + reveal / 2, u_move, u_token)
    shown = moved[moved < size]
    assert abs(len(shown) / len(moved) - reveal) <= GRAIN
    seen = counts(shown, size).numpy() / len(shown)
    assert np.abs(np.cumsum(seen) - np.cumsum(tokens)).max() <= GRAIN + 1e-12


def test_coarse_uniforms_ruin_a_race():
    """Eight bits floor the clocks at about 2^-8: flat sites starve, peaked ones do not."""
    flat, peaked = np.full(40, 1 / 40), np.append(0.99, np.full(39, 0.01 / 39))
    starved, fed = (raced_step(p, 0.05, GRAIN)[1].sum() / 0.05 for p in (flat, peaked))
    assert starved < 0.2
    assert fed > 0.9


def test_quantised_jax_draws_keep_the_law():
    """The float32 path of JAX on the eight-bit grid: its ascending order costs no more."""
    tokens = zipf(40)
    log_c = jnp.asarray(np.log(tokens))
    drawn = np.asarray(draw_categorical(log_c, jnp.asarray(COARSE)))
    seen = np.bincount(drawn, minlength=40) / 256
    assert np.abs(np.cumsum(seen[::-1]) - np.cumsum(tokens[::-1])).max() <= GRAIN + 1e-6
