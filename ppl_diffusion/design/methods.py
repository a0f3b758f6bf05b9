"""The inference programs a question can be given to: every method the command line knows.

All share the prior, the potentials and the seed of the job. Two of them count reveals instead of
time on a masked prior, and then sample the *ordered* chain, whose finite-step law is another one;
the target each result declares says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.design.program import Target
from ppl_diffusion.design.search import Search
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference import (
    BestOfN,
    Corrector,
    FKSteering,
    Power,
    SoftValueGuidance,
    Tilt,
    TwistedSampler,
)
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.potentials import AbstractPotential, Constraint, SumPotential
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc
from ppl_diffusion.smc.engine import Progress
from ppl_diffusion.smc.twists import ArgmaxFill, FillTwist, PersistentFill, SampledFill

MISMATCH_PENALTY = 20.0
"""Nats a guess loses per wrong base where a base is fixed. Guesses hold fixed bases, so that only
a wrong base on its way into the sequence meets it; finite, as a look-ahead must be."""

Run = Callable[[Target, dict[str, Any]], ParticlePosterior]


def infer(target: Target, search: Search, progress: Progress | None = None) -> ParticlePosterior:
    """Sample the target by the method of a search.

    :param target: what is sampled.
    :param search: how.
    :param progress: called with ``(steps done, steps in all)``.
    :returns: the particles; their ``target`` declares the law they are for.
    """
    asked = {f.name: getattr(search, f.name) for f in dataclasses.fields(search)}
    posterior = _METHODS[search.method](target, {**asked, "progress": progress})
    if not target.num_fixed:
        return posterior
    how = "whose probability is part of it" if posterior.exact else "which every draw holds"
    claim = f"{posterior.target}; given {target.num_fixed} fixed bases, {how}"
    return dataclasses.replace(posterior, target=claim)


def _smc(target: Target, asked: dict[str, Any]) -> ParticlePosterior:
    model = FeynmanKac(target.chain, target.potential, twist=_twist(asked), proposal=target.clamp)
    generator = torch.Generator().manual_seed(asked["seed"])
    posterior = run_smc(model, generator=generator, **_common(asked))
    said = {"method": "smc", "seed": asked["seed"]}
    return dataclasses.replace(posterior, settings={**posterior.settings, **said})


def _soft_value(target: Target, asked: dict[str, Any]) -> ParticlePosterior:
    program = SoftValueGuidance(
        target.chain,
        target.potential,
        num_children=asked["children"],
        alpha=asked["alpha"],
        value=_twist(asked),
        weighted=asked["weighted"],
        proposal=target.clamp,
        **_common(asked),
    )
    return program.run(seed=asked["seed"])


def _steering(target: Target, asked: dict[str, Any]) -> ParticlePosterior:
    program = FKSteering(
        target.chain,
        target.potential,
        kind=asked["kind"],
        every=asked["every"],
        twist=_twist(asked),
        proposal=target.clamp,
        **_common(asked),
    )
    return program.run(seed=asked["seed"])


def _twisted(target: Target, asked: dict[str, Any]) -> ParticlePosterior:
    twist = _held_twist(target, asked)
    if target.masked:
        chain, potential = _ordered(target), _held_potential(target)
        program = TwistedSampler(
            chain, potential, proposal="clamped", twist=twist, **_common(asked)
        )
    else:
        program = TwistedSampler(
            target.chain, target.potential, proposal="reweighted", twist=twist, **_common(asked)
        )
    return _declared(program.run(seed=asked["seed"]), target)


def _corrector(target: Target, asked: dict[str, Any]) -> ParticlePosterior:
    twist = _held_twist(target, asked)
    program = Corrector(
        Tilt(Power(target.chain, asked["power"]), _held_potential(target)),
        twist=twist,
        # With four letters to ask about, looking before every reveal is worth its calls.
        clamp=target.masked and twist is not None,
        **_common(asked),
    )
    posterior = program.run(seed=asked["seed"])
    return _declared(posterior, target) if asked["power"] == 1 else posterior


def _best_of_n(target: Target, asked: dict[str, Any]) -> ParticlePosterior:
    names = ("num_particles", "num_runs", "progress")
    program = BestOfN(
        target.chain,
        target.potential,
        keep=asked["keep"],
        proposal=target.clamp,
        **{name: asked[name] for name in names},
    )
    return program.run(seed=asked["seed"])


_METHODS: Mapping[str, Run] = {
    "smc": _smc,
    "soft-value": _soft_value,
    "steering": _steering,
    "twisted": _twisted,
    "corrector": _corrector,
    "best-of-n": _best_of_n,
}


def _common(asked: dict[str, Any]) -> dict[str, Any]:
    names = ("num_particles", "num_runs", "resampler", "ess_threshold", "progress")
    # Lineages that nothing weighs have no threshold to fall below.
    return {name: asked[name] for name in names if asked[name] is not None}


def _twist(asked: dict[str, Any]) -> FillTwist | None:
    name, fills = asked["twist"], asked["fills"]
    if name == "none":
        return None
    if name == "argmax":
        return ArgmaxFill()
    return PersistentFill(fills) if name == "persistent" else SampledFill(fills)


def _ordered(target: Target) -> ReverseChain:
    """Return the chain that reveals as many bases at a time as end within the steps asked for."""
    kernel, length = target.chain.kernel, target.chain.length
    size = -(-length // target.chain.num_steps)
    ordered = OrderedKernel(kernel.process, kernel.denoiser, length=length, group_size=size)
    return ReverseChain(ordered, length)


def _declared(posterior: ParticlePosterior, target: Target) -> ParticlePosterior:
    """Return a result that says in the words all methods share which plain chain it tilts."""
    if not target.masked:
        return dataclasses.replace(
            posterior, target=FeynmanKac(target.chain, target.potential).target
        )
    size = -(-target.chain.length // posterior.num_steps)
    claim = (
        "Pr(order) * the product over reveals of p, each factor given the tokens revealed before, "
        f"in a uniformly random order, {'one site' if size == 1 else f'{size} sites'} per step, "
        f"times G(x0) with log G = {target.potential.name}, normalised; log_evidence estimates "
        "the log of its normalising constant"
    )
    return dataclasses.replace(posterior, target=claim)


# Fixed bases where a method proposes tokens its own way: a constraint, and guesses that hold them.


def _held_potential(target: Target) -> AbstractPotential:
    clamp = target.clamp
    if clamp is None:
        return target.potential
    held = clamp
    rule = Constraint(
        lambda x0: ((x0 != held.tokens) & held.mask).sum(-1),
        penalty=MISMATCH_PENALTY,
        name="the fixed bases",
    )
    return SumPotential((*target.potentials.values(), rule))


def _held_twist(target: Target, asked: dict[str, Any]) -> FillTwist | None:
    twist, clamp = _twist(asked), target.clamp
    return twist if twist is None or clamp is None else HeldFill(twist, clamp)


class HeldFill(FillTwist):
    """Completions that hold the fixed bases wherever they still can.

    :param base: how the other positions are filled.
    :param clamp: the fixed bases.
    """

    name = "held"

    def __init__(self, base: FillTwist, clamp: ClampProposal) -> None:
        self.base, self.clamp, self.num_fills = base, clamp, base.num_fills

    def init(self, shape: tuple[int, ...], generator: Any) -> Tensor | None:
        """Return the noise of the inner fill."""
        return self.base.init(shape, generator)

    def uniforms(
        self, carried: Tensor | None, shape: tuple[int, ...], generator: Any
    ) -> Tensor | None:
        """Return the noise of the inner fill."""
        return self.base.uniforms(carried, shape, generator)

    def fill(self, log_x0: Tensor, uniforms: Tensor | None) -> Tensor:
        """Return completions; a position that was given another base keeps it."""
        size = log_x0.shape[-1]
        known = torch.nn.functional.one_hot(self.clamp.tokens, size).to(log_x0.dtype).log()
        possible = (log_x0 + known).amax(-1) > -torch.inf
        held = (self.clamp.mask & possible)[..., None]
        return self.base.fill(torch.where(held, known, log_x0), uniforms)
