"""ParticleGibbs: what it takes, what it refuses, and what its result holds."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.errors import CapabilityError, ParticleCollapse
from ppl_diffusion.handlers import clamp, twist
from ppl_diffusion.inference.particle_gibbs import ParticleGibbs
from ppl_diffusion.potentials import Potential, factor
from ppl_diffusion.smc.rejuvenation import OrderRefresh, SuffixRefresh
from ppl_diffusion.testing import toy_chain, toy_potential

CHAIN = toy_chain(num_steps=3)
DATA = torch.tensor(2.0)
SHORT = {"num_particles": 4, "num_runs": 2, "num_samples": 3, "num_warmup": 2}


def assay(y=None):
    path = pyro.sample("path", CHAIN)
    total = pyro.deterministic("total", CHAIN.x0(path).sum(-1).float())
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5))
    shift = pyro.sample("shift", dist.Normal(gain[..., None] * torch.ones(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(gain * total + shift.sum(-1), 0.5), obs=y)


def test_result_of_a_program():
    program = ParticleGibbs(assay, moves=[SuffixRefresh(2), OrderRefresh()], **SHORT)
    first, again = (program.run(DATA, seed=4) for _ in range(2))
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.samples["gain"], again.samples["gain"])
    assert first.exact
    assert "latents gain, shift" in first.target
    assert "too large on average" in first.target
    assert "estimates" not in first.target
    assert first.x0.shape == (2, 3, 2)
    assert first.path.shape == (2, 3, 4, 2)
    assert first.updated.shape == (2, 3, 4)
    assert first.ess.shape == (2, 3, 3)
    assert first.accept.shape == (2, 3, 2)
    assert first.update_rate.shape == (4,)
    assert set(first.samples) == {"gain", "shift", "total", "path"}
    assert torch.equal(first.samples["path"], first.path)
    assert first.samples["shift"].shape == (2, 3, 2)
    assert torch.equal(first.samples["total"], first.x0.sum(-1).float())
    assert first.num_evaluations > 0
    assert first.num_potential_calls > 0
    assert first.settings["moves"] == ["suffix", "order"]
    assert repr(first).startswith("GibbsPosterior(2 chains x 3 draws")


def test_log_density_is_the_programs():
    post = ParticleGibbs(assay, **SHORT).run(DATA, seed=0)
    gain, shift, total = (post.samples[name] for name in ("gain", "shift", "total"))
    expected = dist.LogNormal(0.0, 0.5).log_prob(gain)
    expected = expected + dist.Normal(gain[..., None], 1.0).log_prob(shift).sum(-1)
    expected = expected + dist.Normal(gain * total + shift.sum(-1), 0.5).log_prob(DATA)
    assert torch.allclose(post.log_density, expected.double(), atol=1e-5)


def test_chains_and_draws_reach_arviz():
    post = ParticleGibbs(assay, moves=[OrderRefresh()], **SHORT).run(DATA, seed=0)
    data = post.to_arviz()
    assert dict(data.posterior.sizes) == {"chain": 2, "draw": 3, "shift_dim_0": 2}
    assert np.array_equal(data.sequences["x0"].values, post.x0.numpy())
    assert data.smc_history["path"].dims == ("chain", "draw", "state", "position")
    assert data.posterior["gain"].dims == ("chain", "draw")
    stats = {"lp", "conditional_log_evidence", "smallest_ess", "path_updated", "accepted"}
    assert set(data.sample_stats) == stats
    assert data.attrs["exact"] == 1


def test_a_bare_chain_with_its_potential():
    post = ParticleGibbs(CHAIN, toy_potential(), store_path=False, **SHORT).run(seed=0)
    assert post.path is None
    assert post.samples == {}
    assert torch.allclose(post.log_density, toy_potential()(post.x0))
    mean = post.expectation(lambda x0: x0[..., 0])
    torch.testing.assert_close(mean, post.x0[..., 0].double().mean(1))
    with pytest.raises(ValueError, match=r"returned shape \(\), expected .* = \(2, 3\)"):
        post.expectation(lambda x0: x0.sum())
    assert np.isnan(post.step_size)


def test_functions_get_all_sites_of_a_program_even_if_it_has_no_other():
    def bare():
        factor("goal", toy_potential(), CHAIN.x0(pyro.sample("path", CHAIN)))

    post = ParticleGibbs(bare, store_path=False, **SHORT).run(seed=0)
    assert post.samples == {}
    mean = post.expectation(lambda s: s["x0"][..., 0])
    torch.testing.assert_close(mean, post.x0[..., 0].double().mean(1))


def test_plates_around_the_chain():
    def twins(y):
        with pyro.plate("twins", 2):
            path = pyro.sample("path", CHAIN)
            gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5))
            pyro.sample("y", dist.Normal(gain * CHAIN.x0(path).sum(-1), 0.5), obs=y)

    post = ParticleGibbs(twins, **SHORT).run(torch.tensor([1.0, 3.0]), seed=0)
    assert post.x0.shape == (2, 3, 2, 2)
    assert post.samples["gain"].shape == (2, 3, 2)
    assert post.updated.shape == (2, 3, 4)
    assert "twins" in post.to_arviz().sequences["x0"].dims


@pytest.mark.parametrize("moves", [(), (SuffixRefresh(3), OrderRefresh())])
def test_a_clamp_holds(moves):
    tokens, mask = torch.tensor([2, 0]), torch.tensor([True, False])
    program = clamp(assay, tokens=tokens, mask=mask)
    post = ParticleGibbs(program, moves=moves, **{**SHORT, "num_samples": 10}).run(DATA, seed=0)
    assert bool((post.x0[..., 0] == 2).all())
    assert len(set(post.x0[..., 1].flatten().tolist())) > 1
    assert "clamped" in post.target


def test_several_chains_and_latents():
    narrow = toy_chain(vocab_size=2, length=3, num_steps=3)

    def pair():
        gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5))
        n = pyro.deterministic("n", CHAIN.x0(pyro.sample("a", CHAIN)).sum(-1).float())
        with pyro.plate("two", 2):
            z = narrow.x0(pyro.sample("b", narrow)).sum(-1)
        pyro.sample("y", dist.Normal(gain * (n + z.sum(-1, keepdim=z.ndim > 1)), 0.5), obs=DATA)

    post = ParticleGibbs(pair, moves=[SuffixRefresh(2)], **SHORT).run(seed=0)
    assert post.x0.shape == (2, 3, 2)
    assert post.path.shape == (2, 3, 4, 2)
    shapes = {name: tuple(value.shape[2:]) for name, value in post.samples.items()}
    assert shapes == {"gain": (), "n": (), "a": (4, 2), "b": (2, 4, 3)}
    assert torch.equal(post.samples["a"][..., -1, :], post.x0)
    assert "reverse chains 'a' (3 steps), 'b' (3 steps)" in post.target
    assert bool(torch.isfinite(post.log_density).all())


def test_a_twist_moves_the_particles():
    calls = []

    def logits(carry, log_probs, k):
        calls.append(k)
        return 0.5 * log_probs.clamp_min(-3.0)

    post = ParticleGibbs(twist(assay, logits=logits), **SHORT).run(DATA, seed=0)
    assert len(calls) >= 5 * 3  # every sweep, every step
    assert post.exact


def test_progress_is_told():
    seen = []
    options = {**SHORT, "progress": lambda done, total: seen.append((done, total))}
    ParticleGibbs(CHAIN, toy_potential(), **options).run(seed=0)
    assert seen == [(i, 5) for i in range(1, 6)]


# ------------------------------------------------------------------------------------------------
# refusals


def test_discrete_latents_are_refused():
    def coin():
        pyro.sample("path", CHAIN)
        coin = pyro.sample("coin", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(coin, 1.0), obs=DATA)

    with pytest.raises(CapabilityError, match="the latent 'coin' of coin is discrete"):
        ParticleGibbs(coin, **SHORT).run()


def test_unlike_chains_move_side_by_side_and_one_may_be_twisted():
    """Refused before states were named sites; the support matrix holds the law to enumeration."""
    other = toy_chain(num_steps=2)
    calls = []

    def pair():
        pyro.sample("a", CHAIN)
        pyro.sample("b", other)

    def logits(carry, log_probs, k):
        calls.append(k)
        return 0 * log_probs

    post = ParticleGibbs(twist(pair, logits=logits, sites=["b"]), **SHORT).run()
    assert {name: post.samples[name].shape[-2] for name in "ab"} == {"a": 4, "b": 3}
    assert set(calls) == {0, 1}


def test_what_comes_with_what():
    with pytest.raises(TypeError, match="a bare chain needs a potential"):
        ParticleGibbs(CHAIN)
    with pytest.raises(ValueError, match="a program is its own potential"):
        ParticleGibbs(assay, toy_potential())
    with pytest.raises(ValueError, match="looked ahead by completions"):
        ParticleGibbs(assay, twist=lambda carry, k: 0.0)


@pytest.mark.parametrize(
    "wrong", [{"num_particles": 1}, {"num_runs": 0}, {"num_samples": 0}, {"num_warmup": -1}]
)
def test_counts_must_make_sense(wrong):
    with pytest.raises(ValueError, match="num_particles must be >= 2"):
        ParticleGibbs(assay, **{**SHORT, **wrong})


def test_moves_must_fit_the_chain():
    chain = toy_chain("uniform", num_steps=3)
    with pytest.raises(CapabilityError, match="OrderRefresh"):
        ParticleGibbs(chain, toy_potential(), moves=[OrderRefresh()], **SHORT).run()


def test_an_impossible_program_is_said():
    never = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf), name="never")

    def impossible():
        factor("never", never, CHAIN.x0(pyro.sample("path", CHAIN)))

    with pytest.raises(ParticleCollapse, match="no path of positive probability among 4"):
        ParticleGibbs(impossible, **SHORT).run()
