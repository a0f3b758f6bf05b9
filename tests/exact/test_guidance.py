"""Guided kernels by enumeration: what each is exact for, and that weights pay for the rest.

A random ``p(x, y)`` with two classes: the chain of ``p(x)``, the chain of ``p(x | y)``, and
``P(y | z_t)`` in closed form. Evidence tests compare the mean of independent runs with the
enumerated ``Z`` at four standard errors: false-alarm rate 6e-5 each for a normal mean, below 0.3 %
for the file, once, at the fixed seeds.
"""

import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.denoisers.filters import Nucleus
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.kernels.classifier_based import ClassifierKernel
from ppl_diffusion.kernels.classifier_free import ClassifierFreeKernel
from ppl_diffusion.kernels.confidence import ConfidenceKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import (
    PROCESSES,
    ExactChain,
    all_states,
    chi_square_p_value,
    forward_law,
    random_joint,
    state_index,
    state_matrix,
    total_variation,
    toy_process,
    z_score,
)

MAX_Z = 4.0
SHARES = (0.3, 0.7)
SIZE = 3


class Problem:
    """``p(x, y)`` on ``L`` sites, noised by a process; everything about class 0 in closed form."""

    def __init__(self, name, *, length=2, num_steps=3, kappa=1.0, sharpness=1.5):
        self.process, self.length = toy_process(name), length
        self.grid = {"num_steps": num_steps, "kappa": kappa}
        self.joint = [
            share * random_joint(SIZE, length, seed=20 + i, sharpness=sharpness)
            for i, share in enumerate(SHARES)
        ]
        self.conditional = TableDenoiser(self.joint[0] / SHARES[0], self.process)
        self.unconditional = TableDenoiser(sum(self.joint), self.process)
        self.states = all_states(self.process.num_states, length)

    def kernel(self, denoiser=None):
        return InterpolatingKernel(self.process, denoiser or self.unconditional, **self.grid)

    def classifier_free(self, weight=1.5, level="denoiser"):
        pair = self.conditional, self.unconditional
        return ClassifierFreeKernel(self.process, *pair, weight=weight, level=level, **self.grid)

    def classifier_based(self, **options):
        classifier = self.soft if options.get("mode") == "first-order" else self.log_likelihood
        return ClassifierKernel(self.kernel(), classifier, **options)

    def log_likelihood(self, states, t):
        """``log P(y = 0 | z_t)``, exactly."""
        alpha = float(self.process.schedule.alpha(t))
        laws = [forward_law(self.process, p.flatten(), alpha, self.length) for p in self.joint]
        share = laws[0] / (laws[0] + laws[1])
        return share[state_index(states, self.process.num_states)].log()

    def soft(self, states, t):
        """A differentiable stand-in, wrong on purpose: linear in the one-hot encoding."""
        weight = torch.linspace(-0.5, 0.5, states.shape[-1] * self.length)
        return (states * weight.reshape(states.shape[1:])).sum((1, 2))

    @property
    def potential(self):
        ratio = (self.joint[0] / (self.joint[0] + self.joint[1])).log()
        return Potential(lambda x0: ratio[x0.unbind(-1)], name="P(y | x)")

    def proposals(self):
        return {
            "free, denoiser": self.classifier_free(),
            "free, kernel": self.classifier_free(level="kernel"),
            "free, overshooting": self.classifier_free(weight=3.0, level="kernel"),
            "based, exact": self.classifier_based(),
            "based, first order": self.classifier_based(mode="first-order"),
        }


def matrices(kernel, states):
    """Return a kernel's own transition matrices, ``(T, S ** L, S ** L)``."""
    steps = [kernel.step({"tokens": states[:, None]}, k) for k in range(kernel.num_steps)]
    return torch.stack([step.log_prob(states).exp() for step in steps])


def x0_law(kernel, problem):
    law = ExactChain.of(ReverseChain(problem.kernel(), problem.length)).initial
    for matrix in matrices(kernel, problem.states):
        law = law @ matrix
    return law


@pytest.mark.parametrize("name", PROCESSES)
def test_one_site_with_an_exact_classifier_is_the_conditional_chain(name):
    """Bayes' rule for one site: the tilted kernel is the kernel of ``p(x | y)``, step by step."""
    problem = Problem(name, length=1, num_steps=5)
    kernel, target = problem.classifier_based(), problem.kernel(problem.conditional)
    for k, matrix in enumerate(matrices(kernel, problem.states)):
        torch.testing.assert_close(matrix, state_matrix(target, k, 1), rtol=0, atol=1e-12)


def test_reading_the_classifier_before_the_step_is_wrong():
    """The failing twin: the time of the current state is one step late."""
    problem = Problem("uniform", length=1, num_steps=5)
    kernel = problem.classifier_based()
    late = ClassifierKernel(
        kernel.kernel, lambda states, t: problem.log_likelihood(states, min(1.0, t + 0.2))
    )
    expected = state_matrix(problem.kernel(problem.conditional), 2, 1)
    assert float((matrices(late, problem.states)[2] - expected).abs().max()) > 1e-3


def excess(name, num_steps):
    """Return how far guidance (exact inputs, g = 1) and the conditional chain are apart at x0."""
    problem = Problem(name, num_steps=num_steps)
    pair = problem.classifier_based(), problem.kernel(problem.conditional)
    return total_variation(*(x0_law(kernel, problem) for kernel in pair))


@pytest.mark.parametrize("name", ["uniform", "skewed"])
def test_several_sites_in_one_step_count_the_evidence_several_times(name):
    """Wrong by O(1/T): visible in a few steps, gone in many, where sites move one at a time."""
    assert excess(name, 2) > 0.03
    assert excess(name, 32) / excess(name, 64) == pytest.approx(2, rel=0.1)


def test_masks_do_not_count_twice():
    """``c_v P(y | z^{l:=v}) = p(x^l = v | z, y) P(y | z)``: the conditional chain, step by step.

    At any number of steps and sites; not for Psi steps, whose remasking is tilted too.
    """
    for kappa, equal in ((1.0, True), (0.8, False)):
        problem = Problem("absorbing", length=3, num_steps=2, kappa=kappa)
        target = problem.kernel(problem.conditional)
        gaps = [
            float((matrix - state_matrix(target, k, 3)).abs().max())
            for k, matrix in enumerate(matrices(problem.classifier_based(), problem.states))
        ]
        assert (max(gaps) < 1e-12) == equal
        assert max(gaps) < 1e-12 or max(gaps) > 1e-2


def test_guided_chains_end_where_they_should():
    """Total variation to ``p(x | y)`` at 64 steps, against the conditional and the plain chain."""
    problem = Problem("uniform", num_steps=64)
    target = (problem.joint[0] / SHARES[0]).flatten()
    kernels = problem.classifier_based(), problem.kernel(problem.conditional), problem.kernel()
    guided, right, plain = (total_variation(x0_law(k, problem), target) for k in kernels)
    assert max(guided, right) < 0.005 < 0.5 < plain


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_paths_are_normalised(name):
    """``exp(log_prob)`` over all paths of a guided chain is one."""
    problem = Problem(name, num_steps=2, kappa=[0.8, 1.0], length=1 if name == "absorbing" else 2)
    for kernel in problem.proposals().values():
        chain = ReverseChain(kernel, problem.length)
        total = chain.log_prob(chain.enumerate_support()).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-9)


def test_a_kernel_that_remembers_can_be_guided():
    """Confidence-based remasking under a classifier: the carry goes on, the path has a density."""
    problem = Problem("absorbing")
    kappa = [0.8, 0.8, 1.0]
    inner = ConfidenceKernel(problem.process, problem.unconditional, num_steps=3, kappa=kappa)
    kernel = ClassifierKernel(inner, problem.log_likelihood)
    assert not kernel.markov
    chain = ReverseChain(kernel, problem.length)
    paths = all_states(4, 2 * 3).reshape(-1, 3, 2)  # the noisiest state is all masks
    paths = torch.cat([torch.full((len(paths), 1, 2), SIZE), paths], 1)
    assert float(chain.log_prob(paths).exp().sum()) == pytest.approx(1, abs=1e-9)


def relative_evidence(problem, *, model=None, runs=1500, seed=0, n=8, **options):
    """Return ``Z_hat / Z`` of independent runs, ``Z`` that of the unguided chain."""
    chain = ReverseChain(model or problem.kernel(), problem.length)
    exact = ExactChain.of(ReverseChain(problem.kernel(), problem.length))
    fk = FeynmanKac(chain, problem.potential, twist=None, **options)
    generator = torch.Generator().manual_seed(seed)
    post = run_smc(fk, n, runs, generator=generator, store_path=False)
    return post.log_evidence.exp() / exact.evidence(problem.potential)


@pytest.mark.parametrize("which", Problem("uniform").proposals())
@pytest.mark.parametrize(("name", "kappa"), [*((n, 1.0) for n in PROCESSES), ("uniform", 0.9)])
def test_a_guided_proposal_is_unbiased(name, kappa, which):
    """Guidance proposes, the unguided chain is the target, the weight is the difference."""
    problem = Problem(name, kappa=kappa)
    ratio = relative_evidence(problem, proposal=problem.proposals()[which])
    assert abs(z_score(ratio, 1.0)) < MAX_Z
    assert float(ratio.std()) > 0


@pytest.mark.parametrize("which", [w for w in Problem("uniform").proposals() if "order" not in w])
def test_a_guided_proposal_without_its_weight_is_biased(which):
    """The failing twin: the guided chain as the model has another evidence."""
    problem = Problem("uniform")
    ratio = relative_evidence(problem, model=problem.proposals()[which])
    assert abs(z_score(ratio, 1.0)) > 2 * MAX_Z


def test_a_nucleus_as_proposal_loses_mass():
    """Its support is smaller, so no weight brings back what it never proposes.

    The kernel is refused; a function that moves by it is not looked into, and shows why.
    """
    problem = Problem("uniform")
    cut = problem.kernel(Nucleus(problem.unconditional, 0.6))
    with pytest.raises(ValueError, match=r"nucleus|excludes"):
        relative_evidence(problem, proposal=cut)
    ratio = relative_evidence(problem, proposal=lambda step, carry, k: cut.step(carry, k))
    assert z_score(ratio, 1.0) < -2 * MAX_Z


@pytest.mark.parametrize("guide", ["classifier-free", "classifier"])
def test_a_guided_nucleus_is_refused_too(guide):
    """Guidance hides no filter; around the target it is part of the law."""
    problem = Problem("uniform")
    filtered = [Nucleus(d, 0.6) for d in (problem.conditional, problem.unconditional)]
    kernel = {
        "classifier-free": ClassifierFreeKernel(
            problem.process, *filtered, weight=2.0, **problem.grid
        ),
        "classifier": ClassifierKernel(problem.kernel(filtered[1]), problem.log_likelihood),
    }[guide]
    with pytest.raises(ValueError, match=r"nucleus|excludes"):
        relative_evidence(problem, proposal=kernel)
    FeynmanKac(ReverseChain(kernel, problem.length), problem.potential, proposal=kernel)


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_tilts_make_a_better_proposal(name):
    """Conditioning site by site on ``y`` removes most of the variance of ``Z_hat``."""
    problem = Problem(name)
    guided = relative_evidence(problem, proposal=problem.classifier_based())
    assert float(guided.var()) < 0.5 * float(relative_evidence(problem).var())


@pytest.mark.parametrize(("name", "kappa"), [("absorbing", 0.9), ("uniform", 1.0), ("skewed", 0.9)])
def test_weighted_draws_follow_the_posterior(name, kappa):
    """One weighted draw per run at N = 64: chi-square, level 1e-4 (bias is O(1/N)).

    The failing twin is a draw from the proposal itself.
    """
    problem = Problem(name, kappa=kappa)
    proposal = problem.classifier_free(weight=2.0, level="kernel")
    chain = ReverseChain(problem.kernel(), problem.length)
    exact = ExactChain.of(chain)
    generator = torch.Generator().manual_seed(3)
    fk = FeynmanKac(chain, problem.potential, twist=None, proposal=proposal)
    post = run_smc(fk, 64, 1500, generator=generator)
    drawn = post.resample(1, pooled=False, generator=generator)["x0"][:, 0]
    target = exact.posterior(problem.potential)
    assert chi_square_p_value(exact.histogram(drawn) * len(drawn), target) > 1e-4
    plain = ReverseChain(proposal, problem.length).sample((1500,), generator=generator)[:, -1]
    assert chi_square_p_value(exact.histogram(plain) * len(plain), target) < 1e-8


def test_the_target_says_what_changed():
    """Guidance of the model is part of the target; of the proposal, it is not."""
    problem = Problem("uniform")
    for kernel in problem.proposals().values():
        model = FeynmanKac(ReverseChain(kernel, problem.length), problem.potential)
        assert kernel.changes[0] in model.target
        honest = FeynmanKac(
            ReverseChain(problem.kernel(), problem.length), problem.potential, proposal=kernel
        )
        assert "guidance" not in honest.target
