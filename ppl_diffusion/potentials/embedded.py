"""Potentials of the embeddings of tokens: what a gradient can be taken of between tokens.

A sequence is scored through its rows of a codebook ``C`` (``K`` codes of ``b`` numbers)::

    log G(x) = f(C[x]),     f defined, and differentiable, at every point of the embedding space

Image priors are of this kind (``f`` decodes and compares with a measurement), and so are rewards
that read the embeddings of tokens. The target is ``f`` at codes alone; what lies between them
serves guides (:class:`~ppl_diffusion.inference.QuantisedExpectation`), whose weights pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from ppl_diffusion.potentials.base import AbstractPotential


class EmbeddedPotential(AbstractPotential):
    """A potential that is a differentiable function of the embeddings of the tokens.

    :param log_g: ``e (*batch, L, b) -> log G (*batch,)``, differentiable in ``e``; each row on its
        own, so that gradients of a sum are gradients of each.
    :param codebook: embedding of each clean token, ``(K, b)``.
    :param name: how errors call it.
    :raises TypeError: if ``log_g`` is no function.
    :raises ValueError: if the codebook is no finite matrix.

    :ivar codebook: the embeddings.
    :ivar num_embedded: points of the embedding space that were asked about so far.
    """

    def __init__(
        self, log_g: Callable[[Tensor], Tensor], codebook: Tensor, *, name: str | None = None
    ) -> None:
        if not callable(log_g):
            raise TypeError(f"EmbeddedPotential: log_g is a function, got {type(log_g).__name__}.")
        finite = isinstance(codebook, Tensor) and bool(torch.isfinite(codebook).all())
        if not finite or codebook.ndim != 2 or not codebook.is_floating_point():
            shape = tuple(codebook.shape) if isinstance(codebook, Tensor) else codebook
            raise ValueError(
                f"EmbeddedPotential: a codebook has one finite row for each token, (K, b), got "
                f"{shape}."
            )
        self.log_g, self.codebook = log_g, codebook.detach()
        self.name = name or str(getattr(log_g, "__name__", type(log_g).__name__))
        self.num_embedded = 0

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return ``f(C[x0])``."""
        return self.embedded(self.codebook[x0])

    def embedded(self, embeddings: Tensor) -> Tensor:
        """Return ``log G`` of points of the embedding space.

        :param embeddings: ``(*batch, L, b)``.
        :returns: ``(*batch,)``, with a gradient where the points have one.
        """
        self.num_embedded += embeddings[..., 0, 0].numel()
        return self.log_g(embeddings)

    def __repr__(self) -> str:
        size, dim = self.codebook.shape
        return f"{type(self).__name__}({self.name}, {size} codes of {dim} numbers)"


class GaussianMeasurement(EmbeddedPotential):
    """A measurement with independent Gaussian noise: ``y = A(e) + sigma n``.

    ``log G`` is the log-density of the data, constants included, so that an evidence is one::

        log G = -||y - A(e)||^2 / (2 sigma^2) - m log(sigma sqrt(2 pi))

    :param predict: ``A``: ``e (*batch, L, b) -> (*batch, m)``, differentiable.
    :param y: the data, ``(m,)``.
    :param sigma: standard deviation of the noise of one number, positive.
    :param codebook: embedding of each clean token, ``(K, b)``.
    :param linear: whether ``A`` is affine in ``e``, which closed forms may use.
    :param name: how errors call it.
    :raises ValueError: if the data are not a finite vector, or ``sigma`` is not positive.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        y: Tensor,
        sigma: float,
        codebook: Tensor,
        *,
        linear: bool = False,
        name: str = "measurement",
    ) -> None:
        if y.ndim != 1 or not bool(torch.isfinite(y).all()):
            raise ValueError(f"{name}: y is a vector of finite numbers, got {tuple(y.shape)}.")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"{name}: sigma must be positive and finite, got {sigma}.")
        self.predict, self.y, self.sigma, self.linear = predict, y, float(sigma), linear
        self.log_norm = len(y) * math.log(self.sigma * math.sqrt(2 * math.pi))
        self.law_data = (y, torch.tensor(self.sigma))
        super().__init__(self._log_density, codebook, name=name)

    @classmethod
    def correlated(
        cls,
        predict: Callable[[Tensor], Tensor],
        y: Tensor,
        covariance: Tensor,
        codebook: Tensor,
        **options: Any,
    ) -> Self:
        """Return a measurement whose noise has a covariance: ``y = A(e) + N(0, S)``.

        It is that of ``L^-1 y`` with noise of one, ``S = L L^T``, and the density that of ``y``.

        :param covariance: ``S``, ``(m, m)``, positive definite.
        :param options: ``linear`` and ``name``.
        :raises ValueError: if it is not.
        """
        factor, info = torch.linalg.cholesky_ex(covariance.to(torch.float64))
        if covariance.shape != (len(y), len(y)) or int(info):
            raise ValueError(
                f"{cls.__name__}: the covariance of {len(y)} data is a positive definite matrix, "
                f"got {tuple(covariance.shape)}."
            )
        eye = torch.eye(len(y), dtype=torch.float64, device=factor.device)
        white = torch.linalg.solve_triangular(factor, eye, upper=False).to(y)
        made = cls(lambda e: predict(e) @ white.mT, white @ y, 1.0, codebook, **options)
        made.log_norm += float(factor.diagonal().log().sum())
        made.law_data = (y, covariance)
        return made

    def residual(self, embeddings: Tensor) -> Tensor:
        """Return ``y - A(e)``, ``(*batch, m)``."""
        self.num_embedded += embeddings[..., 0, 0].numel()
        return self.y - self.predict(embeddings)

    def _log_density(self, embeddings: Tensor) -> Tensor:
        squares = (self.y - self.predict(embeddings)).square().sum(-1)
        return -squares / (2 * self.sigma**2) - self.log_norm
