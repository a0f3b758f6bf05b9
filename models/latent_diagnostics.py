"""Whether a latent says something, and something of use.

A latent can fail in two ways that a bound does not tell apart. It may *say nothing*: its mutual
information with the sequence is 0. Or what it says may be *useless*: tokens depend on each other
given the latent as much as without it, or more, as where the code of two bits says whether they are
equal. What helps a sampler of few steps is the drop of their total correlation alone (LADD,
arXiv 2510.18114).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.models.latent_costs import Encoding, LatentModel, hidden_costs
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.noise import uniforms

_SAYS_NOTHING = 0.02  # nats
_USEFUL = 0.1  # share of the correlation that is gone


class CodeUse(NamedTuple):
    """How codes are used by a sample of sequences.

    :param perplexity: how many codes a slot uses, were all that it uses used alike; mean of slots.
    :param used: share of the codes that occur anywhere.
    """

    perplexity: float
    used: float


class Diagnosis(NamedTuple):
    """What a latent does for the tokens of a model, nats per sequence.

    :param information: mutual information of sequence and latent, estimated within the sample; it
        cannot exceed the logarithm of its size.
    :param entropy: mean entropy of the codes given a sequence; 0 of an encoder that draws nothing,
        and of a continuous latent.
    :param without: cost of all tokens at once, given a latent of noise.
    :param given: cost of all tokens at once, given the latent.
    :param correlation: total correlation of the tokens as the model sees it: how much less they
        cost one after another, in random order, than at once.
    :param left: total correlation given the latent.
    :param use: of the codes; None for a continuous latent.
    """

    information: float
    entropy: float
    without: float
    given: float
    correlation: float
    left: float
    use: CodeUse | None

    @property
    def drop(self) -> float:
        """Total correlation that the latent takes away."""
        return self.correlation - self.left

    @property
    def finding(self) -> str:
        """``"says nothing"``, ``"useless"`` or ``"useful"``."""
        if self.information < _SAYS_NOTHING:
            return "says nothing"
        return "useful" if self.drop > _USEFUL * self.correlation else "useless"


@torch.no_grad()
def diagnose(
    program: LatentModel, x0: Tensor, *, generator: torch.Generator | None = None
) -> Diagnosis:
    """Measure what the latents of clean sequences do for a model.

    :param program: a :class:`~ppl_diffusion.models.LatentDiffusion`.
    :param x0: a sample of clean sequences, int64 ``(n, L)``; the network reads ``2 L`` rows each.
    """
    encoding = program.encoding(x0)
    clean = encoding.draw(torch.arange(len(x0), device=x0.device), generator)
    finished, noise = _ends(program, clean, generator)
    given, in_turn = _costs(program, x0, clean, finished, 0.0, generator)
    without, in_turn_without = _costs(program, x0, clean, noise, 1.0, generator)
    return Diagnosis(
        information=_information(program, encoding, clean, finished),
        entropy=abs(float(encoding.cost.mean())),
        without=without,
        given=given,
        correlation=without - in_turn_without,
        left=given - in_turn,
        use=None if clean.is_floating_point() else code_use(clean, _size(program)),
    )


def code_use(codes: Tensor, num_codes: int) -> CodeUse:
    """Return how codes are used.

    :param codes: int64 ``(n, N)``.
    """
    counts = torch.stack([slot.bincount(minlength=num_codes) for slot in codes.T])
    shares = counts.double() / len(codes)
    entropies = -torch.special.xlogy(shares, shares).sum(1)
    used = (counts.sum(0) > 0).double().mean()
    return CodeUse(float(entropies.exp().mean()), float(used))


def _ends(
    program: LatentModel, clean: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the latent as tokens read it when it is finished, and before it is begun."""
    process = program.latent_process
    if not isinstance(process, Gaussian):
        return clean, torch.full_like(clean, _size(program))
    eps = [torch.randn(clean.shape, dtype=clean.dtype, generator=generator) for _ in range(2)]
    ours, noise = (e.to(clean.device) for e in eps)
    return process.corrupt(clean, 0.0, ours), noise


def _costs(
    program: LatentModel,
    x0: Tensor,
    clean: Tensor,
    latent: Tensor,
    level: float,
    generator: torch.Generator | None,
) -> tuple[float, float]:
    """Return what tokens cost given a latent, all at once and one after another.

    In random order the cost of the token at which ``k`` are hidden is the mean over the hidden.
    """
    length, mask = x0.shape[1], program.process.vocab_size
    order = uniforms(x0.shape, generator=generator, device=x0.device).argsort(1)
    at, means = torch.full((len(x0),), level, dtype=torch.float64, device=x0.device), []
    for count in range(1, length + 1):
        states = torch.where(order < count, mask, x0), latent
        cost = hidden_costs(
            program, x0, clean, states, (at.new_full((), count / length) + 0 * at, at)
        )
        means.append(float(cost.tokens.mean()) / count)
    return length * means[-1], sum(means)


def _information(
    program: LatentModel, encoding: Encoding, clean: Tensor, finished: Tensor
) -> float:
    """Return ``E log q(latent | x) - log mean_j q(latent | x_j)`` over a sample."""
    log_q = _log_density(program, encoding, clean, finished)
    return float((log_q.diagonal() - log_q.logsumexp(1) + math.log(len(log_q))).mean())


def _log_density(
    program: LatentModel, encoding: Encoding, clean: Tensor, finished: Tensor
) -> Tensor:
    """Return the density of each latent given each sequence, up to a constant, ``(n, n)``."""
    process = program.latent_process
    if isinstance(process, Gaussian):
        means = float(process.signal(0.0)) * clean.flatten(1)
        return -0.5 * (torch.cdist(finished.flatten(1), means) / float(process.noise(0.0))) ** 2
    if encoding.log_probs is None:
        same = (clean[:, None] == clean).all(-1)
        return torch.where(same, 0.0, -torch.inf).double()
    picked = [
        law[:, codes] for law, codes in zip(encoding.log_probs.unbind(1), clean.T, strict=True)
    ]
    return torch.stack(picked).sum(0).T.double()


def _size(program: LatentModel) -> int:
    count = program.denoiser.latent.num_codes
    assert count is not None
    return count
