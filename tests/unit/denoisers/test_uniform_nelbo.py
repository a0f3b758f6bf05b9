"""The fused bound of the uniform process: same numbers, same gradients, no second table."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_diffusion.denoisers import TableDenoiser, uniform_nelbo
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_from_hidden, uniform_nelbo_terms
from ppl_diffusion.kernels import Linear, Uniform
from ppl_diffusion.processes import nelbo_terms
from ppl_diffusion.testing import random_joint

SIZES = [2, 5, 65, 1500]
each_size = pytest.mark.parametrize("size", SIZES)


def batch(size, n=40, seed=0, dtype=torch.float64):
    """Return ``(x0, z, logits, alpha)``: three sites, half of them kept."""
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.randint(size, (n, 3), generator=rng)
    kept = torch.rand(n, 3, generator=rng) < 0.5
    z = torch.where(kept, x0, torch.randint(size, (n, 3), generator=rng))
    logits = 3 * torch.randn(n, 3, size, generator=rng, dtype=torch.float64)
    alpha = 0.02 + 0.97 * torch.rand(n, 1, generator=rng, dtype=torch.float64)
    return x0, z, logits.to(dtype), alpha


def straightforward(x0, z, logits, alpha):
    """The general formula on a dense float64 log-softmax; alpha' = -1."""
    log_c = logits.double().log_softmax(-1)
    return nelbo_terms(Uniform(logits.shape[-1]), x0, z, log_c, 1 - alpha)


def value_and_gradient(bound, x0, z, logits, alpha):
    leaf = logits.clone().requires_grad_()
    value = bound(x0, z, leaf, alpha)
    cotangent = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).reshape(value.shape)
    (gradient,) = torch.autograd.grad((cotangent * value).sum(), leaf)
    return value.detach(), gradient


def fused(x0, z, logits, alpha):
    return uniform_nelbo_terms(x0, z, logits, alpha, -1.0)


def row_error(found, wanted):
    """Return the largest relative error of a row; rows of a known answer are nearly zero."""
    return float(((found - wanted).norm(dim=-1) / (wanted.norm(dim=-1) + 1e-6)).max())


@each_size
def test_it_is_the_general_bound(size):
    given = batch(size)
    value, gradient = value_and_gradient(fused, *given)
    expected, slope = value_and_gradient(straightforward, *given)
    assert value.shape == (40, 3)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert row_error(gradient, slope) < 1e-8


@each_size
def test_float32_logits(size):
    given = batch(size, dtype=torch.float32)
    value, gradient = value_and_gradient(fused, *given)
    expected, slope = value_and_gradient(straightforward, *given)
    assert value.dtype == torch.float64
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert row_error(gradient.double(), slope.double()) < 1e-5


def test_small_signals_keep_their_digits_in_float32():
    """The bound is of order ``(V a)^2`` there, its parts of order ``V a``."""
    x0, z, logits, _ = batch(5, dtype=torch.float32)
    alpha = torch.logspace(-5, -2, 40, dtype=torch.float64)[:, None]
    value, expected = fused(x0, z, logits, alpha), straightforward(x0, z, logits, alpha)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-11)
    assert bool((value > 0).all())


def test_half_precision_logits_are_computed_in_float32():
    x0, z, logits, alpha = batch(1500, dtype=torch.bfloat16)
    value, gradient = value_and_gradient(fused, x0, z, logits, alpha)
    same = fused(x0, z, logits.float(), alpha)
    torch.testing.assert_close(value, same, rtol=0, atol=0)
    assert gradient.dtype == torch.bfloat16


def test_published_rewriting():
    """Duo, Eq. 17, with its own symbols."""
    x0, z, logits, alpha = batch(5)
    size, a = 5, alpha
    y = size * a[..., None] * logits.softmax(-1) + 1 - a[..., None]
    y_z, y_x = (y.gather(-1, ids[..., None])[..., 0] for ids in (z, x0))
    kept = (z == x0).double()
    moved, k0 = 1 - kept, (1 - a) / (size * a + 1 - a)
    x_z = torch.where(z == x0, size * a + 1 - a, 1 - a)
    total = y.log().sum(-1)
    inner = (
        size / x_z
        - size / y_z
        + (k0 * kept + moved) * (total - size * y_z.log())
        + size * a / (1 - a) * moved * (y_x.log() - y_z.log())
        - ((size - 1) * k0 * kept - moved / k0) * k0.log()
    )
    expected = -inner / (size * a)
    torch.testing.assert_close(fused(x0, z, logits, alpha), expected, rtol=1e-9, atol=1e-11)


@each_size
def test_every_term_is_non_negative(size):
    values = fused(*batch(size, n=400, seed=1))
    assert float(values.min()) > -1e-12
    assert float(values.max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_size
def test_knowing_the_answer_costs_nothing(size, dtype):
    x0, z, _, alpha = batch(size)
    logits = torch.where(one_hot(x0, size).bool(), 0.0, -math.inf).to(dtype)
    value, gradient = value_and_gradient(fused, x0, z, logits, alpha)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=2e-6)
    assert bool(gradient.isfinite().all())


def test_the_slope_of_alpha_scales_the_bound():
    x0, z, logits, alpha = batch(5)
    slope = torch.full_like(alpha, -0.3)
    expected = 0.3 * fused(x0, z, logits, alpha)
    torch.testing.assert_close(uniform_nelbo_terms(x0, z, logits, alpha, slope), expected)


def test_ends_of_the_schedule():
    """No signal costs nothing; no noise has a finite limit where the token was kept."""
    x0, _, logits, _ = batch(5)
    for alpha in (0.0, 1.0):
        level = torch.full((40, 1), alpha, dtype=torch.float64)
        value, gradient = value_and_gradient(fused, x0, x0, logits, level)
        near = fused(x0, x0, logits, (level - 1e-12).abs())
        torch.testing.assert_close(value, near, rtol=1e-6, atol=1e-6)
        assert bool(gradient.isfinite().all())


def test_gradient_by_finite_differences(monkeypatch):
    """In chunks of two rows, the last one shorter."""
    monkeypatch.setattr(uniform_nelbo, "_CHUNK_CPU", 10)
    x0, z, logits, alpha = batch(5, n=5)
    assert torch.autograd.gradcheck(
        lambda rows: fused(x0, z, rows, alpha), logits.requires_grad_(), atol=1e-7
    )


def test_gradient_by_finite_differences_in_hidden_states_and_head():
    x0, z, _, alpha = batch(5, n=2)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    head = nn.Linear(4, 5, dtype=torch.float64)

    def bound(states, weight, bias):
        return uniform_nelbo_from_hidden(
            states,
            lambda rows: nn.functional.linear(rows, weight, bias),
            x0,
            z,
            alpha,
            -1.0,
            rows_per_chunk=4,
        )

    leaves = [leaf.detach().requires_grad_() for leaf in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(bound, leaves, atol=1e-7)


class Twice(nn.Linear):
    """A linear layer with another forward pass."""

    def forward(self, rows):
        return 2 * super().forward(rows)


class Normalised(nn.Module):
    """A head that is no plain linear map."""

    def __init__(self, size):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, size))

    def forward(self, rows):
        return self.inner(rows).log_softmax(-1)


@pytest.mark.parametrize("make", [lambda size: nn.Linear(8, size), Normalised])
@pytest.mark.parametrize("rows_per_chunk", [None, 1, 50, 1000])
def test_the_head_may_be_fused_in(make, rows_per_chunk):
    x0, z, _, alpha = batch(65)
    hidden = torch.randn(40, 3, 8)
    head = make(65)

    def run(bound):
        states = hidden.clone().requires_grad_()
        value = bound(states)
        return value, torch.autograd.grad(value.mean(), [states, *head.parameters()])

    value, gradients = run(
        lambda h: uniform_nelbo_from_hidden(
            h, head, x0, z, alpha, -1.0, rows_per_chunk=rows_per_chunk
        )
    )
    expected, slopes = run(lambda h: straightforward(x0, z, head(h), alpha))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6)


def test_what_is_frozen_gets_no_gradient():
    x0, z, _, alpha = batch(65)
    hidden, head = torch.randn(40, 3, 8), nn.Linear(8, 65, bias=False)
    uniform_nelbo_from_hidden(hidden, head, x0, z, alpha, -1.0).sum().backward()
    expected = head.weight.grad.clone()
    assert hidden.grad is None
    head.requires_grad_(False)
    hidden.requires_grad_()
    uniform_nelbo_from_hidden(hidden, head, x0, z, alpha, -1.0).sum().backward()
    assert torch.equal(head.weight.grad, expected)
    assert float(hidden.grad.abs().max()) > 0


@pytest.mark.parametrize("change", ["hook", "subclass", "autocast"])
def test_a_linear_head_that_is_more_than_that(change):
    """A hook doubles the logits, a subclass too; automatic casting makes them bfloat16."""
    x0, z, _, alpha = batch(1500)
    hidden, head = torch.randn(40, 3, 8, requires_grad=True), nn.Linear(8, 1500)
    if change == "hook":
        head.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "subclass":
        head = Twice(8, 1500)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        value = uniform_nelbo_from_hidden(hidden, head, x0, z, alpha, -1.0)
        expected = fused(x0, z, head(hidden), alpha)
    gradients = [torch.autograd.grad(v.mean(), hidden)[0] for v in (value, expected)]
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Records the size of everything that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(a) for a in args if isinstance(a, torch.Tensor)}
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)]
        self.made += [tensor.numel() for tensor in made if storage(tensor) not in given]
        return out


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def tables_made(bound, leaf, table):
    """Return how many tensors of at least ``table`` numbers the value and the gradient make."""
    with Sizes() as sizes:
        bound(leaf).sum().backward()
    return sum(size >= table for size in sizes.made)


def test_the_gradient_is_the_only_table(monkeypatch):
    """Of ``n L V`` numbers; the straightforward form makes many."""
    monkeypatch.setattr(uniform_nelbo, "_CHUNK_CPU", 100)
    x0, z, logits, alpha = batch(65, dtype=torch.float32)
    leaf, table = logits.requires_grad_(), logits.numel()
    assert tables_made(lambda rows: fused(x0, z, rows, alpha), leaf, table) == 1
    assert tables_made(lambda rows: straightforward(x0, z, rows, alpha), leaf, table) > 10


def test_with_the_head_there_is_no_table(monkeypatch):
    monkeypatch.setattr(uniform_nelbo, "_CHUNK_CPU", 100)
    x0, z, logits, alpha = batch(65, dtype=torch.float32)
    hidden, head = torch.randn(40, 3, 8).requires_grad_(), nn.Linear(8, 65)
    table = logits.numel()
    assert (
        tables_made(lambda h: uniform_nelbo_from_hidden(h, head, x0, z, alpha, -1.0), hidden, table)
        == 0
    )
    assert tables_made(lambda h: fused(x0, z, head(h), alpha), hidden, table) == 2


def test_one_site_bound_is_tight():
    """For ``L = 1`` and the exact cavity the integral over times is ``-log p(x)``."""
    process, law = Uniform(3, Linear()), random_joint(3, 1, seed=3)
    denoiser = TableDenoiser(law, process)
    points, weights = np.polynomial.legendre.leggauss(80)
    u = (points + 1) / 2
    states = torch.arange(3)[:, None]
    totals = torch.zeros(3, dtype=torch.float64)
    # Graded nodes t = u**4: the integrand has a logarithm at t = 0.
    for t, w in zip(u**4, weights / 2 * 4 * u**3, strict=True):
        for x in range(3):
            law_z = (1 - t) * (states == x).double() + t / 3
            log_c = denoiser(states, t).double()
            x0 = torch.full_like(states, x)
            terms = uniform_nelbo_terms(x0, states, log_c + 7.0, 1 - t, -1.0)
            totals[x] += w * float((law_z * terms).sum())
    torch.testing.assert_close(totals, -law.log(), rtol=0, atol=1e-8)


def test_shapes_must_fit():
    x0, z, logits, alpha = batch(5)
    with pytest.raises(ValueError, match=r"x0 \(40, 2\) and z \(40, 3\) must have one entry per"):
        fused(x0[:, :2], z, logits, alpha)
    with pytest.raises(ValueError, match="must have one entry per row"):
        uniform_nelbo_from_hidden(torch.zeros(40, 4, 8), nn.Linear(8, 5), x0, z, alpha, -1.0)
