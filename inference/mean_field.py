r"""Mean-field Bayes of a Gaussian measurement of codes, by coordinate updates in closed form.

For data ``y = A(e) + sigma n`` with ``A`` affine, and a prediction ``d`` that is a product over
sites, the product ``r`` of the largest evidence lower bound is a fixed point of (coordinate ascent:
Bishop 2006, section 10.1)::

    r_i(v) ∝ d_i(v) exp( -||rho_i - A_i c_v||^2 / (2 sigma^2) ),   rho_i = y - A(ebar) + A_i ebar_i

one site after another; the variances of the others do not depend on ``v``. It is exact where the
likelihood is a product over sites, too; otherwise ``log Z - ELBO = KL(r || posterior)``. An ``A``
that is not affine is linearised about ``ebar`` anew in every sweep (Gauss-Newton).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from ppl_diffusion.potentials.embedded import GaussianMeasurement

CHUNK = 16
"""Directions of a Jacobian that are decoded at once."""

SETTLED = 1e-14
"""Change of all probabilities below which coordinate ascent has arrived."""


@dataclass(frozen=True)
class MeanField:
    """A product of tables, ``n`` rows of ``L`` sites.

    :param log_r: float64 ``(n, L, K)``.
    :param free_energy: minus the evidence lower bound, ``(n,)``. Of a linearisation, the data term
        is that of ``A`` itself at the mean, and variances pass through the Jacobian.
    :param num_rows: rows that were decoded, each direction of a Jacobian being one.
    """

    log_r: Tensor
    free_energy: Tensor
    num_rows: int


def mean_field(
    potential: GaussianMeasurement,
    log_d: Tensor,
    masked: Tensor,
    num_sweeps: int,
    *,
    relinearise: bool = False,
    keep_best: bool = True,
) -> MeanField:
    """Return the best product of tables that coordinate ascent finds from the prediction.

    :param potential: the measurement.
    :param log_d: the prediction, ``(n, L, K)``, finite at masked sites; others are point masses.
    :param masked: bool ``(n, L)``: sites that are updated.
    :param num_sweeps: updates of every site, at most; 0 returns the prediction.
    :param relinearise: linearise anew in every sweep, after which the bound may fall.
    :param keep_best: return the best sweep of each row instead of the last one.
    """
    log_r, cost, around, best = log_d, 0, None, None
    for sweep in range(num_sweeps + 1):
        mean = log_r.exp() @ potential.codebook.to(torch.float64)
        if around is None or relinearise:
            around = _Affine.of(potential, mean if relinearise else mean[:1])
            cost += around.num_rows
        residual = potential.residual(mean.to(potential.codebook.dtype)).to(torch.float64)
        cost += len(mean)
        found = log_r, around.free_energy(log_r, log_d, masked, residual)
        best = found if best is None or not keep_best else _better(found, best)
        if sweep == num_sweeps:
            break
        new = around.sweep(log_r, log_d, masked, residual)
        if bool((new.exp() - log_r.exp()).abs().max() < SETTLED):
            break
        log_r = new
    assert best is not None
    return MeanField(*best, num_rows=cost)


def _better(found: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lower = found[1] < best[1]
    log_r = torch.where(lower[:, None, None], found[0], best[0])
    return log_r, torch.where(lower, found[1], best[1])


@dataclass(frozen=True)
class _Affine:
    """``A`` about a point: its Jacobian ``(n or 1, m, L, b)``, and ``||A_i c_v||^2``."""

    potential: GaussianMeasurement
    codes: Tensor
    jacobian: Tensor
    squares: Tensor
    num_rows: int

    @classmethod
    def of(cls, potential: GaussianMeasurement, points: Tensor) -> _Affine:
        codes = potential.codebook.to(torch.float64)
        jacobian, num_rows = jacobian_of(potential, points.to(potential.codebook.dtype))
        own = jacobian.to(torch.float64).movedim(1, 2)  # (n or 1, L, m, b)
        squares = (own @ codes.T).square().sum(-2)
        return cls(potential, codes, jacobian.to(torch.float64), squares, num_rows)

    def sweep(self, log_r: Tensor, log_d: Tensor, masked: Tensor, residual: Tensor) -> Tensor:
        """Return the tables after one update of every site, each given those before it."""
        log_r, variance = log_r.clone(), self.potential.sigma**2
        for i in masked.any(0).nonzero()[:, 0].tolist():
            own, mean = self.jacobian[:, :, i], log_r[:, i].exp() @ self.codes
            rho = residual + (own @ mean[..., None])[..., 0]
            match = (rho[:, None] @ own)[:, 0] @ self.codes.T  # <rho, A_i c_v>
            new = log_d[:, i] + (match - self.squares[:, i] / 2) / variance
            log_r[:, i] = torch.where(masked[:, i, None], new.log_softmax(-1), log_r[:, i])
            residual = rho - (own @ (log_r[:, i].exp() @ self.codes)[..., None])[..., 0]
        return log_r

    def free_energy(self, log_r: Tensor, log_d: Tensor, masked: Tensor, residual: Tensor) -> Tensor:
        """Return ``E_r[-log G] + KL(r || d)``, ``(n,)``."""
        r, own = log_r.exp(), self.jacobian.movedim(1, 2)
        at_mean = (own @ (r @ self.codes)[..., None])[..., 0].square().sum(-1)
        spread = (r * self.squares).sum(-1) - at_mean
        kl = (r * (log_r - log_d)).sum(-1)
        squares = residual.square().sum(-1) + torch.where(masked, spread, 0.0).sum(-1)
        data = squares / (2 * self.potential.sigma**2) + self.potential.log_norm
        return data + torch.where(masked, kl, 0.0).sum(-1)


def jacobian_of(potential: GaussianMeasurement, points: Tensor) -> tuple[Tensor, int]:
    """Return ``dA/de`` of every row, ``(n, m, L, b)``, and the number of rows that were decoded.

    Forward or backward, whichever has fewer directions; rows share a direction.

    :param points: ``(n, L, b)``.
    """
    num_data, (length, dim) = len(potential.y), points.shape[1:]
    if num_data <= length * dim:
        pull = vjp(potential.predict, points)[1]
        basis = torch.eye(num_data, dtype=points.dtype, device=points.device)
        backward = vmap(
            lambda row: pull(row.expand(len(points), -1))[0], out_dims=1, chunk_size=CHUNK
        )
        return backward(basis), num_data * len(points)
    basis = torch.eye(length * dim, dtype=points.dtype, device=points.device)

    def forward(row: Tensor) -> Tensor:
        direction = row.reshape(length, dim).expand_as(points)
        pushed: Tensor = jvp(potential.predict, (points,), (direction,))[1]
        return pushed

    with warnings.catch_warnings():  # torch loads a deprecated module of its own, once
        warnings.simplefilter("ignore", DeprecationWarning)
        columns = vmap(forward, out_dims=-1, chunk_size=CHUNK)(basis)
    return columns.unflatten(-1, (length, dim)), length * dim * len(points)
