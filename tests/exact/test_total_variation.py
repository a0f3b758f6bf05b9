"""How far the law of a finite chain is from the data: about one over the number of steps."""

import itertools

import pytest

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.testing import PROCESSES, ExactChain, random_joint, total_variation, toy_chain


def distance(chain, joint):
    return total_variation(ExactChain.of(chain).x0_law(), joint.flatten())


def mislabelled(chain):
    """Plug the posterior mean in where the cavity belongs."""
    denoiser = chain.kernel.denoiser
    denoiser.kind = "cavity"

    class Wrong:
        vocab_size, kind, time_free = denoiser.vocab_size, "cavity", denoiser.time_free

        def __call__(self, tokens, t):
            denoiser.kind = "posterior"  # what it returns, not what it says
            return denoiser(tokens, t)

    kernel = InterpolatingKernel(chain.kernel.process, Wrong(), times=chain.kernel.times)
    return ReverseChain(kernel, chain.length)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("length", [2, 3])
def test_distance_falls_like_one_over_steps(name, length):
    """Doubling ``T`` halves the distance, within 10 % from ``T = 16`` on."""
    joint = random_joint(3, length)
    steps = [8, 16, 32, 64]
    tv = [distance(toy_chain(name, length=length, num_steps=t), joint) for t in steps]
    assert tv[0] > 2e-3
    for before, after in itertools.pairwise(tv[1:]):
        assert before / after == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["uniform", "skewed"])
def test_posterior_mean_is_not_a_cavity(name):
    """The power check: a posterior-mean denoiser that claims to be a cavity never gets there."""
    joint = random_joint(3, 2, sharpness=1.5)
    wrong, right = [], []
    for num_steps in (8, 32, 128):
        chain = toy_chain(name, num_steps=num_steps, sharpness=1.5, kind="posterior")
        right.append(distance(chain, joint))
        wrong.append(distance(mislabelled(chain), joint))
    assert right[0] / right[2] > 10
    assert min(wrong) > 0.1
    assert wrong[2] > 0.8 * wrong[0]


def test_masked_chains_do_not_mind():
    """At masked positions the two kinds coincide."""
    joint = random_joint(3, 2)
    right = toy_chain("absorbing", num_steps=8)
    wrong = mislabelled(toy_chain("absorbing", num_steps=8, kind="posterior"))
    assert distance(wrong, joint) == pytest.approx(distance(right, joint), abs=1e-12)


def test_constant_kappa_falls_more_slowly():
    """Simultaneous correction of several sites costs accuracy; it still converges."""
    joint = random_joint(3, 2)
    tv = [distance(toy_chain(num_steps=t, kappa=0.8), joint) for t in (16, 64, 256)]
    assert tv[0] > tv[1] > tv[2]
    ancestral = distance(toy_chain(num_steps=256), joint)
    assert tv[2] > ancestral
