"""Every named sampler is a reverse chain with the law it says it has."""

import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.denoisers.filters import Nucleus, Temperature
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.models.masked import MaskedDiffusion
from ppl_diffusion.models.samplers import SAMPLERS, SamplerSettings, filtered, make_chain
from ppl_diffusion.models.uniform import UniformDiffusion
from ppl_diffusion.testing import ExactChain, random_joint, total_variation, toy_process

LENGTH, SIZE = 3, 3


def program(family=MaskedDiffusion, kind="absorbing"):
    table = TableDenoiser(random_joint(SIZE, LENGTH, seed=2), toy_process(kind, SIZE))
    return family(table, vocabulary="abc", length=LENGTH, name="toy")


def settings(name, **options):
    known, _ = SAMPLERS[name]
    steps = {"num_steps": 4} if "num_steps" in known else {}
    return SamplerSettings(**{**steps, **options})


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_scores_its_own_paths(name):
    chain = make_chain(program(), name, settings(name))
    path = chain.sample((64,), generator=torch.Generator().manual_seed(0))
    assert int(chain.x0(path).max()) < SIZE
    remembered, scored = chain.log_prob(path), chain.log_prob(path.clone())
    assert bool((remembered > -torch.inf).all())
    torch.testing.assert_close(remembered, scored, rtol=0, atol=1e-10)
    carry = chain.kernel.start_carry(path[:, 0])
    total = chain.kernel.prior_log_prob(path[:, 0])
    for k in range(chain.num_steps):
        step = chain.kernel.step(carry, k)
        total = total + step.log_prob(path[:, k + 1])
        carry = chain.kernel.advance(carry, path[:, k + 1], k, step=step)
    torch.testing.assert_close(total, scored, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_decides(name):
    chain = make_chain(program(), name, settings(name))
    first, again = (chain.sample((9,), generator=torch.Generator().manual_seed(5)) for _ in "ab")
    assert torch.equal(first, again)


def test_first_hitting_has_the_law_of_the_data():
    law = make_chain(program(), "first-hitting").marginal()
    states = law.enumerate_support()
    data = random_joint(SIZE, LENGTH, seed=2).flatten()
    assert total_variation(law.log_prob(states).exp(), data) < 1e-12


def test_psi_brings_its_schedule():
    plain = make_chain(program(), "ancestral", SamplerSettings(num_steps=8))
    psi = make_chain(program(), "psi", SamplerSettings(8, "remdm-cap:0.1"))
    same = make_chain(program(), "psi", SamplerSettings(8, "ancestral"))
    assert float(psi.kernel.kappa.min()) < 1
    torch.testing.assert_close(ExactChain.of(same).x0_law(), ExactChain.of(plain).x0_law())


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_groups_take_at_most_the_steps_asked_for(steps):
    parallel = make_chain(program(), "parallel", SamplerSettings(steps))
    assert parallel.num_steps <= steps
    if steps > 1:
        blocks = make_chain(program(), "semi-autoregressive", SamplerSettings(steps, block=2))
        assert blocks.num_steps <= steps
    assert make_chain(program(), "semi-autoregressive").num_steps == LENGTH


def test_uniform_priors_run_ancestral_and_psi_only():
    uniform = program(UniformDiffusion, "uniform")
    for name in ("ancestral", "psi"):
        assert make_chain(uniform, name, settings(name)).sample((2,)).shape == (2, 5, LENGTH)
    for name in set(SAMPLERS) - {"ancestral", "psi"}:
        with pytest.raises(CapabilityError, match=r"masked prior|Absorbing"):
            make_chain(uniform, name, settings(name))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("nonsense", {}, "There is no sampler 'nonsense'"),
        ("first-hitting", {"num_steps": 4}, "takes no --steps"),
        ("ancestral", {"kappa_schedule": "dfm"}, "takes no --kappa-schedule"),
        ("parallel", {"block": 2}, "takes no --block"),
        ("psi", {"kappa_schedule": "dfm:x"}, "must be a number"),
        ("psi", {"kappa_schedule": ""}, "unknown kappa schedule ''"),
        ("psi", {"kappa_schedule": "constant:-5"}, "would make a probability negative"),
        ("confidence", {"kappa_schedule": "constant:-5"}, "would make a probability negative"),
        ("semi-autoregressive", {"num_steps": 2, "block": 1}, "3 blocks of 1 positions need"),
        ("ancestral", {"filters": ["top:1"]}, "There is no filter 'top:1'"),
        ("ancestral", {"filters": ["nucleus"]}, "needs a number: write nucleus:0.9"),
        ("ancestral", {"filters": ["nucleus:2"]}, r"p must lie in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        make_chain(program(), name, SamplerSettings(**options))


def test_filters_apply_in_order():
    denoiser = filtered(program().denoiser, ["temperature:0.5", "nucleus-drop:0.7"])
    assert isinstance(denoiser, Nucleus)
    assert not denoiser.keep_crossing
    assert isinstance(denoiser.denoiser, Temperature)
    assert (
        len(make_chain(program(), settings=SamplerSettings(filters=["nucleus:0.5"])).kernel.changes)
        == 1
    )
