"""Chains whose rows have prompts of their own: each row is the chain of its prompt."""

import pytest
import torch

from ppl_diffusion import IntractableLogProb
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import random_joint, toy_process

PROMPTS = torch.tensor([[-1, 1, -1], [-1, -1, -1], [0, 2, -1], [2, 0, 1]])


def kernels():
    process = toy_process("absorbing")
    table = TableDenoiser(random_joint(3, 3), process)
    uniform = toy_process("uniform")
    yield InterpolatingKernel(process, table, num_steps=4)
    yield InterpolatingKernel(process, table, num_steps=4, kappa=0.7)
    yield OrderedKernel(process, table, length=3)
    yield OrderedKernel(process, table, length=3, group_size=2, block=2)
    yield InterpolatingKernel(uniform, TableDenoiser(random_joint(3, 3), uniform), num_steps=3)


@pytest.mark.parametrize("kernel", list(kernels()))
def test_every_row_is_the_chain_of_its_prompt(kernel):
    chain = ReverseChain(kernel, 3, prompt=PROMPTS)
    assert chain.batch_shape == (4,)
    path = chain.sample((50,), generator=torch.Generator().manual_seed(0))
    held = PROMPTS >= 0
    assert torch.equal(chain.x0(path)[:, held], PROMPTS[held].expand(50, -1))
    remembered, scored = chain.log_prob(path), chain.log_prob(path.clone())
    assert scored.shape == (50, 4)
    assert bool((scored > -torch.inf).all())
    torch.testing.assert_close(remembered, scored, rtol=0, atol=1e-10)
    for row, prompt in enumerate(PROMPTS):
        alone = ReverseChain(kernel, 3, prompt=prompt)
        torch.testing.assert_close(alone.log_prob(path[:, row]), scored[:, row], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", list(kernels()))
def test_rows_of_a_batch_reveal_what_their_prompt_leaves(kernel):
    """Rows are asynchronous: paths of another row's prompt are impossible."""
    chain = ReverseChain(kernel, 3, prompt=PROMPTS)
    path = chain.sample(generator=torch.Generator().manual_seed(1))
    prompted = (PROMPTS >= 0).any(-1)
    assert bool((chain.log_prob(path.flip(0))[prompted] == -torch.inf).all())
    wide = chain.expand((2, 4))
    assert wide.sample().shape == (2, 4, kernel.num_steps + 1, 3)
    torch.testing.assert_close(wide.log_prob(path), chain.log_prob(path).expand(2, 4))


def test_prompts_are_plates_of_particles():
    kernel = next(kernels())
    chain = ReverseChain(kernel, 3, prompt=PROMPTS)
    post = run_smc(FeynmanKac(chain, lambda x0: (x0 == 1).sum(-1).double()), 8, 3)
    assert post.x0.shape == (3, 8, 4, 3)
    held = PROMPTS >= 0
    assert torch.equal(post.x0[..., held], PROMPTS[held].expand(3, 8, -1))


def test_what_does_not_fit():
    kernel = next(kernels())
    with pytest.raises(ValueError, match=r"prompt must have shape \(3,\) or \(\*batch, 3\)"):
        ReverseChain(kernel, 3, prompt=PROMPTS[:, :2])
    with pytest.raises(IntractableLogProb, match="computed for one prompt"):
        ReverseChain(kernel, 3, prompt=PROMPTS).marginal().log_prob(torch.zeros(4, 3).long())
    process = kernel.process
    per_site = InterpolatingKernel(process, kernel.denoiser, num_steps=2, kappa=[[0.5, 1.0]] * 2)
    with pytest.raises(ValueError, match="kappa is for 2 sites, but the chain has 3"):
        ReverseChain(per_site, 3)
