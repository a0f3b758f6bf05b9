"""How a chain is drawn by sequential Monte Carlo, with a weight that makes up for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.smc import FeynmanKac, Proposal, Resampler, Stratified, smc_loop
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.feynman_kac import LOG_PROB
from ppl_diffusion.smc.resampling import as_resampler
from ppl_diffusion.smc.twists import TwistLike


class Draw(NamedTuple):
    """Paths drawn from a proposal, and what they weigh.

    :param path: int64 ``(*batch, T + 1, L)``.
    :param log_p: log-density under the chain, ``(*batch,)``.
    :param log_weight: importance weight against the chain, ``(*batch,)``.
    """

    path: Tensor
    log_p: Tensor
    log_weight: Tensor

    @property
    def log_q(self) -> Tensor:
        """Log-density (or its unbiased estimate) under the proposal."""
        return self.log_p - self.log_weight


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
    twist: TwistLike = "defensive"
    excludes: bool = False

    def propose(self, chain: ReverseChain, moves: Proposal | None, shape: torch.Size) -> Draw:
        """Draw paths, each picked from the final particles of a run of its own.

        The weight ``log Z_hat - log G(x0)`` against the chain is unbiased whatever the potential is
        (particle-marginal argument: Andrieu, Doucet and Holenstein 2010, Sec. 4.1).

        :param chain: the chain.
        :param moves: how particles move, None for the chain's own steps.
        :param shape: how many paths.
        """
        trace = self._run(_for_runs(chain, shape), moves, shape.numel())
        self._warn_of_exclusions(trace.log_potential)
        chosen = _pick(trace.weights.log)
        path = trace.path()
        assert path is not None
        path = path[torch.arange(len(chosen), device=path.device), chosen[:, 0]].to(torch.int64)
        log_p = trace.carry[LOG_PROB].gather(1, chosen)[:, 0]
        log_z, log_g = trace.log_evidence_steps[:, -1], trace.log_potential.gather(1, chosen)[:, 0]
        alive = log_z > -torch.inf  # a dead run has log G = -inf as well: no inf - inf
        log_weight = torch.where(alive, log_z - torch.where(alive, log_g, 0.0), -torch.inf)
        path = path.reshape(shape + chain.event_shape)
        return Draw(path, log_p.reshape(shape), log_weight.reshape(shape))

    def _run(self, chain: ReverseChain, moves: Proposal | None, runs: int) -> SMCTrace:
        fk = FeynmanKac(chain, self.potential, twist=self.twist, proposal=moves)
        bound, scheme = fk.bind(track_log_prob=True), as_resampler(self.resampler)
        size = (fk.num_steps, self.num_particles, runs)
        return smc_loop(bound, *size, scheme, self.ess_threshold, None, record=bound.record)

    def _warn_of_exclusions(self, log_potential: Tensor) -> None:
        if self.excludes or not bool((log_potential == -torch.inf).any()):
            return
        warnings.warn(
            "steer: the potential excludes sequences (-inf); weights are right only if the "
            "program gives them probability zero too. Say excludes=True if it does.",
            UserWarning,
            stacklevel=2,
        )


def as_steering(hint: Steering | AbstractPotential | Callable[[Tensor], Tensor]) -> Steering:
    """Return a site's hint as a :class:`Steering`; a bare potential gets the defaults.

    :param hint: the value of ``infer={"steer": ...}``.
    """
    return hint if isinstance(hint, Steering) else Steering(hint)


def _for_runs(chain: ReverseChain, shape: torch.Size) -> ReverseChain:
    # Plates are many runs of one chain: as a batch shape they would be plates of every particle.
    whole = chain.kernel.expand_given(chain.given, shape)
    given = {name: x.reshape(shape.numel(), *x.shape[len(shape) :]) for name, x in whole.items()}
    alone = ReverseChain(chain.kernel, chain.length, given={n: x[0] for n, x in given.items()})
    alone.given = {name: x[:, None] for name, x in given.items()}
    if chain.prompt is not None:  # with a size of one where the particles of a run stand
        alone.prompt = chain.prompt.expand(*shape, -1).reshape(-1, 1, chain.length)
    return alone


def _pick(log_weights: Tensor) -> Tensor:
    dead = (log_weights == -torch.inf).all(-1, keepdim=True)
    safe = torch.where(dead, 0.0, log_weights)  # some path must be returned, with weight zero
    uniforms = torch.rand(len(safe), 1, dtype=torch.float64, device=safe.device)
    return Stratified().draw(uniforms, safe)
