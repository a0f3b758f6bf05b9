"""The contract of kernels on chains with a reveal order, and what they refuse."""

import pyro
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, LatentKernel, Path, RevealOrder
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.testing import KernelContract
from ppl_diffusion.testing.latent_toys import corr_bits

BITS = Absorbing(2)
CODES = corr_bits(0.2)
NOISE = Gaussian()
VECTORS = CODES.embedded(lambda x: 2.0 * x[:, :1, None] - 1.0)
SEQ = Path.sequential(1, 2)
TABLE = torch.tensor([[[[1.0, -1.0]], [[-2.0, 0.5]]]])


def kernel_of(order, path=SEQ, denoiser=None):
    return LatentKernel(BITS, BITS, denoiser or CODES.denoiser(), path, order=order)


class TestOrder(KernelContract):
    def make_kernel(self):
        return kernel_of(RevealOrder(TABLE).requires_grad_(False))

    def block_grid(self, name):
        return torch.arange(3)[:, None], torch.ones(3, dtype=torch.float64)


def test_probabilities_and_levels():
    order = RevealOrder(torch.zeros(1, 2, 2, 4))
    codes = torch.tensor([[0], [1], [2]])  # the last one is hidden
    third = torch.tensor([1 / 3, 1 / 2, 1.0], dtype=torch.float64)[:, None, None].expand(3, 3, 4)
    torch.testing.assert_close(order.reveals(codes), third)
    shown = torch.arange(4).double()[:, None, None].expand(4, 3, 4) / 3
    torch.testing.assert_close(order.levels(codes), shown)
    assert order.token_steps == 3
    told = RevealOrder(TABLE).reveals(torch.tensor([1]))
    torch.testing.assert_close(told[0], torch.tensor([-2.0, 0.5]).double().sigmoid())


def test_probabilities_at_the_ends_are_no_nan():
    order = RevealOrder(100.0 * TABLE)
    chain = ReverseChain(kernel_of(order), 2)
    path = chain.sample((50,))
    log_p = chain.log_prob(path)
    assert bool(log_p.isfinite().all())
    log_p.sum().backward()
    assert bool(order.table.grad.isfinite().all())


def test_steps_of_tokens_are_tables():
    order = RevealOrder(TABLE)
    kernel = kernel_of(order)
    carry = kernel.init_carry((5,), 2)
    assert isinstance(kernel.step(carry, 0).blocks["tokens"], TokenStep)
    assert isinstance(kernel.step(carry, 1).blocks["tokens"], StateStep)
    assert any(tensor is order.table for tensor in kernel.declared_parameters())
    assert "order of 2 steps" in repr(kernel)


def test_kernels_know_their_orders():
    denoiser, order = CODES.denoiser(), RevealOrder(TABLE)
    kernel = kernel_of(order, denoiser=denoiser)
    assert kernel.same_as(kernel_of(order, denoiser=denoiser))
    assert not kernel.same_as(kernel_of(RevealOrder(TABLE), denoiser=denoiser))
    assert not kernel.same_as(kernel_of(None, denoiser=denoiser))
    assert kernel.with_denoiser(CODES.denoiser()).order is order


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (Path.joint(2), "needs its codes before the first token"),
        (Path.masked(2), "needs its codes before the first token"),
        (Path.ordered(2), "needs its codes before the first token"),
    ],
    ids=["joint", "masked", "ordered"],
)
def test_paths_that_draw_codes_too_late(path, sentence):
    with pytest.raises(CapabilityError, match=sentence):
        kernel_of(RevealOrder(TABLE), path)


def test_what_does_not_fit():
    order = RevealOrder(TABLE)
    with pytest.raises(ValueError, match="but latent and path have 1, 2 and 3"):
        kernel_of(order, Path.sequential(1, 3))
    with pytest.raises(ValueError, match="1 slots, 3 codes"):
        kernel_of(RevealOrder(torch.zeros(1, 3, 1, 2)))
    with pytest.raises(CapabilityError, match="told by codes, and this latent holds vectors"):
        LatentKernel(BITS, NOISE, VECTORS.denoiser(NOISE), SEQ, order=order)
    with pytest.raises(ValueError, match="of 2 tokens, not 3"):
        ReverseChain(kernel_of(order), 3)
    with pytest.raises(ValueError, match="told by 1 codes, got 2"):
        order.reveals(torch.zeros(4, 2, dtype=torch.int64))
    for table in (torch.zeros(2, 1, 2), torch.full((1, 2, 1, 2), torch.nan)):
        with pytest.raises(ValueError, match="the table must hold finite logits"):
            RevealOrder(table)


def test_methods_that_change_predictions_are_refused():
    chain = ReverseChain(kernel_of(RevealOrder(TABLE).requires_grad_(False)), 2)

    def program():
        return chain.x0(pyro.sample("path", chain))

    held = clamp(program, tokens=torch.tensor([0, 0]), mask=torch.tensor([True, False]))
    with pytest.raises(CapabilityError, match="which a StateStep does not show"):
        SMC(held, num_particles=4).run(seed=0)
