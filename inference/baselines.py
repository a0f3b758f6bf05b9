"""What guided methods are compared with: sampling more, weighing, keeping the best.

Four methods that need no idea, each with a result that claims what it is and no more:

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

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ppl_diffusion.inference.biased import best_only, equal_weights
from ppl_diffusion.inference.bootstrap import LookingAhead
from ppl_diffusion.inference.twisted import TwistedSampler
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import Needs, held_proposal, register
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State, bits
from ppl_diffusion.rows import hash_rows
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import ArgmaxFill, FillTwist, PersistentFill, TwistLike

SCORE = "beam/score"


@register
@dataclass(frozen=True)
class ImportanceSampling(LookingAhead):
    """Draws of the chain, or of a proposal, weighed by the potential at the end.

    :param proposal: None draws from the chain itself; a kernel, or a proposal with a density.

    Example::

        posterior = SMC(chain, Reward(dock, temperature=0.1), method="importance-sampling").run()
    """

    # No option: draws are weighed at the end alone.
    twist: TwistLike = field(default=None, init=False)

    name: ClassVar[str] = "importance-sampling"
    ess_threshold: ClassVar[float] = 0.0

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Independent draws are never resampled."""
        return resampler, 0.0


@register
@dataclass(frozen=True)
class BestOfN(ImportanceSampling):
    """The best of ``N`` draws of the chain.

    :param proposal: as in :class:`ImportanceSampling`.
    :param keep: how many of the draws of each run are kept.
    :raises ValueError: if ``keep`` is below one.

    Example::

        best = SMC(chain, Reward(dock), method="best-of-n", num_particles=8, num_runs=100).run()
    """

    keep: int = 1

    name: ClassVar[str] = "best-of-n"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_keep("BestOfN", self.keep)

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Return all draws, with the weight on the best."""
        kept = "the best" if self.keep == 1 else f"the best {self.keep}"
        drawn = f"{posterior.num_particles} draws of the {posterior.num_steps}-step chain"
        return best_only(posterior, self.keep, f"{kept} of {drawn} by log G, no tilt of the chain")


@register
@dataclass(frozen=True)
class GuidedLineages(TwistedSampler):
    """Particles that move by a guided proposal and never meet.

    :param twist: how a lineage looks ahead; see :class:`TwistedSampler`, without a floor by default
        where nothing pays.
    :param proposal: what it moves by; see there.
    :param weighted: weigh every lineage by ``p G`` over what it was drawn from: importance
        sampling with a guided proposal. False is guidance as usually published: all count alike,
        whatever guided them.

    ``surprise``, ``top``, ``kappa`` and ``cache`` are those of :class:`TwistedSampler`.

    Example::

        posterior = SMC(chain, reward, method="guided-lineages", weighted=False).run(seed=0)
    """

    weighted: bool = True

    name: ClassVar[str] = "guided-lineages"
    ess_threshold: ClassVar[float] = 0.0

    def _fill_of(self, source: Source) -> FillTwist | None:
        fill = super()._fill_of(source)
        if self.twist != "auto" or self.weighted:
            return fill
        return PersistentFill(16) if isinstance(fill, PersistentFill) else ArgmaxFill()

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Lineages are never resampled."""
        if ess_threshold:
            raise ValueError(
                "GuidedLineages: lineages are never resampled; use TwistedSampler for that."
            )
        return resampler, 0.0

    def law(self, run: Bound) -> Law:
        """Return the tilted chain; without weights there is no law."""
        law = super().law(run)
        return law if self.weighted else law.but(exact=False, has_evidence=False)

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Without weights all lineages count alike."""
        if self.weighted:
            return posterior
        why = (
            f"no declared law: {posterior.num_steps} guided steps that nothing paid for, meant to "
            "raise log G; equal weights"
        )
        return equal_weights(posterior, why)


@register
@dataclass(frozen=True)
class BeamSearch(LookingAhead):
    """Beam search: the best of all children survive, and nobody else.

    A run holds ``N`` candidates: the ``N / M`` best of the last step with ``M`` children each,
    drawn from the chain and rated by the potential of their completion. Equal candidates count
    once. As a choice of ancestors it runs on the engine of the other methods.

    :param twist: how candidates are rated: a fill twist, its name, or a function of the state.
    :param proposal: as in :class:`LookingAhead`.
    :param num_children: children ``M`` of each survivor; must divide ``N``.
    :param keep: how many final candidates of each run are kept.
    :raises ValueError: if a number or the twist is not usable.

    Example::

        best = SMC(chain, Reward(dock), method="beam", num_particles=80, num_children=10).run()
    """

    twist: TwistLike = "argmax"  # nothing makes up for what a search drops, so no defence helps
    num_children: int = 8
    keep: int = 1

    name: ClassVar[str] = "beam"
    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(own_moves=True)
    ess_threshold: ClassVar[float] = 2.0  # an ESS is below twice the particles: always resample

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.twist is None:
            raise ValueError("BeamSearch: twist=None rates nothing; use BestOfN, or a twist.")
        if self.num_children < 1:
            raise ValueError(f"BeamSearch: num_children must be >= 1, got {self.num_children}.")
        _check_keep("BeamSearch", self.keep)

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Keep the best, at every step."""
        return KeepBest(self.num_children), 2.0

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the mover by the chain itself, with its clamp, or the proposal."""
        proposal = held_proposal(site) if self.proposal is None else self.proposal
        return chain_mover(site, self.twist, proposal, max_rows=max_rows)

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """Nobody rates the noisiest states."""
        return {**state, SCORE: run.zeros}

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move and rate; a candidate that another one equals already is dead."""
        moved, _ = super().move(run, state, group, generator)
        moved, score = self.rated(run, moved, group, generator)
        given_back: Tensor = state[SCORE]
        ratio = given_back.masked_fill(_is_copy(moved), -torch.inf)
        return {**moved, SCORE: score}, ratio

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the rating of each candidate."""
        score: Tensor = state[SCORE]
        return score

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Return all final candidates, with the weight on the best."""
        survivors = posterior.num_particles // self.num_children
        steps = f"{posterior.num_steps} steps of {survivors} survivors"
        kept = "best" if self.keep == 1 else f"best {self.keep}"
        why = f"the {kept} by log G after {steps} with {self.num_children} children each, no law"
        return best_only(posterior, self.keep, why)


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
        if num_particles % self.copies:
            raise ValueError(
                f"BeamSearch: num_children must divide num_particles, got {self.copies} and "
                f"{num_particles}."
            )
        return 0

    def __call__(self, uniforms: Tensor, log_weights: Tensor) -> Tensor:
        """Return the ancestor of every new particle, int64 ``(*runs, N)``."""
        size = log_weights.shape[-1]
        order = log_weights.argsort(dim=-1, descending=True, stable=True)
        alive = (log_weights > -torch.inf).sum(-1, keepdim=True).clamp_min(1)
        rank = (torch.arange(size, device=order.device) // self.copies) % alive
        return order.gather(-1, rank)

    def _ancestors(self, uniforms: Tensor, weights: Tensor) -> Tensor:
        return self(uniforms, weights.log())


def _is_copy(state: State) -> Tensor:
    """Return which candidates of a run equal an earlier one, bool ``(R, N)``."""
    parts = [carry["tokens"] for carry in state["sites"].values()] + [*state["latents"].values()]
    shape = parts[0].shape[:2]
    rows = torch.cat([bits(part.flatten(0, 1)) for part in parts], -1)
    hashes, order = hash_rows(rows).reshape(shape).sort(dim=-1, stable=True)
    again = torch.zeros_like(hashes, dtype=torch.bool)
    again[:, 1:] = hashes[:, 1:] == hashes[:, :-1]
    return torch.zeros_like(again).scatter(-1, order, again)


def _check_keep(owner: str, keep: int) -> None:
    if keep < 1:
        raise ValueError(f"{owner}: keep must be >= 1, got {keep}.")
