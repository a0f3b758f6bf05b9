"""Forward processes: their laws, and how they corrupt."""

import numpy as np
import pytest
import torch

from ppl_diffusion.kernels import Absorbing, Interpolating, Uniform
from ppl_diffusion.testing import PROCESSES, chi_square_p_value, toy_process


def test_states():
    masked, uniform = Absorbing(4), Uniform(4)
    assert (masked.vocab_size, masked.num_states, masked.mask_id) == (4, 5, 4)
    assert (uniform.vocab_size, uniform.num_states, uniform.mask_id) == (4, 4, None)
    assert masked.absorbing
    assert not uniform.absorbing
    assert not Interpolating([0.0, 0.0, 1.0]).absorbing  # all mass on a clean token is no mask


@pytest.mark.parametrize("name", PROCESSES)
def test_corrupt_follows_the_forward_law(name):
    """Chi-square on one site, level 1e-4 per process."""
    process, n, alpha = toy_process(name), 40_000, 0.35
    x0 = torch.full((n,), 1)
    uniforms = torch.rand(2, n, dtype=torch.float64)
    z = process.corrupt(x0, alpha, *uniforms)
    law = (1 - alpha) * torch.as_tensor(process.prior)
    law[1] += alpha
    assert chi_square_p_value(torch.bincount(z, minlength=process.num_states), law) > 1e-4


@pytest.mark.parametrize("name", PROCESSES)
def test_corrupt_at_the_ends(name):
    process = toy_process(name)
    x0 = torch.randint(3, (200, 7))
    uniforms = torch.rand(2, 200, 7, dtype=torch.float64)
    assert torch.equal(process.corrupt(x0, 1.0, *uniforms), x0)
    noise = process.corrupt(x0, 0.0, *uniforms)
    assert torch.equal(noise, process.draw_prior(uniforms[1]))
    if process.absorbing:
        assert bool((noise == process.mask_id).all())


def test_corrupt_broadcasts_the_level():
    process, x0 = Absorbing(3), torch.zeros(2, 5, dtype=torch.int64)
    uniforms = torch.full((2, 2, 5), 0.5, dtype=torch.float64)
    z = process.corrupt(x0, torch.tensor([[0.9], [0.1]]), *uniforms)
    assert z.tolist() == [[0] * 5, [3] * 5]


def test_prior_draws_never_hit_a_state_of_mass_zero():
    process = Interpolating([0.1] * 3 + [0.7, 0.0, 0.0])
    uniforms = torch.tensor([0.0, 0.05, 1 - 2**-53, 0.9999999999999999], dtype=torch.float64)
    assert process.draw_prior(uniforms).tolist() == [0, 0, 3, 3]
    assert Interpolating([0.0, 1.0]).draw_prior(uniforms).tolist() == [1, 1, 1, 1]


def test_prior_prob_is_float64_and_gathers():
    process = Interpolating(np.array([1, 2, 3]) / 6)
    z = torch.tensor([[2, 0], [1, 1]])
    assert process.prior_prob(z).dtype == torch.float64
    torch.testing.assert_close(process.prior_prob(z) * 6, torch.tensor([[3.0, 1], [2, 2]]).double())


@pytest.mark.parametrize(
    ("prior", "size", "text"),
    [
        ([0.5, 0.6], None, "sum to one"),
        ([1.5, -0.5], None, "non-negative"),
        ([np.nan, 1.0], None, "finite"),
        ([[0.5, 0.5]], None, "must be a vector"),
        ([], None, "vocab_size must be >= 1"),
    ],
)
def test_bad_priors(prior, size, text):
    with pytest.raises(ValueError, match=text):
        Interpolating(prior)


@pytest.mark.parametrize("make", [Absorbing, Uniform])
def test_empty_vocabulary(make):
    with pytest.raises((ValueError, ZeroDivisionError)):
        make(0)


@pytest.mark.parametrize("make", [Absorbing, Uniform])
def test_vocabulary_sizes_are_counts(make):
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"vocab_size must be >= 1, got {size}"):
            make(size)
    with pytest.raises(TypeError, match=r"vocab_size must be a whole number, got 2\.5"):
        make(2.5)
