"""How much noise a latent needs so that its codes can be confused (DINOISER, arXiv:2302.10025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ppl_diffusion.arrays import Array
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.schedules import Schedule


@dataclass(frozen=True)
class NoiseRange:
    """The noise at which to train: ``(b / a)^2`` from ``squared_noise`` on.

    The rule compares the noise of *one* coordinate with the squared distance of codes per
    coordinate, so that in many dimensions codes are never confused at its least noise: the error
    rate is ``Q(sqrt(d) / 2)`` for codes that are equally far apart, .309 for ``d = 1`` and .023 for
    16. Look at that number rather than at the noise.

    :ivar squared_noise: least ratio of noise to signal, ``(b / a)^2``.
    :ivar error_rate: chance that the nearest other code is nearer than the true one at that noise,
        averaged over codes; several near codes are confused more often.
    """

    squared_noise: float
    error_rate: float

    @classmethod
    def from_codebook(
        cls, codes: Array, *, quantile: float | None = None, offset: float = 0.0
    ) -> Self:
        """Return the range of a codebook or of embeddings.

        :param codes: ``(K, d)``, at least two.
        :param quantile: of the squared distances to the nearest other code; None is their mean,
            the published rule.
        :param offset: added to it; one published recipe has 1.
        :raises ValueError: if there are fewer than two codes, or all have a twin.
        """
        from scipy.special import ndtr  # slow to import

        points = np.asarray(codes, dtype=np.float64)
        if points.ndim != 2 or len(points) < 2:
            raise ValueError(
                "NoiseRange.from_codebook: codes must be (K, d) with at least two codes, "
                f"got shape {points.shape}."
            )
        distances = nearest_distances(points)
        each = distances**2 / points.shape[1]
        least = float(each.mean() if quantile is None else np.quantile(each, quantile)) + offset
        if least <= 0.0:
            raise ValueError(
                "NoiseRange.from_codebook: the nearest other code is at distance 0; remove codes "
                "that are equal, or ask for a higher quantile."
            )
        return cls(least, float(ndtr(-0.5 * distances / np.sqrt(least)).mean()))

    @property
    def noise(self) -> float:
        """Least noise ``b`` of a process with ``a^2 + b^2 = 1``."""
        return float(np.sqrt(self.squared_noise / (1.0 + self.squared_noise)))

    def level(self, process: Gaussian) -> float:
        """Return the level of a process from which to train; 0 if it never is less noisy."""
        return float(process.level_of(-0.5 * np.log(self.squared_noise)))

    def t_min(self, schedule: str | Schedule = "sqrt") -> float:
        """Return the ``t_min`` with which a chain of a schedule ends at the least noise."""
        return self.level(Gaussian(schedule, t_min=0.0))


def nearest_distances(points: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """Return the distance of every point to the nearest other one, ``(K,)``.

    :param points: ``(K, d)``.
    :param chunk: points that are compared with all others at once.
    """
    norms = (points**2).sum(-1)
    nearest = np.empty(len(points), dtype=np.int64)
    for first in range(0, len(points), chunk):
        rows = np.arange(first, min(first + chunk, len(points)))
        squared = norms - 2.0 * points[rows] @ points.T
        squared[np.arange(len(rows)), rows] = np.inf
        nearest[rows] = squared.argmin(-1)
    # The products above choose, and differences measure: they cancel less.
    return np.linalg.norm(points - points[nearest], axis=-1)
