r"""What a codec leaves out of an image, as a part of the model.

No sequence of tokens decodes to the image that was measured: it is ``u = G(c_x) + e``. Data whose
noise is below the error ``e`` are then fitted by tokens that decode to something else, and
intervals of decoded pixels miss the truth. With ``e ~ N(mu, Sigma)``, independent of the tokens, as
held-out images have it (the approximation error model: Kaipio and Somersalo 2005, section 5.8)::

    y = A(u) + sigma n  =>  y | x ~ N( A(G(c_x)) + J mu,  S ),      S = sigma^2 I + J Sigma J^T
    u | x, y            ~  N( G(c_x) + mu + K (y - A(G(c_x)) - J mu),  Sigma - K J Sigma ),
                                                                       K = Sigma J^T S^-1

with ``J`` the Jacobian of the operator: exact for linear ones, and linearised at the pseudo-inverse
of the data otherwise. What the data say about the error itself is not lost: ``K`` gives it back to
the image. That the error is Gaussian and knows nothing of the tokens is the approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import jacrev

from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.imaging.measurement import Measurement
from ppl_diffusion.potentials.embedded import GaussianMeasurement

ERROR_FILE, RANK = "error.safetensors", 32
"""File of an error beside the weights of its codec, and directions that it keeps."""


@dataclass(frozen=True, eq=False)
class CodecError:
    """The Gaussian law of image minus decoded image: a few directions, and a rest of each pixel.

    :param mean: ``(P,)`` for ``P = C H W`` pixels.
    :param factor: ``(P, r)``; the covariance is ``F F^T`` plus the diagonal.
    :param variance: that diagonal, ``(P,)``, positive.
    """

    mean: Tensor
    factor: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, codec: ImageCodec, images: Tensor, rank: int = RANK) -> Self:
        """Return the error on images that the codec was not trained on.

        :param images: ``(n, C, H, W)`` in [-1, 1].
        :param rank: directions at most; all but as many as there are images are a rest.
        :raises ValueError: if there are less than two images.
        """
        if len(images) < 2:
            raise ValueError(f"CodecError: the spread of {len(images)} images; give two or more.")
        with torch.no_grad():
            error = (images - codec(images)).flatten(1).double()
        mean = error.mean(0)
        _, size, axes = torch.linalg.svd(error - mean, full_matrices=False)
        kept = min(rank, len(images) // 2)
        factor = axes[:kept].mT * size[:kept] / (len(images) - 1) ** 0.5
        rest = error.var(0) - factor.square().sum(-1)
        return cls(mean.float(), factor.float(), rest.clamp_min(1e-6).float())

    @property
    def covariance(self) -> Tensor:
        """The covariance of the pixels, float64 ``(P, P)``."""
        factor = self.factor.double()
        return factor @ factor.mT + self.variance.double().diag()

    def save(self, folder: str | Path) -> None:
        """Write ``error.safetensors`` beside the weights of the codec."""
        parts = {"mean": self.mean, "factor": self.factor, "variance": self.variance}
        save_file({n: x.contiguous() for n, x in parts.items()}, Path(folder) / ERROR_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        :raises FileNotFoundError: if there is none.
        """
        path = Path(folder) / ERROR_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"The codec {str(folder)!r} has no {ERROR_FILE}: fit one by CodecError.fit, or "
                "restore without it."
            )
        return cls(**load_file(path))


@dataclass(frozen=True, eq=False)
class MeasuredWithError:
    """A measurement of an image that no tokens decode to.

    :param measurement: the data, and how they came about.
    :param error: what the codec leaves out.
    """

    measurement: Measurement
    error: CodecError

    @cached_property
    def jacobian(self) -> Tensor:
        """``J``, float64 ``(m, P)``, at the pseudo-inverse of the data."""
        operator, y = self.measurement.operator, self.measurement.y
        at = operator.pseudo_inverse(y).clamp(-1.0, 1.0).detach()
        jacobian: Tensor = jacrev(operator)(at)
        return jacobian.reshape(len(y), -1).double()

    @cached_property
    def covariance(self) -> Tensor:
        """``S``, the covariance of the data given tokens, float64 ``(m, m)``."""
        spread = self.jacobian @ self.error.covariance @ self.jacobian.mT
        noise = self.measurement.sigma**2
        return spread + noise * torch.eye(len(spread), dtype=torch.float64)

    @cached_property
    def gain(self) -> Tensor:
        """``K``, float64 ``(P, m)``."""
        spread = self.error.covariance @ self.jacobian.mT
        return torch.linalg.solve(self.covariance, spread.mT).mT

    def potential(self, codec: ImageCodec) -> GaussianMeasurement:
        """Return the log-likelihood of tokens, differentiable in their embeddings.

        :param codec: decodes embeddings, and holds the codebook.
        """
        operator, codebook = self.measurement.operator, codec.codebook
        shift = (self.jacobian @ self.error.mean.double()).to(codebook)
        return GaussianMeasurement.correlated(
            lambda e: operator(codec.decode_embedded(e)) + shift,
            self.measurement.y.to(codebook),
            self.covariance,
            codebook,
            name=f"the measurement by {operator.label}, with the error of the codec",
        )

    def expected(self, decoded: Tensor) -> Tensor:
        """Return ``E[u | x, y]``: decoded images, with what the data say about their error.

        :param decoded: ``(*n, C, H, W)``.
        """
        operator, mean = self.measurement.operator, self.error.mean.double()
        innovation = self.measurement.y - operator(decoded)
        missing = innovation.double() - self.jacobian @ mean
        error = mean + missing @ self.gain.mT
        return decoded + error.reshape(decoded.shape).to(decoded)

    def sample(self, decoded: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return draws of ``u`` given tokens and data, one for each decoded image.

        :param decoded: ``(*n, C, H, W)``.
        """
        noise = torch.randn(
            (*decoded.shape[:-3], len(self._root)), generator=generator, dtype=torch.float64
        )
        return self.expected(decoded) + (noise @ self._root.mT).reshape(decoded.shape).to(decoded)

    @cached_property
    def _root(self) -> Tensor:
        """A root of the covariance that the data leave to the error, ``(P, P)``."""
        left = self.error.covariance - self.gain @ self.jacobian @ self.error.covariance
        values, vectors = torch.linalg.eigh((left + left.mT) / 2)
        return vectors * values.clamp_min(0.0).sqrt()
