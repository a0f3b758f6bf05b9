"""What guided methods are compared with: sampling more, weighing, keeping the best.

Four programs that need no idea, each with a result that claims what it is and no more:

- :class:`ImportanceSampling` weighs draws of the chain by ``G(x0)``: exact, and hopeless where the
  potential is rarely high;
- :class:`GuidedLineages` moves every particle by a guided proposal and never lets particles meet:
  exact where it is weighted, classifier-style guidance as usually published where it is not;
- :class:`BestOfN` keeps the best of ``N`` draws: an optimiser;
- :class:`BeamSearch` keeps the best of all children at every step: a greedier one.

No tilt of the chain has the law of the best of anything. The last two (and unweighted guidance)
return ``exact=False``, put their weight on what they keep, and estimate no evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference._biased import best_only, equal_weights
from ppl_diffusion.inference._chain_program import BoundEngine, ChainProgram
from ppl_diffusion.inference._task import Task
from ppl_diffusion.inference.twisted import ProposalLike, TwistedSampler
from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.rows import hash_rows
from ppl_diffusion.smc.engine import Progress, SMCTrace
from ppl_diffusion.smc.feynman_kac import FeynmanKac, Proposal
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import TwistLike, as_twist

SCORE = "beam/score"

Target = ReverseChain | Callable[..., Any]
PotentialLike = AbstractPotential | Callable[[Tensor], Tensor] | None


class ImportanceSampling(ChainProgram):
    """Draws of the chain, or of a proposal, weighed by the potential at the end.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: draws ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param proposal: None draws from the chain itself; a kernel, or a proposal with a density.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(steps done, steps in all)``.

    Example::

        posterior = ImportanceSampling(chain, Reward(dock, temperature=0.1)).run(seed=0)
    """

    method = "importance-sampling"

    def __init__(
        self,
        target: Target,
        potential: PotentialLike = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        proposal: Proposal | Kernel | None = None,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            ess_threshold=0.0,
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.proposal = proposal

    def bind(self, task: Task) -> BoundEngine:
        """Return the engine of one run.

        :param task: chain and potential.
        """
        proposal = task.guided_proposal(type(self).__name__, self.proposal)
        model = FeynmanKac(task.chain, task.potential, None, proposal)
        return BoundEngine(task, model, max_rows=self.max_rows)

    def settings(self, engine: BoundEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {"method": self.method, "proposal": engine.bound.model.settings["proposal"]}


class BestOfN(ImportanceSampling):
    """The best of ``N`` draws of the chain.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param keep: how many of the ``N = num_particles`` draws of each run are kept.
    :param options: the other options of :class:`ImportanceSampling`.
    :raises ValueError: if ``keep`` is below one.

    Example::

        best = BestOfN(chain, Reward(dock), num_particles=8, num_runs=100).run(seed=0)
    """

    method = "best-of-n"

    def __init__(
        self, target: Target, potential: PotentialLike = None, *, keep: int = 1, **options: Any
    ) -> None:
        super().__init__(target, potential, **options)
        self.keep = _check_keep("BestOfN", keep)

    def finish(self, posterior: ParticlePosterior, trace: SMCTrace) -> ParticlePosterior:
        """Return all draws, with the weight on the best; ``exact=False``.

        :param posterior: the weighted draws.
        :param trace: the run behind them.
        """
        kept = "the best" if self.keep == 1 else f"the best {self.keep}"
        drawn = f"{self.num_particles} draws of the {posterior.num_steps}-step chain"
        return best_only(posterior, self.keep, f"{kept} of {drawn} by log G, no tilt of the chain")

    def settings(self, engine: BoundEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {**super().settings(engine), "keep": self.keep}


class GuidedLineages:
    """Particles that move by a guided proposal and never meet.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: lineages ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param twist: how a lineage looks ahead; see
        :class:`~ppl_diffusion.inference.twisted.TwistedSampler`.
    :param proposal: what it moves by; see there.
    :param weighted: weigh every lineage by ``p G`` over what it was drawn from: importance
        sampling with a guided proposal. False is guidance as usually published: all count alike,
        whatever guided them.
    :param options: ``surprise``, ``top``, ``kappa``, ``cache``, ``store_path``, ``max_rows`` and
        ``progress`` of :class:`~ppl_diffusion.inference.twisted.TwistedSampler`.

    Example::

        guided = GuidedLineages(chain, Reward(dock, temperature=0.1), weighted=False)
        posterior = guided.run(seed=0)
    """

    def __init__(
        self,
        target: Target,
        potential: PotentialLike = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        twist: TwistLike | Literal["exhaustive"] = "argmax",
        proposal: ProposalLike | None = None,
        weighted: bool = True,
        **options: Any,
    ) -> None:
        if "ess_threshold" in options or "resampler" in options:
            raise ValueError(
                "GuidedLineages: lineages are never resampled; use TwistedSampler for that."
            )
        self.weighted = weighted
        self._sampler = TwistedSampler(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            twist=twist,
            proposal=proposal,
            ess_threshold=0.0,
            **options,
        )

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> ParticlePosterior:
        """Move every lineage to its end.

        :param args: arguments of the program.
        :param seed: seed of this run; the global random state is left alone if it is given.
        :param kwargs: keyword arguments of the program.
        :returns: the lineages; exact for the finite chain if weighted.
        """
        posterior = self._sampler.run(*args, seed=seed, **kwargs)
        own = {"method": "guided-lineages", "weighted": self.weighted}
        posterior = replace(posterior, settings={**posterior.settings, **own})
        if self.weighted:
            return posterior
        target = (
            f"no declared law: {posterior.num_steps} guided steps that nothing paid for, meant to "
            "raise log G; equal weights"
        )
        return equal_weights(posterior, target)


class BeamSearch(ChainProgram):
    """Beam search: the best of all children survive, and nobody else.

    A run holds ``N`` candidates: the ``N / M`` best of the last step with ``M`` children each,
    drawn from the chain and rated by the potential of their completion. Equal candidates count
    once. As a choice of ancestors it runs on the engine of the other methods.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: candidates ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param num_children: children ``M`` of each survivor; must divide ``N``.
    :param keep: how many final candidates of each run are kept.
    :param twist: how candidates are rated: a fill twist, its name, or a function of the state.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(steps done, steps in all)``.
    :raises ValueError: if a number or the twist is not usable.

    Example::

        best = BeamSearch(chain, Reward(dock), num_particles=80, num_children=10).run(seed=0)
    """

    def __init__(
        self,
        target: Target,
        potential: PotentialLike = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        num_children: int = 8,
        keep: int = 1,
        twist: TwistLike = "argmax",
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        if num_children < 1 or num_particles % num_children:
            raise ValueError(
                f"BeamSearch: num_children must divide num_particles, got {num_children} and "
                f"{num_particles}."
            )
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            resampler=KeepBest(num_children),
            ess_threshold=2.0,  # an effective sample size is below twice the particles: always
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.twist = as_twist(twist)
        if self.twist is None:
            raise ValueError("BeamSearch: twist=None rates nothing; use BestOfN, or a twist.")
        self.num_children, self.keep = num_children, _check_keep("BeamSearch", keep)

    def bind(self, task: Task) -> BeamEngine:
        """Return the engine of one run.

        :param task: chain and potential.
        """
        task.refuse_twist("BeamSearch")
        model = FeynmanKac(task.chain, task.potential, self.twist)
        return BeamEngine(task, model, max_rows=self.max_rows)

    def finish(self, posterior: ParticlePosterior, trace: SMCTrace) -> ParticlePosterior:
        """Return all final candidates, with the weight on the best; ``exact=False``.

        :param posterior: the candidates.
        :param trace: the run behind them.
        """
        survivors = self.num_particles // self.num_children
        steps = f"{posterior.num_steps} steps of {survivors} survivors"
        kept = "best" if self.keep == 1 else f"best {self.keep}"
        children = f"{self.num_children} children each"
        target = f"the {kept} by log G after {steps} with {children}, no law"
        return best_only(posterior, self.keep, target)

    def settings(self, engine: BeamEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        assert self.twist is not None
        return {
            "method": "beam",
            "num_children": self.num_children,
            "keep": self.keep,
            "twist": self.twist.name,
        }


class BeamEngine(BoundEngine):
    """A beam search during one run of :func:`~ppl_diffusion.smc.smc_loop`.

    The loop's weights are the candidates' own ratings: what a parent was rated is given back.
    """

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the noisiest states, which nobody rates."""
        carry = self.bound.init(runs, particles, generator)
        return {**carry, SCORE: torch.zeros((runs, particles), dtype=torch.float64)}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Move and rate; a candidate that another one equals already is dead."""
        moved, _ = self.bound.move(carry, k, generator)
        score = self.bound.log_twist(moved, k + 1, generator)
        assert score is not None
        given_back: Tensor = carry[SCORE]
        ratio = given_back.masked_fill(_is_copy(moved["tokens"]), -torch.inf)
        return {**moved, SCORE: score}, ratio

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return the rating of each candidate."""
        score: Tensor = carry[SCORE]
        return score


@dataclass(frozen=True)
class KeepBest(Resampler):
    """The best particles, each so many times: no resampling scheme in the sense of the others.

    ``E[copies]`` has nothing to do with the weights; for searches only.

    :param copies: copies of each survivor.
    """

    copies: int
    name = "keep-best"

    def num_uniforms(self, num_particles: int) -> int:
        """None: nothing is drawn."""
        return 0

    def __call__(self, uniforms: Tensor, log_weights: Tensor) -> Tensor:
        """Return the ancestor of every new particle, int64 ``(*runs, N)``.

        :param uniforms: not used.
        :param log_weights: what particles are ranked by, ``(*runs, N)``; ``-inf`` never survives
            where another does.
        """
        size = log_weights.shape[-1]
        order = log_weights.argsort(dim=-1, descending=True, stable=True)
        alive = (log_weights > -torch.inf).sum(-1, keepdim=True).clamp_min(1)
        rank = (torch.arange(size) // self.copies) % alive
        return order.gather(-1, rank)

    def _ancestors(self, uniforms: Tensor, weights: Tensor) -> Tensor:
        return self(uniforms, weights.log())


def _is_copy(tokens: Tensor) -> Tensor:
    """Return which candidates of a run equal an earlier one, bool ``(R, N)``.

    :param tokens: int64 ``(R, N, *plates, L)``.
    """
    flat = tokens.flatten(2)
    hashes, order = hash_rows(flat.flatten(0, 1)).reshape(flat.shape[:2]).sort(dim=-1, stable=True)
    again = torch.zeros_like(hashes, dtype=torch.bool)
    again[:, 1:] = hashes[:, 1:] == hashes[:, :-1]
    return torch.zeros_like(again).scatter(-1, order, again)


def _check_keep(owner: str, keep: int) -> int:
    if keep < 1:
        raise ValueError(f"{owner}: keep must be >= 1, got {keep}.")
    return keep
