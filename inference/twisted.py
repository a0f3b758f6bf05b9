"""Twisted sampling: look ahead to every possible child, move where the potential will be high.

A bootstrap particle moves first and is weighed afterwards; most of its variance comes from moves
that were never going to pay. Here a particle completes its sequence (the *guess*), asks the
potential about the guess with each token in turn at the site that is revealed next, and moves by::

    q(v) ∝ D_l(v) exp W(v),     W(v) = log-mean-exp_j log G(guess_j with site l := v)

(*clamped look-ahead*: one network row per step, ``V`` potential calls per completion). The twist
of the child is either ``W(v)`` itself or, with ``surprise=True``, the look-ahead made anew from
what the network says about the child, so that the weight is what the reveal was a surprise by::

    log w = log sum_u D_l(u) exp W(u) - log h(x) + [log h(x') - W(v)]

Chains that move many sites at a time (uniform noise, parallel unmasking) use the completions twice
(*reweighted look-ahead*: no further calls): with ``e_j`` their potentials over the mean, the
prediction of token ``v`` at site ``l`` is multiplied by what the completions that have it pay::

    (kappa + sum_j e_j 1[guess_jl = v]) / (kappa + sum_j 1[guess_jl = v])

(counting them below, too, makes equal potentials leave the model alone). Twists may also be
learned, and moves may follow the gradient of a potential that accepts soft sequences (twisted
diffusion sampler: Wu et al. 2023, arXiv:2306.17775). Whatever is proposed is paid for by
``log K - log q`` and whatever is looked ahead telescopes; the last step asks the potential itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import GradientProposal, Step, tiltable, tilted
from ppl_diffusion.inference.lookahead import Exhaustive, Fills, Lookahead, OfState
from ppl_diffusion.kernels import BlockStep, RevealStep
from ppl_diffusion.kernels.base import ORDERED
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import Method, Needs, based, register
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Changes, Moved, Rng, Source, State
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac, Proposal, draw_step, per_particle
from ppl_diffusion.smc.twists import (
    ArgmaxFill,
    CallableTwist,
    Defensive,
    FillTwist,
    PersistentFill,
    TwistLike,
    as_twist,
)

CHECKED_TOP, CHECKED_FILLS = 32, 4
"""Tokens asked about, and completions, that ``check`` tries."""

FLOOR = 0.5
"""Floor of the default look-ahead: proposals that follow it need more of one than weights do."""

REWEIGHTED = PersistentFill(16, FLOOR)
"""Completions that are reweighted, unless others are asked for."""

GUESS, LOG_H = "twisted/guess", "twisted/log_h"
BEHIND, MADE = "twisted/behind", "twisted/made"
"""The completions behind the twist that is carried, and how many moves were made by then."""

ProposalLike = Literal["clamped", "reweighted"] | Proposal


@register
@dataclass(frozen=True)
class TwistedSampler(Method):
    """Move by what each token would pay: clamped, reweighted, or by a proposal of yours.

    With several chains each item of the schedule moves one of them, all others being at their
    guesses; in a plate every element asks about its own children, with the others at theirs.

    :param twist: how particles look ahead: ``"argmax"``, ``"persistent"``, ``"sample"``, a fill
        twist such as ``PersistentFill(16)``, ``"exhaustive"`` (every completion, tiny problems), or
        a function ``(carry, k) -> log h (R, N)`` of ``carry["tokens"]``, for instance learned (one
        chain). By default the argmax where every token is asked about, over a floor of one half,
        and 16 persistent completions where they are reweighted, over the same.
    :param proposal: ``"clamped"`` (kernels that reveal a given number of positions; the default
        there), ``"reweighted"`` (any kernel; the default elsewhere), or a
        :class:`~ppl_diffusion.smc.Proposal` such as
        :class:`~ppl_diffusion.handlers.GradientProposal`.
    :param surprise: look ahead anew at the child instead of keeping the parent's guess about it
        (clamped proposals; the others always do).
    :param top: children asked about per site, the likeliest first; the others share the score of
        the guess as it is. None for all.
    :param kappa: how many completions of average potential the reweighted proposal adds to those
        it has of each token; small values trust few completions too much.
    :param cache: ask the potential once per distinct sequence; changes the cost and nothing else.
    :raises ValueError: if ``top``, ``kappa`` or a name is not usable.

    Example::

        method = TwistedSampler(twist=PersistentFill(16))
        posterior = SMC(chain, Reward(dock, temperature=0.1), method=method).run(seed=0)
    """

    twist: TwistLike | Literal["exhaustive"] = "auto"
    proposal: ProposalLike | None = None
    surprise: bool = False
    top: int | None = None
    kappa: float = 1.0
    cache: bool = True

    name: ClassVar[str] = "twisted"
    needs: ClassVar[Needs] = Needs(density=True)
    holds_clamps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.proposal, str) and self.proposal not in ("clamped", "reweighted"):
            raise ValueError(
                f"TwistedSampler: unknown proposal {self.proposal!r}; choose 'clamped', "
                "'reweighted', None for the kernel's own, or give a proposal."
            )
        if not (self.proposal is None or isinstance(self.proposal, str) or callable(self.proposal)):
            raise TypeError(
                "TwistedSampler: a proposal is a name or a function (step, carry, k) -> "
                f"distribution, got {type(self.proposal).__name__}."
            )
        if self.top is not None and self.top < 1:
            raise ValueError(f"TwistedSampler: top must be >= 1 or None, got {self.top}.")
        if not 0 < self.kappa < float("inf"):
            raise ValueError(
                f"TwistedSampler: kappa must be positive and finite, got {self.kappa}."
            )
        if self.twist is None:
            raise ValueError(
                "TwistedSampler: twist=None looks at nothing; use FeynmanKac with a proposal."
            )
        if self.twist not in ("auto", "exhaustive"):
            object.__setattr__(self, "twist", as_twist(self.twist))  # type: ignore[arg-type]

    @classmethod
    def variants(cls, source: Source) -> dict[str, Method]:
        """Return what else ``check`` tries where every token of a position is asked about."""
        kernels = [site.chain.kernel for site in source.chains]
        if any(kernel.capability != ORDERED for kernel in kernels):
            return {}
        few = any(kernel.process.vocab_size > CHECKED_TOP for kernel in kernels)
        top = {f"{cls.name}-top": cls(top=CHECKED_TOP)} if few else {}
        return {f"{cls.name}-persistent": cls(twist=PersistentFill(CHECKED_FILLS)), **top}

    @property
    def fill(self) -> FillTwist:
        """The completions, where the look-ahead draws any."""
        return self.twist if isinstance(self.twist, FillTwist) else ArgmaxFill()

    # What is chosen once per run.

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the site's own chain behind a counter; the move is made here."""
        self._require_fitting(site)
        fill = self._fill_of(source)
        # A proposal of one's own may know the steps of the grid, and a function of the state does.
        own = fill is not None and self._proposal_of(site) == "reweighted"
        events = own and source.is_free(site)
        return chain_mover(site, fill, None, max_rows=max_rows, on_events=events)

    def _require_fitting(self, site: ChainSite) -> None:
        kernel = site.chain.kernel
        if site.twist is not None and self.proposal is not None:
            raise CapabilityError(
                f"TwistedSampler: the site {site.name!r} is twisted, and a proposal is given "
                "besides; leave one out."
            )
        if self._proposal_of(site) == "clamped" and kernel.capability != ORDERED:
            raise CapabilityError(
                "TwistedSampler: the clamped look-ahead asks about the next position to be "
                f"revealed, which {type(kernel).__name__} does not choose; build the chain "
                "with OrderedKernel, or use proposal='reweighted'."
            )

    def _proposal_of(self, site: ChainSite) -> ProposalLike:
        given = self.proposal if self.proposal is not None else site.twist
        if given is not None:
            return given
        return "clamped" if site.chain.kernel.capability == ORDERED else "reweighted"

    def _fill_of(self, source: Source) -> FillTwist | None:
        if self.twist == "auto":
            some = any(self._proposal_of(site) == "reweighted" for site in source.chains)
            return REWEIGHTED if some else Defensive(0, FLOOR)
        return self.twist if isinstance(self.twist, FillTwist) else None

    def prepare(self, run: Bound, resampler: Any, ess_threshold: float) -> None:
        """Choose the look-ahead."""
        fill = self._fill_of(run.source)
        run.fill = fill or ArgmaxFill()
        lookahead = self._lookahead(run, fill)
        run.notes |= {"lookahead": lookahead, "gradients": _gradients(run, self.proposal)}
        chosen = [self._proposal_of(site) for site in run.source.chains]
        if "reweighted" in chosen and fill is None:
            raise ValueError(
                "TwistedSampler: proposal='reweighted' reweights completions, which twist="
                f"{lookahead.name!r} does not have; use a fill such as 'persistent'."
            )

    def _lookahead(self, run: Bound, fill: FillTwist | None) -> Lookahead:
        if fill is not None:
            return Fills(run, fill)
        if len(run.sites) > 1:
            raise CapabilityError(
                "TwistedSampler: with several chains particles look ahead by completions; use "
                "'argmax', 'persistent' or a fill twist."
            )
        if isinstance(self.twist, CallableTwist):
            return OfState(run, self.twist)
        return Exhaustive(run)

    # Moving.

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """Nobody has looked ahead yet."""
        return {**state, GUESS: None, LOG_H: None, BEHIND: None, MADE: 0}

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move, and look ahead from the children where their parents did not."""
        opened = run.open(state, group, generator)
        if opened is not state:  # a guess made before knows nothing of chains that begin here
            opened = {**opened, GUESS: None}
        moved, log_ratio = super().move(run, opened, group, generator)
        if moved[LOG_H] is None and moved is not state and group + 1 < len(run.groups):
            moved = self._look(run, moved, generator)
        return moved, log_ratio

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Move one site by what its children promise, and return ``log K - log q``, ``(R, N)``."""
        site, mover = run.sites[item.site], run.movers[item.site]
        carry, kernel = state["sites"][item.site], mover.kernel
        if isinstance(mover, BoundFeynmanKac):
            carry, idle = mover.begin(carry, item.k, generator)
            if idle:
                return run.moved(state, item, carry), 0.0
        step: Any = kernel.step(carry, item.k, fixed=site.chain.fixed)
        if isinstance(step, RevealStep) and not bool(step.eligible.any()):
            still = kernel.advance(carry, step.tokens, item.k, step=step)
            return run.moved(state, item, still), 0.0
        proposal = self._proposal_of(site)
        if proposal == "clamped":
            return self._clamped(run, state, item, step, generator)
        moves: Any = (
            self._reweighted(run, state, item, step, generator)
            if isinstance(proposal, str)
            else proposal(step, carry, item.k)
        )
        value = draw_step(moves, generator)
        moved = run.moved(state, item, kernel.advance(carry, value, item.k, step=step))
        log_ratio = per_particle(step.log_prob(value) - moves.log_prob(value))
        return {**moved, GUESS: None, LOG_H: None}, log_ratio

    def _clamped(
        self, run: Bound, state: State, item: Item, step: RevealStep, generator: Rng
    ) -> tuple[State, Tensor]:
        u_order, u_token = uniforms(
            (2, *step.tokens.shape), generator=generator, device=step.tokens.device
        )
        positions, valid = self._positions(item, step, u_order)
        guess, lookahead = self._guess(run, state, generator), run.notes["lookahead"]
        log_d = step.log_probs.take_along_dim(positions[..., None], -2)  # (*B, m, V)
        last = self._is_last(run, state, item, step)
        ahead = self._ahead(run, state, item, guess, positions, log_d, last=last)
        if not last:  # the ends themselves need no defence
            ahead = run.defended(state, ahead, log_d)
        log_q = _tilted(log_d, ahead)
        chosen = self._draw(item, log_q, u_token.gather(-1, positions))[..., None]
        ratio = (log_d - log_q).gather(-1, chosen)[..., 0]
        log_ratio = per_particle(torch.where(valid, ratio, 0.0).sum(-1))
        kept = step.tokens.gather(-1, positions)
        tokens = step.tokens.scatter(-1, positions, torch.where(valid, chosen[..., 0], kept))
        kernel = run.movers[item.site].kernel
        carry = kernel.advance(state["sites"][item.site], tokens, item.k, step=step)
        moved = {**run.moved(state, item, carry), GUESS: None, LOG_H: None}
        if self.surprise:
            return moved, log_ratio
        alone = positions.shape[-1] == 1
        one = alone and (not run.source.is_program or tokens.ndim == 3)
        if not one or run.levels is not None:
            guess = lookahead.moved(guess, item.site, tokens, tokens != step.tokens)
        if one:
            log_h = ahead.gather(-1, chosen)[..., 0, 0]
        else:  # several positions at once: the parent's guess with all of them in place
            log_h = run.defended(based(moved, log_ratio), lookahead.score(moved, guess))
        # The end itself is no look-ahead, and a token nobody asked about has its parent's.
        known = not last and (not one or self.top is None)
        return self._looked(run, moved, log_h, guess if known else None), log_ratio

    # Both choices are methods, so that a conditional run can hold one particle to a path.

    def _positions(self, item: Item, step: RevealStep, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions revealed next, int64 ``(*B, m)``, and which of them are any."""
        key = torch.where(step.eligible, noise, -1.0)
        positions = key.topk(min(step.count, key.shape[-1]), -1).indices
        return positions, step.eligible.gather(-1, positions)

    def _draw(self, item: Item, log_q: Tensor, noise: Tensor) -> Tensor:
        """Return a token of each position, int64 ``(*B, m)``."""
        drawn: Tensor = draw_categorical(log_q, noise)
        return drawn

    def _ahead(
        self,
        run: Bound,
        state: State,
        item: Item,
        guess: Any,
        positions: Tensor,
        log_d: Tensor,
        *,
        last: bool,
    ) -> Tensor:
        """Return ``W(v)``, float64 ``(*B, m, V)``: the potential itself where nothing is left."""
        size, top, lookahead = log_d.shape[-1], self.top, run.notes["lookahead"]
        scored = log_d.topk(min(top or size, size), -1).indices
        # What cannot be drawn, as what only fills sequences up, is not asked about.
        possible = log_d.gather(-1, scored) > -torch.inf
        changes = Changes(item.site, positions, torch.where(possible, scored, scored[..., :1]))
        values = lookahead.children(state, guess, changes, last=last)
        if scored.shape[-1] == size:
            return torch.empty_like(values).scatter(-1, scored, values)
        rest = lookahead.score_each(state, guess, item.site)[..., None, None]
        return rest.expand(log_d.shape).scatter(-1, scored, values)

    def _is_last(self, run: Bound, state: State, item: Item, step: RevealStep) -> bool:
        """Whether one position is left and no other chain is unfinished."""
        masks = (step.tokens == step.log_probs.shape[-1]).sum(-1)
        return step.count == 1 and run.ends_with(state, item.site) and bool((masks <= 1).all())

    def _reweighted(
        self, run: Bound, state: State, item: Item, step: TorchDistribution, generator: Rng
    ) -> Step | BlockStep:
        """Tilt the prediction by what completions with each token pay, over what all of them do."""
        if isinstance(step, BlockStep):  # what stands beside the tokens moves by the chain itself
            tokens = self._reweighted(run, state, item, step.blocks[TOKENS], generator)
            return step.with_block(TOKENS, tokens)
        step, guess = tiltable(step), self._guess(run, state, generator)
        clean = run.sites[item.site].chain.tokens(guess[item.site])
        own = clean.movedim(2, -2)  # (*B, F, L)
        values = run.source.look(guess, state).movedim(2, -1)  # (R, N, *elements, F)
        values = values.reshape(
            *values.shape[:2], *[1] * (own.ndim - 1 - values.ndim), *values.shape[2:]
        )
        pay = torch.softmax(values, -1).expand(own.shape[:-1]) * own.shape[-2]  # e_j, mean one
        zero = pay.new_zeros((*own.shape[:-2], *step.log_probs.shape[-2:]))
        found, one = own.mT, torch.ones_like(pay)
        paid, count = (
            zero.scatter_add(-1, found, x[..., None, :].expand(found.shape)) for x in (pay, one)
        )
        return tilted(step, paid_over_all(paid, count, self.kappa))

    # Looking ahead.

    def _guess(self, run: Bound, state: State, generator: Rng) -> Any:
        """Return the guess a parent left, or a new one."""
        known = state[GUESS]
        return run.notes["lookahead"].guess(state, generator) if known is None else known

    def _look(self, run: Bound, moved: State, generator: Rng) -> State:
        """Return states with a new guess and its score."""
        guess = self._guess(run, moved, generator)
        score = run.notes["lookahead"].score(moved, guess)
        looked = self._looked(run, moved, run.defended(moved, score), guess)
        return {**looked, GUESS: guess}

    def _looked(self, run: Bound, moved: State, log_h: Tensor, guess: Any) -> State:
        """Return states with a twist, and what is behind it where latents may move."""
        kept = guess if run.levels is not None and isinstance(guess, dict) else None
        return {**moved, LOG_H: log_h, BEHIND: kept, MADE: run.moves_made(moved)}

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead by the completions behind the twist."""
        fills = state[BEHIND]
        return None if fills is None else run.ahead(state, fills, state[MADE])

    def renewed(self, state: State, log_h: Tensor) -> State:
        """Return states with another twist."""
        return {**state, LOG_H: log_h}

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return ``log h``: constant at the start."""
        log_h: Tensor | None = state[LOG_H]
        if log_h is None:
            return None
        # A sequence finished before the last step may be forbidden; its end will say so.
        return per_particle(torch.where(log_h == -torch.inf, FORBIDDEN_GUESS, log_h))

    def num_calls(self, run: Bound) -> int:
        """Return how many sequences were asked about, or differentiated at."""
        return super().num_calls(run) + _gradients(run, self.proposal) - run.notes["gradients"]

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, in JSON types."""
        chosen = [self._proposal_of(site) for site in run.source.chains]
        names = [p if isinstance(p, str) else type(p).__name__ for p in chosen]
        fill = self._fill_of(run.source)
        return {
            **super().settings(run),
            "twist": run.notes["lookahead"].name,
            "num_fills": None if fill is None else fill.num_fills,
            "proposal": " + ".join(dict.fromkeys(names)),
        }


def _gradients(run: Bound, given: Any = None) -> int:
    proposals = {id(p): p for p in [given, *(site.twist for site in run.source.chains)]}
    return sum(p.num_calls for p in proposals.values() if isinstance(p, GradientProposal))


def paid_over_all(paid: Array, count: Array, kappa: float) -> Array:
    """Return the log of what completions with a token pay, over what all of them do.

    :param paid: sums over completions that have a token of what they pay, mean one.
    :param count: how many have it.
    :param kappa: completions of average worth to add.
    """
    return array_namespace(paid).log((kappa + paid) / (kappa + count))


def _tilted(log_d: Tensor, ahead: Tensor) -> Tensor:
    """Return ``D exp(W)`` normalised; a particle all of whose children are dead moves by ``D``."""
    log_q = log_d + ahead
    total = torch.logsumexp(log_q, -1, keepdim=True)
    return torch.where(total == -torch.inf, log_d, log_q - total)
