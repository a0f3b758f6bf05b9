"""One exact problem for every program: the fixture ``posed`` poses it to each of them in turn."""

import math
from dataclasses import dataclass
from functools import partial

import pyro
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import LogitsProposal
from ppl_diffusion.inference import SMC, Power, Tilt
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Potential, factor
from ppl_diffusion.smc import RESAMPLERS, PersistentFill
from ppl_diffusion.testing import random_joint, state_index, toy_chain, toy_potential, z_score
from ppl_diffusion.testing.path_laws import PathLaw

SIZE, LENGTH = 2, 4
GOAL = toy_potential(SIZE, LENGTH, scale=1.5)
FEATURE = toy_potential(SIZE, LENGTH, seed=7)
LOGITS = 0.3 * torch.randn(LENGTH, SIZE, generator=torch.Generator().manual_seed(9))
LADDER = [0.0, 0.3, 0.7, 1.0]
GENTLE = {"max": 0.5, "soft value": 0.6}
"""Powers of ``G`` for programs that resample greedily: their evidence has a heavy tail."""


class Biased:
    """The right answer mixed with a preference that depends on how much is masked.

    No two orders of reveals agree on the density of a sequence.
    """

    def __init__(self, base):
        self.base, self.kind, self.time_free = base, base.kind, base.time_free
        self.vocab_size = base.vocab_size

    def __call__(self, tokens, t):
        share = (tokens == SIZE).double().mean(-1)[..., None, None]
        other = torch.cat([0.2 + 0.6 * share, 0.8 - 0.6 * share], -1)
        weight = 0.5 if self.time_free else 0.2  # uniform chains ask again at every step
        return torch.log((1 - weight) * self.base(tokens, t).exp() + weight * other)


class Renamed(Biased):
    """The same network with tokens 0 and 1 swapped on both sides."""

    def __call__(self, tokens, t):
        return self.base(torch.tensor([1, 0, 2])[tokens], t).flip(-1)


def masked_chain(wrap):
    """One reveal per step."""
    process = Absorbing(SIZE)
    denoiser = TableDenoiser(random_joint(SIZE, LENGTH, sharpness=1.5), process)
    return ReverseChain(OrderedKernel(process, wrap(denoiser), length=LENGTH), LENGTH)


def uniform_chain(wrap):
    """Three steps that redraw all positions."""
    chain = toy_chain("uniform", vocab_size=SIZE, length=LENGTH, num_steps=3, sharpness=1.5)
    return ReverseChain(chain.kernel.with_denoiser(wrap(chain.kernel.denoiser)), LENGTH)


def smc(chain, goal, **options):
    def program():
        path = pyro.sample("path", chain)
        factor("goal", goal, pyro.deterministic("x0", chain.x0(path), event_dim=1))

    return SMC(program, **options)


def annealed(chain, goal, **options):
    return SMC(Tilt(Power(chain, 2.0), goal), method="corrector", **options)


PROGRAMS = {
    "smc": smc,
    "difference": partial(SMC, method="steering"),
    "max": partial(SMC, method="steering", kind="max"),
    "soft value": partial(SMC, method="soft-value", num_children=3),
    "clamped": partial(SMC, method="twisted"),
    "surprise": partial(SMC, method="twisted", surprise=True, twist=PersistentFill(2)),
    "reweighted": partial(SMC, method="twisted", proposal="reweighted", twist=PersistentFill(3)),
    "logits": partial(
        SMC, method="twisted", proposal=LogitsProposal(lambda carry, log_d, k: LOGITS)
    ),
    "lockstep clamped": partial(SMC, method="corrector", clamp=True),
    "annealed": annealed,
    "importance": partial(SMC, method="importance-sampling"),
    "guided": partial(SMC, method="guided-lineages"),
    "tempering": partial(SMC, method="tempering", powers=LADDER),
    "waste-free": partial(SMC, method="tempering", powers=LADDER, waste_free=2),
    "uniform smc": smc,
    "uniform soft value": partial(SMC, method="soft-value", num_children=3),
    "uniform reweighted": partial(SMC, method="twisted", twist=PersistentFill(3)),
    "uniform annealed": annealed,
}


@dataclass
class Posed:
    """A program, a chain and a potential, and the declared law of paths."""

    name: str
    chain: ReverseChain
    goal: Potential
    law: PathLaw

    def run(self, particles, runs, *, seed=1, **options):
        options = {"num_particles": particles, "num_runs": runs, "store_path": False, **options}
        return PROGRAMS[self.name](self.chain, self.goal, **options).run(seed=seed)

    def again(self, power=1.0):
        """The same program on another power of ``G``."""
        return pose_problem(self.name, power)

    def ideal(self):
        """The same program on the chain of the right denoiser."""
        return pose_problem(self.name, wrap=lambda denoiser: denoiser)

    def renamed(self):
        """The same problem with its tokens swapped."""
        swapped = Potential(lambda x0: self.goal(1 - x0), name="swapped")
        return pose_problem(
            self.name, goal=swapped, wrap=lambda denoiser: Renamed(Biased(denoiser))
        )

    def ratio(self, posterior):
        return (posterior.log_evidence - self.law.log_z).exp()

    def scores(self, posterior):
        """How many standard errors ``Z_hat`` and ``Z_hat f_hat`` are off: both are unbiased."""
        ratio = self.ratio(posterior)
        mean = (posterior.weights * FEATURE(posterior.x0)).sum(-1)  # zero where a run died
        expected = float(self.law.probs @ FEATURE(self.law.paths[:, -1]))
        return z_score(ratio, 1.0), z_score(ratio * mean, expected)

    @property
    def x0_law(self):
        """Probability of every sequence."""
        index = state_index(self.law.paths[:, -1], SIZE)
        return torch.zeros(SIZE**LENGTH).double().index_add(0, index, self.law.probs)

    def mixed_law(self, posterior):
        """The law of one weighted draw per run, averaged over runs."""
        index, mass = state_index(posterior.x0, SIZE), posterior.weights / posterior.num_runs
        law = torch.zeros(SIZE**LENGTH).double()
        return law.index_add(0, index.flatten(), mass.flatten())

    @property
    def schedules(self):
        """Options of resampling that make a difference to the program."""
        if self.name in ("importance", "guided", "waste-free"):
            return [{}]
        if self.name == "tempering":  # resampled at every stage
            return [{"resampler": scheme} for scheme in RESAMPLERS]
        uniform = self.name.startswith("uniform")
        schemes = ("systematic", "multinomial") if uniform else RESAMPLERS
        pairs = [(s, tau) for s in schemes for tau in (0.5, 1.01)]
        pairs = [("systematic", 0.0), *pairs]
        return [{"resampler": scheme, "ess_threshold": tau} for scheme, tau in pairs]


def pose_problem(name, power=1.0, *, goal=None, wrap=Biased):
    goal = power * GENTLE.get(name, 1.0) * GOAL if goal is None else goal
    chain = (uniform_chain if name.startswith("uniform") else masked_chain)(wrap)
    law = PathLaw.of(chain, goal)
    return Posed(name, chain, goal, annealed_law(law, chain, goal) if "annealed" in name else law)


def annealed_law(law, chain, goal):
    """The declared path target at exponent 2, from the law of the chain's own paths.

    Masks: ``Pr(order) prod D^2 G``, where the chain has ``Pr(order) prod D``. Uniform noise:
    ``prod K^2 / q G`` with the forward kernel ``q`` of every step.
    """
    log_g = goal(law.paths[:, -1])
    log_p = law.probs.log() + law.log_z - log_g
    if chain.kernel.process.absorbing:
        log_gamma = 2 * log_p + math.lgamma(LENGTH + 1) + log_g
    else:
        alphas = torch.as_tensor(chain.kernel.alphas)
        kept = (alphas[:-1] / alphas[1:])[:, None]
        same = (law.paths[:, :-1] == law.paths[:, 1:]).double()
        log_q = torch.log(kept * same + (1 - kept) / SIZE).sum((-2, -1))
        log_gamma = 2 * log_p - log_q + log_g
    log_z = torch.logsumexp(log_gamma, 0)
    return PathLaw(law.paths, (log_gamma - log_z).exp(), float(log_z))


POSED = {name: pose_problem(name) for name in PROGRAMS}


@pytest.fixture(params=list(PROGRAMS))
def posed(request):
    return POSED[request.param]


@pytest.fixture
def pose():
    return pose_problem
