"""Kernels that cannot propose for a chain are refused; the failing twin shows why."""

import pytest
import torch

from ppl_diffusion import CapabilityError
from ppl_diffusion.denoisers import Nucleus, TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import (
    ConfidenceKernel,
    ExtrapolatedKernel,
    InterpolatingKernel,
    OrderedKernel,
    first_hitting,
    psi,
)
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.support import missing_support
from ppl_diffusion.testing import random_joint, toy_chain, toy_process, z_score


def flat(x0):
    return torch.zeros(x0.shape[:-1], dtype=torch.float64)


def pair(name, **options):
    process = toy_process(name, 2)
    denoiser = TableDenoiser(random_joint(2, 2), process)
    steps = {} if "psi" in options else {"num_steps": 6}
    return (
        InterpolatingKernel(process, denoiser, num_steps=6),
        InterpolatingKernel(process, denoiser, **steps, **options),
    )


@pytest.mark.parametrize("name", ["absorbing", "uniform", "skewed"])
def test_mild_corrections_can_propose(name):
    model, proposal = pair(name, kappa=0.5)
    assert missing_support(model, proposal) is None
    fk = FeynmanKac(ReverseChain(model, 2), flat, twist=None, proposal=proposal)
    post = run_smc(fk, 8, 1000, generator=torch.Generator().manual_seed(0))
    assert abs(z_score(post.log_evidence.exp(), 1.0)) < 4  # 4 s.e.: fails by chance in 6e-5


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("absorbing", "forward-backward"), ("absorbing", "remdm-cap:1"), ("uniform", "remdm-cap:1")],
)
def test_corrections_without_room_cannot(name, schedule):
    process = toy_process(name, 2)
    model, proposal = pair(name, psi=psi.parse_psi(schedule, process.schedule, 6).within(process))
    with pytest.raises(ValueError, match=r"proposal never lets a (mask|token) .* at step \d"):
        FeynmanKac(ReverseChain(model, 2), flat, proposal=proposal)


def test_a_function_is_not_checked_and_loses_the_mass():
    """What the refusal prevents: the evidence of nothing at all, 1, comes out far below."""
    process = toy_process("absorbing", 2)
    model, proposal = pair("absorbing", psi=psi.forward_backward(process.schedule, 6))
    fk = FeynmanKac(
        ReverseChain(model, 2),
        flat,
        twist=None,
        proposal=lambda step, carry, k: proposal.step(carry, k),
    )
    post = run_smc(fk, 8, 200, generator=torch.Generator().manual_seed(0))
    assert float(post.log_evidence.exp().mean()) < 0.8


def test_chains_that_correct_need_proposals_that_do():
    proposal, model = pair("absorbing", kappa=0.5)
    assert "masked again" in str(missing_support(model, proposal))
    model, proposal = pair("uniform", kappa=0.5)[::-1]
    assert missing_support(model, proposal) is None


def test_the_last_kinds_of_kernel():
    model, _ = pair("absorbing")
    process, denoiser = model.process, model.denoiser
    extrapolated = ExtrapolatedKernel(process, denoiser, num_steps=6)
    assert missing_support(model, extrapolated) is None
    confident = ConfidenceKernel(process, denoiser, num_steps=6)
    assert "token stay" in str(missing_support(model, confident))
    mild = ConfidenceKernel(process, denoiser, num_steps=6, kappa=0.9)
    assert missing_support(model, mild) is None
    hitting = first_hitting(process, denoiser, length=2)
    assert missing_support(hitting, first_hitting(process, denoiser, length=2)) is None
    blocks = OrderedKernel(process, denoiser, length=2, block=1)
    for other in (blocks, model):
        assert "numbers of positions" in str(missing_support(hitting, other))


def test_filters_and_alphabets():
    model, _ = pair("absorbing")
    cut = model.with_denoiser(Nucleus(model.denoiser, 0.5))
    assert "nucleus" in str(missing_support(model, cut))
    assert missing_support(cut, model) is None
    assert missing_support(cut, cut) is None
    other = toy_chain("uniform", vocab_size=3, num_steps=6).kernel
    assert "3 states and 3 tokens" in str(missing_support(model, other))


def without_token_one(name, kind, prompt=None):
    """A chain, and a kernel whose table never has token 1 at position 0."""
    process = toy_process(name, 2)
    joint = random_joint(2, 2)
    cut = joint * torch.tensor([1.0, 0.0])[:, None]
    denoisers = [TableDenoiser(table / table.sum(), process) for table in (joint, cut)]
    if kind == "ordered":
        kernels = [OrderedKernel(process, d, length=2) for d in denoisers]
    else:
        kernels = [InterpolatingKernel(process, d, num_steps=3, kappa=kind) for d in denoisers]
    return ReverseChain(kernels[0], 2, prompt=prompt), kernels[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("absorbing", 1.0), ("absorbing", 0.5), ("absorbing", "ordered"), ("uniform", 1.0)],
)
def test_a_kernel_that_excludes_a_token_is_refused_when_it_shows(name, kind):
    chain, proposal = without_token_one(name, kind)
    with pytest.raises(CapabilityError, match=r"token 1 at position 0 at step \d"):
        run_smc(FeynmanKac(chain, flat, twist=None, proposal=proposal), 8, 200)
    swapped = FeynmanKac(ReverseChain(proposal, 2), flat, twist=None, proposal=chain.kernel)
    generator = torch.Generator().manual_seed(0)
    post = run_smc(swapped, 8, 2000, generator=generator)
    assert abs(z_score(post.log_evidence.exp(), 1.0)) < 4  # 4 s.e.: fails by chance in 6e-5


@pytest.mark.parametrize("kind", [1.0, "ordered"])
def test_a_token_excluded_where_nothing_is_drawn_does_no_harm(kind):
    chain, proposal = without_token_one("absorbing", kind, torch.tensor([0, -1]))
    model = FeynmanKac(chain, flat, twist=None, proposal=proposal)
    post = run_smc(model, 8, 200, generator=torch.Generator().manual_seed(0))
    assert abs(z_score(post.log_evidence.exp(), 1.0)) < 4  # 4 s.e.: fails by chance in 6e-5


def test_a_function_that_excludes_what_the_potential_forbids_is_taken():
    chain, proposal = without_token_one("absorbing", "ordered")

    def only_zero(x0):
        return torch.where(x0[..., 0] == 0, 0.0, -torch.inf).double()

    def move(step, carry, k):
        return proposal.step(carry, k)

    model = FeynmanKac(chain, only_zero, twist=None, proposal=move)
    post = run_smc(model, 8, 20, generator=torch.Generator().manual_seed(0))
    evidence = random_joint(2, 2)[0].sum().log()  # by the ideal proposal: no run differs
    torch.testing.assert_close(post.log_evidence, evidence.expand(20))
