"""How a denoiser of tokens and a latent is trained, encoder and codes included (LADD, 2510.18114).

First the code is learnt: the denoiser reads it, noised, while it fills in tokens, and nothing else
moves the encoder. Then the law of the code is learnt, with the encoder as it is. Were both done at
once, the easiest code to predict would win, which is one that says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.denoisers.latent_encoder import LatentEncoder
from ppl_diffusion.denoisers.latent_transformer import LatentTransformer
from ppl_diffusion.denoisers.quantiser import GumbelQuantiser, Quantiser, VectorQuantiser
from ppl_diffusion.models.latent_phases import Phases, draw_phases
from ppl_diffusion.models.latent_terms import (
    Encoded,
    encoded,
    hidden_tokens,
    latent_terms,
    noised_latent,
    token_terms,
)
from ppl_diffusion.models.objectives import Objective

_SETTLING = 50  # steps
_HIDDEN = 0.9  # largest share of a view's tokens that is hidden for the contrast
_TEMPERATURE = 0.1  # of the contrast
_QUANTISERS: dict[str, type[VectorQuantiser] | type[GumbelQuantiser]] = {
    "vq": VectorQuantiser,
    "gumbel": GumbelQuantiser,
}


class LatentObjective(Objective):
    """The two stages of training a latent, as one loss.

    :param program: around a
        :class:`~ppl_diffusion.denoisers.latent_transformer.LatentTransformer`, with ``process`` and
        ``latent_process``.
    :param learning: share of the steps in which the code is learnt and its law is not.
    :param frozen: whether the encoder is left alone afterwards. If it is not, it goes on learning
        from the tokens; the law of the latent never moves it.
    :param latent_rows: share of the rows that train the law of the latent before any token.
    :param mixed: share of the other rows at which latent and tokens are both noisy, for paths on
        which they move together.
    :param withheld: share of the other rows that are given no latent: one network is then also the
        denoiser without one, and relies on the latent no more than it should.
    :param hide: the encoder does not see some of the tokens that the denoiser has to fill in; this
        is the largest share.
    :param focus: 0 weighs hidden tokens as the bound does; larger, those of noisier states count
        more, 1 all alike.
    :param latent_weight: weight of the law of the latent.
    :param delay: share of the second stage before it counts.
    :param ramp: share of the second stage in which it grows to its full weight.
    :param cap: largest weight of the squared error of a continuous latent, whose weight in the
        bound grows without limit where there is little noise.
    :param shrink: weight of half the squared norm of what the encoder says before it is scaled.
    :param contrast: weight of InfoNCE between two views with tokens hidden.
    :param independence: weight of the divergence between predictions with and without the visible
        tokens: what tokens have in common is pushed into the latent.
    :param quantiser: options of
        :class:`~ppl_diffusion.denoisers.quantiser.VectorQuantiser` or ``GumbelQuantiser``.
    :raises ValueError: if the program has another network, or a share lies outside [0, 1].
    """

    def __init__(
        self,
        program: Any,
        *,
        steps: int,
        learning: float = 0.4,
        frozen: bool = True,
        latent_rows: float = 0.4,
        mixed: float = 0.15,
        withheld: float = 0.15,
        hide: float = 0.0,
        focus: float = 1.0,
        latent_weight: float = 1.0,
        delay: float = 0.0,
        ramp: float = 0.0,
        cap: float = 5.0,
        shrink: float = 0.0,
        contrast: float = 0.0,
        independence: float = 0.0,
        quantiser: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(program, steps=steps)
        _check_shares(
            learning=learning,
            latent_rows=latent_rows,
            mixed=mixed,
            withheld=withheld,
            hide=hide,
            delay=delay,
            ramp=ramp,
        )
        if not isinstance(program.denoiser, LatentTransformer):
            raise ValueError(
                "latent: this is no prior with a latent of its own network "
                "(LatentTransformer); train it with the objective nelbo, or a latent recipe."
            )
        self.network: LatentTransformer = program.denoiser
        self.learning, self.frozen = learning, frozen
        self.latent_rows, self.mixed, self.withheld = latent_rows, mixed, withheld
        self.hide, self.focus, self.cap = hide, focus, cap
        self.latent_weight, self.delay, self.ramp = latent_weight, delay, ramp
        self.shrink, self.contrast, self.independence = shrink, contrast, independence
        self.quantiser = _quantiser(self.network, learning > 0.0 or not frozen, quantiser)

    def in_first_stage(self, step: int) -> bool:
        """Return whether the code is still learnt and its law not yet."""
        return step < self.learning * self.steps

    def _learns(self, step: int) -> bool:
        return self.in_first_stage(step) or not self.frozen

    def loss(self, rows: Tensor, step: int, labels: Tensor | None = None) -> Tensor:
        """Return the loss in nats per sequence."""
        first = self.in_first_stage(step)
        self._let_learn(self._learns(step))
        phases, length = draw_phases(rows, self._shares(first)), rows.shape[1]
        noised = hidden_tokens(self.program, rows, phases.tokens)
        clean, loss = self._encoded(rows, noised, step)
        latent, vectors = noised_latent(self.program, clean, phases.latent, phases.withheld)
        if weight := self._weight(step):  # what is noised is what is predicted: it must not move
            vectors = torch.where(phases.for_latent[:, None, None], vectors.detach(), vectors)
        hidden = self.network.rows(noised, vectors, phases.latent)
        log_probs = self.network.head(hidden[:, :length])
        loss = loss + self._token_loss(rows, noised, log_probs, phases)
        if self.independence:
            loss = loss + self.independence * self._divergence(noised, vectors, log_probs, phases)
        if weight:
            predicted, u = self.network.latent_head(hidden[:, length:]), phases.latent
            terms = latent_terms(self.program, clean, latent, predicted, u, self.cap)
            loss = loss + weight * _mean(terms, phases.for_latent)
        return loss

    def _shares(self, first: bool) -> dict[str, float]:
        latent = 0.0 if first else self.latent_rows
        finished = 1.0 - self.mixed - self.withheld
        shares = {"finished": finished, "mixed": self.mixed, "withheld": self.withheld}
        return {**{k: (1.0 - latent) * share for k, share in shares.items()}, "latent": latent}

    def _weight(self, step: int) -> float:
        """Return the weight of the law of the latent: none in the first stage, then a ramp."""
        if self.in_first_stage(step):
            return 0.0
        start = self.learning * self.steps
        done = (step - start) / max(self.steps - start, 1.0) - self.delay
        share = float(done >= 0) if self.ramp == 0.0 else min(max(done / self.ramp, 0.0), 1.0)
        return self.latent_weight * share

    def _let_learn(self, learns: bool) -> None:
        encoder, codes = self.network.encoder, getattr(self.network, "codebook", None)
        encoder.requires_grad_(learns and encoder.learns)
        if isinstance(codes, torch.nn.Parameter):
            codes.requires_grad_(learns)

    def _encoded(self, rows: Tensor, noised: Tensor, step: int) -> tuple[Encoded, Tensor]:
        """Return the clean latent, and what learning it costs besides."""
        if not self._learns(step):
            self._settle(rows, step)
            return encoded(self.network, rows), torch.zeros((), device=rows.device)
        encoder, visible = self.network.encoder, self._visible(rows, noised != rows)
        raw = encoder.raw(rows, visible)
        vectors, loss = encoder.scale(raw, learn=True), self._costs(rows, raw)
        if self.quantiser is None:
            return Encoded(vectors, None), loss
        progress = step / max(self.learning * self.steps, 1.0)
        quantised = self.quantiser(vectors, progress)
        return Encoded(quantised.vectors, quantised.codes), loss + quantised.loss

    @torch.no_grad()
    def _settle(self, rows: Tensor, step: int) -> None:
        """Measure the scale of an encoder that has just stopped; while it moved, it lagged."""
        stopped = math.ceil(self.learning * self.steps)
        encoder = self.network.encoder
        if not encoder.learns or not 0 <= step - stopped < _SETTLING:
            return
        if step == stopped:
            assert isinstance(encoder, LatentEncoder)
            encoder.scale.restart()
        encoder(rows, learn=True)

    def _visible(self, rows: Tensor, hidden: Tensor) -> Tensor | None:
        if not self.hide:
            return None
        share = self.hide * torch.rand(len(rows), 1, device=rows.device)
        return ~(hidden & (torch.rand(rows.shape, device=rows.device) < share))

    def _costs(self, rows: Tensor, raw: Tensor) -> Tensor:
        loss = raw.new_zeros(())
        if self.shrink:
            loss = loss + self.shrink * 0.5 * raw.square().flatten(1).sum(1).mean()
        return loss + self.contrast * self._info_nce(rows) if self.contrast else loss

    def _info_nce(self, rows: Tensor) -> Tensor:
        """Return how poorly two views of a sequence are matched among those of a batch, nats."""
        shares = _HIDDEN * torch.rand(2, len(rows), 1, device=rows.device)
        seen = torch.rand(2, *rows.shape, device=rows.device) >= shares
        encoder = self.network.encoder
        one, other = (F.normalize(encoder(rows, view).flatten(1), dim=1) for view in seen)
        return F.cross_entropy(
            one @ other.T / _TEMPERATURE, torch.arange(len(rows), device=rows.device)
        )

    def _token_loss(
        self, rows: Tensor, noised: Tensor, log_probs: Tensor, phases: Phases
    ) -> Tensor:
        terms = token_terms(self.program, rows, noised, log_probs, phases.tokens)
        weight = (1.0 + self.focus) * phases.tokens**self.focus
        return _mean(weight * terms, phases.for_tokens)

    def _divergence(
        self, noised: Tensor, vectors: Tensor, log_probs: Tensor, phases: Phases
    ) -> Tensor:
        """Return KL of predictions from visible tokens and latent to those from the latent."""
        masks, length = torch.full_like(noised, self.network.vocab_size), noised.shape[1]
        alone = self.network.head(self.network.rows(masks, vectors, phases.latent)[:, :length])
        teacher = log_probs.detach()
        each = (teacher.exp() * (teacher - alone)).sum(-1)
        return _mean((each * (noised == masks)).sum(-1), phases.for_tokens & ~phases.withheld)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages of the codes."""
        return {} if self.quantiser is None else {"quantiser": self.quantiser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.quantiser is not None:
            self.quantiser.load_state_dict(state["quantiser"])


def _mean(terms: Tensor, chosen: Tensor) -> Tensor:
    return (terms * chosen).sum() / chosen.sum().clamp(min=1)


def _quantiser(
    network: LatentTransformer, learns: bool, options: Mapping[str, Any] | None
) -> Quantiser | None:
    if network.latent.num_codes is None or not learns:
        return None
    return _QUANTISERS[network.config.quantiser](network.codebook, **(options or {}))


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0 or not math.isfinite(share):
            raise ValueError(f"latent: {name} must lie in [0, 1], got {share}.")
    if shares["mixed"] + shares["withheld"] > 1.0:
        raise ValueError(
            "latent: mixed and withheld are shares of the same rows; their sum is > 1."
        )
