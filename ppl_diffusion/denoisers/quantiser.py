"""How vectors become codes, and how codes are learnt.

A code stands for a direction: a vector gets the code whose own vector has the largest inner product
with it. Vectors of codes learnt by moving averages have unit norm times ``sqrt(d)`` (coordinates of
unit variance), so that this is the cosine. Only learning needs ``vector-quantize-pytorch``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Quantised(NamedTuple):
    """Codes of some vectors, while they are learnt.

    :param vectors: those of the codes, ``(n, N, d)``; gradients pass straight to what was encoded.
    :param codes: int64 ``(n, N)``.
    :param loss: what is added to the loss of a batch, a scalar.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the codes of vectors, int64 ``(...)``.

    :param vectors: ``(..., d)``.
    :param codebook: vectors of the codes, ``(K, d)``.
    """
    return (vectors @ codebook.T).argmax(-1)


def unit_codes(codebook: Tensor) -> Tensor:
    """Return vectors of codes, ``(K, d)``, with norm ``sqrt(d)``."""
    return math.sqrt(codebook.shape[-1]) * F.normalize(codebook, dim=-1)


class Quantiser(ABC):
    """Learns the codes of a network."""

    @abstractmethod
    def __call__(self, vectors: Tensor, progress: float) -> Quantised:
        """Return codes of vectors, and learn from them.

        :param vectors: what an encoder says, ``(n, N, d)``.
        :param progress: share of the learning that is done, 0 to 1.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know besides the network."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""


class VectorQuantiser(Quantiser):
    """Codes as moving averages of what they stand for (van den Oord et al. 2017, 1711.00937).

    :param codebook: the network's vectors of codes, ``(K, d)``, written in place.
    :param decay: of the moving averages, per step.
    :param commitment: weight of the distance between a vector and its code, which keeps the encoder
        near; in units of the mean square over coordinates.
    :param revival: a code that is used less often per batch is moved onto a vector of the batch. At
        most ``revival_share`` of what each would get if all were used alike: where a batch has few
        vectors per code, everything would be moved at every step.
    :raises ModuleNotFoundError: if ``vector-quantize-pytorch`` is not installed.
    """

    def __init__(
        self,
        codebook: Tensor,
        *,
        decay: float = 0.95,
        commitment: float = 0.1,
        revival: float = 2.0,
        revival_share: float = 0.1,
    ) -> None:
        self.codebook, self.revival, self.revival_share = codebook, revival, revival_share
        size, dim = codebook.shape
        self.library: nn.Module = _library().VectorQuantize(
            dim=dim,
            codebook_size=size,
            decay=decay,
            commitment_weight=commitment,
            use_cosine_sim=True,
            rotation_trick=False,
            threshold_ema_dead_code=revival,
            kmeans_init=True,
        ).to(codebook.device)

    def __call__(self, vectors: Tensor, progress: float = 0.0) -> Quantised:
        """Return codes of vectors, and move the averages; ``progress`` does not matter."""
        self._expect(vectors.shape[0] * vectors.shape[1])
        unit, codes, loss = self.library(vectors)
        with torch.no_grad():
            self.codebook.copy_(unit_codes(self.library.codebook))  # type: ignore[arg-type]
        return Quantised(math.sqrt(vectors.shape[-1]) * unit, codes, loss.sum())

    def _expect(self, count: int) -> None:
        # The library takes a number of uses that suits one size of batch.
        uses = min(self.revival, self.revival_share * count / len(self.codebook))
        inner: Any = self.library._codebook
        inner.threshold_ema_dead_code = inner.reset_cluster_size = uses

    def state_dict(self) -> dict[str, Any]:
        """Return counts and averages of the codes."""
        return dict(self.library.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up counts and averages."""
        self.library.load_state_dict(dict(state))


class GumbelQuantiser(Quantiser):
    """Codes drawn from a softmax, hard, with the gradient of the soft draw (Jang 2017, 1611.01144).

    :param codebook: the network's vectors of codes, ``(K, d)``, a parameter.
    :param temperatures: of the softmax at the beginning and at the end; exponential in between.
    """

    def __init__(
        self, codebook: Tensor, *, temperatures: tuple[float, float] = (1.0, 0.1)
    ) -> None:
        first, last = temperatures
        if not 0.0 < last <= first:
            raise ValueError(f"gumbel: temperatures must fall and stay above 0, got {temperatures}.")
        self.codebook, self.temperatures = codebook, temperatures

    def __call__(self, vectors: Tensor, progress: float) -> Quantised:
        """Return codes of vectors."""
        first, last = self.temperatures
        tau = first * (last / first) ** min(progress, 1.0)
        logits = vectors @ self.codebook.T
        hard = F.gumbel_softmax(logits, tau=tau, hard=True)
        return Quantised(hard @ self.codebook, hard.argmax(-1), logits.new_zeros(()))


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Learning codes needs vector-quantize-pytorch, but {error.name} is not installed; "
            "run `pip install 'ppl-diffusion[latent]'`."
        ) from error
    return vector_quantize_pytorch
