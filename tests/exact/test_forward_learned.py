"""Learned forward processes of enumerated data: bounds, gaps, couplings (F3 to F7, F10)."""

import math

import pytest
import torch
from bit_laws import codes_of, joint_of

from ppl_diffusion.processes.couplings import Independent, Markov, Maximum
from ppl_diffusion.testing.forward_learned_laws import ForwardLaw
from ppl_diffusion.testing.latent_toys import corr_bits, mix_prod

HOLE = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
WITHIN = 1e-5  # what the printed constants are rounded to


def revealing(*probs):
    """Return marginals of masks at the one inner time: each site shown with its probability."""
    shown = torch.tensor(probs, dtype=torch.float64)[:, None]

    def inner(x):
        clean = torch.nn.functional.one_hot(x, 3).double()
        return (shown * clean + (1 - shown) * HOLE)[None]

    return inner


def telling(problem):
    """Return the marginals by which the first site carries the code, and all others are hidden."""
    table = codes_of(problem)

    def inner(x):
        powers = 2 ** torch.arange(problem.length - 1, -1, -1)
        given = table[:, (x * powers).sum(-1)] * problem.weights[:, None]
        code = (given / given.sum(0)).T  # (X, 2)
        first = torch.cat([code, torch.zeros(len(x), 1).double()], 1)
        rest = HOLE.expand(len(x), problem.length - 1, 3)
        return torch.cat([first[:, None], rest], 1)[None]

    return inner


@pytest.mark.parametrize(
    ("probs", "bound"),
    [((0.5, 0.5), 1.196699), ((0.6, 0.3), 1.181531), ((0.9, 0.1), 1.075357), ((1, 0), 1.007103)],
)
def test_two_bits_with_learned_reveals(probs, bound):
    law = ForwardLaw.of(joint_of(corr_bits(0.05)), revealing(*probs), HOLE, Maximum())
    assert law.nelbo() == pytest.approx(bound, abs=WITHIN)
    a, b = probs
    information = 2 * math.log(2) - law.entropy
    formula = law.entropy + (a * b + (1 - a) * (1 - b)) * information
    assert law.nelbo() == pytest.approx(formula, abs=1e-12)
    if probs == (0.5, 0.5):
        assert law.total_variation() == pytest.approx(0.2025, abs=WITHIN)
    if probs == (1, 0):
        assert law.total_variation() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "entropy", "one_step", "half"),
    [(3, 1.573031, 0.506410, 0.233349), (4, 1.939371, 0.833218, 0.371708)],
)
def test_a_code_in_the_first_site_closes_the_whole_gap(length, entropy, one_step, half):
    problem = mix_prod(length, 0.9)
    joint = joint_of(problem)
    told = ForwardLaw.of(joint, telling(problem), HOLE, Maximum())
    assert told.entropy == pytest.approx(entropy, abs=WITHIN)
    assert told.nelbo() == pytest.approx(told.entropy, abs=1e-12)
    assert told.total_variation() == pytest.approx(0, abs=1e-12)
    alone = length * math.log(2)
    assert alone - told.entropy == pytest.approx(one_step, abs=WITHIN)
    fixed = ForwardLaw.of(joint, revealing(*[0.5] * length), HOLE, Maximum())
    assert fixed.nelbo() - told.entropy == pytest.approx(half, abs=WITHIN)


def test_uniform_noise_needs_independence_at_the_last_step():
    """The noise is uniform over the two bits; over the hole, too, the excess is another (.0315)."""
    problem = mix_prod(3, 0.9)
    bits = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    joint, inner = joint_of(problem), telling(problem)
    most = ForwardLaw.of(joint, inner, bits, Maximum(), last=True)
    best = ForwardLaw.of(joint, inner, bits, Maximum())
    assert most.nelbo() == pytest.approx(1.592374, abs=WITHIN)
    assert best.nelbo() == pytest.approx(1.573031, abs=WITHIN)
    for law in (most, best):
        assert law.total_variation() == pytest.approx(0, abs=1e-12)


def fixed_uniform(law):
    flat = torch.full((2,), 0.5, dtype=torch.float64)

    def inner(x):
        clean = torch.nn.functional.one_hot(x, 2).double()
        return torch.stack([k * clean + (1 - k) * flat for k in (0.75, 0.5)])

    return lambda coupling: ForwardLaw.of(law, inner, flat, coupling, last=True)


def test_couplings_differ_for_uniform_noise():
    """The maximum coupling is not the best between fixed marginals."""
    make = fixed_uniform(joint_of(corr_bits(0.05)))
    assert make(Maximum()).nelbo() == pytest.approx(1.357409, abs=WITHIN)
    assert make(Independent()).nelbo() == pytest.approx(1.260900, abs=WITHIN)
    sampled = [make(c).total_variation() for c in (Maximum(), Independent())]
    assert sampled == pytest.approx([0.1514, 0.1683], abs=5e-5)


def random_law(seed, size=2, length=2, states=3, steps=2):
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand([size] * length, generator=generator).double()
    shape = (steps - 1, size**length, length, states)
    u = torch.rand(shape, generator=generator).double().pow(3) + 1e-6
    prior = torch.rand(states, generator=generator).double() + 0.05
    u, prior = u / u.sum(-1, keepdim=True), prior / prior.sum()
    return joint / joint.sum(), lambda x: u, prior


@pytest.mark.parametrize("coupling", [Maximum(), Independent()], ids=repr)
@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_above_the_entropy_and_the_chain_has_its_marginals(seed, coupling):
    law = ForwardLaw.of(*random_law(seed, steps=3), coupling)
    assert law.nelbo() >= law.entropy - 1e-12
    for t in range(1, law.num_steps + 1):
        moved = torch.einsum("xla,xlab->xlb", law.marginals[t], law.table(t))
        torch.testing.assert_close(moved, law.marginals[t - 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_what_two_steps_from_masks_lose_is_total_correlation(seed):
    joint, inner, _ = random_law(seed)
    law = ForwardLaw.of(joint, inner, HOLE, Maximum())
    lost = [law.total_correlation(t) for t in (1, 2)]
    assert min(lost) > -1e-12
    assert law.nelbo() - law.entropy == pytest.approx(sum(lost), abs=1e-12)


def test_more_steps_forget_too():
    law = ForwardLaw.of(*random_law(1, steps=3), Maximum())
    lost = sum(law.total_correlation(t) for t in (1, 2, 3))
    assert law.nelbo() - law.entropy > lost + 1e-4


@pytest.mark.parametrize("seed", range(40))
def test_independence_at_the_last_step_is_never_worse(seed):
    parts = random_law(seed)
    most = ForwardLaw.of(*parts, Maximum(), last=True)
    best = ForwardLaw.of(*parts, Maximum())
    assert most.nelbo() >= best.nelbo() - 1e-12


def test_a_wrong_row_is_seen():
    """The misprint of the published formula breaks the marginals, and with them the bound."""

    class Misprinted(Maximum):
        def table(self, u, w):
            eye = torch.eye(u.shape[-1]).double()
            return super().table(w, u) * (1 - eye) + eye * super().table(u, w)

    parts = random_law(0, steps=3)
    law = ForwardLaw.of(*parts, Misprinted())
    moved = torch.einsum("xla,xlab->xlb", law.marginals[2], law.table(2))
    assert (moved - law.marginals[1]).abs().max() > 0.01


def test_bayes_rule_between_uniform_marginals():
    flat = torch.full((2,), 0.5, dtype=torch.float64)
    joint = joint_of(corr_bits(0.05))

    def inner(x):
        clean = torch.nn.functional.one_hot(x, 2).double()
        return (0.5 * clean + 0.5 * flat)[None]

    step = 0.5 * torch.eye(2).double() + 0.5 * flat
    law = ForwardLaw.of(joint, inner, flat, Markov(step), last=True)
    row = Markov(step).table(law.marginals[0], law.marginals[1])
    torch.testing.assert_close(
        torch.einsum("xla,xlab->xlb", law.marginals[1], row), law.marginals[0], rtol=0, atol=1e-12
    )
