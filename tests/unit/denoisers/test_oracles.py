"""Exact denoisers: the denoiser contract, enumeration, and each other."""

import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser, TableDenoiser, emission
from ppl_diffusion.kernels import Absorbing, Uniform
from ppl_diffusion.testing import (
    PROCESSES,
    DenoiserContract,
    all_states,
    chi_square_p_value,
    posterior_as_cavity,
    random_joint,
    state_index,
    toy_process,
)


class TestMaskedTable(DenoiserContract):
    tolerance, ignores_own_token = 1e-12, True

    def make_process(self):
        return Absorbing(3)

    def make_denoiser(self, process):
        return TableDenoiser(random_joint(3, self.length), process)


class TestUniformTable(TestMaskedTable):
    def make_process(self):
        return Uniform(3)


class TestPosteriorTable(TestMaskedTable):
    ignores_own_token = False

    def make_process(self):
        return toy_process("skewed")

    def make_denoiser(self, process):
        return TableDenoiser(random_joint(3, self.length), process, kind="posterior")


def markov(process, length=3, kind="cavity", seed=0):
    probs = torch.softmax(random_joint(process.vocab_size, 2, seed=seed).log(), -1)
    return MarkovDenoiser(probs[0] / probs[0].sum(), probs, process, kind=kind)


class TestMaskedMarkov(TestMaskedTable):
    length = 7

    def make_denoiser(self, process):
        return markov(process)


class TestUniformMarkov(TestMaskedMarkov):
    def make_process(self):
        return Uniform(3)


def joint_of(denoiser, length):
    law = denoiser.log_prob(all_states(3, length)).exp()
    return law.reshape([3] * length)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", ["cavity", "posterior"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_table_is_bayes_by_enumeration(name, kind, t):
    """``p(x^l | z)`` (posterior) or ``p(x^l | z without l)`` (cavity), by summation."""
    process, joint = toy_process(name), random_joint(3, 3)
    denoiser = TableDenoiser(joint, process, kind=kind)
    clean, states = all_states(3, 3), all_states(process.num_states, 3)
    a = 1 - t
    prior = torch.as_tensor(process.prior)
    kept = (
        a * (states[:, None] == clean).double() + (1 - a) * prior[states][:, None]
    )  # (z, x, site)
    for site in range(3):
        others = [s for s in range(3) if kind == "posterior" or s != site]
        weight = joint.flatten() * kept[..., others].prod(-1)
        law = torch.stack([weight[:, clean[:, site] == v].sum(-1) for v in range(3)], -1)
        possible = law.sum(-1) > 0
        here = denoiser(states, t).exp()[:, site]
        expected = law[possible] / law[possible].sum(-1, keepdim=True)
        torch.testing.assert_close(here[possible], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(here.sum(-1), torch.ones(len(states)).double())


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", ["cavity", "posterior"])
@pytest.mark.parametrize("t", [0.2, 0.7, 1.0])
def test_markov_equals_its_table(name, kind, t):
    process = toy_process(name)
    denoiser = markov(process, kind=kind)
    table = TableDenoiser(joint_of(denoiser, 4), process, kind=kind)
    states = all_states(process.num_states, 4)
    torch.testing.assert_close(
        denoiser(states, t).exp(), table(states, t).exp(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ["uniform", "skewed"])
def test_kinds_are_related_by_the_site_evidence(name):
    process, states, t = toy_process(name), all_states(3, 3), 0.4
    cavity = TableDenoiser(random_joint(3, 3), process)(states, t).exp()
    posterior = TableDenoiser(random_joint(3, 3), process, kind="posterior")(states, t).exp()
    converted = posterior_as_cavity(process, states, posterior, 1 - t)
    torch.testing.assert_close(converted, cavity, rtol=0, atol=1e-12)
    assert float((posterior - cavity).abs().max()) > 0.05


def test_long_sequences_do_not_underflow():
    log_c = markov(Uniform(3), seed=4)(torch.randint(3, (4, 3000)), 0.1)
    assert bool(torch.isfinite(log_c).all())
    torch.testing.assert_close(torch.logsumexp(log_c, -1), torch.zeros(4, 3000).double())


def test_markov_samples_follow_its_law():
    """Chi-square over sequences of length three, level 1e-4."""
    denoiser = markov(Absorbing(3))
    drawn = denoiser.sample((40_000,), 3)
    counts = torch.bincount(state_index(drawn, 3), minlength=27)
    assert chi_square_p_value(counts, joint_of(denoiser, 3).flatten()) > 1e-4
    assert denoiser.sample((2, 5), 4).shape == (2, 5, 4)


def test_time_free_exactly_for_masks():
    assert markov(Absorbing(3)).time_free
    assert not markov(Uniform(3)).time_free


def test_emission_is_the_forward_law():
    process = toy_process("skewed")
    table = emission(process, torch.arange(3), 0.4)
    expected = 0.6 * torch.eye(3) + 0.4 * torch.tensor([1, 2, 3])[:, None] / 6
    torch.testing.assert_close(table, expected.double(), rtol=0, atol=1e-7)
    assert table.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: TableDenoiser(torch.ones(2, 2) / 4, Absorbing(3)),
            r"shape \(V,\) \* L with V = 3",
        ),
        (lambda: TableDenoiser(torch.ones(3, 3), Absorbing(3)), "sum to one"),
        (lambda: TableDenoiser(torch.tensor([1.5, -0.5]), Absorbing(2)), "non-negative"),
        (lambda: TableDenoiser(torch.tensor([torch.nan, 1]), Absorbing(2)), "non-negative"),
        (
            lambda: MarkovDenoiser(torch.ones(3) / 3, torch.ones(3, 3), Absorbing(3)),
            "transition must hold probabilities",
        ),
        (
            lambda: MarkovDenoiser(torch.ones(2) / 2, torch.eye(3), Absorbing(3)),
            r"initial must have shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_bad_tables(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match="this denoiser is for 2 positions, got 3"):
        TableDenoiser(random_joint(3, 2), Absorbing(3))(torch.zeros(1, 3).long(), 0.5)
