"""What a model of tokens and a latent pays for what is still hidden, at any two levels.

Both noise independently given a sequence and its latent, so one call of the network at a noised
pair says what every hidden token, every hidden code, or the rest of the noise would cost. A bound
on a path, a training loss and a search for a path weigh these numbers differently.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.denoisers.latent import LatentDenoiser
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.processes.base import Absorbing, Process
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.noise import draw_categorical, uniforms

Levels = tuple[Tensor, Tensor]
"""Levels of tokens and of the latent, one per row."""


class Encoding(NamedTuple):
    """What an encoder says of sequences: one latent each, or a law of codes.

    :param point: the latent, ``(n, N)`` codes or ``(n, N, d)``; the likeliest codes of a law.
    :param log_probs: law of the codes where they are drawn, ``(n, N, K)``, else None.
    """

    point: Tensor
    log_probs: Tensor | None = None

    def draw(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a latent for each of ``rows``, int64 ``(m,)`` numbers of sequences."""
        if self.log_probs is None:
            return self.point[rows]
        log_q = self.log_probs[rows]
        noise = uniforms(log_q.shape[:-1], generator=generator, device=log_q.device)
        codes: Tensor = draw_categorical(log_q, noise)
        return codes

    @property
    def cost(self) -> Tensor:
        """Expected log-probability of the codes under the encoder, ``(n,)``; 0 for points."""
        if self.log_probs is None:
            return torch.zeros(len(self.point), dtype=torch.float64, device=self.point.device)
        log_q = self.log_probs.to(torch.float64)
        return torch.special.xlogy(log_q.exp(), log_q.exp()).flatten(1).sum(1)


class LatentModel(Protocol):
    """What bounds and searches ask of a model program."""

    denoiser: LatentDenoiser
    process: Process
    latent_process: Absorbing | Gaussian

    def encoding(self, x0: Tensor) -> Encoding: ...


class Noise(NamedTuple):
    """Randomness of a noised pair: uniforms ``(m, L)``; uniforms ``(m, N)`` or normals."""

    tokens: Tensor
    latent: Tensor

    @classmethod
    def draw(cls, x0: Tensor, latent: Tensor, generator: torch.Generator | None) -> Noise:
        """Draw noise for tokens and a latent of given shapes.

        :param x0: ``(m, L)``.
        :param latent: int64 ``(m, N)``, or float ``(m, N, d)``.
        """
        hidden = uniforms(x0.shape, generator=generator, device=x0.device)
        if not latent.is_floating_point():
            return cls(hidden, uniforms(latent.shape, generator=generator, device=x0.device))
        source = x0.device if generator is None else generator.device
        normal = torch.randn(
            latent.shape, dtype=latent.dtype, generator=generator, device=source
        ).to(x0.device)
        return cls(hidden, normal)


class Hidden(NamedTuple):
    """Costs of what is hidden, float64 ``(m,)`` each.

    :param tokens: cross-entropy of the hidden tokens, summed, nats.
    :param latent: the same of hidden codes; or the squared error of a continuous latent, summed.
    """

    tokens: Tensor
    latent: Tensor


def noised_pair(
    model: LatentModel,
    x0: Tensor,
    latent: Tensor,
    levels: Levels,
    noise: Noise,
    *,
    drawn: bool = True,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise tokens and a latent to two levels.

    :param x0: clean tokens, int64 ``(m, L)``.
    :param latent: what they were encoded as, ``(m, N)`` or ``(m, N, d)``.
    :param levels: of tokens and of the latent, float64 ``(m,)`` each.
    :param drawn: whether the model draws the latent. Where it does not, a continuous one is the
        noise that its chain begins with, of which no encoder knows anything.
    :param shown: probability of each token to be shown, float64 ``(m, L)``, in place of the one
        that its level gives to all alike.
    """
    process = model.latent_process
    if shown is None:
        z = _masked(model.process, x0, levels[0], noise.tokens)
    else:
        z = model.process.corrupt(x0, shown, noise.tokens, noise.tokens)
    if not isinstance(process, Gaussian):
        return z, _masked(process, latent, levels[1], noise.latent)
    return z, process.corrupt(latent, levels[1], noise.latent) if drawn else noise.latent


def hidden_costs(
    model: LatentModel,
    x0: Tensor,
    latent: Tensor,
    states: tuple[Tensor, Tensor],
    levels: Levels,
    *,
    wanted: tuple[Tensor, Tensor] | None = None,
    reveals: Tensor | None = None,
) -> Hidden:
    """Return what is hidden in a noised pair costs under the network, with one call of it.

    :param x0: clean tokens, int64 ``(m, L)``.
    :param latent: the clean latent, ``(m, N)`` or ``(m, N, d)``.
    :param states: tokens and latent at ``levels``.
    :param wanted: bool ``(m,)`` each, whether the costs of tokens, of the latent, are asked for;
        they are 0 where not.
    :param reveals: weights of the costs of tokens, float64 ``(m, L)``; all are 1 by default.
    :returns: differentiable in the network, and in a continuous latent.
    """
    every = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    tokens_wanted, latent_wanted = wanted or (every, every)
    (z, y), network = states, model.denoiser
    rows = network.joint(z, levels[0], latent=y, latent_time=levels[1])
    token_rows, latent_rows = rows[..., : x0.shape[-1], :], rows[..., x0.shape[-1] :, :]
    size = model.process.vocab_size
    hidden = (z == size) & tokens_wanted[:, None]
    tokens = _cross_entropy(network.head(token_rows[hidden]), x0, hidden, size, reveals)
    if isinstance(model.latent_process, Gaussian):
        error = _squared_error(network.latent_head(latent_rows), latent)
        return Hidden(tokens, torch.where(latent_wanted, error, 0.0))
    size = model.latent_process.vocab_size
    hidden = (y == size) & latent_wanted[:, None]
    codes = _cross_entropy(network.latent_head(latent_rows[hidden]), latent, hidden, size)
    return Hidden(tokens, codes)


def step_weights(model: LatentModel, path: Path) -> Tensor:
    """Return what each step of a path pays per unit of :class:`Hidden`, float64 ``(T, 2)``.

    A hidden token or code is revealed with probability ``(k(s) - k(t)) / (1 - k(t))``; Gaussian
    steps of equal variance differ by half the gain in signal-to-noise ratio times the squared error
    (LADD, arXiv 2510.18114; VDM, arXiv 2107.00630, eq. 13).
    """
    levels = torch.tensor(path.levels, dtype=torch.float64)
    process = model.latent_process
    tokens = _reveal_shares(model.process, levels[:, 0])
    if isinstance(process, Gaussian):
        return torch.stack([tokens, level_masses(process, levels[:, 1]).diff()], -1)
    return torch.stack([tokens, _reveal_shares(process, levels[:, 1])], -1)


def level_masses(process: Process | Gaussian, levels: Tensor) -> Tensor:
    """Return the share that is clean at levels, or half the signal-to-noise ratio."""
    if isinstance(process, Gaussian):
        return 0.5 * torch.as_tensor(process.snr(levels), dtype=torch.float64)
    return torch.as_tensor(process.schedule.alpha(levels), dtype=torch.float64)


def prior_cost(model: LatentModel, latent: Tensor) -> Tensor:
    """Return what the noisiest latent costs, float64 ``(n,)``: 0 for codes, which are all hidden.

    :param latent: ``(n, N)`` codes, or ``(n, N, d)``.
    """
    process = model.latent_process
    if isinstance(process, Gaussian):
        kl: Tensor = process.prior_kl(latent.to(torch.float64))
        return kl
    return torch.zeros(len(latent), dtype=torch.float64, device=latent.device)


def _reveal_shares(process: Process, levels: Tensor) -> Tensor:
    kept = torch.as_tensor(process.schedule.alpha(levels), dtype=torch.float64)
    hidden = torch.as_tensor(process.schedule.log1m_alpha(levels), dtype=torch.float64).exp()
    moved = kept.diff()
    return torch.where(moved > 0, moved / hidden[:-1], 0.0)


def _masked(process: Process, clean: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    kept = process.schedule.alpha(level)[:, None]
    masked: Tensor = process.corrupt(clean, kept, noise, noise)
    return masked


def _cross_entropy(
    log_p: Tensor, clean: Tensor, hidden: Tensor, size: int, weights: Tensor | None = None
) -> Tensor:
    """Sum the code lengths of hidden values by row, float64 ``(m,)``.

    :param log_p: of the hidden positions in order, ``(h, size)``.
    :param weights: of all positions, ``(m, L)``; 1 by default.
    """
    total = torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    if not log_p.numel():
        return total
    exact = clean_log_probs(log_p, (len(log_p),), size)
    paid = -exact.gather(-1, clean[hidden][:, None])[:, 0]
    paid = paid if weights is None else paid * weights[hidden]
    return total.index_add(0, hidden.nonzero()[:, 0], paid)


def _squared_error(prediction: Tensor, latent: Tensor) -> Tensor:
    off = prediction.to(torch.float64) - latent.to(torch.float64)
    return off.square().flatten(1).sum(1)
