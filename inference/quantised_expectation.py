r"""Quantised expectation: a table of token probabilities, tilted until its codes explain the data.

The prediction ``d`` of a denoiser is the start of a table ``r = softmax(Phi)`` over the masked
sites. Its mean in the space of the codes, and the nearest code (the *anchor*), are::

    ebar_i = sum_v r_i(v) c_v,   h_i = argmin_v ||ebar_i - c_v||

and ``Phi`` descends the loss of the decoded anchors, straight through: of the points ``e_i =
ebar_i + sg(c_{h_i} - ebar_i)``, where ``sg`` stops the gradient (anchored posterior sampling: Rout
et al. 2025, arXiv:2510.02291), so that::

    dLoss / dPhi_iv = r_i(v) <dLoss/de_i, c_v - ebar_i>    at the quantised point

Adam makes that move tokens of tiny prior mass, too, while it exceeds the epsilon of its steps. The
network is asked once and never differentiated. Nothing here is a law of anything: the table and
the anchors are a guess, for an optimiser to commit to (:mod:`~ppl_diffusion.inference.anchored`) or
a proposal to be weighed.

Where data lie between codes the straight-through loop does not converge: its anchor flips between
the codes around them, so the last iterate depends on the parity of their number and the average of
``r`` carries the data. Hence ``keep="best"``. Its fixed points know no prior but the start;
``kl_weight=1`` with the likelihood puts it back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.mean_field import mean_field
from ppl_diffusion.inference.quantisers import (
    FLOOR,
    Expectation,
    MaskedSites,
    Quantiser,
    nearest_code,
    quantised,
)
from ppl_diffusion.potentials.embedded import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.programs.sources import Rng


@dataclass(frozen=True)
class QuantisedExpectation:
    """Tilt a prediction by gradients through the codebook, all rows in one batch.

    Rows share nothing: their losses are summed and each has its own state of the optimiser, made
    anew at every call, so that a batch gives what its rows give one at a time.

    :param num_iterations: gradient steps ``J``; 0 decodes the mean of the prediction. Sweeps over
        the sites for the other inner loops.
    :param learning_rate: step size of Adam.
    :param quantiser: where the loss is taken: at the nearest code (``"straight-through"``), at the
        mean itself (``"soft"``), at a code drawn from the table (``"gumbel"``, straight-through
        Gumbel-softmax), or between mean and nearest code, the nearer to the code the flatter the
        table (``"entropy-mix"``: arXiv:2602.05000).
    :param kl_weight: adds ``kl_weight * sum_i KL(r_i || d_i)`` to the loss.
    :param keep: ``"best"``, the iterate of the lowest loss of each row, or ``"last"``.
    :param loss: ``"likelihood"``, ``-log G``; ``"l1"``, the sum of ``|y - A(e)|`` of a
        :class:`~ppl_diffusion.potentials.GaussianMeasurement`, as published: the likelihood of
        nothing that is known.
    :param warm_start: ``Phi`` begins at ``f log d + (1 - f) Phi_previous``; 1 forgets.
    :param stop_at: a row stops where ``||y - A(e)||^2 <= stop_at * m sigma^2`` (discrepancy
        principle): 1 is where the rest is noise. None never stops.
    :param inner: ``"gradient"``; ``"cavi"``, the coordinate updates in closed form of a linear
        measurement with Gaussian noise (mean-field Bayes: they include the prior, and read neither
        ``quantiser`` nor ``kl_weight``, ``loss``, ``warm_start`` and ``stop_at``); or
        ``"gauss-newton"``, the same about a linearisation that is made anew in every sweep.
    :param tau: temperature of the Gumbel-softmax.
    :raises ValueError: if an option is not usable.

    Example::

        found = QuantisedExpectation()(potential, tokens, log_d)
        found.anchors
    """

    num_iterations: int = 30
    learning_rate: float = 0.3
    quantiser: Quantiser = "straight-through"
    kl_weight: float = 0.0
    keep: Literal["best", "last"] = "best"
    loss: Literal["likelihood", "l1"] = "likelihood"
    warm_start: float = 1.0
    stop_at: float | None = None
    inner: Literal["gradient", "cavi", "gauss-newton"] = "gradient"
    tau: float = 1.0

    def __post_init__(self) -> None:
        _one_of("quantiser", self.quantiser, ("straight-through", "soft", "gumbel", "entropy-mix"))
        _one_of("keep", self.keep, ("best", "last"))
        _one_of("loss", self.loss, ("likelihood", "l1"))
        _one_of("inner", self.inner, ("gradient", "cavi", "gauss-newton"))
        stop = 1.0 if self.stop_at is None else self.stop_at
        for name, value, low, high in (
            ("num_iterations", self.num_iterations, 0, math.inf),
            ("learning_rate", self.learning_rate, 0, math.inf),
            ("kl_weight", self.kl_weight, 0, math.inf),
            ("warm_start", self.warm_start, 0, 1),
            ("stop_at", stop, 0, math.inf),
            ("tau", self.tau, 1e-6, math.inf),
        ):
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(
                    f"QuantisedExpectation: {name} must be finite and between {low} and {high}, "
                    f"got {value}."
                )

    def __call__(
        self,
        potential: EmbeddedPotential,
        tokens: Tensor,
        log_d: Tensor,
        *,
        generator: Rng = None,
        previous: Tensor | None = None,
    ) -> Expectation:
        """Return the tilted table and its anchors.

        :param potential: what the anchors are to explain.
        :param tokens: states, int64 ``(n, L)``; the mask has id ``K``.
        :param log_d: the prediction, ``(n, L, K)``; read at masked sites only.
        :param generator: noise of the Gumbel quantiser.
        :param previous: logits of an earlier call, ``(n, L, K)``, for a warm start.
        :raises CapabilityError: if the potential lacks what the loss or the inner loop needs.
        :raises ValueError: if tokens, prediction and codebook do not fit each other.
        """
        self.require(potential)
        sites = MaskedSites.of(potential.codebook, tokens, log_d)
        if self.inner != "gradient":
            return self._mean_field(potential, sites)
        with torch.no_grad():
            return _Descent(self, potential, sites, generator).run(previous)

    def require(self, potential: object) -> None:
        """Refuse a potential that lacks what is read of it.

        :raises CapabilityError: if it does.
        """
        if not isinstance(potential, EmbeddedPotential):
            raise CapabilityError(
                "QuantisedExpectation: gradients go through a codebook, which "
                f"{type(potential).__name__} does not have; give an EmbeddedPotential."
            )
        measured = isinstance(potential, GaussianMeasurement)
        asked = {
            "loss='l1'": self.loss == "l1",
            "stop_at": self.stop_at is not None,
            f"inner={self.inner!r}": self.inner != "gradient",
        }
        for option, given in asked.items():
            if given and not measured:
                raise CapabilityError(
                    f"QuantisedExpectation: {option} reads residuals and the level of the noise, "
                    f"which {potential.name} does not show; give a GaussianMeasurement."
                )
        if self.inner == "cavi" and not getattr(potential, "linear", False):
            raise CapabilityError(
                f"QuantisedExpectation: inner='cavi' is closed for linear measurements, which "
                f"{potential.name} is not said to be; use inner='gauss-newton'."
            )

    @torch.no_grad()
    def _mean_field(self, potential: EmbeddedPotential, sites: MaskedSites) -> Expectation:
        assert isinstance(potential, GaussianMeasurement)
        sweeps = self.num_iterations if bool(sites.masked.any()) else 0
        found = mean_field(
            potential,
            sites.table(sites.log_d),
            sites.masked,
            sweeps,
            relinearise=self.inner == "gauss-newton",
            keep_best=self.keep == "best",
        )
        masked = found.log_r[sites.masked]
        anchors = sites.tokens.masked_scatter(
            sites.masked,
            nearest_code(sites.codebook)(masked.exp().to(sites.dtype) @ sites.codebook),
        )
        logits, loss = found.log_r.clamp_min(FLOOR), found.free_energy
        return Expectation(found.log_r, anchors, logits, loss, found.num_rows, found.log_r)


@dataclass
class _Descent:
    """One call of the gradient loop."""

    options: QuantisedExpectation
    potential: EmbeddedPotential
    sites: MaskedSites
    generator: Rng
    num_losses: int = field(default=0, init=False)

    def run(self, previous: Tensor | None) -> Expectation:
        options, sites = self.options, self.sites
        phi = self._start(previous).requires_grad_()
        optimiser = torch.optim.Adam([phi], lr=options.learning_rate)
        nearest = nearest_code(sites.codebook)
        live = torch.ones(len(sites.tokens), dtype=torch.bool, device=phi.device)
        loss = torch.full((len(live),), torch.inf, dtype=torch.float64, device=phi.device)
        kept, anchors = phi.detach().clone(), torch.zeros_like(sites.rows)
        total, seen = torch.zeros_like(kept), torch.zeros_like(loss)
        # Without a masked site there is nothing to descend in.
        num_iterations = options.num_iterations if len(sites.rows) else 0
        for iteration in range(num_iterations + 1):
            here = live[sites.rows]
            with torch.set_grad_enabled(iteration < num_iterations):
                points, ids = quantised(
                    phi[here],
                    sites.codebook,
                    options.quantiser,
                    nearest=nearest,
                    tau=options.tau,
                    generator=self.generator,
                )
                new, misfit = self._losses(phi[here], points, live)
            better = self._better(loss, live, new.detach())
            loss[better] = new.detach()[better[live]]
            site = better[sites.rows]
            kept[site], anchors[site] = phi.detach()[site], ids[site[here]]
            total[here] += phi.detach()[here].softmax(-1)
            seen += live
            if iteration == num_iterations:
                break
            (gradient,) = torch.autograd.grad(new, phi, torch.ones_like(new))
            if misfit is not None and options.stop_at is not None:
                live = live.masked_scatter(live, misfit > options.stop_at)
            live = live & sites.masked.any(-1)
            if not bool(live.any()):
                break
            phi.grad = gradient  # rows that stopped may drift: they are looked at no more
            optimiser.step()
        average = (total / seen[sites.rows, None].clamp_min(1)).log()
        return Expectation(
            log_r=sites.table(kept.to(torch.float64).log_softmax(-1)),
            anchors=sites.tokens.masked_scatter(sites.masked, anchors),
            logits=sites.table(kept).clamp_min(FLOOR),
            loss=loss,
            num_losses=self.num_losses,
            log_average=sites.table(average),
        )

    def _start(self, previous: Tensor | None) -> Tensor:
        log_d, share = self.sites.log_d, self.options.warm_start
        if previous is None or share == 1:
            return log_d.clone()
        before = previous[self.sites.masked].detach().to(log_d.dtype).log_softmax(-1)
        return (share * log_d + (1 - share) * before).log_softmax(-1)

    def _losses(self, phi: Tensor, points: Tensor, live: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each live row, and ``||residual||^2 / (m sigma^2)`` if asked for."""
        options, potential, misfit = self.options, self.potential, None
        e = self.sites.embeddings(points, live).to(potential.codebook.dtype)
        self.num_losses += len(e)
        if isinstance(potential, GaussianMeasurement):
            residual = potential.residual(e)
            squares = residual.square().sum(-1)
            loss = squares / (2 * potential.sigma**2) + potential.log_norm
            loss = residual.abs().sum(-1) if options.loss == "l1" else loss
            if options.stop_at is not None:
                misfit = squares.detach() / (residual.shape[-1] * potential.sigma**2)
        else:
            loss = -potential.embedded(e)
        if options.kl_weight > 0:
            log_r, here = phi.log_softmax(-1), live[self.sites.rows]
            kl = (log_r.exp() * (log_r - self.sites.log_d[here])).sum(-1)
            rows = live.cumsum(0)[self.sites.rows[here]] - 1
            loss = loss + options.kl_weight * loss.new_zeros(len(loss)).index_add(
                0, rows, kl.to(loss.dtype)
            )
        return loss.to(torch.float64), misfit

    def _better(self, loss: Tensor, live: Tensor, new: Tensor) -> Tensor:
        """Return the rows whose iterate is kept from here on, bool ``(n,)``."""
        if self.options.keep == "last":
            return live
        found = loss.masked_scatter(live, new)
        return live & ~(found >= loss)  # a loss that is no number is kept, and seen


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"QuantisedExpectation: {name} must be one of {', '.join(choices)}, got {value!r}."
        )
