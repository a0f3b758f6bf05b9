"""The result of every particle method: weighted draws, evidence, lineage, cost, and its claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.smc.draws import Draws
from ppl_diffusion.smc.evidence import Evidence
from ppl_diffusion.smc.genealogy import genealogy_graph
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.verdict import Verdict
from ppl_diffusion.smc.verdicts import judge

if TYPE_CHECKING:
    import networkx as nx

    from ppl_diffusion.smc.origin import Origin


@dataclass(frozen=True, eq=False)
class ParticlePosterior(Draws, kind="particles"):
    """``R`` runs of ``N`` weighted particles; immutable.

    :param x0: clean sequences, int64 ``(R, N, *plates, L)`` (of the first chain site).
    :param log_weights: float64 ``(R, N)``, normalised in each run; all ``-inf`` in a dead run.
    :param log_evidence: float64 ``(R,)``; ``exp`` of it is unbiased for the normalising constant.
        NaN where the method estimates none: such runs count alike; ``-inf`` in a dead run.
    :param log_evidence_steps: running value, float64 ``(R, T)``.
    :param evidence_variance: single-run relative variance of ``exp(log_evidence)``, ``(R,)``;
        NaN where the family tree tells none: resampled by another scheme than multinomial, fewer
        than two effective roots, or an estimate that is not positive.
    :param ancestors: int64 ``(T, R, N)``: ``ancestors[k]`` is the parent, in the population after
        step ``k - 1``, of each particle of step ``k``.
    :param eve: root ancestor of each particle, int64 ``(R, N)``.
    :param ess: effective sample size after each step, before resampling, float64 ``(R, T)``.
    :param resampled: whether the run was resampled after each step, bool ``(R, T)``.
    :param died_at: step at which all weights became zero, int64 ``(R,)``, -1 if never.
    :param log_potential: ``log G`` of each particle, float64 ``(R, N)``.
    :param times: the time grid, float64 ``(T + 1,)``.
    :param samples: values of the program's sites, each ``(R, N, ...)``.
    :param num_evaluations: network rows evaluated.
    :param num_potential_calls: sequences the potential (or the program) was asked about.
    :param law: what the weights are exact for, or aim at.
    :param settings: what was chosen, in JSON types.
    :param seconds: wall time.
    :param log_mass: log of the share of the chain's own law that the particles still stand for,
        before each move, float64 ``(R, T)``; its exponential has expectation one. None if unknown.
    :param num_move_rows: rows of the program evaluated to move latents.
    :param num_move_gradients: how many of these were differentiated.
    :param num_scout_rows: rows of networks and programs that the scout run asked for, of those in
        ``num_evaluations``, ``num_potential_calls`` and ``num_move_rows``.
    :param compact_path: stored paths in a small integer type, or None.
    :param is_program: whether the draws are those of a program (then functions get ``samples``).
    :param plates: names of the plates that each site of the program is in, from left to right; ""
        for a dimension of a batch without a plate.
    :param origin: the program, to be run again; not saved.
    """

    x0: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    log_evidence_steps: Tensor
    evidence_variance: Tensor
    ancestors: Tensor
    eve: Tensor
    ess: Tensor
    resampled: Tensor
    died_at: Tensor
    log_potential: Tensor
    times: Tensor
    samples: Mapping[str, Tensor]
    num_evaluations: int
    num_potential_calls: int
    law: Law
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.nan
    compact_path: Tensor | None = None
    is_program: bool = False
    log_mass: Tensor | None = None
    num_move_rows: int = 0
    num_move_gradients: int = 0
    num_scout_rows: int = 0
    plates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origin: Origin | None = field(default=None, repr=False)

    @property
    def num_particles(self) -> int:
        """Number ``N`` of particles per run."""
        return self.log_weights.shape[1]

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps."""
        return self.ancestors.shape[0]

    @property
    def alive(self) -> Tensor:
        """Runs with any particle of positive weight, bool ``(R,)``."""
        return self.died_at < 0

    @property
    def weights(self) -> Tensor:
        """Normalised weights, float64 ``(R, N)``; zero in a dead run."""
        return self.log_weights.exp()

    @property
    def pooled_log_evidence(self) -> float:
        """Log of the mean of the runs' evidences, dead runs counting as zero (unbiased).

        NaN where the method estimates none.
        """
        return float(torch.logsumexp(self.log_evidence, 0)) - math.log(self.num_runs)

    @cached_property
    def _verdicts(self) -> tuple[Verdict, ...]:
        return tuple(judge(self))

    @property
    def warnings(self) -> list[Verdict]:
        """What is wrong with this result, a sentence each, the worst first; empty if nothing is.

        Every sentence also has the ``kind``, ``level``, ``where``, ``value`` and ``limit`` that it
        was judged by.
        """
        return list(self._verdicts)

    @property
    def evidence(self) -> Evidence | None:
        """What the runs say together: a value with an interval, or why there is none.

        None where the method estimates no evidence.
        """
        return self.evidence_of()

    def evidence_of(self, kept: int | None = None, *, overspent: float = 1.0) -> Evidence | None:
        """Return what the first runs say, with the spread of all.

        :param kept: how many runs; None for all.
        :param overspent: see :meth:`Evidence.of`.
        """
        if not self.law.has_evidence:
            return None
        # Runs that all lost the same mass agree, too.
        trusted = all(verdict.kind != "mass" for verdict in self._verdicts)
        return Evidence.of(self.log_evidence, trusted=trusted, kept=kept, overspent=overspent)

    @property
    def pooled_log_weights(self) -> Tensor:
        """Log-weights over all runs, each run weighted by its evidence, ``(R, N)``; sums to one.

        Runs of a method that estimates no evidence count alike.

        :raises ParticleCollapse: if no run is alive.
        """
        self._require_alive()
        log_w = self.log_weights + self.log_evidence.nan_to_num(0.0, -math.inf, -math.inf)[:, None]
        return log_w - torch.logsumexp(log_w.flatten(), 0)

    def own_log_weights(self) -> Tensor:
        """Return the log-weights, which sum to one in each living run.

        :raises ParticleCollapse: if no run is alive.
        """
        self._require_alive()
        return self.log_weights

    def genealogy(self, run: int = 0) -> nx.DiGraph:
        """Return one run's genealogy (see :func:`ppl_diffusion.smc.genealogy.genealogy_graph`)."""
        if not 0 <= run < self.num_runs:
            raise ValueError(f"genealogy: run must lie in 0..{self.num_runs - 1}, got {run}.")
        return genealogy_graph(self.ancestors[:, run], self.eve[run], self.weights[run])

    def reweight(
        self, *args: Any, temperature: float = 1.0, force: bool = False, **kwargs: Any
    ) -> ParticlePosterior:
        """Return this run for another potential, temperature or observation.

        Sequences, latents, lineage and cost are kept; weights, evidence, law and the values of
        deterministic sites change. ``exp`` of the new evidences is unbiased. Their ratios to the
        old ones are in ``settings["log_evidence_ratio"]``, run by run (they share each run's error,
        which only the spread over runs shows), what was done in ``settings["reweighted_from"]``.

        :param args: the new potential of a bare chain; of a program its new arguments, at which it
            runs again with the same latents. None at all keeps what there was, for another
            temperature.
        :param temperature: positive and finite; the target is ``p G^(1 / temperature)``, where the
            ``G`` of a program is all that its latents were not drawn by: the likelihood, where they
            come from their prior.
        :param force: return weights that would be refused.
        :param kwargs: keyword arguments of the program.
        :raises CapabilityError: where the weights are not to be used: k-hat above 0.7 with few
            effective particles, a run with fewer than ten of these or with one root ancestor, a
            potential that allows what the old one excluded; or where the arguments change a chain.
        :raises ParticleCollapse: if no particle meets the new potential.
        :raises PotentialError: if its densities are NaN or ``+inf``.
        :raises TypeError: if arguments are missing, or a bare chain is given some.
        :raises ValueError: if the temperature is not positive and finite, the program fails at its
            new arguments, or is not known, because the run was read from a file.

        Example::

            colder = posterior.reweight(temperature=0.5)
            other = posterior.reweight(y=torch.tensor(11.0))
        """
        # Here, not above: it makes results from results.
        from ppl_diffusion.smc.reweighting import reweight

        return cast(
            ParticlePosterior, reweight(self, args, kwargs, temperature=temperature, force=force)
        )

    def to_arviz(self, **options: Any) -> Any:
        """Return ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x).

        :param options: those of :func:`ppl_diffusion.smc.arviz_data.to_arviz`.
        """
        # Here, not above: xarray is slow to import, and most runs never leave torch.
        from ppl_diffusion.smc.arviz_data import to_arviz

        return to_arviz(self, **options)

    def _require_alive(self) -> None:
        if not bool(self.alive.any()):
            raise ParticleCollapse(
                "every particle of every run has weight zero (died at steps "
                f"{sorted(set(self.died_at.tolist()))}): the evidence estimate is 0; use more "
                "particles, a better twist, or relax the constraint."
            )

    def __repr__(self) -> str:
        kinds = ", ".join(verdict.kind for verdict in self._verdicts)
        return (
            f"ParticlePosterior({self.num_runs} runs x {self.num_particles} particles, "
            f"{self.num_steps} steps, log_evidence={self.evidence or 'none'}, "
            f"warnings: {kinds or 'none'})"
        )
