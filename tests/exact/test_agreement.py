"""M13, T6.8, T7.5: ways that must agree, and populations that may be pooled.

Means are held at four standard errors (false alarm 6e-5 each), distances of laws with their noise
stated: below .1 % for the file, once, at the fixed seeds. Torch and JAX are compared bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import GradientProposal, LogitsProposal
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.processes import mixture_sample
from ppl_diffusion.smc import RESAMPLERS, FeynmanKac, PersistentFill, Weights, run_smc
from ppl_diffusion.testing import (
    PROCESSES,
    ExactChain,
    random_joint,
    state_index,
    total_variation,
    toy_chain,
    toy_potential,
    toy_process,
    z_score,
)
from ppl_diffusion.testing.path_laws import PathLaw

SIZE, LENGTH = 3, 3
SLOPE = torch.randn(LENGTH, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# Section 6: one potential, every look-ahead and proposal.


def soft_potential(soft):
    """Linear in a soft sequence but for one product of neighbours."""
    return 1.5 * (soft * SLOPE).sum((-2, -1)) + 2.0 * (soft[:, 0] * soft[:, 1]).sum(-1)


def hard_potential(x0):
    rows = torch.nn.functional.one_hot(x0.reshape(-1, LENGTH), SIZE).to(torch.float64)
    return soft_potential(rows).reshape(x0.shape[:-1])


def reveal_chain():
    process = Absorbing(SIZE)
    denoiser = TableDenoiser(random_joint(SIZE, LENGTH, sharpness=1.5), process)
    return ReverseChain(OrderedKernel(process, denoiser, length=LENGTH), LENGTH)


def imperfect_value(goal):
    """Seven tenths of ``log E[G(x0) | x]`` under the data law, a table of partly masked states."""
    joint, clean = random_joint(SIZE, LENGTH, sharpness=1.5), goal(all_clean())
    states = torch.cartesian_prod(*[torch.arange(SIZE + 1)] * LENGTH)
    agree = ((states[:, None] == all_clean()) | (states[:, None] == SIZE)).all(-1)
    log_p = joint.flatten().log().expand(len(states), -1).masked_fill(~agree, -torch.inf)
    table = torch.logsumexp(log_p + clean, -1) - torch.logsumexp(log_p, -1)
    return lambda carry, k: 0.7 * table[state_index(carry["tokens"], SIZE + 1)]


def all_clean():
    return torch.cartesian_prod(*[torch.arange(SIZE)] * LENGTH)


GOAL = Potential(hard_potential, name="neighbours")
WAYS = {
    "6.2 gradient": {"proposal": GradientProposal(soft_potential)},
    "6.2 wrong gradient": {"proposal": GradientProposal(soft_potential, scale=-0.2)},
    "6.2 learned logits": {"proposal": LogitsProposal(lambda carry, log_d, k: 0.5 * SLOPE)},
    "6.3 clamped": {"twist": "argmax"},
    "6.3 few tokens": {"twist": "argmax", "top": 2},
    "6.3 surprise": {"twist": "exhaustive", "surprise": True},
    "6.4 persistent": {"twist": PersistentFill(2)},
    "6.5 reweighted": {"twist": PersistentFill(4), "proposal": "reweighted"},
    "6.6 learned twist": {"twist": imperfect_value(GOAL)},
}


@pytest.mark.parametrize("name", WAYS)
def test_all_of_section_six_agree_in_law(name):
    """T6.8 at N = 512, 60 runs. The noise of 27 cells is .01 to .03; the prior is .5 away."""
    chain = reveal_chain()
    law = PathLaw.of(chain, GOAL)
    index = state_index(law.paths[:, -1], SIZE)
    exact = torch.zeros(SIZE**LENGTH).double().index_add(0, index, law.probs)
    options = {"num_particles": 512, "num_runs": 60, "store_path": False, **WAYS[name]}
    posterior = SMC(chain, GOAL, method="twisted", **options).run(seed=4)
    weights = posterior.pooled_log_weights.exp().flatten()
    found = torch.zeros_like(exact).index_add(0, state_index(posterior.x0, SIZE).flatten(), weights)
    assert total_variation(found, exact) < 0.05
    assert total_variation(random_joint(SIZE, LENGTH, sharpness=1.5).flatten(), exact) > 0.3
    assert abs(z_score((posterior.log_evidence - law.log_z).exp(), 1.0)) < 4


# Section 7.5: islands.


def test_islands_are_pooled_by_their_evidence():
    """T7.5: many islands of four particles. The failing twin gives every island one vote."""
    chain, goal = toy_chain("uniform"), toy_potential(scale=2.5)
    exact = ExactChain.of(chain)
    generator = torch.Generator().manual_seed(3)
    islands = run_smc(FeynmanKac(chain, goal), 4, 20_000, generator=generator, store_path=False)
    assert abs(z_score(islands.log_evidence.exp(), exact.evidence(goal))) < 4
    pooled = exact.histogram(islands.x0, islands.pooled_log_weights.exp())
    voting = exact.histogram(islands.x0, islands.weights)
    assert total_variation(pooled, exact.posterior(goal)) < 0.01
    assert total_variation(voting, exact.posterior(goal)) > 0.03
    drawn = islands.resample(20_000, generator=generator)["x0"]
    assert total_variation(exact.histogram(drawn), exact.posterior(goal)) < 0.03


# Torch and JAX.


@pytest.fixture
def _x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("scheme", RESAMPLERS)
def test_whole_runs_have_the_same_ancestors(process, scheme):
    """M13: move, weigh and resample at every step from shared uniforms, on both backends."""
    steps, runs, particles, length = 5, 4, 7, 6
    process, resampler = toy_process(process), RESAMPLERS[scheme]
    rng = np.random.default_rng(0)
    moves = rng.uniform(size=(steps + 1, 2, runs, particles, length))
    points = rng.uniform(size=(steps, runs, resampler.num_uniforms(particles)))
    law = np.log(rng.dirichlet(np.ones(3), size=(process.num_states, length)))
    gain = rng.normal(size=(process.num_states, length))
    alphas = process.schedule.alpha(np.linspace(1, 0, steps + 1))

    def run(wrap):
        site, weights = wrap(np.arange(length)), Weights(wrap(np.zeros((runs, particles))))
        tokens = process.corrupt(
            wrap(np.zeros((runs, particles, length), np.int64)), 0.0, *wrap(moves[0])
        )
        rows, seen = wrap(np.arange(runs))[:, None], []
        for k in range(steps):
            a, b = float(alphas[k]), float(alphas[k + 1])
            log_c = wrap(law)[tokens, site]
            tokens = mixture_sample(process, tokens, log_c, a, b, *wrap(moves[k + 1]))
            weights = weights.add(wrap(gain)[tokens, site].sum(-1))
            ancestors = resampler(wrap(points[k]), weights.log)
            tokens = tokens[rows, ancestors]
            seen += [np.asarray(ancestors), np.asarray(tokens), np.asarray(weights.log)]
            weights = Weights(0.5 * weights.log[rows, ancestors])  # some weight is kept
        return seen

    for here, there in zip(run(torch.as_tensor), run(jnp.asarray), strict=True):
        if here.dtype == np.float64:
            np.testing.assert_allclose(here, there, rtol=1e-12)
        else:
            np.testing.assert_array_equal(here, there)
