"""Classifier-free guidance at both levels, against dense formulas written out here."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, TableDenoiser
from ppl_diffusion.denoisers.conditional import Paired
from ppl_diffusion.denoisers.filters import Nucleus
from ppl_diffusion.denoisers.guidance import guided_log_probs
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.kernels.classifier_free import ClassifierFreeKernel
from ppl_diffusion.kernels.psi import remdm_cap
from ppl_diffusion.testing import (
    PROCESSES,
    KernelContract,
    all_states,
    random_joint,
    site_rows,
    toy_process,
)

LEVELS = ("denoiser", "kernel")
WEIGHTS = (-0.5, 0.0, 0.4, 1.0, 2.0, 4.0)
SIZE, LENGTH = 3, 2


def two_denoisers(process, *, kind="cavity", seed=0, sharpness=1.0):
    """Return exact denoisers of ``p(x | y)`` and of ``p(x)`` for a random ``p(x, y)``."""
    pair = [
        random_joint(SIZE, LENGTH, seed=seed + i, sharpness=sharpness).mul(share)
        for i, share in enumerate((0.3, 0.7))
    ]
    conditional, marginal = pair[0] / pair[0].sum(), pair[0] + pair[1]
    return [TableDenoiser(p, process, kind=kind) for p in (conditional, marginal)]


def guided(name="uniform", *, kind="cavity", seed=0, **options):
    process = toy_process(name)
    steps = {} if "times" in options else {"num_steps": 3}
    options = {"weight": 2.0, **steps, **options}
    return ClassifierFreeKernel(process, *two_denoisers(process, kind=kind, seed=seed), **options)


def geometric(p, q, weight):
    """``p**w q**(1 - w)`` where both are positive, normalised, in plain probabilities."""
    both = (p > 0) & (q > 0)
    mixed = torch.where(both, p, 1.0) ** weight * torch.where(both, q, 1.0) ** (1 - weight)
    mixed = torch.where(both, mixed, 0.0)
    return mixed / mixed.sum(-1, keepdim=True)


def dense_rows(kernel, k, tokens, weight, level):
    """The definition of both levels, from dense bridges; float64 ``(*batch, L, S)``."""
    process, a, b = kernel.process, float(kernel.alphas[k]), float(kernel.alphas[k + 1])
    kappa = float(kernel.kappa[k])
    c_y, c_0 = (d(tokens, kernel.times[k]).exp() for d in two_denoisers(process))
    if level == "denoiser":
        return site_rows(process, tokens, geometric(c_y, c_0, weight), a, b, kappa)
    bridge, clean = (
        geometric(*(site_rows(process, tokens, c, a, end) for c in (c_y, c_0)), weight)
        for end in (b, 1.0)
    )
    prior = torch.as_tensor(process.prior)
    return kappa * bridge + (1 - kappa) * (b * clean + (1 - b) * prior)


def table(kernel, k, tokens, **options):
    return kernel.step({"tokens": tokens}, k, **options).dense_log_probs().exp()


class TestDenoiserLevel(KernelContract):
    def make_kernel(self):
        return guided("absorbing", kappa=0.9)


class TestKernelLevel(KernelContract):
    def make_kernel(self):
        return guided("absorbing", level="kernel", kappa=0.9)


class TestKernelLevelUniform(KernelContract):
    def make_kernel(self):
        return guided("uniform", level="kernel", weight=3.0)


@pytest.mark.parametrize("kind", ["cavity", "posterior"])
@pytest.mark.parametrize("kappa", [1.0, 0.7])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PROCESSES)
def test_each_level_is_its_own_dense_formula(name, level, kappa, kind):
    """Over all states and steps; posterior denoisers are converted, not mixed up."""
    for weight in WEIGHTS:
        kernel = guided(name, weight=weight, level=level, kappa=kappa, kind=kind)
        states = all_states(kernel.process.num_states, LENGTH)
        for k in range(kernel.num_steps):
            expected = dense_rows(kernel, k, states, weight, level)
            torch.testing.assert_close(table(kernel, k, states), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PROCESSES)
def test_ends_are_the_plain_chains_bit_for_bit(name, level):
    for weight, which in ((1.0, 0), (0.0, 1)):
        kernel = guided(name, weight=weight, level=level, kappa=0.8)
        process = kernel.process
        plain = InterpolatingKernel(process, two_denoisers(process)[which], num_steps=3, kappa=0.8)
        states = all_states(process.num_states, LENGTH)
        for k in range(3):
            here, there = (x.step({"tokens": states}, k) for x in (kernel, plain))
            assert torch.equal(here.log_prob(states[:, None]), there.log_prob(states[:, None]))
            noise = [torch.rand(states.shape, dtype=torch.float64) for _ in range(2)]
            assert torch.equal(here.draw(*noise), there.draw(*noise))
        assert kernel.changes == plain.changes


@pytest.mark.parametrize("level", LEVELS)
def test_the_ends_are_limits(level):
    """The guided formula itself tends to them: it is not the shortcut that makes them right."""
    states = all_states(4, LENGTH)
    for end in (0.0, 1.0):
        at, near = (
            table(guided("absorbing", weight=w, level=level), 1, states) for w in (end, end + 1e-7)
        )
        torch.testing.assert_close(near, at, rtol=0, atol=1e-6)
        assert not torch.equal(near, at)


def largest_gap(name, weight, **options):
    """Return how far the two levels' tables are apart at each step."""
    pair = [guided(name, weight=weight, level=level, **options) for level in LEVELS]
    states = all_states(pair[0].process.num_states, LENGTH)
    tables = [[table(kernel, k, states) for kernel in pair] for k in range(pair[0].num_steps)]
    return [float((here - there).abs().max()) for here, there in tables]


@pytest.mark.parametrize("weight", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_levels_agree_in_steps_to_the_data_and_in_no_other(name, weight):
    """At ``b = 1`` the bridge is the prediction times the evidence of the site, ``q(z | x)``.

    That factor is in both laws and its exponents sum to one: the levels agree whatever ``a`` is,
    not only in the single jump from ``a = 0``. Any other step tells them apart.
    """
    assert largest_gap(name, weight, num_steps=1) == pytest.approx([0], abs=1e-12)
    *early, last = largest_gap(name, weight, num_steps=4)
    assert last == pytest.approx(0, abs=1e-12)
    assert min(early) > 1e-3
    assert largest_gap(name, weight, num_steps=4, kappa=0.8)[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_unmask_probability(level):
    """``u -> u S / (u S + 1 - u)`` at the kernel level, ``u`` untouched at the denoiser level.

    The three quoted numbers for ``u = .1`` (w = .5: .061, w = 2: .79, w = 4: 1.000) belong to very
    different predictions. A pair of two-token predictions has two degrees of freedom: set to give
    the first two numbers, it must give the third.
    """
    u, c_y, c_0 = 0.1, torch.tensor([0.7775, 0.2225]), torch.tensor([0.01787, 0.98213])
    process = toy_process("absorbing", 2)
    masked = torch.full((1, 1), 2)
    quoted = {0.5: 0.061, 2.0: 0.79, 4.0: 1.0}
    for weight, value in quoted.items():
        denoisers = [TableDenoiser(c, process) for c in (c_y, c_0)]
        kernel = ClassifierFreeKernel(
            process, *denoisers, weight=weight, level=level, times=[1.0, 0.9, 0.0]
        )
        rows = table(kernel, 0, masked)[0, 0]
        s = float((c_y**weight * c_0 ** (1 - weight)).sum())
        here = 1 - float(rows[-1])
        if level == "kernel":
            assert here == pytest.approx(u * s / (u * s + 1 - u), rel=1e-6)
            assert here == pytest.approx(value, rel=0.02 if weight < 4 else 5e-4)
        else:
            assert here == pytest.approx(u, abs=1e-12)
        tokens = rows[:-1] / rows[:-1].sum()  # which token, given that one appears: the same
        expected = geometric(c_y.double(), c_0.double(), weight)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


def test_zeros_intersect_the_supports():
    first = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
    second = torch.tensor([0.0, 0.25, 0.75, 0.0]).log()
    for weight in (-2.0, -0.5, 0.5, 1.5, 3.0):
        log_p = guided_log_probs(first, second, weight)
        assert log_p.tolist() == [-math.inf, 0, -math.inf, -math.inf]
    assert torch.equal(guided_log_probs(first, second, 1.0), first.double())
    assert torch.equal(guided_log_probs(first, second, 0.0), second.double())
    nothing = guided_log_probs(first, first.flip(0), 2.0)
    assert nothing.tolist() == [-math.inf] * 4
    broken = guided_log_probs(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]), 2.0)
    assert bool(torch.isnan(broken).all())


def test_large_weights_do_not_overflow():
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_p = guided_log_probs(first, second, 1e4)
    assert float(log_p.exp().sum()) == pytest.approx(1)
    assert int(log_p.argmax()) == int((first - second).argmax())


def test_guided_rows_are_the_same_in_jax():
    import jax.numpy as jnp

    first, second = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    first[0, 2] = second[1, 3] = -math.inf
    for weight in (-0.5, 0.0, 1.0, 2.5):
        here = guided_log_probs(first, second, weight).numpy()
        there = np.asarray(
            guided_log_probs(jnp.asarray(first.numpy()), jnp.asarray(second.numpy()), weight)
        )
        np.testing.assert_allclose(np.exp(there), np.exp(here), rtol=0, atol=1e-6)


class Rows:
    """A denoiser with one row for every position."""

    kind, time_free = "cavity", True

    def __init__(self, probs):
        self.log_probs = torch.tensor(probs, dtype=torch.float64).log()
        self.vocab_size = len(probs)

    def __call__(self, tokens, t, /):
        return self.log_probs.expand(*tokens.shape, -1)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_in_common_is_an_error(level):
    """In the step that must reveal; before it, the kernel level just keeps the mask."""
    pair = Rows([1.0, 0.0]), Rows([0.0, 1.0])
    kernel = ClassifierFreeKernel(
        toy_process("absorbing", 2), *pair, weight=2.0, level=level, num_steps=2
    )
    with pytest.raises(ValueError, match=r"law at \(0, 1\) have no state in common; soften"):
        kernel.step({"tokens": torch.tensor([[0, 2]])}, 1)
    if level == "kernel":
        assert table(kernel, 0, torch.tensor([[0, 2]]))[0, 1].tolist() == [0, 0, 1]
    settled = (
        table(kernel, 1, torch.tensor([[0, 2]]), fixed=torch.tensor([False, True]))
        if (level == "kernel")
        else table(kernel, 1, torch.tensor([[0, 1]]))
    )
    assert bool(torch.isfinite(settled).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PROCESSES)
def test_prompts_stay(name, level):
    kernel = guided(name, level=level, kappa=0.8)
    chain = ReverseChain(kernel, LENGTH, prompt=torch.tensor([2, -1]))
    path = chain.sample((50,), generator=torch.Generator().manual_seed(0))
    assert bool((path[..., 0] == 2).all())
    again = ReverseChain(guided(name, level=level, kappa=0.8), LENGTH, prompt=chain.prompt)
    torch.testing.assert_close(again.log_prob(path), chain.log_prob(path))


@pytest.mark.parametrize("level", LEVELS)
def test_kappa_per_step_and_site(level):
    process = toy_process("uniform")
    kappa = np.array([[1.0, 0.5], [0.8, 1.0], [1.0, 1.0]])
    kernel = guided("uniform", level=level, kappa=kappa)
    states = all_states(process.num_states, LENGTH)
    for k in range(3):
        here = table(kernel, k, states)
        for site in range(LENGTH):
            flat = guided("uniform", level=level, kappa=kappa[:, site])
            there = table(flat, k, states)[:, site]
            torch.testing.assert_close(here[:, site], there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_named_schedules(level):
    process = toy_process("absorbing")
    psi = remdm_cap(process.schedule, 4, eta=0.2)
    options = {"weight": 2.0, "level": level}
    kernel = ClassifierFreeKernel(process, *two_denoisers(process), psi=psi, **options)
    assert np.array_equal(kernel.kappa, psi.kappa)
    states = all_states(4, LENGTH)
    expected = dense_rows(kernel, 2, states, 2.0, level)
    torch.testing.assert_close(table(kernel, 2, states), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_posterior_mean_is_the_jump_to_data(level):
    kernel = guided("skewed", level=level)
    states = all_states(3, LENGTH)
    mean = kernel.posterior_mean({"tokens": states}, 1).exp()
    c_y, c_0 = (d(states, kernel.times[1]).exp() for d in two_denoisers(kernel.process))
    a = float(kernel.alphas[1])
    clean = [site_rows(kernel.process, states, c, a, 1.0) for c in (c_y, c_0)]
    expected = (
        geometric(*clean, 2.0)
        if level == "kernel"
        else site_rows(kernel.process, states, geometric(c_y, c_0, 2.0), a, 1.0)
    )
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    cavity = kernel.cavity_log_probs({"tokens": states}, 1).exp()
    torch.testing.assert_close(cavity, geometric(c_y, c_0, 2.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_no_call_where_nothing_depends_on_it(level):
    kernel = guided("absorbing", level=level, times=[1.0, 0.5, 0.5, 0.0])
    cached = EvaluatedDenoiser(kernel.denoiser)
    kernel = kernel.with_denoiser(cached)
    kernel.step({"tokens": torch.zeros(4, LENGTH, dtype=torch.int64)}, 0)  # all revealed
    kernel.step({"tokens": torch.full((4, LENGTH), SIZE)}, 1)  # no progress
    assert cached.num_calls == 0
    assert table(kernel, 1, torch.tensor([[3, 1]]))[0].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_reach_both_networks(level):
    """Finite through zeros too: a masked state has many."""
    process = toy_process("absorbing")
    logits = [torch.randn(SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    class Learned(Rows):
        def __init__(self, logits):
            self.logits, self.vocab_size = logits, SIZE

        def __call__(self, tokens, t, /):
            return self.logits.log_softmax(-1).expand(*tokens.shape, -1)

    pair = [Learned(x) for x in logits]
    kernel = ClassifierFreeKernel(process, *pair, weight=2.0, level=level, num_steps=2, kappa=0.9)
    step = kernel.step({"tokens": torch.tensor([[3, 1, 3]])}, 0)
    step.log_prob(torch.tensor([[1, 1, 3]])).sum().backward()
    for x in logits:
        assert bool(torch.isfinite(x.grad).all())
        assert float(x.grad.abs().sum()) > 0


def test_a_filter_around_the_guided_prediction():
    kernel = guided("uniform")
    kernel = kernel.with_denoiser(Nucleus(kernel.denoiser, 0.7))
    assert kernel.changes == ("classifier-free guidance 2 of the denoiser", "nucleus 0.7")
    states = all_states(3, LENGTH)
    assert bool((kernel.cavity_log_probs({"tokens": states}, 1) == -math.inf).any())


def test_one_prediction_is_no_pair():
    """At the kernel level the denoiser holds both, and another one cannot take its place."""
    kernel = guided("uniform", level="kernel")
    alone = kernel.with_denoiser(two_denoisers(kernel.process)[0])
    with pytest.raises(ValueError, match=r"returned shape \(4, 2, 3\), expected \(4, 2, 6\)"):
        alone.step({"tokens": torch.zeros(4, LENGTH, dtype=torch.int64)}, 0)


def test_what_changed_is_said_once():
    process = toy_process("uniform")
    pair = [Nucleus(d, 0.9) for d in two_denoisers(process)]
    options = {"weight": 1.5, "num_steps": 2}
    for level, phrase in (("denoiser", "of the denoiser"), ("kernel", "of every step")):
        kernel = ClassifierFreeKernel(process, *pair, level=level, **options)
        assert kernel.changes == ("nucleus 0.9", f"classifier-free guidance 1.5 {phrase}")
        assert f"weight=1.5, level={level}" in repr(kernel)


def test_same_as_sees_the_guidance():
    process = toy_process("uniform")
    pair = two_denoisers(process)
    base = ClassifierFreeKernel(process, *pair, weight=1.0, num_steps=2)
    plain = InterpolatingKernel(process, pair[0], num_steps=2)
    assert base.mixes
    assert not base.same_as(plain)
    assert not plain.same_as(base)
    kernel = ClassifierFreeKernel(process, *pair, weight=2.0, level="kernel", num_steps=2)
    assert not kernel.mixes
    for options, equal in (
        ({"weight": 2.0, "level": "kernel"}, True),
        ({"weight": 3.0, "level": "kernel"}, False),
        ({"weight": 2.0}, False),
    ):
        other = ClassifierFreeKernel(process, *pair, num_steps=2, **options)
        assert kernel.same_as(other.with_denoiser(kernel.denoiser)) == equal


def test_refusals():
    process = toy_process("uniform")
    pair = two_denoisers(process)
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="weight must be a finite number"):
            ClassifierFreeKernel(process, *pair, weight=weight, num_steps=2)
    with pytest.raises(ValueError, match="choose 'denoiser' or 'kernel'"):
        ClassifierFreeKernel(process, *pair, weight=2.0, level="logits", num_steps=2)
    posterior = TableDenoiser(random_joint(SIZE, LENGTH), process, kind="posterior")
    with pytest.raises(CapabilityError, match="has kind 'cavity', the unconditional one 'post"):
        ClassifierFreeKernel(process, pair[0], posterior, weight=2.0, num_steps=2)
    with pytest.raises(CapabilityError, match="has vocab_size 3, the unconditional one 2"):
        Paired(pair[0], Rows([0.5, 0.5]))
    for order in (1, -1):  # both parts are held against the process
        mixed = [pair[0], two_denoisers(toy_process("skewed"))[1]][::order]
        with pytest.raises(CapabilityError, match="the denoiser was built for"):
            ClassifierFreeKernel(process, *mixed, weight=2.0, num_steps=2)
    with pytest.raises(ValueError, match="kappa < 0 can make a probability negative"):
        guided("absorbing", level="kernel", kappa=[-0.1, 1.0, 1.0])
    guided("absorbing", kappa=[-0.1, 1.0, 1.0])
