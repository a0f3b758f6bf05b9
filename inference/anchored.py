"""Anchored posterior sampling: restore a measured sequence by gradients through its codebook.

At every step of a masked chain the prediction is tilted until its codes explain the data
(:class:`~ppl_diffusion.inference.QuantisedExpectation`: no gradient through the network), each
masked site has the code nearest to the mean of its table, the *anchor*, and the surest sites are
committed for good (:class:`~ppl_diffusion.inference.AnchoredRemasking`; Rout et al. 2025,
arXiv:2510.02291).

It is an optimiser, whatever its name says: particles are independent restorations, which nothing
weighs. With many inner steps the prior enters through little but the visible context; several
sites committed at once ignore what they know of each other; no variance, no second mode and no
evidence can be read off. The same moves with a density are a proposal, which weights make exact:
``aps-smc``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.anchored_remasking import (
    AnchoredRemasking,
    Annealing,
    Order,
    Schedule,
    Score,
)
from ppl_diffusion.inference.biased import Unpaid
from ppl_diffusion.inference.guides import guide_of
from ppl_diffusion.inference.quantised_expectation import QuantisedExpectation
from ppl_diffusion.inference.quantisers import Expectation, Quantiser
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.kernels.base import GIVEN
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.potentials.embedded import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import Needs, register
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.rows import distinct_rows

FREE, LOGITS = "anchored/free", "anchored/logits"
"""Sites that were masked at the start, and the logits of the step before."""

DECODED = "anchored/decoded"

OURS = QuantisedExpectation(kl_weight=1.0), AnchoredRemasking()
PUBLISHED = (
    QuantisedExpectation(num_iterations=100, keep="last", loss="l1"),
    AnchoredRemasking(),
)
"""What the options are if nothing is said: with and without ``preset="published"``."""


CLOSED = ("cavi", "gauss-newton")
DESCENT = (
    "preset",
    "learning_rate",
    "quantiser",
    "kl_weight",
    "loss",
    "warm_start",
    "stop_at",
)
"""What only gradients have."""


@register
@dataclass(frozen=True)
class AnchoredPosteriorSampler(Unpaid):
    """Restore one chain's sequence by anchors: an optimiser, with equal weights and no evidence.

    Works with masked chains of any grid (``InterpolatingKernel``, ``OrderedKernel``), prompts and
    clamps, which are never masked again, and guided denoisers. Every element of a plate is restored
    on its own. Options that are None are those of the preset; see
    :class:`~ppl_diffusion.inference.QuantisedExpectation` and
    :class:`~ppl_diffusion.inference.AnchoredRemasking` for what they do.

    :param preset: ``"published"``: 100 steps in the L1 norm of the residuals (of a measurement;
        elsewhere of ``-log G``), no prior in the loss, the last iterate. None: 30 steps of the
        likelihood with the prior (``kl_weight=1``), the best iterate.
    :param num_iterations: gradient steps, or sweeps, per step of the chain.
    :param learning_rate: step size of Adam.
    :param quantiser: where the loss is taken.
    :param kl_weight: weight of the prior in the loss.
    :param keep: the iterate that anchors are taken from.
    :param loss: the likelihood, or the L1 norm of the residuals.
    :param warm_start: how much of the logits of the step before is forgotten; 1 forgets all.
    :param stop_at: residual, in units of the noise, at which a row stops; none never stops.
    :param inner: gradients, coordinate updates in closed form, or those of a linearisation; the
        latter two take none of the options of gradients.
    :param score: what confidence is.
    :param order: whose confidence decides.
    :param mask_schedule: how the number of masks falls.
    :param noise: multiplies the temperature of the Gumbel noise of the selection.
    :param annealing: how that temperature falls.
    :param token: what is committed: the ``"anchor"``, the likeliest token of the table
        (``"argmax"``), or a draw from it (``"sample"``).
    :param guide: an :class:`~ppl_diffusion.potentials.EmbeddedPotential` to steer by; None is the
        potential of the chain itself. Programs need one: it steers, and they decide what is asked.
    :raises ValueError: if an option is not usable.

    Example::

        likelihood = measurement.potential(codec)
        posterior = SMC(chain, likelihood, method="aps", num_particles=4).run(seed=0)
        published = SMC(chain, likelihood, method="aps", preset="published").run(seed=0)
    """

    preset: Literal["published"] | None = None
    num_iterations: int | None = None
    learning_rate: float | None = None
    quantiser: Quantiser | None = None
    kl_weight: float | None = None
    keep: Literal["best", "last"] | None = None
    loss: Literal["likelihood", "l1"] | None = None
    warm_start: float | None = None
    stop_at: float | None = None
    inner: Literal["gradient", "cavi", "gauss-newton"] | None = None
    score: Score | None = None
    order: Order | None = None
    mask_schedule: Schedule | None = None
    noise: float | None = None
    annealing: Annealing | None = None
    token: Literal["anchor", "argmax", "sample"] = "anchor"
    guide: EmbeddedPotential | None = None

    name: ClassVar[str] = "aps"
    needs: ClassVar[Needs] = Needs(own_moves=True, guide=True)

    def __post_init__(self) -> None:
        if self.preset not in (None, "published"):
            raise ValueError(
                f"AnchoredPosteriorSampler: unknown preset {self.preset!r}; choose 'published', or "
                "None."
            )
        if self.token not in ("anchor", "argmax", "sample"):
            raise ValueError(
                "AnchoredPosteriorSampler: token must be one of anchor, argmax, sample, got "
                f"{self.token!r}."
            )
        self._pieces()  # their options are checked where they are made
        if self.inner in CLOSED:
            said = [name for name in DESCENT if getattr(self, name) is not None]
            if said:
                raise ValueError(
                    f"AnchoredPosteriorSampler: inner={self.inner!r} is in closed form and reads "
                    f"no {', '.join(said)}: leave out what only gradients have."
                )

    def _pieces(self) -> tuple[QuantisedExpectation, AnchoredRemasking]:
        expectation, remasking = OURS if self.preset is None else PUBLISHED
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        said["schedule"] = self.mask_schedule  # a schedule alone is the runner's: who moves when
        return _with(expectation, said), _with(remasking, said)

    @property
    def remasking(self) -> AnchoredRemasking:
        """How sites are committed."""
        return self._pieces()[1]

    def expectation(self, guide: EmbeddedPotential) -> QuantisedExpectation:
        """Return how tables are tilted.

        :param guide: what they are tilted by; only a measurement has residuals, so that the L1 norm
            of a preset becomes the likelihood elsewhere.
        """
        expectation = self._pieces()[0]
        if self.loss is None and not isinstance(guide, GaussianMeasurement):
            expectation = replace(expectation, loss="likelihood")
        return expectation

    def require(self, source: Source) -> None:
        """Refuse what has no codebook, no masks, or not one chain."""
        guide = guide_of(type(self).__name__, self.guide, source)
        super().require(source)
        self.expectation(guide).require(guide)
        (site,) = source.chains
        kernel = site.chain.kernel
        masked = isinstance(kernel, InterpolatingKernel | OrderedKernel)
        if not masked or not kernel.process.absorbing:
            raise CapabilityError(
                "AnchoredPosteriorSampler: it commits masks, group after group, which "
                f"{kernel!r} does not have; use InterpolatingKernel or OrderedKernel over an "
                "Absorbing process."
            )
        if isinstance(kernel, OrderedKernel) and kernel.block < kernel.length:
            raise CapabilityError(
                "AnchoredPosteriorSampler: it commits the surest sites wherever they are, and the "
                f"chain goes from left to right in blocks of {kernel.block}; take one block."
            )

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the chain behind a counter; moves are made here."""
        return chain_mover(site, None, max_rows=max_rows)

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """Put clamped tokens in place: whatever is not masked is never asked about."""
        site, carry = run.only, state["sites"][run.only.name]
        tokens, size = carry[TOKENS], site.chain.kernel.process.vocab_size
        if site.clamp is not None:
            held = site.clamp.mask.to(tokens.device)
            tokens = torch.where(held, site.clamp.tokens.to(tokens.device), tokens)
        sites = {**state["sites"], site.name: {**carry, TOKENS: tokens}}
        return {**state, "sites": sites, FREE: (tokens == size).sum(-1), LOGITS: None}

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Tilt, anchor, commit."""
        kernel, carry = run.movers[item.site].kernel, state["sites"][item.site]
        tokens = carry[TOKENS]
        rows, masked = tokens.flatten(0, -2), (tokens == kernel.process.vocab_size).flatten(0, -2)
        logits = None
        if bool(masked.any()):
            log_d = kernel.cavity_log_probs(carry, item.k).flatten(0, -3)
            found = self._expect(run, state, rows, log_d, GIVEN in carry, generator)
            chosen = self._tokens(found, masked, generator)
            scores = self.remasking.scores(found, chosen, log_d)
            law = self.remasking.selection(
                scores, masked, state[FREE].flatten(), item.k + 1, kernel.num_steps
            )
            picked = law.picked(law.sample(generator=generator))
            tokens = torch.where(picked, chosen, rows).reshape(tokens.shape)
            if self.warm_start is not None and self.warm_start < 1:
                logits = found.logits.reshape(*tokens.shape, -1)
        moved = run.moved(state, item, kernel.advance(carry, tokens, item.k))
        return {**moved, LOGITS: logits}, 0.0

    def _expect(
        self,
        run: Bound,
        state: State,
        rows: Tensor,
        log_d: Tensor,
        given: bool,
        generator: Rng,
    ) -> Expectation:
        """Return the tilted tables of all rows; equal rows are tilted once where that is one."""
        guide = guide_of(type(self).__name__, self.guide, run.source)
        expectation, previous = self.expectation(guide), state[LOGITS]
        alike = not given and previous is None and expectation.quantiser != "gumbel"
        every = torch.arange(len(rows), device=rows.device)
        first, inverse = distinct_rows(rows) if alike else (every, every)
        found = expectation(
            guide,
            rows[first],
            log_d[first],
            generator=generator,
            previous=None if previous is None else previous.flatten(0, -3),
        )
        run.notes[DECODED] = run.notes.get(DECODED, 0) + found.num_losses
        return found if not alike else found.at(inverse)

    def _tokens(self, found: Expectation, masked: Tensor, generator: Rng) -> Tensor:
        """Return what would be committed at each site, int64 ``(n, L)``."""
        if self.token == "anchor":
            return found.anchors
        if self.token == "argmax":
            return found.log_r.argmax(-1)
        noise = uniforms(masked.shape, generator=generator, device=masked.device)
        drawn: Tensor = draw_categorical(found.log_r, noise)
        return drawn

    def num_calls(self, run: Bound) -> int:
        """Return how many sequences were asked about, or decoded by the inner loop."""
        return super().num_calls(run) + int(run.notes.get(DECODED, 0))

    def why(self, run: Bound) -> str:
        """Return why restorations have no declared law."""
        asked = " + ".join(tilt.of for tilt in run.source.law.tilts)
        return (
            f"no declared law: an optimiser that committed anchors of {asked} in {run.num_steps} "
            "steps, which nothing paid for; equal weights"
        )

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, with the options that the preset filled in, and its cost."""
        guide = guide_of(type(self).__name__, self.guide, run.source)
        chosen = asdict(self.expectation(guide)) | asdict(self.remasking)
        if self.inner in CLOSED:
            chosen = {name: value for name, value in chosen.items() if name not in DESCENT}
        return {
            "preset": self.preset,
            **chosen,
            "token": self.token,
            "guide": guide.name,
            "num_decoded": int(run.notes.get(DECODED, 0)),
        }


def _with(piece: Any, said: dict[str, Any]) -> Any:
    own = {f.name: said[f.name] for f in fields(piece) if said.get(f.name) is not None}
    return replace(piece, **own)
