"""The reverse kernel: the kernel contract, settings and refusals."""

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, TableDenoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import Absorbing, Cosine, Interpolating, InterpolatingKernel, Uniform
from ppl_diffusion.testing import KernelContract, counted, random_joint, toy_chain


class TestAbsorbing(KernelContract):
    def make_kernel(self):
        return toy_chain("absorbing").kernel


class TestUniform(KernelContract):
    def make_kernel(self):
        return toy_chain("uniform").kernel


class TestAnyPrior(KernelContract):
    def make_kernel(self):
        return toy_chain("skewed").kernel


class TestPsi(KernelContract):
    def make_kernel(self):
        return toy_chain("uniform", kappa=[0.9, 0.5, 1.0]).kernel


class TestRemasking(KernelContract):
    def make_kernel(self):
        return toy_chain("absorbing", num_steps=4, kappa=[1.0, 0.3, -0.2, 1.0]).kernel


class TestPosteriorDenoiser(KernelContract):
    def make_kernel(self):
        return toy_chain("uniform", kind="posterior").kernel


class TestOwnGrid(KernelContract):
    def make_kernel(self):
        process = Uniform(3, Cosine())
        denoiser = TableDenoiser(random_joint(3, 2), process)
        return InterpolatingKernel(process, denoiser, times=[1.0, 0.7, 0.7, 0.1, 0.0])


def test_contract_has_power():
    """A sampler that is not the density's fails the contract."""
    kernel = toy_chain("uniform").kernel
    other = toy_chain("uniform", seed=5).kernel

    class Mismatched(InterpolatingKernel):
        def step(self, carry, k, *, fixed=None):
            right = super().step(carry, k, fixed=fixed)
            step = right.with_log_probs(other.cavity_log_probs(carry, k))
            step.log_prob = right.log_prob
            return step

    broken = Mismatched(kernel.process, kernel.denoiser, times=kernel.times)
    contract = KernelContract()
    contract.test_every_step_is_normalised(broken)
    with pytest.raises(AssertionError):
        contract.test_samples_follow_the_density(broken)


def make(**options):
    process = options.pop("process", Absorbing(3))
    denoiser = options.pop("denoiser", None) or TableDenoiser(random_joint(3, 2), process)
    return InterpolatingKernel(process, denoiser, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "exactly one of num_steps and times"),
        ({"num_steps": 2, "times": [1, 0]}, "exactly one of num_steps and times"),
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"times": [1.0, 0.5]}, "decrease from exactly 1"),
        ({"times": [1.0, 0.5, 0.6, 0.0]}, "decrease from exactly 1"),
        ({"times": [1.0, np.nan, 0.0]}, "finite times"),
        ({"times": [1.0]}, "at least two"),
        ({"num_steps": 2, "kappa": [1.0, 1.0, 1.0]}, r"for 2 steps, got shape \(3,\)"),
        ({"num_steps": 3, "kappa": [0.5]}, r"for 3 steps, got shape \(1,\)"),
        ({"num_steps": 2, "kappa": 1.1}, "finite and at most 1"),
        ({"num_steps": 2, "kappa": np.nan}, "finite and at most 1"),
        ({"num_steps": 2, "kappa": -5.0}, "kappa = -5.0 at step 0 makes a probability negative"),
        ({"num_steps": 3, "kappa": -2.0, "process": Uniform(3)}, "makes a probability negative"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


@pytest.mark.parametrize("num_steps", [2.5, 2.0, "2"])
def test_num_steps_is_not_rounded(num_steps):
    with pytest.raises(TypeError, match="num_steps must be a whole number, got"):
        make(num_steps=num_steps)


def test_denoiser_must_be_of_the_same_process():
    """An exact denoiser knows which noise it is exact for; prior and schedule, not the class."""
    joint = random_joint(3, 2)
    masked = TableDenoiser(joint, Absorbing(3))
    with pytest.raises(CapabilityError, match=r"built for Absorbing.* but the kernel runs Uniform"):
        InterpolatingKernel(Uniform(3), masked, num_steps=2)
    uniform = TableDenoiser(joint, Uniform(3))
    with pytest.raises(CapabilityError, match=r"built for Uniform.*Linear.* runs Uniform.*Cosine"):
        InterpolatingKernel(Uniform(3, Cosine()), uniform, num_steps=2)
    InterpolatingKernel(Absorbing(3, Cosine()), masked, num_steps=2)  # masks do not see the time
    InterpolatingKernel(Interpolating([1 / 3] * 3), uniform, num_steps=2)


def test_denoiser_must_fit():
    with pytest.raises(CapabilityError, match="3 clean tokens but the process has 4"):
        InterpolatingKernel(
            Absorbing(4), TableDenoiser(random_joint(3, 2), Absorbing(3)), num_steps=2
        )
    nameless = TableDenoiser(random_joint(3, 2), Absorbing(3))
    nameless.kind = "other"
    with pytest.raises(CapabilityError, match="kind must be 'cavity' or 'posterior'"):
        make(denoiser=nameless, num_steps=2)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (lambda tokens: torch.zeros(*tokens.shape, 3), "NaN or unnormalised"),
        (lambda tokens: torch.full((*tokens.shape, 3), torch.nan), "NaN or unnormalised"),
        (lambda tokens: torch.zeros(*tokens.shape, 2), "returned shape"),
    ],
)
def test_denoiser_must_behave(output, text):
    class Broken:
        vocab_size, kind, time_free = 3, "cavity", True

        def __call__(self, tokens, t):
            return output(tokens)

    kernel = make(denoiser=Broken(), num_steps=2)
    with pytest.raises(ValueError, match=text):
        kernel.step(kernel.init_carry((2,), 2), 0).sample((20,))


@pytest.mark.parametrize("wrap", [lambda d: d, EvaluatedDenoiser])
@pytest.mark.parametrize("output", [None, np.zeros((2, 2, 3)), [0.0]])
def test_denoiser_must_return_a_tensor(output, wrap):
    class Broken:
        vocab_size, kind, time_free = 3, "cavity", True

        def __call__(self, tokens, t):
            return output

    kernel = make(denoiser=wrap(Broken()), num_steps=2)
    with pytest.raises(TypeError, match=f"returned {type(output).__name__}, expected a torch tens"):
        kernel.step(kernel.init_carry((2,), 2), 0)


@pytest.mark.parametrize("process", [Absorbing(4), Uniform(4)])
def test_nearly_normalised_rows_are_normalised(process):
    """A network off by 5e-4 per site: without this the path law has mass 0.96 at 80 sites."""
    logits = torch.randn(80, 4).log_softmax(-1).requires_grad_()

    class Sloppy:
        vocab_size, kind, time_free = 4, "cavity", True

        def __call__(self, tokens, t):
            return (logits + 5e-4).expand(*tokens.shape, 4)

    kernel = InterpolatingKernel(process, Sloppy(), num_steps=2)
    log_c = kernel.cavity_log_probs(kernel.init_carry((3,), 80), 0)
    assert log_c.dtype == torch.float64
    total = log_c.logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-14)
    torch.testing.assert_close(log_c[0].float(), logits.detach(), rtol=0, atol=1e-6)
    gradient = torch.autograd.grad(total.sum(), logits)[0]  # a constant has none
    torch.testing.assert_close(gradient, torch.zeros(80, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_posterior_mean_at_a_repeated_time_is_the_real_one(name):
    """A step without progress asks no network, but a look-ahead from there does."""
    chain, counter = counted(toy_chain(name))
    times = [1.0, 0.5, 0.5, 0.0]
    kernel = InterpolatingKernel(chain.kernel.process, counter, times=times)
    tokens = kernel.init_carry((4,), 2)["tokens"]
    kernel.step({"tokens": tokens}, 1)
    assert counter.calls == 0
    here, there = (kernel.posterior_mean({"tokens": tokens}, k) for k in (1, 2))
    torch.testing.assert_close(here, there)
    assert float((here - here.mean(-1, keepdim=True)).abs().max()) > 0.1


def test_no_network_call_where_nothing_can_depend_on_it():
    """A fully revealed masked state, and a step without progress."""
    chain, counter = counted(toy_chain("absorbing", num_steps=4))
    chain.kernel.step({"tokens": torch.zeros(5, 2, dtype=torch.int64)}, 2)
    assert counter.calls == 0
    chain.kernel.step({"tokens": torch.tensor([[0, 3]])}, 2)
    assert counter.calls == 1
    kernel = InterpolatingKernel(chain.kernel.process, counter, times=[1.0, 0.5, 0.5, 0.0])
    tokens = torch.tensor([[3, 3]])
    step = kernel.step({"tokens": tokens}, 1)
    assert counter.calls == 1
    assert torch.equal(step.sample(), tokens)
    assert float(step.log_prob(tokens)) == 0


def test_prompt_in_the_first_state():
    kernel, prompt = toy_chain("absorbing").kernel, torch.tensor([-1, 2])
    carry = kernel.init_carry((4,), 2, prompt=prompt)
    assert carry["tokens"].tolist() == [[3, 2]] * 4
    states = torch.tensor([[3, 2], [3, 1], [0, 2]])
    assert kernel.prior_log_prob(states, prompt).tolist() == [0.0, -torch.inf, -torch.inf]


def test_repr_says_what_matters():
    assert "num_steps=3, FACTORISED" in repr(toy_chain("absorbing").kernel)
    assert "kappa in [0.5, 1]" in repr(toy_chain("uniform", kappa=[0.5, 1, 1]).kernel)


@pytest.mark.parametrize("process", ["absorbing", "uniform", "skewed"])
def test_same_uniforms_same_states(process):
    """Ancestral sampling and ``kappa = 1`` are one kernel, bit for bit."""
    chain, psi = toy_chain(process), toy_chain(process, kappa=[1.0, 1.0, 1.0])
    uniforms = torch.rand(2, 100, 2, dtype=torch.float64)
    carry = chain.kernel.init_carry((100,), 2)
    for k in range(3):
        here = chain.kernel.step(carry, k).draw(*uniforms)
        there = psi.kernel.step(carry, k).draw(*uniforms)
        assert torch.equal(here, there)
        carry = chain.kernel.advance(carry, here, k)


def test_grids_and_kappas_may_be_tensors():
    """Without the warning that NumPy gives when it copies a tensor."""
    known = toy_chain("absorbing", num_steps=4).kernel
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    kernel = InterpolatingKernel(known.process, known.denoiser, times=times, kappa=torch.ones(4))
    assert kernel.same_as(known)
    times.zero_()
    assert kernel.same_as(known)
