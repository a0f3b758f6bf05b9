"""The result of particle Gibbs: chains of correlated, equally weighted draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.smc.chain_rules import judge_chains
from ppl_diffusion.smc.draws import Draws
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.verdict import Verdict

if TYPE_CHECKING:
    from ppl_diffusion.smc.origin import Origin


def require_particles(posterior: Draws, what: str) -> None:
    """Refuse draws of Markov chains.

    :param posterior: a result of either kind.
    :param what: what needs weighted particles, in the error.
    :raises CapabilityError: if it holds chains.
    """
    if isinstance(posterior, GibbsPosterior):
        raise _no_particles(what)


def _no_particles(what: str) -> CapabilityError:
    return CapabilityError(
        f"{what}: draws of ParticleGibbs are Markov chains, without weights, evidence or a family "
        "tree; look at its summary and its to_arviz(), or ask a run of SMC."
    )


@dataclass(frozen=True, eq=False)
class GibbsPosterior(Draws, kind="chains"):
    """``C`` Markov chains of ``S`` draws, after warm-up; immutable.

    :param x0: clean sequences, int64 ``(C, S, *plates, L)``.
    :param samples: values of the program's sites, each ``(C, S, ...)``; whole paths of its chains
        where paths were stored.
    :param compact_path: paths in a small integer type ``(C, S, *plates, T + 1, L)``, or None.
    :param log_density: log-density of everything but the chain, given the chain, ``(C, S)``.
    :param log_evidence: log-evidence of each sweep's conditional SMC given the latents, ``(C, S)``;
        too large on average.
    :param ess: effective sample size of each sweep after each step, ``(C, S, T)``.
    :param updated: whether each state of the path changed in the sweep, bool ``(C, S, T + 1)``: the
        lineage of the draws, renewed or kept.
    :param accept: accepted path moves of each kind, ``(C, S, moves)``.
    :param step_size: of NUTS; NaN without latents.
    :param num_divergences: divergent transitions after warm-up, over all chains.
    :param num_evaluations: network rows evaluated, warm-up included.
    :param num_potential_calls: sequences the program was asked about, warm-up included.
    :param law: the invariant law; how far the chains are from it is for diagnostics to say.
    :param settings: what was chosen, in JSON types.
    :param seconds: wall time.
    :param is_program: whether the draws are those of a program (then functions get all sites).
    :param plates: names of the plates that each site of the program is in, from left to right; ""
        for a dimension of a batch without a plate.
    :param origin: the program, to be run again; not saved.
    """

    x0: Tensor
    samples: Mapping[str, Tensor]
    compact_path: Tensor | None
    log_density: Tensor
    log_evidence: Tensor
    ess: Tensor
    updated: Tensor
    accept: Tensor
    step_size: float
    num_divergences: int
    num_evaluations: int
    num_potential_calls: int
    law: Law
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = float("nan")
    is_program: bool = False
    plates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origin: Origin | None = field(default=None, repr=False)

    @property
    def num_samples(self) -> int:
        """Number ``S`` of draws per chain."""
        return self.x0.shape[1]

    @property
    def update_rate(self) -> Tensor:
        """Share of sweeps that changed each state of the path, float64 ``(T + 1,)``.

        Near zero for the noisy states it says that lineages coalesce before they get there: use
        more particles, or moves that mask again.
        """
        return self.updated.to(torch.float64).mean((0, 1))

    @cached_property
    def _verdicts(self) -> tuple[Verdict, ...]:
        return tuple(judge_chains(self))

    @property
    def warnings(self) -> list[Verdict]:
        """What is wrong with this result, a sentence each, the worst first; empty if nothing is."""
        return list(self._verdicts)

    @property
    def alive(self) -> Tensor:
        """All chains, bool ``(C,)``."""
        return torch.ones(self.num_runs, dtype=torch.bool, device=self.x0.device)

    @property
    def pooled_log_weights(self) -> Tensor:
        """Equal log-weights over all chains, float64 ``(C, S)``; they sum to one."""
        return self.own_log_weights() - math.log(self.num_runs)

    def own_log_weights(self) -> Tensor:
        """Return equal log-weights, which sum to one in each chain."""
        return self.log_density.new_full(self.log_density.shape, -math.log(self.num_samples))

    def to_arviz(self, **options: Any) -> Any:
        """Return ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x), chains and draws as such.

        ``sample_stats`` holds the log-density, the smallest ESS of each conditional SMC and how
        much of the path each sweep changed; options and other groups are those of
        :func:`ppl_diffusion.smc.arviz_data.to_arviz`, without ``weights``.

        :raises CapabilityError: if ``weights`` are asked for.
        """
        if "weights" in options:
            require_particles(self, "to_arviz(weights=...)")
        # Here, not above: xarray is slow to import, and most runs never leave torch.
        from ppl_diffusion.smc.arviz_chains import chains_to_arviz

        return chains_to_arviz(self, **options)

    def reweight(self, *args: Any, **options: Any) -> Any:
        """Refuse: draws of Markov chains are for their invariant law alone.

        :raises CapabilityError: always.
        """
        raise CapabilityError(
            "reweight: draws of ParticleGibbs carry no weights and no evidence that another "
            "potential could change; run it again, or reweight a run of SMC."
        )

    @property
    def evidence(self) -> NoReturn:
        """Refuse: chains estimate no evidence.

        :raises CapabilityError: always.
        """
        raise _no_particles("evidence")

    @property
    def pooled_log_evidence(self) -> NoReturn:
        """Refuse: chains estimate no evidence.

        :raises CapabilityError: always.
        """
        raise _no_particles("pooled_log_evidence")

    def genealogy(self, run: int = 0) -> NoReturn:
        """Refuse: chains have no family tree.

        :raises CapabilityError: always.
        """
        raise _no_particles("genealogy")

    def __repr__(self) -> str:
        return (
            f"GibbsPosterior({self.num_runs} chains x {self.num_samples} draws, "
            f"warnings: {', '.join(verdict.kind for verdict in self._verdicts) or 'none'})"
        )
