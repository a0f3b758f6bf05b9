"""Psi chains by enumeration: what they preserve, how far they are from the data, and why."""

import itertools

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.kernels.kappa_rules import kappa_room
from ppl_diffusion.kernels.psi import parse_psi
from ppl_diffusion.testing import (
    PROCESSES,
    ExactChain,
    all_states,
    forward_law,
    random_joint,
    state_matrix,
    total_variation,
    toy_process,
)

ROUND_OFF = 1e-13


class PosteriorAsCavity:
    """A posterior-mean denoiser that claims to be a cavity."""

    vocab_size, kind = 3, "cavity"

    def __init__(self, joint, process):
        self.right = TableDenoiser(joint, process, kind="posterior")
        self.time_free = self.right.time_free

    def __call__(self, tokens, t):
        return self.right(tokens, t)


def dirichlet(seed, length, concentration=0.4):
    """The joints of the published tables."""
    p = np.random.default_rng(seed).dirichlet(np.full(3**length, concentration))
    return torch.tensor(p.reshape((3,) * length))


def distance(joint, process, denoiser=TableDenoiser, **options):
    kernel = InterpolatingKernel(process, denoiser(joint, process), **options)
    law = ExactChain.of(ReverseChain(kernel, joint.ndim)).x0_law()
    return total_variation(law, joint.flatten())


# Total variation to the data of masked chains with an exact denoiser, L = K = 3, by steps.
MASKED = [
    (16, 0.0317, 0.0350, 0.0378),
    (32, 0.0159, 0.0177, 0.0231),
    (64, 0.0080, 0.0089, 0.0152),
    (128, 0.0040, 0.0045, 0.0107),
]


@pytest.mark.parametrize(("steps", "ancestral", "rate", "constant"), MASKED)
def test_distances_of_masked_chains(steps, ancestral, rate, constant):
    """Ancestral and ``1 - kappa = 2/N`` fall like 1/N, a constant ``kappa`` like N^-1/2."""
    joint, process = dirichlet(1, 3), Absorbing(3)
    for kappa, expected in ((1.0, ancestral), (1 - 2 / steps, rate), (0.8, constant)):
        tv = distance(joint, process, num_steps=steps, kappa=kappa)
        assert tv == pytest.approx(expected, abs=6e-5)


def test_constant_kappa_keeps_its_rate():
    joint, process = dirichlet(1, 3), Absorbing(3)
    for steps, expected in ((256, 0.0079), (512, 0.0059)):
        tv = distance(joint, process, num_steps=steps, kappa=0.8)
        assert tv == pytest.approx(expected, abs=6e-5)


# The same for uniform chains, L = 2, K = 3: cavity, posterior mean, posterior mean at kappa .95.
UNIFORM = [
    (8, 0.069, 0.270, 0.273),
    (32, 0.018, 0.272, 0.288),
    (128, 0.0049, 0.273, 0.321),
    (512, 0.0013, 0.273, 0.361),
]


@pytest.mark.parametrize(("steps", "cavity", "posterior", "corrected"), UNIFORM)
def test_distances_of_uniform_chains(steps, cavity, posterior, corrected):
    """The cavity converges; the posterior mean in its place does not, and correcting hurts it."""
    joint, process = dirichlet(3, 2), Uniform(3)
    tv = distance(joint, process, num_steps=steps)
    assert tv == pytest.approx(cavity, abs=10.0 ** -(4 if cavity < 0.01 else 3) * 0.6)
    wrong = [
        distance(joint, process, PosteriorAsCavity, num_steps=steps, kappa=kappa)
        for kappa in (1.0, 0.95)
    ]
    assert wrong == pytest.approx([posterior, corrected], abs=6e-4)


GRID = (1.0, 0.6, 0.1, 0.0)
VALID = [(n, k) for n in PROCESSES for k in (1.0, 0.5, 0.0, -0.2 if n == "skewed" else -0.3)]


def worst_marginal(name, kappa, denoiser=TableDenoiser):
    """Largest error of any marginal ``p(z_t)`` of a chain of one site."""
    process, joint = toy_process(name), dirichlet(0, 1, 1.0)
    kernel = InterpolatingKernel(process, denoiser(joint, process), times=GRID, kappa=kappa)
    laws = ExactChain.of(ReverseChain(kernel, 1)).laws()
    exact = torch.stack([forward_law(process, joint, float(a), 1) for a in kernel.alphas])
    return float((laws - exact).abs().max())


@pytest.mark.parametrize(("name", "kappa"), VALID)
def test_one_site_keeps_every_marginal(name, kappa):
    """For any valid ``kappa``, also below zero, and any step, given the cavity."""
    assert worst_marginal(name, kappa) < ROUND_OFF


@pytest.mark.parametrize(("name", "kappa"), [(n, k) for n, k in VALID if n != "absorbing"])
def test_posterior_mean_does_not(name, kappa):
    """The power of the test above (of one masked site both are right)."""
    assert worst_marginal(name, kappa, PosteriorAsCavity) > 5e-3


def remdm_rows(tokens, c, a, b, sigma):
    """One published ReMDM step of every site, ``(*batch, L, V + 1)``."""
    mask = c.shape[-1]
    here = torch.nn.functional.one_hot(tokens, mask + 1).double()
    noise = torch.nn.functional.one_hot(torch.tensor(mask), mask + 1).double()
    revealed = (1 - sigma) * here + sigma * noise
    clean = torch.nn.functional.pad(c, (0, 1)) * (b - (1 - sigma) * a) / (1 - a)
    masked = clean + (1 - b - sigma * a) / (1 - a) * noise
    return torch.where((tokens == mask)[..., None], masked, revealed)


def published_sigma(name, a, b, t):
    most = min(1.0, (1 - b) / a)
    return {
        "remdm-cap:0.1": min(0.1, most),
        "remdm-rescale:0.4": 0.4 * most,
        "remdm-loop:0.1": 0.1 if a == pytest.approx(b) else 0.0,
        "forward-backward": min((b - a) / a, most),
        "dfm:0.7": min(0.7 * (b - a) / a, most),
        "dfm": min(10 * (t * (1 - t)) ** 0.25 * (b - a) / a, most),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["remdm-cap:0.1", "remdm-rescale:0.4", "remdm-loop:0.1", "forward-backward", "dfm:0.7", "dfm"],
)
def test_psi_schedules_are_the_remdm_kernels(name):
    """The library's steps against the published ones, every state, every step with signal."""
    process = Absorbing(3)
    denoiser = TableDenoiser(random_joint(3, 2), process)
    psi = parse_psi(name, process.schedule, 20)
    kernel = InterpolatingKernel(process, denoiser, psi=psi)
    states = all_states(4, 2)
    sigmas = []
    for k in range(1, 20):
        a, b = (float(x) for x in kernel.alphas[k : k + 2])
        sigmas.append(published_sigma(name, a, b, float(kernel.times[k])))
        c = denoiser(states, float(kernel.times[k])).exp()
        expected = remdm_rows(states, c, a, b, sigmas[-1])
        got = kernel.step({"tokens": states}, k).dense_log_probs().exp()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert max(sigmas) > 0.01


def test_flow_matching_weights():
    """Weights ``1 + w`` forward and ``w`` backward: reveal ``(1 + w)(b - a)/(1 - a)``, remask."""
    process, w = Absorbing(3), 0.7
    psi = parse_psi(f"dfm:{w}", process.schedule, 20)
    kernel = InterpolatingKernel(process, TableDenoiser(random_joint(3, 1), process), psi=psi)
    a, b = (float(x) for x in kernel.alphas[9:11])
    rows = kernel.step({"tokens": torch.tensor([[3], [1]])}, 9).dense_log_probs().exp()[:, 0]
    assert float(1 - rows[0, 3]) == pytest.approx((1 + w) * (b - a) / (1 - a))
    assert float(rows[1, 3]) == pytest.approx(w * (b - a) / a)


def held(name, kappa, length=2):
    """A chain that holds its time for one step, with ``kappa`` at the sites of that step."""
    process = toy_process(name)
    denoiser = TableDenoiser(random_joint(3, length, sharpness=1.5), process)
    table = np.ones((3, length))
    table[1] = kappa
    return InterpolatingKernel(process, denoiser, times=[1.0, 0.4, 0.4, 0.0], kappa=table)


def hold_error(name, kappa):
    """How far the hold moves the exact noised law."""
    kernel = held(name, kappa)
    process, joint = kernel.process, kernel.denoiser.joint
    states = all_states(process.num_states, 2)
    matrix = kernel.step({"tokens": states}, 1).log_prob(states[:, None]).exp().T
    law = forward_law(process, joint.flatten(), float(kernel.alphas[1]), 2)
    return float((law @ matrix - law).abs().sum() / 2)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("site", [0, 1])
@pytest.mark.parametrize("kappa", [0.9, 0.3, 0.0, -0.07])
def test_correcting_one_site_leaves_the_law_alone(name, site, kappa):
    """At ``a = b`` it is a Gibbs step on that site and its clean token."""
    sites = np.ones(2)
    sites[site] = kappa
    assert hold_error(name, sites) < ROUND_OFF


@pytest.mark.parametrize("name", PROCESSES)
def test_correcting_several_sites_at_once_costs_the_square(name):
    errors = [hold_error(name, 1 - eps) for eps in (0.2, 0.1, 0.05)]
    assert errors[0] > 1e-4
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("text", ["constant:0.4", "remdm-cap:0.3", "remdm-loop:0.2", "lowest"])
@pytest.mark.parametrize("prompt", [None, torch.tensor([-1, 2])], ids=["free", "prompt"])
def test_path_densities_are_the_dense_ones(name, text, prompt):
    """Finite where reachable, ``-inf`` where not, and the dense number everywhere."""
    process = toy_process(name)
    psi = parse_psi("ancestral" if text == "lowest" else text, process.schedule, 3)
    room = np.clip(kappa_room(process, psi.alphas), -1, 0)
    kappa = 0.95 * room if text == "lowest" else psi.within(process).kappa
    denoiser = TableDenoiser(random_joint(3, 2), process)
    kernel = InterpolatingKernel(process, denoiser, times=psi.times, kappa=kappa)
    chain = ReverseChain(kernel, 2, prompt=prompt)
    exact = ExactChain.of(chain)
    paths = reachable_and_not(chain)
    log_p = chain.log_prob(paths)
    prob = exact.path_prob(paths)
    possible = prob > ROUND_OFF
    assert bool(possible.any())
    if process.absorbing or prompt is not None:
        assert bool((prob == 0).any())
    torch.testing.assert_close(log_p.exp(), prob.clamp_min(0), rtol=1e-9, atol=1e-14)
    assert bool(torch.isfinite(log_p[possible]).all())
    assert bool((log_p[prob == 0] == -torch.inf).all())


def reachable_and_not(chain, n=20_000):
    """Sampled paths, random sequences of states, and sampled paths with one state changed."""
    generator = torch.Generator().manual_seed(0)
    size, shape = chain.kernel.process.num_states, (n, *chain.event_shape)
    sampled = chain.sample((n,), generator=generator)
    anything = torch.randint(size, shape, generator=generator)
    changed = sampled.clone()
    step = torch.randint(shape[1], (n,), generator=generator)
    changed[torch.arange(n), step, 0] = anything[torch.arange(n), step, 0]
    return torch.unique(torch.cat([sampled, anything, changed]), dim=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_dense_rows_of_negative_kappa_are_laws(name):
    process = toy_process(name)
    psi = parse_psi("ancestral", process.schedule, 4)
    kappa = 0.95 * np.clip(kappa_room(process, psi.alphas), -1, 0)
    kernel = InterpolatingKernel(
        process, TableDenoiser(random_joint(3, 2), process), num_steps=4, kappa=kappa
    )
    for k in range(4):
        matrix = state_matrix(kernel, k, 2)
        reachable = torch.ones(len(matrix), dtype=torch.bool)
        if process.absorbing and k == 0:  # nothing is revealed at alpha = 0
            reachable[:-1] = False
        assert float(matrix[reachable].min()) > -ROUND_OFF
        total = matrix.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_negative_kappa_still_reaches_the_data(name):
    """Anticipating instead of correcting: valid, and it converges as well."""
    joint, process = random_joint(3, 2), toy_process(name)
    tv = []
    for steps in (8, 32):
        alphas = np.linspace(0, 1, steps + 1)
        kappa = 0.5 * np.clip(kappa_room(process, alphas), -0.1, 0)
        tv.append(distance(joint, process, num_steps=steps, kappa=kappa))
    assert tv[1] < 0.75 * tv[0]
