"""A denoiser of tokens and a latent, seen as one of either with the other known.

Where the latent is finished before the first token (SEQ), tokens and codes are two chains, each of
which is an ordinary one: these are their denoisers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Kind, Wrapper
from ppl_diffusion.denoisers.latent import LATENT, LATENT_TIME, LatentDenoiser
from ppl_diffusion.errors import CapabilityError


class AtLatent(Wrapper):
    """The tokens given a finished latent, which is the condition ``"latent"`` of their chain.

    :param denoiser: predictor of both.
    """

    kind: Kind = "cavity"

    def __init__(self, denoiser: LatentDenoiser) -> None:
        self.denoiser = denoiser
        self.conditions = {LATENT: len(denoiser.latent.event_shape)} | _others(denoiser)
        self.adopt(denoiser, "rows_per_call")

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return log-probabilities of clean tokens, ``(*batch, L, V)``.

        :param given: ``latent``, ``(*batch, N)`` or ``(*batch, N, d)``.
        """
        finished = torch.zeros(tokens.shape[:-1], dtype=torch.float64, device=tokens.device)
        rows = self.denoiser.joint(tokens, t, **given, **{LATENT_TIME: finished})
        return self.denoiser.head(rows[..., : tokens.shape[-1], :])


class CodeDenoiser(Wrapper):
    """The codes before there are tokens: a denoiser whose tokens are the codes.

    :param denoiser: predictor of both, of a discrete latent.
    :param tokens: int64 ``(L,)``, what is known of the tokens: a prompt, the mask ``V`` elsewhere.
    :raises CapabilityError: if the latent is continuous.
    """

    kind: Kind = "cavity"

    def __init__(self, denoiser: LatentDenoiser, tokens: Tensor) -> None:
        size = denoiser.latent.num_codes
        if size is None:
            raise CapabilityError(
                "CodeDenoiser: the latent is continuous and has no codes; use a GaussianChain."
            )
        self.denoiser, self.tokens = denoiser, tokens
        self.conditions = _others(denoiser)
        self.adopt(denoiser, "rows_per_call")
        self.vocab_size, self.time_free = size, False

    def __call__(self, codes: Tensor, t: float | Tensor, /, **given: Any) -> Tensor:
        """Return log-probabilities of clean codes, ``(*batch, N, K)``.

        :param codes: int64 ``(*batch, N)``, the hole ``K`` where a slot is hidden.
        :param t: their level, a number or one per row.
        """
        rows = prior_rows(self.denoiser, self.tokens, codes, t, **given)
        return self.denoiser.latent_head(rows)


def prior_rows(
    denoiser: LatentDenoiser,
    tokens: Tensor,
    latent: Tensor,
    u: float | Tensor,
    **given: Any,
) -> Tensor:
    """Return the rows of the slots before there are tokens, ``(*batch, N, width)``.

    :param tokens: int64 ``(L,)``, a prompt and masks.
    :param latent: ``(*batch, N)`` or ``(*batch, N, d)``.
    :param u: level of the latent, a number or one per row.
    """
    batch = latent.shape[: latent.ndim - len(denoiser.latent.event_shape)]
    level = torch.as_tensor(u, dtype=torch.float64, device=latent.device).expand(batch)
    states = tokens.to(latent.device).expand(*batch, -1)
    given = {LATENT: latent, LATENT_TIME: level, **given}
    return denoiser.joint(states, 1.0, **given)[..., tokens.shape[-1] :, :]


def _others(denoiser: LatentDenoiser) -> dict[str, int]:
    """Return the conditions besides the latent."""
    own = getattr(denoiser, "conditions", {})
    return {n: dims for n, dims in own.items() if n not in (LATENT, LATENT_TIME)}
