"""Fill twists: what they guess, and that parents and children share their noise."""

import math

import pytest
import torch

from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import ArgmaxFill, FeynmanKac, PersistentFill, run_smc
from ppl_diffusion.smc.twists import FILL_UNIFORMS, log_mean_exp
from ppl_diffusion.testing import ExactChain, toy_markov_chain, z_score


def bound_of(name, twist, potential):
    chain = toy_markov_chain(name, length=3)
    return chain, FeynmanKac(chain, potential, twist).bind()


def test_argmax_guess_by_hand():
    """Masked positions take their likeliest token, revealed ones are kept."""
    chain, bound = bound_of("absorbing", "argmax", Potential(lambda x0: x0.double() @ WEIGHTS))
    tokens = torch.tensor([[[3, 1, 3], [0, 3, 2]]])
    log_h = bound.log_twist({"tokens": tokens}, 1, None)
    guess = chain.kernel.denoiser(tokens, 0.5).argmax(-1)
    guess = torch.where(tokens < 3, tokens, guess)
    torch.testing.assert_close(log_h, guess.double() @ WEIGHTS)


WEIGHTS = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)


def test_guess_of_a_uniform_chain_is_the_posterior_mean_not_the_cavity():
    chain, bound = bound_of("uniform", "argmax", Potential(lambda x0: x0.double() @ WEIGHTS))
    tokens = torch.randint(3, (1, 50, 3))
    log_h = bound.log_twist({"tokens": tokens}, 2, None)
    guess = chain.kernel.posterior_mean({"tokens": tokens}, 2).argmax(-1)
    torch.testing.assert_close(log_h, guess.double() @ WEIGHTS)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_persistent_average_over_sites(name):
    """A site-wise potential: the mean over fills of ``exp`` tends to its expectation.

    4 s.e. at one state: false alarm rate 6e-5 per case.
    """
    hits = Potential(lambda x0: torch.where(x0[..., 0] == 1, 1.0, 0.0))
    chain, bound = bound_of(name, PersistentFill(num_fills=1), hits)
    tokens = bound.init(1, 1, None)["tokens"].expand(4000, 1, 3)
    carry = {"tokens": tokens, FILL_UNIFORMS: torch.rand(4000, 1, 1, 3, dtype=torch.float64)}
    h = bound.log_twist(carry, 1, None).exp()[:, 0]
    p = float(chain.kernel.posterior_mean({"tokens": tokens[0]}, 1)[0, 0, 1].exp())
    assert abs(z_score(h, 1 + p * (math.e - 1))) < 4


def test_noise_travels_with_its_particle():
    _, bound = bound_of("absorbing", "persistent", Potential(lambda x0: x0.sum(-1).double()))
    carry = bound.init(2, 4, None)
    assert carry[FILL_UNIFORMS].shape == (2, 4, 4, 3)
    ancestors = torch.tensor([[3, 3, 0, 1], [0, 1, 2, 3]])
    gathered = bound.gather(carry, ancestors)
    assert torch.equal(gathered[FILL_UNIFORMS][0, 0], carry[FILL_UNIFORMS][0, 3])
    moved, _ = bound.move(gathered, 0, None)
    assert torch.equal(moved[FILL_UNIFORMS], gathered[FILL_UNIFORMS])


def test_finished_states_score_the_potential_itself():
    """At the last step, and for a masked state that is already complete."""
    values = Potential(lambda x0: x0.double() @ WEIGHTS)
    for twist in ("argmax", "persistent"):
        _, bound = bound_of("absorbing", twist, values)
        tokens = torch.randint(3, (1, 20, 3))
        carry = bound.init(1, 20, None) | {"tokens": tokens}
        expected = tokens.double() @ WEIGHTS
        for k in (2, 4):
            torch.testing.assert_close(bound.log_twist(carry, k, None), expected)


def test_forbidden_guesses_are_finite():
    impossible = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf))
    for twist in ("argmax", "persistent"):
        _, bound = bound_of("absorbing", twist, impossible)
        log_h = bound.log_twist(bound.init(1, 3, None), 0, None)
        assert bool(torch.isfinite(log_h).all())


def test_plates_are_summed():
    chain = toy_markov_chain("uniform", length=3).expand((2,))
    values = Potential(lambda x0: x0.double() @ WEIGHTS)
    fk = FeynmanKac(chain, values, ArgmaxFill())
    post = run_smc(fk, 5, 3)
    assert post.x0.shape == (3, 5, 2, 3)
    torch.testing.assert_close(post.log_potential, values(post.x0).sum(-1))


def test_a_good_twist_is_worth_its_cost():
    """The exact twist tightens the evidence at equal ``N`` (a fixed-seed comparison)."""
    chain = toy_markov_chain("absorbing", length=5, num_steps=5)
    exact = ExactChain.of(chain)
    potential = Potential(lambda x0: 1.5 * (x0[..., 1:] == x0[..., :-1]).sum(-1).double())
    spread = {}
    for label, twist in (("none", None), ("exact", exact.twist(exact.log_h(potential)))):
        fk = FeynmanKac(chain, potential, twist)
        post = run_smc(fk, 16, 500, "ssp", 2.0, torch.Generator().manual_seed(0))
        spread[label] = float((post.log_evidence.exp() / exact.evidence(potential)).std())
    assert spread["exact"] < 0.95 * spread["none"]


def test_log_mean_exp():
    x = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert float(log_mean_exp(x, 1)) == pytest.approx(math.log(2))
