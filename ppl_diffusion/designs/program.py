"""From a question to its target: a prior, potentials and fixed tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.digests import digest
from ppl_diffusion.designs.question import Job, Question
from ppl_diffusion.designs.scores import Score, make_score
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.jobs.checks import InputError, user_input
from ppl_diffusion.kernels import DirectKernel
from ppl_diffusion.models import DiffusionProgram, load
from ppl_diffusion.potentials import AbstractPotential, ForbiddenMotif, Potential, SumPotential
from ppl_diffusion.processes import Padded

if TYPE_CHECKING:
    from ppl_diffusion.distributions import ReverseChain

DNA = Alphabet(tuple("ACGT"))
REVEALS, UNMASKED_STEPS = 4, 64
"""Positions per step of a masked chain, and steps of any other, if nothing is said."""


@dataclass(frozen=True)
class Target:
    """What a job samples from.

    :param job: the job, with every default filled in.
    :param prior: the prior, of the lengths that were asked for.
    :param chain: its reverse chain.
    :param potentials: log-potentials by site name; their sum is what is added to the prior.
    :param pattern: fixed tokens, int64 ``(L,)``, -1 where free; None if nothing is fixed.
    :param scores: rewards first, then judges.
    :param alphabet: of the prior.
    :param given: the prior as it was handed over, if it was, and ``more`` potentials.
    """

    job: Job
    prior: DiffusionProgram
    chain: ReverseChain
    potentials: Mapping[str, AbstractPotential]
    pattern: Tensor | None = None
    scores: tuple[Score, ...] = ()
    alphabet: Alphabet = DNA
    given: DiffusionProgram | None = None
    more: Mapping[str, AbstractPotential] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the job says all of it, so that a brief can."""
        own = any(score.spec.object is not None for score in self.scores)
        return self.given is None and not self.more and not own

    @property
    def potential(self) -> AbstractPotential:
        """What is added to the log-probability of the prior."""
        if not self.potentials:
            return Potential(lambda x0: x0.new_zeros(x0.shape[:-1], dtype=torch.float32), name="0")
        return SumPotential(tuple(self.potentials.values()))

    @property
    def masked(self) -> bool:
        # Learned noise begins with masks too, but no token that is shown stays.
        kernel = self.chain.kernel
        return kernel.process.absorbing and not isinstance(kernel, DirectKernel)

    @property
    def clamp(self) -> ClampProposal | None:
        if self.pattern is None:
            return None
        return ClampProposal(self.pattern, self.pattern >= 0, len(self.alphabet.vocabulary))

    def decode(self, tokens: Tensor) -> list[str]:
        return self.alphabet.decode(tokens)


def build_target(
    job: Job,
    *,
    prior: DiffusionProgram | None = None,
    more: Mapping[str, AbstractPotential] | None = None,
) -> Target:
    """Load what a job names and put the target together.

    :param prior: the prior itself, where it is at hand; otherwise it is loaded.
    :param more: further potentials by name.
    :raises InputError: if the question does not fit the prior.
    """
    given = prior
    with user_input():
        device = job.search.device or "cpu"
        prior = (load(job.name) if prior is None else prior).to(device)
    known = _prior_digest(prior)
    if job.prior_digest not in (None, known):
        raise InputError(
            f"The prior {job.name!r} is not the one of the brief (its digest is {known}, not "
            f"{job.prior_digest}): restore it, or drop the digest from the brief."
        )
    job = _with_default_steps(dataclasses.replace(job, prior_digest=known), prior)
    alphabet = Alphabet.of(prior)
    pattern = alphabet.pattern(job.question.fix, prior.length)
    prior = _of_lengths(prior, job.question, pattern)
    if job.question.label is not None:
        with user_input():
            prior = prior.of_class(job.question.label, job.question.guidance)
    scores = _scores(job.question, alphabet, prior.device)
    rewards = tuple(s.spec for s in scores if s.potential is not None)
    job = job.asking(rewards=rewards)
    with user_input():
        potentials = {**_potentials(job.question, alphabet, scores), **(more or {})}
        # A motif wider than the sequence or an empty GC range must be found before the run.
        own = {s.spec.name for s in scores if s.spec.source in ("python", "torch", "command")}
        for name, potential in potentials.items():
            if name not in own and not isinstance(potential, Potential):
                potential.lookahead(torch.zeros(1, prior.length, dtype=torch.int64, device=device))
    if not potentials and pattern is None:
        raise InputError(
            f"Nothing is asked of {job.name!r}, and it has no brief of its own: give --reward, "
            "--motif, --gc, --forbid or --fix."
        )
    _require_possible(job.question, alphabet, pattern)
    assert job.search.num_steps is not None
    with user_input():
        chain = prior.chain(num_steps=job.search.num_steps)
    made = (job, prior, chain, potentials, pattern, scores, alphabet)
    return Target(*made, given=given, more=dict(more or {}))


def _with_default_steps(job: Job, prior: DiffusionProgram) -> Job:
    if job.search.num_steps is not None:
        return job
    # More at a time and the chain is another law: a network knows no ties among its reveals.
    masked = prior.process.absorbing
    steps = prior.fixed_steps or (-(-prior.length // REVEALS) if masked else UNMASKED_STEPS)
    search = dataclasses.replace(job.search, num_steps=steps)
    return dataclasses.replace(job, search=search)


def _of_lengths(
    prior: DiffusionProgram, question: Question, pattern: Tensor | None
) -> DiffusionProgram:
    """Return the prior of the lengths asked for, and long enough for what is fixed."""
    if not isinstance(prior.process, Padded):
        if question.lengths is not None:
            raise InputError(
                f"All sequences of {prior.name!r} have {prior.length} tokens: drop the lengths."
            )
        return prior
    low, high = question.lengths or (0, prior.length)
    if pattern is not None:
        low = max(low, int((pattern >= 0).nonzero().max()) + 1)
    with user_input():
        return prior.between(low, high)


def _prior_digest(prior: DiffusionProgram) -> str:
    """Tell priors apart by what they compute, wherever they lie."""
    network = prior.denoiser
    numbers = network.state_dict() if isinstance(network, torch.nn.Module) else {}
    shape = getattr(network, "config", None)
    law = f"{prior.family}, {prior.length}, {prior.vocabulary}, {shape}"
    lengths = getattr(prior.process, "lengths", None)
    return digest(law if lengths is None else f"{law}, {lengths.tolist()}", numbers)


def _scores(question: Question, alphabet: Alphabet, device: torch.device) -> tuple[Score, ...]:
    rewards = [make_score(spec, alphabet, device) for spec in question.rewards]
    judges = [make_score(spec, alphabet, device, judge=True) for spec in question.judges]
    return (*rewards, *judges)


def _potentials(
    question: Question, alphabet: Alphabet, scores: Sequence[Score]
) -> dict[str, AbstractPotential]:
    found = {s.spec.name: s.potential for s in scores if s.potential is not None}
    if question.gc is not None:
        found["the GC content"] = alphabet.gc(*question.gc)
    for piece in question.forbid:
        found[f"the forbidden {piece}"] = alphabet.forbid(piece)
    return found


def _require_possible(question: Question, alphabet: Alphabet, pattern: Tensor | None) -> None:
    """Refuse what the fixed tokens alone rule out, before anything is run."""
    if pattern is None:
        return
    for motif in question.forbid:
        rule = alphabet.forbid(motif)
        for piece in _runs(pattern):
            width = rule.width if isinstance(rule, ForbiddenMotif) else 1
            if len(piece) >= width and float(rule(piece[None])) == -math.inf:
                text = "".join(alphabet.vocabulary[i] for i in piece.tolist())
                raise InputError(
                    f"The fixed {alphabet.noun} {text} hold the forbidden {motif}: drop one."
                )
    if question.gc is not None and alphabet.padding is None:
        _require_possible_gc(question.gc, alphabet, pattern)


def _require_possible_gc(gc: tuple[float, float], alphabet: Alphabet, pattern: Tensor) -> None:
    held, length = pattern[pattern >= 0], len(pattern)
    share = alphabet.gc_share(held[None])
    assert share is not None
    fixed = round(float(share) * len(held))
    low, high = fixed / length, (fixed + length - len(held)) / length
    if high < gc[0] or low > gc[1]:
        raise InputError(
            f"With the fixed bases the GC content lies between {low:.3g} and {high:.3g}, never "
            f"within {gc[0]:g} to {gc[1]:g}: change --gc or --fix."
        )


def _runs(pattern: Tensor) -> list[Tensor]:
    """Return the stretches of fixed tokens."""
    places = (pattern >= 0).nonzero()[:, 0].tolist()
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [pattern[run] for run in runs]
