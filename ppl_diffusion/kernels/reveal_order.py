"""When each token is revealed, as the codes beside it suggest.

Tokens that depend on each other are better drawn one after the other. In a chain that draws its
codes first (SEQ of LADD, arXiv 2510.18114) every site may have its own probability to be revealed
at a step, and it may depend on the codes: they are known by then, so that the reverse step stays
exact with the network as it is. It is the learned noise of FLDD (arXiv 2605.18204) of masks alone,
told by codes and not by the clean sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.latent import LatentSpec
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.path import Path


class RevealOrder(nn.Module):
    """Probabilities ``r`` that a hidden token is revealed at a step, given the codes.

    The last step reveals all that is left. At the others ``r`` is the sigmoid of the logit of equal
    steps, ``1 / (Tx - k)``, plus what every slot adds; a hidden slot adds nothing.

    :param table: what a code of a slot adds at a step and a position, in logits, ``(N, K, Tx - 1,
        L)``; zeros are equal steps.
    :raises ValueError: if the table has another number of axes, or a number is not finite.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        if table.ndim != 4 or not bool(torch.isfinite(table).all()):
            raise ValueError(
                "RevealOrder: the table must hold finite logits of shape (slots, codes, token "
                f"steps - 1, length), got shape {tuple(table.shape)}."
            )
        self.table = nn.Parameter(table.detach().to(torch.float64, copy=True))

    @property
    def token_steps(self) -> int:
        """Number ``Tx`` of steps that draw tokens."""
        return self.table.shape[2] + 1

    @property
    def length(self) -> int:
        """Number ``L`` of tokens."""
        return self.table.shape[3]

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of :meth:`reveals`, float64 ``(Tx, *batch, L)``, infinite at the end.

        :param codes: int64 ``(*batch, N)``, the hole ``K`` where a slot is hidden.
        :raises ValueError: if there is another number of slots.
        """
        slots, steps = self.table.shape[0], self.token_steps
        if codes.shape[-1] != slots:
            raise ValueError(
                f"RevealOrder: the order is told by {slots} codes, got {codes.shape[-1]}."
            )
        rows = F.pad(self.table, (0, 0, 0, 0, 0, 1))
        added = rows[torch.arange(slots, device=codes.device), codes].sum(-3).movedim(-2, 0)
        left = torch.arange(steps, 1, -1, dtype=torch.float64, device=codes.device)
        logits = added + torch.logit(1 / left).reshape(-1, *[1] * (added.ndim - 1))
        return torch.cat([logits, logits.new_full((1, *logits.shape[1:]), torch.inf)])

    def reveals(self, codes: Tensor) -> Tensor:
        """Return the probabilities to be revealed at each step, float64 ``(Tx, *batch, L)``.

        :param codes: int64 ``(*batch, N)``.
        """
        return self(codes).sigmoid()

    def levels(self, codes: Tensor) -> Tensor:
        """Return the probabilities to be shown before each step and at the end.

        They are ``a_0 = 0`` and ``a_{k+1} = a_k + (1 - a_k) r_k``.

        :param codes: int64 ``(*batch, N)``.
        :returns: float64 ``(Tx + 1, *batch, L)``.
        """
        stays = (-self(codes)).sigmoid()
        return 1 - torch.cat([torch.ones_like(stays[:1]), stays.cumprod(0)])

    def check(self, spec: LatentSpec, path: Path) -> None:
        """Refuse a latent or a path that the order is not made for.

        :raises CapabilityError: if the latent is no codes, or not finished before the tokens.
        :raises ValueError: if a number of codes or of steps is another.
        """
        if spec.num_codes is None:
            raise CapabilityError(
                "RevealOrder: an order is told by codes, and this latent holds vectors; leave the "
                "order out."
            )
        if path.levels[path.first_token_step][1] != 0.0:
            raise CapabilityError(
                f"RevealOrder: an order needs its codes before the first token is drawn, which "
                f"{path!r} does not draw by then; take Path.sequential."
            )
        steps = path.num_steps - path.first_token_step
        known, wanted = (*self.table.shape[:2], self.token_steps), (*spec[:2], steps)
        if known != wanted:
            raise ValueError(
                f"RevealOrder: the order is of {known[0]} slots, {known[1]} codes and {known[2]} "
                f"token steps, but latent and path have {wanted[0]}, {wanted[1]} and {wanted[2]}; "
                "learn an order for them."
            )

    def check_length(self, length: int) -> None:
        """:raises ValueError: if sequences have another number of tokens."""
        if length != self.length:
            raise ValueError(
                f"RevealOrder: the order is of {self.length} tokens, not {length}; learn an order "
                "for them."
            )


def ordered_law(tokens: Tensor, log_probs: Tensor, logits: Tensor) -> Tensor:
    """Return the law of a step that reveals each hidden token with a probability of its own.

    :param tokens: int64 ``(*batch, L)``, the mask being ``V``.
    :param log_probs: predictions of the clean tokens, ``(*batch, L, V)``.
    :param logits: of being revealed, float64 ``(*batch, L)``.
    :returns: log-probabilities of the next states, float64 ``(*batch, L, V + 1)``.
    """
    size, chance = log_probs.shape[-1], F.logsigmoid(logits)[..., None]
    moved = torch.cat([chance + log_probs, F.logsigmoid(-logits)[..., None]], -1)
    stays = F.one_hot(tokens, size + 1).to(moved.dtype).log()
    return torch.where((tokens == size)[..., None], moved, stays)
