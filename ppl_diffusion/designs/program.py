"""From a question to its target: a prior, potentials and fixed bases."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_diffusion.designs.question import Job, MotifSpec, Question, clamp_pattern
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.jobs.checks import InputError, user_input
from ppl_diffusion.models import DiffusionProgram, Oracle, load, load_oracle
from ppl_diffusion.potentials import (
    AbstractPotential,
    ForbiddenMotif,
    GCContent,
    Likelihood,
    Motif,
    Potential,
    Reward,
    SumPotential,
    find_motif,
    read_motifs,
)

if TYPE_CHECKING:
    from ppl_diffusion.distributions import ReverseChain

BASES = ["A", "C", "G", "T"]
ORACLES = {
    "yeast-promoter": ("yeast-oracle-design", "yeast-oracle-judge"),
    "yeast-promoter-uniform": ("yeast-oracle-design", "yeast-oracle-judge"),
}
DEFAULT_TEMPERATURE = 0.4
"""Expression units per nat; the prior's standard deviation is about four times as large."""
REVEALS, UNMASKED_STEPS = 4, 64
"""Positions per step of a masked chain, and steps of any other, if nothing is said."""
HIGHEST_EXPRESSION = 17.0
CAPPED = f"min(oracle, {HIGHEST_EXPRESSION:g})"
"""The top of the assay's scale: a prediction beyond it is extrapolation and earns nothing more."""
Potentials = dict[str, AbstractPotential]


@dataclass(frozen=True)
class Target:
    """What a job samples from.

    :param job: the job, with every default filled in.
    :param potentials: log-potentials by site name; their sum is what is added to the prior.
    :param pattern: fixed tokens, int64 ``(L,)``, -1 where free; None if nothing is fixed.
    :param designer: the oracle in the target, or None.
    :param judge: an independent oracle, or None.
    """

    job: Job
    prior: DiffusionProgram
    chain: ReverseChain
    potentials: Mapping[str, AbstractPotential]
    pattern: Tensor | None = None
    designer: Oracle | None = None
    judge: Oracle | None = None

    @property
    def potential(self) -> AbstractPotential:
        """What is added to the log-probability of the prior."""
        if not self.potentials:
            return Potential(lambda x0: x0.new_zeros(x0.shape[:-1], dtype=torch.float32), name="0")
        return SumPotential(tuple(self.potentials.values()))

    @property
    def masked(self) -> bool:
        return self.chain.kernel.process.absorbing

    @property
    def clamp(self) -> ClampProposal | None:
        if self.pattern is None:
            return None
        return ClampProposal(self.pattern, self.pattern >= 0, len(BASES))

    def decode(self, tokens: Tensor) -> list[str]:
        return list(self.prior.decode(tokens))


def build_target(job: Job) -> Target:
    """Load what a job names and put the target together.

    :raises InputError: if the question does not fit the prior.
    """
    with user_input():
        device = job.search.device or "cpu"
        prior = load(job.name).to(device)
    if prior.vocabulary != BASES:
        raise InputError(
            f"Designs are made of the bases ACGT, but the prior {job.name!r} writes "
            f"{''.join(prior.vocabulary)}: choose a DNA prior."
        )
    job = dataclasses.replace(job, prior_digest=_prior_digest(prior))
    designer, judge = _oracles(prior, job.question)
    job = _with_default_steps(_with_default_reward(job, designer), prior)
    with user_input():
        motifs = [_motif(spec) for spec in job.question.motifs]
        job = _with_digests(job, motifs)
        potentials = _potentials(job.question, designer, motifs)
        # A motif wider than the sequence or an empty GC range must be found before the run.
        for potential in potentials.values():
            potential.lookahead(torch.zeros(1, prior.length, dtype=torch.int64, device=device))
    pattern = _pattern(job.question, prior)
    if not potentials and pattern is None:
        why = "" if job.name in ORACLES else ", which has no expression oracle"
        raise InputError(
            f"Nothing is asked of {job.name!r}{why}: give --motif, --gc, --forbid or --fix."
        )
    _require_possible(job.question, pattern)
    assert job.search.num_steps is not None
    chain = prior.chain(num_steps=job.search.num_steps)
    return Target(job, prior, chain, potentials, pattern, designer, judge)


def _oracles(prior: DiffusionProgram, question: Question) -> tuple[Oracle | None, Oracle | None]:
    if prior.name in ORACLES:
        designer, judge = ORACLES[prior.name]
        return load_oracle(designer).to(prior.device), load_oracle(judge).to(prior.device)
    if question.uses_oracle:
        raise InputError(
            f"The prior {prior.name!r} has no expression oracle: ask for --motif, --gc, --forbid "
            "or --fix instead of --observe or --temperature."
        )
    return None, None


def _with_default_reward(job: Job, oracle: Oracle | None) -> Job:
    question = job.question
    if oracle is None or question.uses_oracle or not question.expression:
        return job
    asked = dataclasses.replace(question, temperature=DEFAULT_TEMPERATURE)
    return dataclasses.replace(job, question=asked)


def _with_default_steps(job: Job, prior: DiffusionProgram) -> Job:
    if job.search.num_steps is not None:
        return job
    # More at a time and the chain is another law: a network knows no ties among its reveals.
    masked = prior.chain(num_steps=1).kernel.process.absorbing
    steps = -(-prior.length // REVEALS) if masked else UNMASKED_STEPS
    search = dataclasses.replace(job.search, num_steps=steps)
    return dataclasses.replace(job, search=search)


def _prior_digest(prior: DiffusionProgram) -> str:
    """Tell priors apart by what they compute, wherever they lie."""
    network = prior.denoiser
    numbers = network.state_dict() if isinstance(network, torch.nn.Module) else {}
    shape = getattr(network, "config", None)
    return digest(f"{prior.family}, {prior.length}, {prior.vocabulary}, {shape}", numbers)


def _with_digests(job: Job, motifs: Sequence[Motif]) -> Job:
    digests = (digest(repr(m.sites), {"probabilities": m.probabilities}) for m in motifs)
    pairs = zip(job.question.motifs, digests, strict=True)
    specs = tuple(dataclasses.replace(spec, digest=known) for spec, known in pairs)
    return dataclasses.replace(job, question=dataclasses.replace(job.question, motifs=specs))


def digest(text: str, numbers: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for name, values in sorted(numbers.items()):
        total.update(f"\n{name} {values.dtype} {tuple(values.shape)}\n".encode())
        total.update(values.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


def _potentials(question: Question, oracle: Oracle | None, motifs: Sequence[Motif]) -> Potentials:
    found: Potentials = {}
    if oracle is not None and question.observe is not None and question.sd is not None:
        found["expression"] = Likelihood(oracle, question.observe, question.sd, name="oracle")
    if oracle is not None and question.temperature is not None:
        found["expression"] = Reward(_capped(oracle), question.temperature, name=CAPPED)
    for index, (spec, matrix) in enumerate(zip(question.motifs, motifs, strict=True)):
        found[f"motif_{index}"] = spec.weight * matrix.potential()
    if question.gc is not None:
        found["gc"] = GCContent(*question.gc)
    for motif in question.forbid:
        found[f"forbid_{motif}"] = ForbiddenMotif(motif)
    return found


def _capped(oracle: Oracle) -> Callable[[Tensor], Tensor]:
    return lambda tokens: oracle(tokens).clamp_max(HIGHEST_EXPRESSION)


def _motif(spec: MotifSpec) -> Motif:
    motifs = read_motifs(spec.path)
    if spec.name is not None:
        return find_motif(motifs, spec.name)
    if len(motifs) > 1:
        raise InputError(
            f"The motif file {str(spec.path)!r} holds {len(motifs)} matrices: choose one with "
            f"FILE@NAME, such as {spec.path.name}@{motifs[0].identifier}."
        )
    return motifs[0]


def _pattern(question: Question, prior: DiffusionProgram) -> Tensor | None:
    fixed = clamp_pattern(question.fix, prior.length)
    if not fixed:
        return None
    pattern = torch.full((prior.length,), -1, dtype=torch.int64, device="cpu")
    for position, base in fixed.items():
        pattern[position] = BASES.index(base)
    return pattern


def _require_possible(question: Question, pattern: Tensor | None) -> None:
    """Refuse what the fixed bases alone rule out, before anything is run."""
    if pattern is None:
        return
    text = "".join("." if token < 0 else BASES[token] for token in pattern.tolist())
    for motif in question.forbid:
        rule = ForbiddenMotif(motif)
        for piece in filter(None, text.split(".")):
            ids = torch.tensor([[BASES.index(base) for base in piece]], device="cpu")
            if len(piece) >= len(motif) and float(rule(ids)) == -math.inf:
                raise InputError(f"The fixed bases {piece} hold the forbidden {motif}: drop one.")
    if question.gc is not None:
        free = text.count(".")
        fixed = text.count("G") + text.count("C")
        low, high = fixed / len(text), (fixed + free) / len(text)
        if high < question.gc[0] or low > question.gc[1]:
            raise InputError(
                f"With the fixed bases the GC content lies between {low:.3g} and {high:.3g}, never "
                f"within {question.gc[0]:g} to {question.gc[1]:g}: change --gc or --fix."
            )
