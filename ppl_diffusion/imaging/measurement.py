"""A measurement: what is known about an image, and how well.

``y = A(u) + sigma n``, ``n ~ N(0, I)``. The operator holds whatever was random about it, so that a
file of a measurement is all that a restoration needs.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_diffusion.imaging.operators.base import OPERATORS, Operator
from ppl_diffusion.potentials.embedded import GaussianMeasurement

_STREAM = 2
"""First number of the seeds of noise; operators draw from another stream."""
_PARAMETER = "parameter_"
_DAMAGED = (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile)


class Decoder(Protocol):
    """What a measurement needs of a codec."""

    codebook: Tensor

    def decode_embedded(self, embeddings: Tensor) -> Tensor:
        """Return images of embeddings: ``(*n, L, b) -> (*n, C, H, W)``, differentiable."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """Data, the operator they came through, and their noise.

    :param operator: the operator.
    :param y: the data, ``(m,)``.
    :param sigma: standard deviation of the noise of each number, positive.
    :raises ValueError: if the data are no finite vector of the operator's size, or the noise is
        not positive.
    """

    operator: Operator
    y: Tensor
    sigma: float

    def __post_init__(self) -> None:
        label, size = self.operator.label, self.operator.size
        if tuple(self.y.shape) != (size,):
            raise ValueError(
                f"Measurement: {label} measures {size} numbers, got {tuple(self.y.shape)}."
            )
        if not bool(self.y.isfinite().all()):
            raise ValueError(
                f"Measurement: {int((~self.y.isfinite()).sum())} of the {size} numbers of {label} "
                "are not finite; leave out what was not measured by an operator of its own."
            )
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(
                f"Measurement: sigma, the noise, must be positive and finite, got {self.sigma}."
            )

    def likelihood(self, images: Tensor) -> dist.Distribution:
        """Return the law of the data given images, for a site of a program.

        ::

            x = chain.x0(pyro.sample("path", chain))
            pyro.sample("y", measurement.likelihood(codec.decode(x)), obs=measurement.y)

        :param images: ``(*n, C, H, W)``.
        :returns: a distribution with batch shape ``(*n)`` and event shape ``(m,)``.
        """
        return dist.Normal(self.operator(images), self.sigma).to_event(1)

    def log_likelihood(self, images: Tensor) -> Tensor:
        """Return the log-density of the data given images, ``(*n)``.

        :param images: ``(*n, C, H, W)``.
        """
        return self.likelihood(images).log_prob(self.y.to(images))

    def residual(self, images: Tensor) -> Tensor:
        """Return ``||y - A(u)||^2 / (m sigma^2)``, ``(*n)``.

        About one for the image that was measured; less is fitting the noise.

        :param images: ``(*n, C, H, W)``.
        """
        return (self.y.to(images) - self.operator(images)).square().mean(-1) / self.sigma**2

    def potential(self, codec: Decoder) -> GaussianMeasurement:
        """Return the log-likelihood of tokens, differentiable in their embeddings.

        Decoders are not linear, so that it is not declared linear, whatever the operator.

        :param codec: decodes embeddings, and holds the codebook.
        """
        return GaussianMeasurement(
            lambda embeddings: self.operator(codec.decode_embedded(embeddings)),
            self.y.to(codec.codebook),
            self.sigma,
            codec.codebook,
            name=f"the measurement by {self.operator.label}",
        )

    def save(self, path: str | Path) -> None:
        """Write a NumPy archive (``.npz``) that :meth:`load` reads."""
        parameters: dict[str, Any] = {
            _PARAMETER + name: value.cpu().numpy()
            for name, value in self.operator.parameters.items()
        }
        with Path(path).open("wb") as file:  # as it is called: savez would add an ending
            np.savez(
                file,
                operator=self.operator.name,
                image_shape=self.operator.image_shape,
                y=self.y.cpu().numpy(),
                sigma=self.sigma,
                **parameters,
            )

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read what :meth:`save` wrote.

        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if it holds no measurement, or one by an operator that is not
            registered.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no measurement {str(path)!r}: check the path.")
        try:
            with np.load(path, allow_pickle=False) as archive:
                entries: dict[str, Any] = dict(archive)
            name, shape = str(entries["operator"]), tuple(entries["image_shape"].tolist())
            y, sigma = torch.from_numpy(entries["y"]), float(entries["sigma"])
        except _DAMAGED as error:
            raise _no_measurement(path, error) from error
        if name not in OPERATORS:
            raise ValueError(
                f"The measurement {str(path)!r} is one by the operator {name!r}, which is not "
                "known here: import the module that registers it."
            )
        parameters = {
            key.removeprefix(_PARAMETER): torch.from_numpy(value)
            for key, value in entries.items()
            if key.startswith(_PARAMETER)
        }
        try:
            operator = OPERATORS[name](shape, parameters)
            operator(torch.zeros(shape))  # what is missing shows when it is used
            return cls(operator, y, sigma)
        except (*_DAMAGED, RuntimeError, AttributeError, IndexError) as error:
            raise _no_measurement(path, error) from error


def measure(operator: Operator, image: Tensor, sigma: float, seed: int = 0) -> Measurement:
    """Measure an image, with noise from a seed.

    :param operator: the operator.
    :param image: ``(C, H, W)`` in [-1, 1].
    :param sigma: standard deviation of the noise of each number.
    :param seed: the same one gives the same noise, on every machine.
    """
    with torch.no_grad():
        clean = operator(image)
    noise = np.random.default_rng((_STREAM, seed)).standard_normal(operator.size)
    return Measurement(operator, clean + sigma * torch.from_numpy(noise).to(clean), float(sigma))


def _no_measurement(path: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"The file {str(path)!r} holds no measurement ({type(error).__name__}: {error}): "
        "give one that a restoration or Measurement.save wrote."
    )
