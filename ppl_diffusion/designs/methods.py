"""From a question and a search to particles: any registered method, one runner.

All share the prior, the potentials and the seed of the job. Methods that choose a token before its
position is revealed count reveals instead of time on a masked prior: they sample the *ordered*
chain, whose finite-step law is another one. The law of each result says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.designs.program import Target
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference import (
    SMC,
    Composition,
    Corrector,
    Method,
    Power,
    Refinement,
    TwistedSampler,
)
from ppl_diffusion.inference.lockstep import LockstepMover, RandomSites
from ppl_diffusion.jobs.backends import jax_room
from ppl_diffusion.jobs.checks import InputError, user_input
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.kernels import DirectKernel, OrderedKernel
from ppl_diffusion.kernels.completions import Completions
from ppl_diffusion.potentials import AbstractPotential, Constraint, SumPotential
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.smc import ParticlePosterior
from ppl_diffusion.smc.engine import Progress
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.twists import FillTwist

MISMATCH_PENALTY = 20.0
"""Nats a guess loses per wrong base where a base is fixed. Guesses hold fixed bases, so that only
a wrong base on its way into the sequence meets it; finite, as a look-ahead must be."""


def infer(target: Target, search: Search, progress: Progress | None = None) -> ParticlePosterior:
    plan = _plan(target, search)
    if search.backend is not None:
        posterior = _in_jax(plan, search)
        return dataclasses.replace(posterior, law=_declared(posterior.law, target, plan))
    with user_input():
        runner = SMC(
            Power(plan.chain, plan.power) if plan.power != 1 else plan.chain,
            plan.potential,
            method=plan.method,
            num_particles=search.num_particles,
            num_runs=search.num_runs,
            resampler=search.resampler or "systematic",
            ess_threshold=search.ess_threshold,
            progress=progress,
        )
    try:
        posterior = runner.run(seed=search.seed)
    except CapabilityError as error:  # a method that this prior's chain has nothing to offer to
        learned = isinstance(target.chain.kernel, DirectKernel)
        others = " Noise that was learned takes --method smc, steering or soft-value."
        raise InputError(f"--method {search.method}: {error}{others * learned}") from error
    return dataclasses.replace(posterior, law=_declared(posterior.law, target, plan))


def _in_jax(plan: _Plan, search: Search) -> ParticlePosterior:
    """Return particles of the compiled engine, which asks the potential on the host."""
    room = jax_room()
    if plan.power != 1:
        raise InputError("Powers of a prior are sampled by torch alone: drop --backend numpyro.")
    method, held = plan.method, _proposal(plan.method)
    import jax

    from ppl_diffusion.numpyro.methods import require_method

    with user_input():
        require_method(method)
        chain = room.from_torch(plan.chain)
        if isinstance(held, ClampProposal):
            tokens = torch.where(held.mask, held.tokens, -1)
            chain = room.ProposedChain.of(chain).holding(tokens.numpy())
            method = dataclasses.replace(method, **{"proposal": None})
        runner = room.SMC(
            chain,
            plan.potential,
            method=method,
            num_particles=search.num_particles,
            num_runs=search.num_runs,
            resampler=search.resampler or "systematic",
            ess_threshold=search.ess_threshold,
        )
        posterior: ParticlePosterior = runner.run(jax.random.key(search.seed))
    return posterior


@dataclass(frozen=True)
class _Plan:
    chain: ReverseChain
    potential: AbstractPotential
    method: Method
    power: float


def _plan(target: Target, search: Search) -> _Plan:
    method = search.make()
    if not isinstance(method, Refinement):
        return _plan_of(target, search, method)
    plan = _plan_of(target, search, method.guide)
    potential = plan.potential
    if target.clamp is not None and isinstance(_proposal(plan.method), ClampProposal):
        # The guide's particles hold the fixed bases; moves propose others, which must be worth 0.
        potential = _held_potential(target, target.clamp)
        plan = dataclasses.replace(plan, method=_held(plan.method, target.clamp))
    refined = dataclasses.replace(method, inner=plan.method)
    return dataclasses.replace(plan, potential=potential, method=refined)


def _proposal(method: Method) -> object:
    return getattr(method, "proposal", None)


def _plan_of(target: Target, search: Search, method: Method) -> _Plan:
    power = search.options.get("power", 1.0)
    chain = _ordered(target) if target.masked and _reveals(method) else target.chain
    if isinstance(method, Corrector) and "clamp" not in search.options:
        # With four letters to ask about, looking before every reveal is worth its calls.
        ahead = _reveals(method) and target.masked and method.twist is not None
        method = dataclasses.replace(method, clamp=ahead)
    if target.clamp is None:
        return _Plan(chain, target.potential, method, power)
    if isinstance(chain.kernel, DirectKernel):  # known tokens are a likelihood there
        return _Plan(chain, _held_potential(target, target.clamp), method, power)
    if method.holds_clamps and hasattr(method, "proposal"):
        method = dataclasses.replace(method, **{"proposal": target.clamp})
        return _Plan(chain, target.potential, method, power)
    if not target.masked:
        raise InputError(
            f"The method {method.name} holds fixed bases on masked priors alone: drop --fix, or "
            "choose another --method."
        )
    return _Plan(chain, _held_potential(target, target.clamp), _held(method, target.clamp), power)


def _reveals(method: Method) -> bool:
    """Whether a method chooses tokens at the positions that are revealed next."""
    if isinstance(method, TwistedSampler):
        return method.proposal != "reweighted"
    return isinstance(method, Corrector) and method.form in ("auto", "lockstep")


def _ordered(target: Target) -> ReverseChain:
    """Return the chain that reveals as many bases at a time as end within the steps asked for."""
    kernel, length = target.chain.kernel, target.chain.length
    size = -(-length // target.chain.num_steps)
    ordered = OrderedKernel(kernel.process, kernel.denoiser, length=length, group_size=size)
    return ReverseChain(ordered, length)


def _declared(law: Law, target: Target, plan: _Plan) -> Law:
    """Return the law in terms of what was asked, however the method came to it."""
    asked = ChainSite("x", plan.chain, target.clamp).base()
    (known,) = law.chains
    held = dataclasses.replace(known, clamped=asked.clamped, digest=asked.digest)
    tilts = tuple(dataclasses.replace(tilt, of=target.potential.name) for tilt in law.tilts)
    return law.but(chains=(held,), tilts=tilts, product=_product(law, plan))


def _product(law: Law, plan: _Plan) -> str:
    ordered = isinstance(plan.chain.kernel, OrderedKernel)
    if ordered and not isinstance(plan.method, Corrector):
        one = Composition([(plan.chain, 1.0)])
        mover = LockstepMover(one, rule=RandomSites(), twist=None, max_rows=None)
        return mover.target_law.format(law=one.law)
    # Path by path, the first power of a chain is the chain: noise and forward factors cancel.
    return "p(path)" if law.exact and plan.power == 1 and not ordered else law.product


# Fixed bases where a method proposes tokens its own way: a constraint, and guesses that hold them.


def _held_potential(target: Target, clamp: ClampProposal) -> AbstractPotential:
    rule = Constraint(
        lambda x0: ((x0 != clamp.tokens.to(x0.device)) & clamp.mask.to(x0.device)).sum(-1),
        penalty=MISMATCH_PENALTY,
        name="the fixed bases",
    )
    return SumPotential((*target.potentials.values(), rule))


def _held(method: Method, clamp: ClampProposal) -> Method:
    twist = getattr(method, "twist", None)
    if not isinstance(twist, FillTwist) and twist != "auto":
        return method
    return dataclasses.replace(method, **{"twist": HeldFill(method.fill, clamp)})


class HeldFill(FillTwist):
    """Completions by ``base`` that hold the fixed bases wherever they still can."""

    name = "held"

    def __init__(self, base: FillTwist, clamp: ClampProposal) -> None:
        self.base, self.clamp, self.num_fills = base, clamp, base.num_fills
        self.floor = base.floor

    def init(self, shape: tuple[int, ...], generator: Any) -> Tensor | None:
        return self.base.init(shape, generator)

    def uniforms(
        self, carried: Tensor | None, shape: tuple[int, ...], generator: Any
    ) -> Tensor | None:
        return self.base.uniforms(carried, shape, generator)

    def fill(self, completions: Completions, uniforms: Tensor | None) -> Tensor:
        """Return completions; a position that was given another base keeps it."""
        tokens, mask = self.clamp.tokens, self.clamp.mask
        filled = self.base.fill(completions, uniforms)
        known = tokens.to(filled.device)
        held = mask.to(filled.device) & completions.allow(known)
        return torch.where(held[:, :, None], known, filled)
