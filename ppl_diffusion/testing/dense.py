"""Dense reference kernels, straight from the definitions.

The only place where a reverse kernel is a matrix. Nothing here uses the three-way mixture: rows
are bridges ``q(z_s | z_t, x)`` with the clean token averaged over a categorical ``c``, and a
Psi-posterior is ``kappa`` times that plus ``(1 - kappa)`` times denoise-and-renoise. Float64, cost
``S ** (2 L)``: for chains that fit on a page.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl_diffusion.kernels import InterpolatingKernel, Process


def all_states(num_states: int, length: int) -> Tensor:
    """Return every sequence of states in lexicographic order, int64 ``(S ** L, L)``."""
    return torch.cartesian_prod(*[torch.arange(num_states)] * length).reshape(-1, length)


def state_index(tokens: Tensor, num_states: int) -> Tensor:
    """Return the position of sequences in :func:`all_states`, int64 ``(*batch,)``.

    :param tokens: int64 ``(*batch, L)``.
    """
    powers = num_states ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * powers).sum(-1)


def forward_law(process: Process, x0_law: Tensor, alpha: float, length: int) -> Tensor:
    """Return the law of the noised sequence, float64 ``(S ** L,)``.

    :param x0_law: law of clean sequences, ``(V ** L,)`` in lexicographic order.
    :param alpha: signal level.
    """
    keep = torch.eye(process.num_states, dtype=torch.float64)[: process.vocab_size]
    site = alpha * keep + (1 - alpha) * _prior(process)  # (V, S)
    law = x0_law.reshape([process.vocab_size] * length)
    for _ in range(length):  # contract the first clean axis, append its noised one
        law = torch.tensordot(law, site, dims=([0], [0]))
    return law.reshape(-1)


def site_rows(
    process: Process, z: Tensor, c: Tensor, a: float, b: float, kappa: float | Tensor = 1.0
) -> Tensor:
    """Return ``p(z_s = . | z_t = z)`` of single sites, float64 ``(*batch, S)``.

    ``kappa q(z_s | z_t, c) + (1 - kappa) [b q(z_0 | z_t, c) + (1 - b) pi]`` with the bridge
    ``q(z_s = j | z_t = z, c) = q(z | z_s = j) (b c_j + (1 - b) pi_j) / (a c_z + (1 - a) pi_z)``.
    Where the prior cannot produce ``z``, the token is known to be clean and ``c`` is one-hot there.

    :param z: current states, int64 ``(*batch,)``.
    :param c: probabilities of the clean token, ``(*batch, V)``.
    :param a: ``alpha(t)``.
    :param b: ``alpha(s) >= a``.
    :param kappa: Psi parameter, a number or broadcastable to ``(*batch, 1)``.
    """
    renoised = b * _bridge(process, z, c, a, 1.0) + (1 - b) * _prior(process)
    return kappa * _bridge(process, z, c, a, b) + (1 - kappa) * renoised


def _bridge(process: Process, z: Tensor, c: Tensor, a: float, b: float) -> Tensor:
    prior, size = _prior(process), process.num_states
    here = torch.nn.functional.one_hot(z, size).to(torch.float64)
    clean = torch.nn.functional.pad(c.to(torch.float64), (0, size - process.vocab_size))
    evidence = (a * (clean * here).sum(-1) + (1 - a) * prior[z])[..., None]
    keep = 1.0 if a == b else a / b
    arrive = keep * here + (1 - keep) * prior[z][..., None]  # q(z_t = z | z_s = j)
    leave = b * clean + (1 - b) * prior  # q(z_s = j | c)
    known = (prior[z] == 0)[..., None] | (evidence == 0)
    return torch.where(known, here, arrive * leave / torch.where(known, 1.0, evidence))


def posterior_as_cavity(process: Process, z: Tensor, g: Tensor, a: float) -> Tensor:
    """Divide a posterior over clean tokens by the site's own evidence and renormalise.

    :param z: current states, int64 ``(*batch,)``.
    :param g: probabilities ``p(x | z)``, ``(*batch, V)``.
    :param a: ``alpha(t)``.
    """
    here = torch.nn.functional.one_hot(z, process.num_states)[..., : process.vocab_size]
    evidence = a * here.to(torch.float64) + (1 - a) * _prior(process)[z][..., None]
    weights = torch.where(evidence > 0, g / torch.where(evidence > 0, evidence, 1.0), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def state_matrix(
    kernel: InterpolatingKernel,
    k: int,
    length: int,
    prompt: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return step ``k`` of a kernel as a matrix over all states, float64 ``(S ** L, S ** L)``.

    Row: current state; column: next state; both in the order of :func:`all_states`.

    :param kernel: the kernel (its process, denoiser and grid are used, its ``step`` is not).
    :param prompt: int64 ``(L,)``, fixed tokens, -1 where free.
    :param given: conditions of the denoiser, without batch dimensions.
    """
    process, states = kernel.process, all_states(kernel.process.num_states, length)
    a, b = float(kernel.alphas[k]), float(kernel.alphas[k + 1])
    known = kernel.expand_given(given, states.shape[:-1])
    c = kernel.denoiser(states, float(kernel.times[k]), **known).to(torch.float64).exp()
    if kernel.denoiser.kind == "posterior" and not process.absorbing:
        c = posterior_as_cavity(process, states, c, a)
    kappa = torch.from_numpy(kernel.kappa[k, ..., None])
    rows = site_rows(process, states, c, a, b, kappa)  # (S ** L, L, S)
    if prompt is not None:
        here = torch.nn.functional.one_hot(states, process.num_states).to(torch.float64)
        rows = torch.where((prompt >= 0)[:, None], here, rows)
    moves = rows.new_ones(len(states), len(states))
    for site in range(length):
        moves = moves * rows[:, site, states[:, site]]
    return moves


def prior_law(process: Process, length: int, prompt: Tensor | None = None) -> Tensor:
    """Return the law of the noisiest state, float64 ``(S ** L,)``.

    :param prompt: int64 ``(L,)``, fixed tokens, -1 where free.
    """
    states = all_states(process.num_states, length)
    sites = _prior(process)[states]
    if prompt is not None:
        sites = torch.where(prompt >= 0, (states == prompt).to(torch.float64), sites)
    return sites.prod(-1)


def _prior(process: Process) -> Tensor:
    return torch.as_tensor(process.prior, dtype=torch.float64)
