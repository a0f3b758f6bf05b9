"""Reconstructions that know no prior."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsqr
from torch import Tensor

from ppl_diffusion.imaging.operators.base import Operator

DAMPING = 0.1
"""Standard deviation of the noise over that of a pixel, about .05 over .5."""


def damped_least_squares(
    operator: Operator, measured: Tensor, *, damping: float = DAMPING
) -> Tensor:
    """Return ``argmin ||A(u) - y||^2 + damping^2 ||u||^2`` of a linear operator, without a matrix.

    :param measured: ``(n, *shape)``.
    :returns: ``(n, C, H, W)``.
    """
    size = int(np.prod(operator.image_shape))

    def forward(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return operator(torch.from_numpy(image).reshape(operator.image_shape)).numpy()

    def backward(y: NDArray[np.float64]) -> NDArray[np.float64]:
        return adjoint(operator, torch.from_numpy(y.ravel())).flatten().numpy()

    matrix = LinearOperator((operator.size, size), forward, backward, dtype=np.float64)
    rows = [
        lsqr(matrix, y, damp=damping, atol=1e-9, btol=1e-9)[0]
        for y in measured.double().cpu().flatten(1).numpy()
    ]
    images = torch.from_numpy(np.stack(rows)).reshape(-1, *operator.image_shape)
    return images.to(measured)


def adjoint(operator: Operator, y: Tensor) -> Tensor:
    """Return ``A^T y`` of a linear operator, by differentiating ``<A(u), y>``.

    :param y: ``(m,)``.
    :returns: ``(C, H, W)``.
    """
    with torch.enable_grad():
        image = torch.zeros(operator.image_shape, dtype=y.dtype, device=y.device).requires_grad_()
        (gradient,) = torch.autograd.grad((operator(image) * y).sum(), image)
    return gradient
