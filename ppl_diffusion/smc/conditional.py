"""Conditional SMC: a population of particles around a path that is kept.

Slot 0 follows the retained path; at every resampling the other slots draw their ancestors from the
weights, slot 0 included, and slot 0 keeps itself. One slot drawn by the final weights, traced back,
is the next path: a Markov kernel that leaves ``p(path) G(x0)`` invariant for any number of
particles from two on (Andrieu, Doucet and Holenstein 2010, JRSS-B 72, Algorithm 2).

Two details decide. The other ancestors are independent draws in no particular order: sorted ones
are not exchangeable with slot 0 once that is overwritten, and the kernel then has another law. And
the retained particle is weighed like any other, against its own parent. If the retained path is a
draw of the target, ``E[1 / Z_hat] = 1 / Z``, so that a plain and a conditional run bracket
``log Z`` (Grosse, Ghahramani and Adams 2015, arXiv:1511.02543).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.blocks import Value, tokens_of, widened
from ppl_diffusion.smc.engine import Progress, SMCTrace, run_smc, smc_loop
from ppl_diffusion.smc.evaluated_potential import EvaluatedPotential
from ppl_diffusion.smc.feynman_kac import (
    LOG_PROB,
    BoundFeynmanKac,
    FeynmanKac,
    KernelProposal,
    ends,
    per_particle,
)
from ppl_diffusion.smc.late import require_in_time
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Multinomial, Resampler
from ppl_diffusion.smc.twists import Carry

_CONDITIONAL = (
    "conditional on a retained path, so that the weights are exact only where that path is a draw "
    "of this law, and log_evidence is then an upper bound on average"
)


@dataclass(frozen=True)
class ConditionalMultinomial(Resampler):
    """Slot 0 keeps itself; the others draw independently, in the order drawn (unsorted).

    Given that slot 0 survives this is the law of multinomial ancestors, so that ``E[copies]`` is
    *not* ``N w``: for conditional SMC only. The uniform of slot 0 is not used.
    """

    name = "conditional-multinomial"

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = array_namespace(weights)
        drawn = Multinomial()._ancestors(uniforms, weights)
        return xp.concat([xp.zeros_like(drawn[..., :1]), drawn[..., 1:]], axis=-1)


class ConditionalFeynmanKac(BoundFeynmanKac):
    """A bound Feynman-Kac model whose slot 0 follows a retained path.

    What a twist draws for itself (fill noise) is independent of the path under the target, so it is
    drawn anew for the retained particle in every run.

    :param model: the model; its chain needs a density.
    :param retained: one path per run, int64 ``(R, *plates, T + 1, L)``.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    :param potential: evaluates ``log G`` instead of the model's own potential, where it depends on
        the run; takes ``x0 (R, N, *plates, L)``.
    :raises CapabilityError: if the chain has no density.
    :raises ValueError: if the paths do not fit the chain.
    """

    def __init__(
        self,
        model: FeynmanKac,
        retained: Tensor,
        *,
        max_rows: int | None = None,
        potential: EvaluatedPotential | None = None,
    ) -> None:
        require_in_time(model.twist)
        retained = _check_paths(model, retained)
        # With the densities of the moves a retained path that the chain cannot take shows itself.
        super().__init__(model, max_rows=max_rows, track_log_prob=True)
        self.retained = retained
        if potential is not None:
            self.potential = potential

    def init(
        self,
        runs: int,
        particles: int,
        generator: torch.Generator | None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the noisiest states, slot 0 that of the retained path."""
        given = self.model.chain.given if given is None else given
        carry = super().init(runs, particles, generator, given)
        kernel = self._kernel
        start = kernel.split(_hold(kernel.flat(carry), self.retained[..., 0, :]))
        carry = {**carry, **kernel.resume(start, given)}
        if isinstance(self._proposal, KernelProposal):
            carry |= self._proposal.start(tokens_of(start), given)
        log_p = per_particle(kernel.prior_log_prob(start, self.model.chain.prompt))
        _require(log_p[:, :1] > -math.inf, "starts from a state that the chain cannot start from")
        return {**carry, LOG_PROB: log_p}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Move all slots but slot 0, which follows its path, and weigh all of them alike."""
        moved, log_ratio = super().move(carry, k, generator)
        possible = torch.isfinite(torch.as_tensor(log_ratio)[..., :1])
        _require(possible, f"makes a move of probability zero at step {k}")
        return moved, log_ratio

    def _draw(self, moves: TorchDistribution, k: int, generator: torch.Generator | None) -> Value:
        drawn = self._kernel.flat(super()._draw(moves, k, generator))
        return self._kernel.split(_hold(drawn, self.retained[..., k + 1, :]))

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return ``log h_k``; at the end that of the retained path must be possible."""
        value = super().log_twist(carry, k, generator)
        if k == self.model.num_steps and value is not None:
            _require(value[:, :1] > -math.inf, "ends in a sequence whose potential is -inf")
        return value


@dataclass(frozen=True, eq=False)
class ConditionalRun:
    """What a conditional SMC left behind.

    :param path: the next path of each run, int64 ``(R, *plates, T + 1, L)``.
    :param slot: the slot it was drawn from, int64 ``(R,)``; 0 is the retained one.
    """

    path: Tensor
    slot: Tensor
    trace: SMCTrace
    engine: ConditionalFeynmanKac

    @property
    def log_evidence(self) -> Tensor:
        """Running estimate of ``log Z``, too large on average, float64 ``(R,)``."""
        return self.trace.log_evidence_steps[:, -1]

    @property
    def log_potential(self) -> Tensor:
        """Return ``log G`` of the next path, float64 ``(R,)``."""
        return self.trace.log_potential.gather(1, self.slot[:, None])[:, 0]

    @property
    def moved(self) -> Tensor:
        """Whether the path changed anywhere, bool ``(R,)``."""
        return (self.path != self.engine.retained).flatten(1).any(-1)

    def posterior(self) -> ParticlePosterior:
        """Return the population as a posterior, ESS trace and lineage included.

        Its weights are exact if the retained path was a draw of the target, which nobody here can
        know; hence ``exact=False``.
        """
        model, tokens = self.engine.model, self.trace.carry["tokens"]
        return ParticlePosterior(
            x0=tokens,
            times=torch.as_tensor(model.chain.kernel.times),
            samples=ends(model.chain.kernel, self.trace.carry),
            num_evaluations=self.engine.num_evaluations,
            num_potential_calls=self.engine.num_potential_calls,
            law=model.law.but(exact=False, why=_CONDITIONAL),
            settings={**model.settings, "resampler": ConditionalMultinomial.name},
            compact_path=self.trace.path(),
            **self.trace.posterior_fields(),
        )


def conditional_smc(
    model: FeynmanKac | ConditionalFeynmanKac,
    retained: Tensor | None = None,
    *,
    num_particles: int,
    ess_threshold: float = 0.5,
    generator: torch.Generator | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> ConditionalRun:
    """Make one conditional SMC sweep from each of ``R`` retained paths.

    :param model: the Feynman-Kac model, or the bound one (which brings its retained paths).
    :param retained: paths, int64 ``(R, *plates, T + 1, L)``.
    :param num_particles: particles ``N`` per run, at least 2, the retained one included.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    :raises CapabilityError: if the chain has no density.
    :raises ValueError: if the settings or a retained path are impossible.
    """
    if num_particles < 2:
        raise ValueError(
            f"conditional SMC needs at least 2 particles, the retained one included, got "
            f"{num_particles}."
        )
    if isinstance(model, FeynmanKac):
        if retained is None:
            raise ValueError("conditional SMC needs the retained paths; pass retained=.")
        model = ConditionalFeynmanKac(model, retained, max_rows=max_rows)
    with torch.no_grad():
        trace = smc_loop(
            model,
            model.model.num_steps,
            num_particles,
            len(model.retained),
            ConditionalMultinomial(),
            ess_threshold,
            generator,
            record=model.record,
            progress=progress,
        )
        slot = torch.multinomial(trace.weights.normalised, 1, generator=generator)[:, 0]
    paths = trace.path()
    assert paths is not None  # the tokens were recorded
    path = widened(paths[torch.arange(len(slot)), slot])
    return ConditionalRun(path, slot, trace, model)


@dataclass(frozen=True, eq=False)
class EvidenceBounds:
    """Stochastic lower and upper bounds of ``log Z`` from ``R`` runs each.

    On average over runs ``E[lower] <= log Z <= E[upper]``; the gap of the means is the symmetrised
    Kullback-Leibler divergence between the sampler and its target, and bounds that of its draws.

    :param lower: ``log Z_hat`` of plain runs, float64 ``(R,)``.
    :param upper: ``log Z_hat`` of conditional runs, float64 ``(R,)``.
    """

    lower: Tensor
    upper: Tensor

    @property
    def gap(self) -> float:
        """Mean upper minus mean lower bound, in nats."""
        return float(self.upper.mean() - self.lower.mean())

    @property
    def gap_error(self) -> float:
        """Standard error of :attr:`gap`."""
        return float(
            (self.upper.var() / len(self.upper) + self.lower.var() / len(self.lower)) ** 0.5
        )

    def __repr__(self) -> str:
        low, high = float(self.lower.mean()), float(self.upper.mean())
        return f"EvidenceBounds({low:.3f} <= log Z <= {high:.3f}, +- {self.gap_error:.3f})"


def two_sided_evidence(
    fk: FeynmanKac,
    exact_paths: Tensor,
    *,
    num_particles: int,
    ess_threshold: float = 0.5,
    generator: torch.Generator | None = None,
    max_rows: int | None = None,
) -> EvidenceBounds:
    """Bracket ``log Z`` by as many plain as conditional runs, of one resampling scheme.

    :param exact_paths: independent draws of ``p(path) G(x0) / Z``, ``(R, *plates, T + 1, L)``.
    :param num_particles: particles ``N`` per run, at least 2.
    :param ess_threshold: fraction of ``N`` below which a run is resampled.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    """
    plain = run_smc(
        fk,
        num_particles,
        len(exact_paths),
        "multinomial",
        ess_threshold,
        generator,
        store_path=False,
        max_rows=max_rows,
    )
    around = conditional_smc(
        fk,
        exact_paths,
        num_particles=num_particles,
        ess_threshold=ess_threshold,
        generator=generator,
        max_rows=max_rows,
    )
    return EvidenceBounds(plain.log_evidence, around.log_evidence)


def _hold(tokens: Tensor, held: Tensor) -> Tensor:
    """Return ``tokens (R, N, ...)`` with ``held (R, ...)`` in slot 0."""
    return torch.cat([held[:, None], tokens[:, 1:]], 1)


def _require(fine: Tensor, what: str) -> None:
    bad = (~fine).flatten(1).any(-1)
    if bool(bad.any()):
        run = int(bad.nonzero()[0])
        raise ValueError(
            f"conditional SMC: the retained path of run {run} {what}, so it is no path of the "
            "target; start from one that is, such as a draw of run_smc."
        )


def _check_paths(model: FeynmanKac, retained: Tensor) -> Tensor:
    chain = model.chain
    if not chain.kernel.has_path_density:
        raise CapabilityError(
            f"conditional SMC holds a path that is scored step by step, but this kernel is "
            f"{chain.kernel.claim}; use a kernel with a density."
        )
    expected = (*chain.batch_shape, *chain.event_shape)
    if tuple(retained.shape[1:]) != expected or not len(retained):
        raise ValueError(
            f"conditional SMC: retained paths must have shape (R, {', '.join(map(str, expected))}),"
            f" got {tuple(retained.shape)}."
        )
    return widened(retained)
