"""``E[Z_hat] = Z``, whatever the resampler, the threshold, the twist or the proposal.

Each case compares the mean of many independent runs with the enumerated ``Z`` at four standard
errors: false alarm rate 6e-5 per case for a normal mean, about 1 % for the whole file, once, at
the fixed seeds.
"""

import math

import pytest
import torch

from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import RESAMPLERS, FeynmanKac, Weights, run_smc
from ppl_diffusion.smc.genealogy import evidence_variance
from ppl_diffusion.testing import (
    PROCESSES,
    ExactChain,
    chi_square_p_value,
    toy_chain,
    toy_potential,
    z_score,
)

MAX_Z = 4.0
THRESHOLDS = {"never": 0.0, "adaptive": 0.95, "always": 2.0}
NOISE = torch.Generator().manual_seed(3)
TWISTS = {  # of the optimal log-twist, a table (T + 1, states)
    "useless": lambda h: torch.randn(h.shape, generator=NOISE.manual_seed(3), dtype=h.dtype),
    "half": lambda h: 0.5 * h,
    "exact": lambda h: h,
    "adversarial": lambda h: -0.7 * h,
}
POTENTIAL = toy_potential(scale=2.0)
RUNS = {2: 4000, 8: 1500}


def problem(name="absorbing", **options):
    chain = toy_chain(name, **options)
    return chain, ExactChain.of(chain)


def relative_evidence(chain, exact, *, potential=POTENTIAL, seed=0, runs=None, n=8, **options):
    """Return ``Z_hat / Z`` of independent runs."""
    settings = {key: options.pop(key) for key in ("resampler", "ess_threshold") if key in options}
    fk = FeynmanKac(chain, potential, **options)
    generator = torch.Generator().manual_seed(seed)
    runs = runs or RUNS[n]
    post = run_smc(fk, n, runs, generator=generator, store_path=False, **settings)
    return post.log_evidence.exp() / exact.evidence(potential)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("quality", TWISTS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_unbiased(resampler, threshold, quality, n):
    """Every resampler x {never, adaptive, always} x {useless, half, exact, adversarial} twist."""
    name = "absorbing" if n == 8 else "uniform"
    chain, exact = problem(name)
    ratio = relative_evidence(
        chain,
        exact,
        n=n,
        twist=exact.twist(TWISTS[quality](exact.log_h(POTENTIAL))),
        resampler=resampler,
        ess_threshold=THRESHOLDS[threshold],
    )
    assert abs(z_score(ratio, 1.0)) < MAX_Z


@pytest.mark.parametrize("quality", TWISTS)
def test_thresholds_mean_what_they_say(quality):
    """The table above has power only if "adaptive" resamples sometimes and not always."""
    chain, exact = problem()
    twist = exact.twist(TWISTS[quality](exact.log_h(POTENTIAL)))
    shares = {}
    for threshold, value in THRESHOLDS.items():
        generator = torch.Generator().manual_seed(0)
        post = run_smc(FeynmanKac(chain, POTENTIAL, twist), 8, 500, "ssp", value, generator)
        assert not bool(post.resampled[:, -1].any())  # the end is left weighted
        shares[threshold] = float(post.resampled[:, :-1].double().mean())
    assert shares["never"] == 0
    assert 0.05 < shares["adaptive"] < 0.99
    assert shares["always"] == 1


def test_exact_twist_makes_the_evidence_certain_to_first_order():
    """With the optimal twist only the last factorised moves vary: far less than without."""
    chain, exact = problem()
    h = exact.log_h(POTENTIAL)
    spread = {
        quality: float(relative_evidence(chain, exact, twist=exact.twist(scale(h))).var())
        for quality, scale in TWISTS.items()
    }
    assert spread["exact"] < spread["useless"] < spread["adversarial"]


@pytest.mark.filterwarnings("ignore:twist='sample' draws fresh")
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("twist", [None, "argmax", "persistent", "sample"])
@pytest.mark.parametrize("every", [1, 2])
def test_fill_twists_are_unbiased(name, twist, every):
    chain, exact = problem(name, num_steps=4)
    ratio = relative_evidence(
        chain, exact, n=8, twist=twist, twist_every=every, ess_threshold=0.95, runs=3000
    )
    assert abs(z_score(ratio, 1.0)) < MAX_Z


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("resampler", ["systematic", "multinomial"])
def test_wrong_proposal_is_unbiased(name, resampler):
    """Another model's kernel, of full support, proposes; the weight pays for it."""
    chain, exact = problem(name)
    other = toy_chain(chain.kernel.process, seed=9, sharpness=0.5)
    ratio = relative_evidence(
        chain, exact, n=8, twist=None, proposal=other.kernel, resampler=resampler
    )
    assert abs(z_score(ratio, 1.0)) < MAX_Z
    assert float(ratio.std()) > 0


def test_proposal_function_is_unbiased():
    """A proposal given as a function of the model's step, here a flattened denoiser."""
    chain, exact = problem("uniform")

    def flatter(step, carry, k):
        return step.with_log_probs((0.5 * step.log_probs).log_softmax(-1))

    ratio = relative_evidence(chain, exact, n=8, proposal=flatter, twist="argmax")
    assert abs(z_score(ratio, 1.0)) < MAX_Z


def test_proposal_without_its_weight_is_biased():
    """The failing twin: moving by the wrong kernel and not paying is noticed."""
    _, exact = problem("uniform")
    other = toy_chain("uniform", seed=9, sharpness=0.5)
    ratio = relative_evidence(other, exact, n=8, twist=None)
    assert abs(z_score(ratio, 1.0)) > 2 * MAX_Z


def test_forgetting_weights_is_biased(monkeypatch):
    """The failing twin of adaptive resampling: weights that are not carried on."""
    chain, exact = problem(num_steps=4)
    twist = exact.twist(0.5 * exact.log_h(POTENTIAL))
    options = {"twist": twist, "ess_threshold": 0.95, "n": 8, "runs": 4000}
    assert abs(z_score(relative_evidence(chain, exact, **options), 1.0)) < MAX_Z
    add = Weights.add
    monkeypatch.setattr(Weights, "add", lambda self, x: add(Weights(0.0 * self.log), x))
    assert abs(z_score(relative_evidence(chain, exact, **options), 1.0)) > 2 * MAX_Z


def test_forgetting_the_last_twist_is_biased():
    """The failing twin of telescoping: a twist whose first value is not the one taken back."""
    chain, exact = problem()
    honest = exact.twist(exact.log_h(POTENTIAL))
    calls = []

    def changing(carry, k):
        calls.append(k)
        return honest(carry, k) + 0.3 * (k == 1)

    ratio = relative_evidence(chain, exact, n=8, twist=changing)
    assert abs(z_score(ratio, 1.0)) < MAX_Z  # wrong at one step: still unbiased
    assert set(calls) == {0, 1, 2}
    never_taken_back = ratio * math.exp(0.3)
    assert abs(z_score(never_taken_back, 1.0)) > 2 * MAX_Z


@pytest.mark.parametrize("name", PROCESSES)
def test_mean_of_the_logarithm_is_below_and_rises(name):
    """Jensen: ``E[log Z_hat] < log Z``, closer for more particles."""
    chain, exact = problem(name)
    means = [
        float(relative_evidence(chain, exact, n=n, twist=None, runs=3000).log().mean())
        for n in (2, 8, 32)
    ]
    assert means[0] < means[1] < means[2] < 0.01


@pytest.mark.parametrize("name", PROCESSES)
def test_weighted_draws_follow_the_posterior(name):
    """One weighted draw per run at N = 128: chi-square, level 1e-4 (bias is O(1/N))."""
    chain, exact = problem(name)
    generator = torch.Generator().manual_seed(5)
    post = run_smc(FeynmanKac(chain, POTENTIAL), 128, 1500, generator=generator)
    drawn = post.resample(1, pooled=False, generator=generator)["x0"][:, 0]
    counts = exact.histogram(drawn) * len(drawn)
    assert chi_square_p_value(counts, exact.posterior(POTENTIAL)) > 1e-4
    pooled = exact.histogram(post.x0, post.pooled_log_weights.exp())
    torch.testing.assert_close(pooled, exact.posterior(POTENTIAL), rtol=0, atol=0.01)


def single_run_variance(threshold):
    """Return per-run ``(Z_hat/Z)**2 V`` and ``(Z_hat/Z - 1)**2`` and the posterior."""
    chain, exact = problem("uniform", num_steps=4)
    fk = FeynmanKac(chain, POTENTIAL, twist=exact.twist(0.5 * exact.log_h(POTENTIAL)))
    generator = torch.Generator().manual_seed(6)
    post = run_smc(fk, 8, 30_000, "multinomial", threshold, generator, store_path=False)
    ratio = post.log_evidence.exp() / exact.evidence(POTENTIAL)
    raw = evidence_variance(post.eve, post.weights, post.resampled)
    return ratio**2 * raw, (ratio - 1) ** 2, post, ratio


def test_single_run_variance_is_unbiased():
    """Lee and Whiteley: ``E[Z_hat**2 V] = E[Z_hat**2] - Z**2``, multinomial at every step.

    Runs with a single Eve count too. The failing twin has no power of ``N / (N - 1)``.
    """
    single, across, post, ratio = single_run_variance(THRESHOLDS["always"])
    assert bool(post.resampled[:, :-1].all())
    assert abs(z_score(single - across, 0.0)) < MAX_Z
    flat = torch.zeros_like(post.resampled)
    naive = ratio**2 * evidence_variance(post.eve, post.weights, flat)
    assert abs(z_score(naive - across, 0.0)) > 2 * MAX_Z


def test_single_run_variance_under_adaptive_resampling():
    """The number of resamplings is random here: within 10 % of the replicate variance."""
    single, across, post, _ = single_run_variance(THRESHOLDS["adaptive"])
    assert 0.02 < float(post.resampled.double().mean()) < 0.7
    assert float(single.mean()) == pytest.approx(float(across.mean()), rel=0.1)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("twist", [None, "argmax", "persistent"])
def test_hard_constraint(name, twist):
    """``G`` in {0, 1}: ``Z`` is a probability, and what is forbidden never comes back.

    A look-ahead that excludes forbidden *guesses* instead of penalising them fails here.
    """
    potential = Potential(lambda x0: torch.where(x0[..., 0] != x0[..., 1], 0.0, -torch.inf))
    chain, exact = problem(name)
    allowed = exact.clean & (exact.states[:, 0] != exact.states[:, 1])
    expected = float(exact.laws()[-1][allowed].sum())
    generator = torch.Generator().manual_seed(7)
    post = run_smc(FeynmanKac(chain, potential, twist=twist), 8, 3000, generator=generator)
    assert exact.evidence(potential) == pytest.approx(expected, abs=1e-12)
    assert abs(z_score(post.log_evidence.exp(), expected)) < MAX_Z
    drawn = post.resample(20_000, generator=generator)["x0"]
    assert bool((drawn[..., 0] != drawn[..., 1]).all())
    forbidden = post.x0[..., 0] == post.x0[..., 1]
    assert bool((post.log_weights[forbidden] == -torch.inf).all())


def test_impossible_constraint_kills_every_run():
    chain, _ = problem()
    dead = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf))
    post = run_smc(FeynmanKac(chain, dead, twist=None), 8, 5)
    assert post.log_evidence.tolist() == [-math.inf] * 5
    assert post.died_at.tolist() == [2] * 5
    assert bool((post.log_weights == -torch.inf).all())
    assert bool((post.ess[:, -1] == 0).all())
    assert bool(torch.isnan(post.evidence_variance).all())


def test_dead_runs_count_as_zero():
    """Two particles and a rare event: most runs die, the mean over all runs is still right."""
    chain, exact = problem("uniform")
    rare = Potential(lambda x0: torch.where((x0 == 1).all(-1), 0.0, -torch.inf))
    generator = torch.Generator().manual_seed(8)
    post = run_smc(FeynmanKac(chain, rare, twist=None), 2, 20_000, generator=generator)
    assert 0.3 < float((~post.alive).double().mean()) < 1
    assert abs(z_score(post.log_evidence.exp(), exact.evidence(rare))) < MAX_Z


def test_biased_denoiser_gives_the_evidence_of_its_own_chain():
    """The target is the declared chain, not the data: a perturbed denoiser has another ``Z``."""
    chain, exact = problem("uniform", num_steps=4)
    base = chain.kernel.denoiser

    class Perturbed:
        vocab_size, kind, time_free = 3, "cavity", False

        def __call__(self, tokens, t):
            return torch.log(0.7 * base(tokens, t).exp() + 0.1)

    kernel = InterpolatingKernel(chain.kernel.process, Perturbed(), num_steps=4)
    perturbed = type(chain)(kernel, chain.length)
    own = ExactChain.of(perturbed)
    ratio = relative_evidence(perturbed, own, n=8, twist="argmax", runs=4000)
    assert abs(z_score(ratio, 1.0)) < MAX_Z
    other = ratio * own.evidence(POTENTIAL) / exact.evidence(POTENTIAL)
    assert abs(z_score(other, 1.0)) > 2 * MAX_Z


def test_label_permutation_leaves_the_evidence():
    """Renamed tokens: same evidence, and estimates within four standard errors of it."""
    order = torch.tensor([2, 0, 1])
    chain, exact = problem()
    renamed = toy_chain()
    renamed.kernel.denoiser.joint = chain.kernel.denoiser.joint[order][:, order]
    potential = Potential(lambda x0: POTENTIAL(order[x0]))
    z = exact.evidence(POTENTIAL)
    assert ExactChain.of(renamed).evidence(potential) == pytest.approx(z, rel=1e-12)
    ratio = relative_evidence(renamed, ExactChain.of(renamed), potential=potential, n=8)
    assert abs(z_score(ratio, 1.0)) < MAX_Z


def test_plates_multiply():
    """A chain with a batch of three inside each particle: the evidence is the cube."""
    chain, exact = problem()
    post = run_smc(
        FeynmanKac(chain.expand((3,)), POTENTIAL),
        8,
        4000,
        generator=torch.Generator().manual_seed(9),
    )
    assert post.x0.shape == (4000, 8, 3, 2)
    assert abs(z_score(post.log_evidence.exp(), exact.evidence(POTENTIAL) ** 3)) < MAX_Z
