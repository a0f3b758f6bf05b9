"""Propose reverse chains with sequential Monte Carlo, without changing the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.handlers.clamp import ClampedChain, ClampProposal
from ppl_diffusion.handlers.site import ProposedChain, SiteMessenger
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.smc.engine import SMCTrace, smc_loop
from ppl_diffusion.smc.feynman_kac import LOG_PROB, FeynmanKac
from ppl_diffusion.smc.resampling import Resampler, Stratified, as_resampler
from ppl_diffusion.smc.twists import TwistLike


@dataclass(frozen=True)
class Steering:
    """How to propose one chain site; also the value of the hint ``infer={"steer": ...}``.

    :param potential: what to steer towards: a potential or a function of ``x0 (*batch, L)``.
    :param num_particles: particles of the run behind each draw; 1 is ancestral sampling.
    :param resampler: resampling scheme.
    :param ess_threshold: resample below this fraction of the particles.
    :param twist: look-ahead, as in :class:`~ppl_diffusion.smc.FeynmanKac`.
    :param excludes: say so if the potential's ``-inf`` are meant, because the program itself
        excludes those sequences; otherwise the first one met is warned about.
    """

    potential: AbstractPotential | Callable[[Tensor], Tensor]
    num_particles: int = 64
    resampler: str | Resampler = "systematic"
    ess_threshold: float = 0.5
    twist: TwistLike = "argmax"
    excludes: bool = False


def as_steering(hint: Steering | AbstractPotential | Callable[[Tensor], Tensor]) -> Steering:
    """Return a site's hint as a :class:`Steering`; a bare potential gets the defaults.

    :param hint: the value of ``infer={"steer": ...}``.
    """
    return hint if isinstance(hint, Steering) else Steering(hint)


class SteeredChain(ProposedChain):
    """A chain site proposed by SMC: a sampler with a properly weighted, random density.

    Each draw is one path picked from the final particles of its own run. ``log_prob`` of the
    draw is ``log p(path) - (log Z_hat - log G(x0))``, so that importance weights against the
    chain are the site weight ``log Z_hat - log G`` and unbiased whatever the potential is
    (particle-marginal argument: Andrieu, Doucet and Holenstein 2010, Sec. 4.1).

    :param chain: the chain.
    :param steering: how to propose.
    :param clamp: tokens to hold, or None.
    """

    def __init__(
        self, chain: ReverseChain, steering: Steering, clamp: ClampProposal | None = None
    ) -> None:
        self.steering, self.clamp = steering, clamp
        super().__init__(chain)

    def with_clamp(self, clamp: ClampProposal) -> SteeredChain:
        """Return the same site with (further) tokens held.

        :param clamp: the clamp.
        """
        merged = clamp if self.clamp is None else self.clamp.merge(clamp)
        return SteeredChain(self.chain, self.steering, merged)

    def _with_chain(self, chain: ReverseChain) -> Self:
        return type(self)(chain, self.steering, self.clamp)

    def _model_log_prob(self, path: Tensor) -> Tensor:
        log_p = self.chain.log_prob(path)
        if self.clamp is None:
            return log_p
        return torch.where(self.clamp.holds(self.x0(path)), log_p, -torch.inf)

    def _propose(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        trace = self._run(shape.numel())
        self._warn_of_exclusions(trace.log_potential)
        uniforms = torch.rand(shape.numel(), 1, dtype=torch.float64)
        chosen = Stratified().draw(uniforms, _safe(trace.weights.log))
        path = trace.paths()
        assert path is not None
        path = path[torch.arange(len(chosen)), chosen[:, 0]].to(torch.int64)
        log_p = trace.carry[LOG_PROB].gather(1, chosen)[:, 0]
        log_z, log_g = trace.log_evidence_steps[:, -1], trace.log_potential.gather(1, chosen)[:, 0]
        alive = log_z > -torch.inf
        log_weight = torch.where(alive, log_z - torch.where(alive, log_g, 0.0), -torch.inf)
        return (
            path.reshape(*shape, *self.event_shape),
            log_p.reshape(shape),
            log_weight.reshape(shape),
        )

    def _run(self, runs: int) -> SMCTrace:
        how, chain = self.steering, _unbatched(self.chain)
        fk = FeynmanKac(chain, how.potential, twist=how.twist, proposal=self.clamp)
        with torch.no_grad():
            return smc_loop(
                fk.bind(track_log_prob=True),
                fk.num_steps,
                how.num_particles,
                runs,
                as_resampler(how.resampler),
                how.ess_threshold,
                None,
                record="tokens",
            )

    def _warn_of_exclusions(self, log_potential: Tensor) -> None:
        if self.steering.excludes or not bool((log_potential == -torch.inf).any()):
            return
        warnings.warn(
            "steer: the potential excludes sequences (-inf); weights are right only if the "
            "program gives them probability zero too. Say excludes=True if it does.",
            UserWarning,
            stacklevel=2,
        )


def _unbatched(chain: ReverseChain) -> ReverseChain:
    return ReverseChain(chain.kernel, chain.length, prompt=chain.prompt)


def _safe(log_weights: Tensor) -> Tensor:
    """Give a dead run equal weights: some path must be returned, with weight zero."""
    dead = (log_weights == -torch.inf).all(-1, keepdim=True)
    return torch.where(dead, 0.0, log_weights)


class SteerMessenger(SiteMessenger):
    """The handler behind :func:`steer`.

    :param steering: for chain sites without a hint of their own; None leaves those alone.
    """

    handler = "steer"
    advice = (
        "give a potential or a site hint, and wrap the model where inference blocks outer handlers"
    )

    def __init__(self, steering: Steering | None) -> None:
        super().__init__()
        self.steering = steering

    def _exchanged(self, msg: Any) -> TorchDistribution | None:
        fn, twisted = msg["fn"], hasattr(msg["fn"], "with_steering")
        if not (twisted or isinstance(fn, ReverseChain | ClampedChain)):
            return None
        hint = msg["infer"].get("steer", self.steering)
        if hint is None:
            return None
        steering = msg["infer"]["steer"] = as_steering(hint)
        if twisted:
            steered: TorchDistribution = fn.with_steering(steering)
            return steered
        if isinstance(fn, ClampedChain):
            return SteeredChain(fn.chain, steering, fn.clamp)
        return SteeredChain(fn, steering)


def steer(
    fn: Callable[..., Any] | None = None,
    *,
    potential: AbstractPotential | Callable[[Tensor], Tensor] | None = None,
    num_particles: int = 64,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    twist: TwistLike = "argmax",
    excludes: bool = False,
) -> Any:
    """Propose each reverse-chain site with sequential Monte Carlo.

    The joint density of the program is unchanged: a site is drawn from a run that targets
    ``p(path) exp(potential)`` and carries the weight ``log Z_hat - potential(x0)``. Any finite
    potential is valid and a bad one only adds variance. Use it around plain Pyro importance
    sampling; a site's own ``infer={"steer": Steering(...)}`` takes precedence.

    :param fn: a program to wrap; without it, use ``steer`` as a context manager. Wrap the
        program for ``pyro.infer.Importance``, which blocks all handlers outside of it.
    :param potential: what to steer towards (optional where sites carry hints).
    :param num_particles: particles of the run behind each draw; 1 is ancestral sampling.
    :param resampler: resampling scheme.
    :param ess_threshold: resample below this fraction of the particles.
    :param twist: look-ahead, as in :class:`~ppl_diffusion.smc.FeynmanKac`.
    :param excludes: see :class:`Steering`.
    :raises ValueError: if no chain site is met.

    Example::

        steered = steer(assay, potential=Reward(dock, temperature=0.1), num_particles=64)
        posterior = pyro.infer.Importance(steered, num_samples=100).run(y)
    """
    steering = None
    if potential is not None:
        steering = Steering(potential, num_particles, resampler, ess_threshold, twist, excludes)
    messenger = SteerMessenger(steering)
    return messenger if fn is None else messenger(fn)


def log_weight(trace: Trace) -> Tensor:
    """Return the importance weight of one steered or clamped run of a program.

    The sum of the observed sites' log-densities and of the site weights; its exponential is
    unbiased for the program's evidence.

    :param trace: a trace of the program, recorded under :func:`steer` (and :func:`clamp`).
    :returns: a scalar, float64.
    """
    trace.compute_log_prob(lambda name, site: site["is_observed"])
    total = torch.zeros((), dtype=torch.float64)
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"]:
            total = total + site["log_prob_sum"]
        elif site["type"] == "sample" and isinstance(site["fn"], ProposedChain):
            draw = site["fn"].draw
            if draw is None:
                raise ValueError(f"log_weight: site {site['name']!r} did not draw its own value.")
            total = total + draw.log_weight.sum()
    return total
