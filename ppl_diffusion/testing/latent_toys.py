"""Laws of tokens and of a latent beside them that are known exactly, with their denoisers.

Every problem is a mixture of products: a component is drawn, and given it tokens and slots are
independent. Two correlated bits and a noisy sawtooth are mixtures by nature; a table is the mixture
over its cells, each of which holds one sequence and one code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.latent import LatentSpec
from ppl_diffusion.testing.dense import all_states

Unseen = Literal["refuse", "uniform"]


class Diffusing(Protocol):
    """What is asked of the process of a continuous latent, by level."""

    def signal(self, u: Any) -> Any:
        """Return the factor ``a`` of the clean latent at level ``u``."""

    def noise(self, u: Any) -> Any:
        """Return the standard deviation ``b`` of the noise at level ``u``."""


@dataclass(frozen=True, eq=False)
class LatentProblem:
    """``p~(x, y) = sum_m w_m prod_i p_m(x_i) q_m(y)``, so ``p(x)`` and an encoder ``q(y | x)``.

    :param weights: ``w``, float64 ``(M,)``.
    :param tokens: laws of clean tokens, ``(M, L, V)``.
    :param latent: laws of codes ``(M, N, K)``, or the latent itself, ``(M, N, d)``.
    :param continuous: which of the two ``latent`` is.
    """

    weights: Tensor
    tokens: Tensor
    latent: Tensor
    continuous: bool = False

    @property
    def length(self) -> int:
        """Number ``L`` of tokens."""
        return self.tokens.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of clean tokens."""
        return self.tokens.shape[2]

    @property
    def spec(self) -> LatentSpec:
        """What the latent is."""
        _, slots, width = self.latent.shape
        return LatentSpec(slots, dim=width) if self.continuous else LatentSpec(slots, width)

    @property
    def data(self) -> Tensor:
        """The law of sequences, ``(V,) * L``."""
        return _contract(self.weights, list(self.tokens.unbind(1)))

    @property
    def joint(self) -> Tensor:
        """The law of sequences and codes, ``(V,) * L + (K,) * N``."""
        if self.continuous:
            raise TypeError("LatentProblem.joint: the latent is continuous; there is no table.")
        return _contract(self.weights, [*self.tokens.unbind(1), *self.latent.unbind(1)])

    @property
    def entropy(self) -> float:
        """``H(X)`` in nats."""
        return entropy(self.data)

    @property
    def encoder_entropy(self) -> float:
        """``E H(q(c | x))`` in nats, zero where the codes are a function of the sequence."""
        return entropy(self.joint) - self.entropy

    @property
    def information(self) -> float:
        """``I(c; x)`` in nats."""
        codes = self.joint.sum(tuple(range(self.length)))
        return entropy(codes) - self.encoder_entropy

    def encoded(self, encoder: Callable[[Tensor], Tensor], num_codes: int) -> LatentProblem:
        """Return the same data with codes that are a function of the sequence.

        :param encoder: from sequences, int64 ``(n, L)``, to codes, int64 ``(n, N)``.
        """
        weights, sequences = self._sequences()
        codes = one_hot(encoder(sequences), num_codes).double()
        return LatentProblem(weights, one_hot(sequences, self.vocab_size).double(), codes)

    def embedded(self, encoder: Callable[[Tensor], Tensor]) -> LatentProblem:
        """Return the same data with a continuous latent that is a function of the sequence.

        :param encoder: from sequences, int64 ``(n, L)``, to latents, ``(n, N, d)``.
        """
        weights, sequences = self._sequences()
        tokens = one_hot(sequences, self.vocab_size).double()
        return LatentProblem(weights, tokens, encoder(sequences).double(), continuous=True)

    def _sequences(self) -> tuple[Tensor, Tensor]:
        weights, sequences = self.data.flatten(), all_states(self.vocab_size, self.length)
        return weights[weights > 0], sequences[weights > 0]

    def draw(self, num: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw clean sequences, int64 ``(num, L)``, and their latents, ``(num, N)`` or ``(., d)``.

        The two are drawn from ``p~``, so the latents come from the encoder ``q(y | x)``.
        """
        which = torch.multinomial(self.weights, num, True, generator=generator)
        tokens = _draw(self.tokens[which], generator)
        latent = self.latent[which]
        return tokens, latent if self.continuous else _draw(latent, generator)

    def log_prob(self, x0: Tensor) -> Tensor:
        """Return ``log p(x)`` in nats, also where a table would be too large.

        :param x0: int64 ``(*batch, L)``.
        """
        log_p = _reads(self.tokens.log(), x0).sum(-2)  # (*batch, M)
        return torch.logsumexp(self.weights.log() + log_p, -1)

    def denoiser(
        self, process: Diffusing | None = None, *, unseen: Unseen = "refuse"
    ) -> ExactLatentDenoiser:
        """Return the Bayes-optimal denoiser; see :class:`ExactLatentDenoiser`."""
        return ExactLatentDenoiser(self, process, unseen=unseen)


class ExactLatentDenoiser:
    """The Bayes-optimal :class:`~ppl_diffusion.denoisers.LatentDenoiser` of a problem, float64.

    A hole is predicted from all that is revealed, and from a noisy continuous latent at its level;
    a revealed token or code from all others (``"cavity"``). Rows of :meth:`joint` are
    log-probabilities (or the clean latent), padded to one width.

    :param problem: the law of tokens and latent.
    :param process: process of a continuous latent, which gives signal and noise of a level.
    :param unseen: what to do with a hole beside tokens and codes that never occur together, where
        no prediction is right: refuse, or predict all values alike.
    :raises ValueError: if a continuous latent has no process.
    """

    kind: Kind = "cavity"
    time_free = True
    conditions: Mapping[str, int]

    def __init__(
        self, problem: LatentProblem, process: Diffusing | None = None, *, unseen: Unseen = "refuse"
    ) -> None:
        if problem.continuous and process is None:
            raise ValueError("ExactLatentDenoiser: a continuous latent needs its process.")
        self.problem, self.diffusing, self.unseen = problem, process, unseen
        self.vocab_size, self.latent = problem.vocab_size, problem.spec
        self.conditions = {"latent": 2 if problem.continuous else 1, "latent_time": 0}

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Any) -> Tensor:
        """Return log-probabilities of clean tokens, ``(*batch, L, V)``."""
        return self.head(self.joint(tokens, t, **given)[..., : tokens.shape[-1], :])

    def head(self, rows: Tensor) -> Tensor:
        """Return log-probabilities of clean tokens, ``(..., V)``."""
        return rows[..., : self.vocab_size]

    def latent_head(self, rows: Tensor) -> Tensor:
        """Return log-probabilities of codes ``(..., K)``, or the clean latent ``(..., d)``."""
        return rows[..., : self.problem.latent.shape[-1]]

    def joint(
        self,
        tokens: Tensor,
        t: float | Tensor,
        /,
        *,
        latent: Tensor,
        latent_time: float | Tensor = 0.0,
    ) -> Tensor:
        """Return a row for each token and slot, ``(*batch, L + N, max(V, K or d))``.

        :raises ValueError: if a hole stands beside what never occurs together, unless the rows of
            such states are to be uniform.
        """
        own = _log_evidence(self.problem.tokens, tokens)  # (*batch, L, M)
        prior = self.problem.weights.log().expand(*own.shape[:-2], -1)
        if self.problem.continuous:
            seen = self._log_density(latent, latent_time).expand_as(prior)
            slots = own.new_zeros((*own.shape[:-2], 0, own.shape[-1]))
        else:
            seen, batch = torch.zeros_like(prior), tokens.shape[:-1]
            slots = _log_evidence(self.problem.latent, latent.expand(*batch, -1))
        others = _leave_one_out(torch.cat([own, slots], -2)) + (prior + seen)[..., None, :]
        hole = (torch.cat([own, slots], -2) == 0).all(-1)
        weights = self._posterior(others, hole)
        count = tokens.shape[-1]
        first = _mixed(weights[..., :count, :], self.problem.tokens).log()
        return _stacked(first, self._latent_rows(weights, count, own, prior + seen))

    def _latent_rows(self, weights: Tensor, count: int, own: Tensor, prior: Tensor) -> Tensor:
        if not self.problem.continuous:
            return _mixed(weights[..., count:, :], self.problem.latent).log()
        everything = (own.sum(-2) + prior)[..., None, :]
        hole = torch.ones(everything.shape[:-1], dtype=torch.bool)
        whole = self._posterior(everything, hole)[..., 0, :]
        return torch.einsum("...m,mnd->...nd", whole, self.problem.latent)

    def _posterior(self, logits: Tensor, hole: Tensor) -> Tensor:
        """Normalise over components; nobody reads the rows of what is revealed."""
        unseen = (logits == -torch.inf).all(-1)
        if self.unseen == "refuse" and bool((unseen & hole).any()):
            raise ValueError(
                "ExactLatentDenoiser: a hole stands beside tokens and codes that never occur "
                "together, so its law is undefined; smooth the problem (corr_bits with delta > 0), "
                "or take unseen='uniform'."
            )
        return torch.softmax(torch.where(unseen[..., None], 0.0, logits), -1)

    def _log_density(self, latent: Tensor, level: float | Tensor) -> Tensor:
        """``log N(y; a mu_m, b^2)`` up to what all components share, ``(*batch, M)``."""
        assert self.diffusing is not None
        a, b = (
            torch.as_tensor(x, dtype=torch.float64)[..., None, None, None]
            for x in (self.diffusing.signal(level), self.diffusing.noise(level))
        )
        far = (latent.double()[..., None, :, :] - a * self.problem.latent) / b
        return -far.square().sum((-2, -1)) / 2

    def parameters(self) -> Iterator[Tensor]:
        """Yield the arrays that are all the output depends on."""
        yield from (self.problem.weights, self.problem.tokens, self.problem.latent)

    def to(self, device: torch.device | str) -> Self:
        """Move the arrays, in place."""
        weights, tokens, latent = (array.to(device) for array in self.parameters())
        self.problem = LatentProblem(weights, tokens, latent, self.problem.continuous)
        return self


def corr_bits(delta: float) -> LatentProblem:
    """Return two noisy copies of a fair bit, whose code is that bit.

    :param delta: how often each differs from it.
    """
    return mix_prod(2, 1.0 - delta)


def mix_prod(length: int, p: float) -> LatentProblem:
    """Return independent bits that are ``C`` with probability ``p``; the code is the fair bit ``C``.

    :param length: number of bits.
    """
    bits = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64)
    codes = torch.eye(2, dtype=torch.float64)[:, None]
    return LatentProblem(torch.full((2,), 0.5).double(), bits[:, None].repeat(1, length, 1), codes)


def binary_saw(
    num_codes: int,
    *,
    length: int = 16,
    num_saws: int = 2,
    edge: float = 0.01,
    num_points: int = 1024,
) -> LatentProblem:
    """Return bits whose probability runs up and down along positions, from a random shift.

    The code is the shift, in bins. Given a sequence the shift is not certain, so the encoder is
    random (BinSaw of LADD, arXiv 2510.18114, with the shift by the midpoint rule).

    :param num_codes: number ``K`` of bins.
    :param length: number of bits, one or many per tooth.
    :param num_saws: teeth along the sequence.
    :param edge: least probability of either value.
    :param num_points: midpoints of the quadrature over shifts of one tooth.
    """
    shift = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    phase = (num_saws * torch.arange(length) / length + shift[:, None]) % 1.0
    one = edge + (1 - 2 * edge) * (2 * phase - 1).abs()
    codes = one_hot((shift * num_codes).long(), num_codes).double()[:, None]
    weights = torch.full_like(shift, 1 / num_points)
    return LatentProblem(weights, torch.stack([1 - one, one], -1), codes)


def random_latents(
    vocab_size: int,
    length: int,
    num_codes: int,
    num_slots: int = 1,
    *,
    seed: int = 0,
    sharpness: float = 1.0,
) -> LatentProblem:
    """Return a random table of sequences and codes.

    :param sharpness: standard deviation of its log-probabilities.
    """
    sequences, codes = all_states(vocab_size, length), all_states(num_codes, num_slots)
    generator = torch.Generator().manual_seed(seed)
    size = len(sequences) * len(codes)
    logits = sharpness * torch.randn(size, generator=generator, dtype=torch.float64)
    tokens = one_hot(sequences, vocab_size).double().repeat_interleave(len(codes), 0)
    latent = one_hot(codes, num_codes).double().repeat(len(sequences), 1, 1)
    return LatentProblem(torch.softmax(logits, 0), tokens, latent)


def entropy(law: Tensor) -> float:
    """Return the entropy of a table of probabilities, in nats."""
    return float(-torch.special.xlogy(law, law).sum())


def _contract(weights: Tensor, sites: list[Tensor]) -> Tensor:
    """Sum a product over components into a table; in two halves, so that it is one product."""
    half = len(sites) // 2
    left, right = (_outer(part) for part in (sites[:half], sites[half:]))
    shape = [site.shape[-1] for site in sites]
    return ((weights[:, None] * left).T @ right).reshape(shape)


def _outer(sites: list[Tensor]) -> Tensor:
    """Multiply out independent sites, ``(M, V) each -> (M, V ** len(sites))``."""
    table = sites[0].new_ones(len(sites[0]), 1) if sites else torch.ones(1, 1).double()
    for site in sites:
        table = (table[:, :, None] * site[:, None]).flatten(1)
    return table


def _log_evidence(laws: Tensor, states: Tensor) -> Tensor:
    """``log p_m`` of what is revealed and zero at holes, ``(M, S, A), (*b, S) -> (*b, S, M)``."""
    return _reads(pad(laws.log(), (0, 1)), states)


def _reads(log_laws: Tensor, states: Tensor) -> Tensor:
    sites = torch.arange(states.shape[-1], device=states.device)
    return log_laws.permute(1, 2, 0)[sites, states]


def _leave_one_out(terms: Tensor) -> Tensor:
    """Sum over all sites but one, ``(*batch, S, M)``; ``-inf`` is counted, as it cancels not."""
    never = terms == -torch.inf
    finite = torch.where(never, 0.0, terms)
    rest = finite.sum(-2, keepdim=True) - finite
    return torch.where(never.sum(-2, keepdim=True) > never.long(), -torch.inf, rest)


def _mixed(weights: Tensor, laws: Tensor) -> Tensor:
    """Average the laws of sites over components, ``(*b, S, M), (M, S, A) -> (*b, S, A)``."""
    mixed = torch.einsum("...sm,msa->...sa", weights, laws)
    return mixed / mixed.sum(-1, keepdim=True)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Put rows of two widths below one another; what is padded is never read."""
    width = max(first.shape[-1], second.shape[-1])
    rows = [pad(x, (0, width - x.shape[-1]), value=-math.inf) for x in (first, second)]
    return torch.cat(rows, -2)


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.reshape(probs.shape[:-1])
