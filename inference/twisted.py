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

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.distributions.reveal_step import RevealStep
from ppl_diffusion.handlers import GradientProposal, Step, tiltable, tilted
from ppl_diffusion.inference._chain_program import ChainProgram, TaskEngine
from ppl_diffusion.inference._lookahead import (
    ExhaustiveLookahead,
    FillLookahead,
    Lookahead,
    StateLookahead,
    UncachedPotential,
    with_sites,
)
from ppl_diffusion.inference._task import Task
from ppl_diffusion.kernels.base import ORDERED, SAMPLE_ONLY, Carry
from ppl_diffusion.kernels.noise import draw_categorical, uniforms
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS, AbstractPotential
from ppl_diffusion.smc.engine import Progress
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential, Proposal, per_particle, take_particles
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import (
    FILL_UNIFORMS,
    ArgmaxFill,
    CallableTwist,
    FillTwist,
    PersistentFill,
    TwistLike,
    as_twist,
)

GUESS, LOG_H = "guess", "log_h"

ProposalLike = Literal["clamped", "reweighted"] | Proposal


class TwistedSampler(ChainProgram):
    """Posterior sampling by twisted sequential Monte Carlo.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param twist: how particles look ahead: ``"argmax"``, ``"persistent"``, ``"sample"``, a fill
        twist such as ``PersistentFill(16)``, ``"exhaustive"`` (every completion, tiny problems), or
        a function ``(carry, k) -> log h (R, N)`` of ``carry["tokens"]``, for instance learned.
        By default 16 persistent completions where they are reweighted, the argmax elsewhere.
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
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(steps done, steps in all)``.
    :raises ValueError: if ``top``, ``kappa`` or a name is not usable.

    Example::

        sampler = TwistedSampler(chain, Reward(dock, temperature=0.1), twist=PersistentFill(16))
        posterior = sampler.run(seed=0)
    """

    def __init__(
        self,
        target: ReverseChain | Callable[..., Any],
        potential: AbstractPotential | Callable[[Tensor], Tensor] | None = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        twist: TwistLike | Literal["auto", "exhaustive"] = "auto",
        proposal: ProposalLike | None = None,
        surprise: bool = False,
        top: int | None = None,
        kappa: float = 1.0,
        cache: bool = True,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        if isinstance(proposal, str) and proposal not in ("clamped", "reweighted"):
            raise ValueError(
                f"TwistedSampler: unknown proposal {proposal!r}; choose 'clamped', 'reweighted', "
                "None for the kernel's own, or give a proposal."
            )
        if not (proposal is None or isinstance(proposal, str) or callable(proposal)):
            raise TypeError(
                "TwistedSampler: a proposal is a name or a function (step, carry, k) -> "
                f"distribution, got {type(proposal).__name__}."
            )
        if top is not None and top < 1:
            raise ValueError(f"TwistedSampler: top must be >= 1 or None, got {top}.")
        if not 0 < kappa < float("inf"):
            raise ValueError(f"TwistedSampler: kappa must be positive and finite, got {kappa}.")
        if twist is None:
            raise ValueError(
                "TwistedSampler: twist=None looks at nothing; use FeynmanKac with a proposal."
            )
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            resampler=resampler,
            ess_threshold=ess_threshold,
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.twist = twist if twist == "auto" or twist == "exhaustive" else as_twist(twist)
        self.proposal, self.surprise, self.top, self.kappa = proposal, surprise, top, kappa
        self.cache = cache

    def bind(self, task: Task) -> TwistedEngine:
        """Return the engine of one run.

        :param task: chain and potential.
        """
        return TwistedEngine(task, self)

    def settings(self, engine: TwistedEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {
            "method": "twisted",
            "twist": engine.lookahead.name,
            "num_fills": engine.num_fills,
            "proposal": engine.proposal_name,
            "surprise": self.surprise,
            "top": self.top,
            "kappa": self.kappa,
            "cache": self.cache,
            "resampler": self.resampler.name,
            "ess_threshold": self.ess_threshold,
        }


class TwistedEngine(TaskEngine):
    """A task during one run of :func:`~ppl_diffusion.smc.smc_loop`.

    The carry holds, besides the tokens, the guess of each particle and ``log h`` of its state,
    where they were made by its parent.

    :param task: chain and potential.
    :param options: the program's options.
    """

    def __init__(self, task: Task, options: TwistedSampler) -> None:
        super().__init__(task)
        self.chain, self.kernel, self.options = task.chain, task.chain.kernel, options
        given = task.proposal("TwistedSampler", options.proposal)
        self.proposal = given or _default_proposal(self.kernel.capability)
        self._check_kernel()
        self.denoiser = EvaluatedDenoiser(self.kernel.denoiser, max_rows=options.max_rows)
        self.kernel = self.kernel.with_denoiser(self.denoiser)
        self.twist = options.twist
        if self.twist == "auto":
            self.twist = PersistentFill(16) if self.proposal == "reweighted" else ArgmaxFill()
        self.fill = self.twist if isinstance(self.twist, FillTwist) else None
        evaluated = EvaluatedPotential if options.cache else UncachedPotential
        self.potential = evaluated(task.potential)
        self._gradients_before = _gradients(self.proposal)
        self.lookahead = self._lookahead()
        self._check_lookahead()

    def _lookahead(self) -> Lookahead:
        if self.fill is not None:
            return FillLookahead(self.fill, self.potential)
        if isinstance(self.twist, CallableTwist):
            return StateLookahead(self.twist)
        return ExhaustiveLookahead(
            self.potential, self.kernel.process.vocab_size, self.chain.length
        )

    def _check_kernel(self) -> None:
        if self.kernel.capability == SAMPLE_ONLY:
            raise CapabilityError(
                "TwistedSampler: a proposal needs a kernel with a density, "
                f"{type(self.kernel).__name__} is {SAMPLE_ONLY}; use SMC or FeynmanKac without one."
            )
        if self.proposal == "clamped" and self.kernel.capability != ORDERED:
            raise CapabilityError(
                "TwistedSampler: the clamped look-ahead asks about the next position to be "
                f"revealed, which {type(self.kernel).__name__} does not choose; build the chain "
                "with OrderedKernel, or use proposal='reweighted'."
            )

    def _check_lookahead(self) -> None:
        if self.proposal == "reweighted" and self.fill is None:
            raise ValueError(
                "TwistedSampler: proposal='reweighted' reweights completions, which twist="
                f"{self.lookahead.name!r} does not have; use a fill such as 'persistent'."
            )
        if isinstance(self.lookahead, StateLookahead) and self.chain.batch_shape:
            raise CapabilityError(
                "TwistedSampler: a twist given by a function sees whole particles, not the "
                f"plates {tuple(self.chain.batch_shape)} of the chain; run the sequences apart."
            )

    @property
    def num_fills(self) -> int | None:
        """Completions per particle, None where the look-ahead draws none."""
        return None if self.fill is None else self.fill.num_fills

    @property
    def proposal_name(self) -> str:
        """What moves the particles."""
        return self.proposal if isinstance(self.proposal, str) else type(self.proposal).__name__

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""
        return self.denoiser.rows_evaluated

    @property
    def num_potential_calls(self) -> int:
        """Sequences the potential was asked about or differentiated at so far."""
        return self.potential.num_calls + _gradients(self.proposal) - self._gradients_before

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the noisiest states; their twist is constant."""
        chain, batch = self.chain, (runs, particles, *self.chain.batch_shape)
        carry = self.kernel.init_carry(
            batch, chain.length, prompt=chain.prompt, generator=generator
        )
        noise = None if self.fill is None else self.fill.init((*batch, chain.length), generator)
        return carry if noise is None else {**carry, FILL_UNIFORMS: noise}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Return the carry after step ``k``, with its twist, and ``log K - log q``, ``(R, N)``."""
        step: Any = self.kernel.step(carry, k, fixed=self.chain.fixed)
        if isinstance(step, RevealStep) and not bool(step.eligible.any()):
            return self.kernel.advance(carry, step.tokens, k, step=step), 0.0
        if self.proposal == "clamped":
            return self._clamped(step, carry, k, generator)
        proposal: Any = (
            self._reweighted(tiltable(step), self._guess(carry, k, generator))
            if isinstance(self.proposal, str)
            else self.proposal(step, carry, k)
        )
        tokens = proposal.sample() if generator is None else proposal.sample(generator=generator)
        moved = self.kernel.advance(carry, tokens, k, step=step)
        log_ratio = per_particle(step.log_prob(tokens) - proposal.log_prob(tokens))
        return self._look(moved, k + 1, generator), log_ratio

    # Clamped look-ahead.

    def _clamped(
        self, step: RevealStep, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor]:
        u_order, u_token = uniforms((2, *step.tokens.shape), generator=generator)
        sites, valid = self._sites(step, u_order)
        guess = self._guess(carry, k, generator)
        log_d = step.log_probs.take_along_dim(sites[..., None], -2)  # (*B, m, V)
        ahead = self._ahead(step, guess, sites, log_d, k)
        log_q = _tilted(log_d, ahead)
        chosen = self._draw(log_q, u_token.gather(-1, sites))[..., None]
        ratio = (log_d - log_q).gather(-1, chosen)[..., 0]
        log_ratio = per_particle(torch.where(valid, ratio, 0.0).sum(-1))
        kept = step.tokens.gather(-1, sites)
        tokens = step.tokens.scatter(-1, sites, torch.where(valid, chosen[..., 0], kept))
        moved = self.kernel.advance(carry, tokens, k, step=step)
        if self.options.surprise:
            return self._look(moved, k + 1, generator), log_ratio
        if sites.shape[-1] == 1:
            log_h = ahead.gather(-1, chosen)[..., 0, 0]
        else:
            log_h = self.lookahead.score(
                self.lookahead.moved(guess, tokens, tokens != step.tokens), k + 1
            )
        return {**moved, LOG_H: log_h}, log_ratio

    def _ahead(
        self, step: RevealStep, guess: Tensor, sites: Tensor, log_d: Tensor, k: int
    ) -> Tensor:
        """Return ``W(v)``, float64 ``(*B, m, V)``: the potential itself where nothing is left."""
        size, top = log_d.shape[-1], self.options.top
        scored = log_d.topk(min(top or size, size), -1).indices
        if sites.shape[-1] == 1 and not bool(((step.tokens == size).sum(-1) > 1).any()):
            whole = with_sites(step.tokens[..., None, None, :], sites[..., None], scored)
            values = self.potential(whole)
        else:
            values = self.lookahead.children(guess, sites, scored, k + 1)
        if scored.shape[-1] == size:
            return torch.empty_like(values).scatter(-1, scored, values)
        rest = self.lookahead.score(guess, k)[..., None, None].expand(log_d.shape)
        return rest.scatter(-1, scored, values)

    def _sites(self, step: RevealStep, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions revealed next, int64 ``(*B, m)``, and which of them are any."""
        key = torch.where(step.eligible, noise, -1.0)
        sites = key.topk(min(step.count, key.shape[-1]), -1).indices
        return sites, step.eligible.gather(-1, sites)

    def _draw(self, log_q: Tensor, noise: Tensor) -> Tensor:
        """Return the tokens they get, int64 ``(*B, m)``."""
        tokens: Tensor = draw_categorical(log_q, noise)
        return tokens

    # Reweighted look-ahead.

    def _reweighted(self, step: Step, guess: Tensor) -> Step:
        """Tilt the prediction by what completions with each token pay, over what all of them do."""
        assert isinstance(self.lookahead, FillLookahead)
        pay = torch.softmax(self.lookahead.values(guess), -1) * guess.shape[-2]  # e_j, mean one
        zero = pay.new_zeros((*guess.shape[:-2], *step.log_probs.shape[-2:]))
        found, one = guess.mT, torch.ones_like(pay)
        paid, count = (
            zero.scatter_add(-1, found, x[..., None, :].expand(found.shape)) for x in (pay, one)
        )
        return tilted(step, torch.log((self.options.kappa + paid) / (self.options.kappa + count)))

    # Looking ahead.

    def _guess(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor:
        """Return the guess a parent left, or a new one."""
        known: Tensor | None = carry.get(GUESS)
        if known is not None:
            return known
        tokens, noise = carry["tokens"], None
        if self.fill is not None:
            noise = self.fill.uniforms(carry.get(FILL_UNIFORMS), tuple(tokens.shape), generator)
        return self.lookahead.guess(carry, self.kernel.posterior_mean(tokens, k), k, noise)

    def _look(self, moved: Carry, k: int, generator: torch.Generator | None) -> Carry:
        """Return the carry with a new guess and its score, except at the end."""
        moved = {name: value for name, value in moved.items() if name != GUESS}
        if k == self.chain.num_steps:
            return moved
        guess = self._guess(moved, k, generator)
        return {**moved, GUESS: guess, LOG_H: self.lookahead.score(guess, k)}

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return ``log h_k``, ``(R, N)``: constant at the start, the potential at the end."""
        if k == self.chain.num_steps:
            return per_particle(self.potential(carry["tokens"]))
        log_h: Tensor | None = carry.get(LOG_H)
        if log_h is None:
            return None
        # A sequence finished before the last step may be forbidden; its end will say so.
        return per_particle(torch.where(log_h == -torch.inf, FORBIDDEN_GUESS, log_h))

    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors."""
        return {name: take_particles(value, ancestors) for name, value in carry.items()}


def _default_proposal(capability: str) -> Literal["clamped", "reweighted"]:
    return "clamped" if capability == ORDERED else "reweighted"


def _gradients(proposal: ProposalLike) -> int:
    return proposal.num_calls if isinstance(proposal, GradientProposal) else 0


def _tilted(log_d: Tensor, ahead: Tensor) -> Tensor:
    """Return ``D exp(W)`` normalised; a particle all of whose children are dead moves by ``D``."""
    log_q = log_d + ahead
    total = torch.logsumexp(log_q, -1, keepdim=True)
    return torch.where(total == -torch.inf, log_d, log_q - total)
