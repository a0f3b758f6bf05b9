"""The result of particle Gibbs: chains of correlated, equally weighted draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.smc.chain_rules import judge_chains
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior import Draws
from ppl_diffusion.smc.verdict import Verdict


@dataclass(frozen=True, eq=False)
class GibbsPosterior(Draws):
    """``C`` Markov chains of ``S`` draws, after warm-up; immutable.

    :param x0: clean sequences, int64 ``(C, S, *plates, L)``.
    :param samples: values of the program's other sites, each ``(C, S, ...)``.
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

    def expectation(self, fn: Callable[[Any], Tensor]) -> Tensor:
        """Return the mean of a function over the draws of each chain, float64 ``(C, ...)``.

        :param fn: of ``x0 (C, S, *plates, L)`` for a bare chain, of the dict of site values (each
            ``(C, S, ...)``, with ``x0`` added) for a program; returns ``(C, S, ...)``.
        :raises ValueError: if the function does not return one value per draw.
        """
        draws = {"x0": self.x0, **self.samples} if self.is_program else self.x0
        values = torch.as_tensor(fn(draws), device="cpu")
        if values.shape[:2] != self.x0.shape[:2]:
            raise ValueError(
                f"expectation: the function returned shape {tuple(values.shape)}, expected it to "
                f"start with (chains, draws) = {tuple(self.x0.shape[:2])}."
            )
        return values.to(torch.float64).mean(1)

    def to_arviz(self) -> Any:
        """Return ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x), chains and draws as such.

        ``sample_stats`` holds the log-density, the smallest ESS of each conditional SMC and how
        much of the path each sweep changed.
        """
        # Here, not above: xarray is slow to import, and most runs never leave torch.
        from ppl_diffusion.smc import arviz_data

        chains = np.arange(self.num_runs)
        names = arviz_data.stored_names(self.samples)
        variables = {"x0": self._variable("x0", self.x0)}
        variables |= {names[n]: self._variable(names[n], v) for n, v in self.samples.items()}
        groups = {
            "posterior": arviz_data.make_dataset(variables, chains),
            "sample_stats": arviz_data.make_dataset(self._statistics(), chains),
        }
        return arviz_data.make_container(groups, self._attributes())

    def _variable(self, name: str, value: Tensor) -> tuple[tuple[str, ...], Any]:
        from ppl_diffusion.smc import arviz_data

        plates, array = self.x0.ndim - 3, value.detach().numpy()
        inner = [f"{name}_dim_{i}" for i in range(array.ndim - 2)]
        if array.dtype.kind in "iu" and array.shape == tuple(self.x0.shape):
            inner = [*(f"plate_{i}" for i in range(plates)), "position"]
        return ("chain", "draw", *inner), arviz_data.storable(array, tuple(inner))

    def _statistics(self) -> dict[str, tuple[tuple[str, ...], Any]]:
        columns = {
            "lp": self.log_density,
            "conditional_log_evidence": self.log_evidence,
            "smallest_ess": self.ess.amin(-1),
            "path_updated": self.updated.to(torch.float64).mean(-1),
        }
        statistics: dict[str, tuple[tuple[str, ...], Any]] = {
            name: (("chain", "draw"), value.numpy()) for name, value in columns.items()
        }
        if self.accept.shape[-1]:
            statistics["accepted"] = (("chain", "draw", "path_move"), self.accept.numpy())
        return statistics

    def _attributes(self) -> dict[str, Any]:
        from ppl_diffusion.smc import arviz_data

        facts = {
            "inference_library": "ppl_diffusion",
            "target": self.target,
            "exact": self.exact,
            "num_evaluations": self.num_evaluations,
            "num_potential_calls": self.num_potential_calls,
            "num_divergences": self.num_divergences,
            "step_size": self.step_size,
        }
        return {n: arviz_data.attribute(v) for n, v in {**self.settings, **facts}.items()}

    def __repr__(self) -> str:
        return (
            f"GibbsPosterior({self.num_runs} chains x {self.num_samples} draws, "
            f"warnings: {', '.join(verdict.kind for verdict in self._verdicts) or 'none'})"
        )
