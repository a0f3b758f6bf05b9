"""What a model of tokens and a latent is worth: exact bounds on a path, and what is no bound.

On one path the bound is that of one model, term by term (LADD, arXiv 2510.18114)::

    E log q(latent | x)                                    (codes that are drawn; 0 for points)
    + KL(q(y_1 | y_0) || N(0, 1))                          (continuous latents)
    + sum over steps of rho E[cross-entropy of hidden tokens]
    + sum over steps of rho' E[cross-entropy of hidden codes], or 0.5 (g(s) - g(u)) E|y_0 - y^|^2

with tokens and latent noised to the levels *before* each step. Under a learned order each token has
its own level and ``rho``, given the codes. A continuous latent has no clean site: the chain ends at
the first noise, and tokens read that, so the encoder has no density to pay and the bound is strict.
An average over independent clocks of tokens and latent is the bound of no model, and can lie below
the entropy of the data; it is a loss, and is never called a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.kernels.reveal_order import RevealOrder
from ppl_diffusion.models.latent_costs import (
    Encoding,
    LatentModel,
    Noise,
    hidden_costs,
    noised_pair,
    prior_cost,
    step_weights,
)
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.noise import uniforms

ROWS = 2048
"""Rows of one call of the network."""


@dataclass(frozen=True, eq=False)
class LatentBound:
    """What sequences cost on a path, in nats; the parts sum to :attr:`loss`.

    :param loss: float64 ``(n,)``, one number per sequence.
    :param is_bound: whether its expectation bounds ``-log p(x0)`` of the chain on :attr:`path` from
        above.
    :param tokens: part of the tokens, ``(n,)``.
    :param latent: part of the latent's steps, ``(n,)``.
    :param prior: part that no step decides, ``(n,)``: what the noisiest continuous latent costs, or
        the (negative) expected log-probability of drawn codes under the encoder.
    :param standard_error: of each number, ``(n,)``, from independent repetitions; that of the mean
        over the sequences is :attr:`mean_error`. NaN where there was one repetition.
    :param path: the path.
    """

    loss: Tensor
    is_bound: bool
    tokens: Tensor
    latent: Tensor
    prior: Tensor
    standard_error: Tensor
    path: Path

    @property
    def bound(self) -> Tensor | None:
        """The bound, ``(n,)``, or None where the loss is none."""
        return self.loss if self.is_bound else None

    @property
    def mean(self) -> float:
        """Mean of the loss over the sequences."""
        return float(self.loss.mean())

    @property
    def mean_error(self) -> float:
        """Standard error of :attr:`mean` for these sequences, that of the noise alone."""
        return float(self.standard_error.square().sum().sqrt() / len(self.standard_error))

    def __repr__(self) -> str:
        what = "bound" if self.is_bound else "loss, no bound"
        return f"LatentBound({what} {self.mean:.4f} ± {self.mean_error:.4f} nats, {self.path!r})"


class Terms(NamedTuple):
    """Weighted costs of tokens and of the latent, float64 ``(S, n)`` each."""

    tokens: Tensor
    latent: Tensor


@torch.no_grad()
def path_bound(
    model: LatentModel,
    x0: Tensor,
    path: Path,
    *,
    num_samples: int = 4,
    num_steps: int | None = None,
    order: RevealOrder | None = None,
    generator: torch.Generator | None = None,
) -> LatentBound:
    """Estimate the bound of every sequence on a path, without bias.

    :param x0: clean tokens, int64 ``(n, L)``.
    :param num_samples: independent repetitions, whose spread is the standard error.
    :param num_steps: steps scored in a repetition. None is all of them, which has the least
        variance and costs ``T`` network rows; fewer are drawn anew for every sequence, from equal
        strata of the steps, and weighted by ``T / num_steps``.
    :param order: when each token is revealed, given the codes; by the path if None.
    :raises ValueError: if a number is less than one.
    """
    if num_samples < 1 or (num_steps is not None and num_steps < 1):
        raise ValueError("bound: num_samples and num_steps must be 1 or more.")
    encoding = model.encoding(x0)
    chosen = [
        _every_step(path, x0) if num_steps is None else drawn_steps(path, x0, num_steps, generator)
        for _ in range(num_samples)
    ]
    scale = path.num_steps / len(chosen[0])
    terms = path_terms(model, x0, encoding, path, torch.cat(chosen), generator, order)
    # (repetitions, steps of one, n), summed over the steps
    tokens, latent = (part.unflatten(0, (num_samples, -1)).sum(1) * scale for part in terms)
    return _summary(path, tokens, latent, constant_cost(model, encoding, path))


def path_terms(
    model: LatentModel,
    x0: Tensor,
    encoding: Encoding,
    path: Path,
    steps: Tensor,
    generator: torch.Generator | None,
    order: RevealOrder | None = None,
) -> Terms:
    """Return what chosen steps of a path cost, each at a fresh draw of the forward process.

    :param x0: clean tokens, int64 ``(n, L)``.
    :param steps: int64 ``(S, n)``, a step of the path per term and sequence.
    :param order: when each token is revealed, given the codes; by the path if None.
    """
    weights, shown, reveals = step_weights(model, path).to(x0.device), None, None
    if order is not None:  # its weights are those of single tokens
        weights[:, 0] = (weights[:, 0] > 0).to(weights.dtype)
    levels = torch.tensor(path.levels[:-1], dtype=torch.float64, device=x0.device)
    rows = torch.arange(x0.shape[0], device=x0.device).expand_as(steps).reshape(-1)
    parts = []
    for row, step in zip(rows.split(ROWS), steps.reshape(-1).split(ROWS), strict=True):
        latent = encoding.draw(row, generator)
        noise, weight = Noise.draw(x0[row], latent, generator), weights[step]
        here, wanted = _columns(levels[step]), _columns(weight > 0)
        if order is not None:
            shown, reveals = _of_order(order, latent, step - path.first_token_step)
        states = noised_pair(
            model, x0[row], latent, here, noise, drawn=path.draws_latent, shown=shown
        )
        cost = hidden_costs(model, x0[row], latent, states, here, wanted=wanted, reveals=reveals)
        parts.append(torch.stack(cost, -1) * weight)
    tokens, latent = torch.cat(parts).unbind(-1)
    return Terms(tokens.reshape(steps.shape), latent.reshape(steps.shape))


def _of_order(order: RevealOrder, codes: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return how likely tokens are shown before a step, and revealed by it, ``(m, L)`` each.

    :param codes: int64 ``(m, N)``.
    :param step: of the tokens, ``(m,)``, negative while codes are drawn and no token is.
    """
    rows, at = torch.arange(len(codes), device=codes.device), step.clamp_min(0)
    moves = (step >= 0).to(torch.float64)[:, None]
    return order.levels(codes)[at, rows] * moves, order.reveals(codes)[at, rows] * moves


def drawn_steps(path: Path, x0: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``count`` steps per sequence, one from each of as many equal strata, ``(count, n)``.

    Every step has probability ``count / T`` in expectation.
    """
    offset = uniforms((count, len(x0)), generator=generator, device=x0.device)
    strata = torch.arange(count, dtype=torch.float64, device=x0.device)[:, None]
    place = (strata + offset) * (path.num_steps / count)
    return place.floor().long().clamp_max(path.num_steps - 1)


def constant_cost(model: LatentModel, encoding: Encoding, path: Path) -> Tensor:
    """Return what a path that draws the latent costs whatever its steps are, float64 ``(n,)``."""
    if not path.draws_latent:
        return torch.zeros_like(encoding.cost)
    return encoding.cost + prior_cost(model, encoding.point)


@torch.no_grad()
def published_surrogate(
    model: LatentModel,
    x0: Tensor,
    path: Path,
    *,
    surrogate: Literal["mse"] = "mse",
    num_samples: int = 4,
    generator: torch.Generator | None = None,
) -> LatentBound:
    """Return the published training loss on the levels of a path, which bounds nothing.

    Mean cross-entropy of the hidden tokens per position, plus the mean squared error of the
    latent per coordinate, both unweighted and averaged over the steps that lower them; the tokens
    of a finished latent read the encoder's point itself, for whose density nobody pays (the term
    would be infinite). A constant encoder can make it as small as it likes.

    :raises ValueError: if there is no such surrogate.
    :raises CapabilityError: if the latent is discrete: then the bound is exact.
    """
    if surrogate != "mse":
        raise ValueError(f"bound: surrogate must be 'mse' or None, got {surrogate!r}.")
    if not isinstance(model.latent_process, Gaussian):
        raise CapabilityError(
            "bound: the bound of a discrete latent is exact and costs no more than a surrogate; "
            "leave surrogate out."
        )
    point = model.encoding(x0).point
    drawn = [_unweighted(model, x0, point, path, generator) for _ in range(num_samples)]
    tokens, latent = torch.stack(drawn).unbind(1)
    nothing = torch.zeros_like(tokens[0])
    return _summary(path, tokens, latent, nothing, is_bound=False)


def _unweighted(
    model: LatentModel, x0: Tensor, point: Tensor, path: Path, generator: torch.Generator | None
) -> Tensor:
    """Return the surrogate's two parts, ``(2, n)``."""
    levels = torch.tensor(path.levels, dtype=torch.float64, device=x0.device)
    falls = (levels[:-1] > levels[1:]).to(torch.float64)
    shares = falls / falls.sum(0).clamp_min(1.0)
    sizes = torch.tensor([x0.shape[-1], point[0].numel()], device=x0.device)
    total = torch.zeros(2, len(x0), dtype=torch.float64, device=x0.device)
    for pair, share in zip(levels[:-1], shares, strict=True):
        here, noise = _columns(pair.expand(len(x0), 2)), Noise.draw(x0, point, generator)
        z, y = noised_pair(model, x0, point, here, noise)
        y = point if pair[1] == 0 else y
        cost = hidden_costs(model, x0, point, (z, y), here)
        total += (share / sizes)[:, None] * torch.stack(cost)
    return total


def _summary(
    path: Path, tokens: Tensor, latent: Tensor, prior: Tensor, *, is_bound: bool = True
) -> LatentBound:
    """Average repetitions, ``(R, n)`` each."""
    total, count = tokens + latent, len(tokens)
    alone = torch.full_like(prior, torch.nan)
    return LatentBound(
        loss=total.mean(0) + prior,
        is_bound=is_bound,
        tokens=tokens.mean(0),
        latent=latent.mean(0),
        prior=prior,
        standard_error=total.std(0) / count**0.5 if count > 1 else alone,
        path=path,
    )


def _every_step(path: Path, x0: Tensor) -> Tensor:
    steps = torch.arange(path.num_steps, device=x0.device)
    return steps[:, None].expand(-1, len(x0))


def _columns(pairs: Tensor) -> tuple[Tensor, Tensor]:
    return pairs[:, 0], pairs[:, 1]
