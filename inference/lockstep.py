"""Lockstep reveals: a product of masked chains whose weights are booked at reveals only.

All particles reveal the same number of positions in every step. A position revealed from
predictions ``D_m`` draws ``v ~ g / sum g`` with ``g_v = prod_m D_m(v)**b_m``, and ``log sum g`` is
its weight. On complete paths the factors of *when* a position is revealed cancel in the path-power
target, so nothing is lost; and counts that are equal add no noise to the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.inference.experts import ExpertMover, is_plain_mixture, normalised
from ppl_diffusion.kernels import SAMPLE_ONLY, OrderedKernel, RevealStep
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.kernels.path_power import log_product
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.smc.feynman_kac import per_particle

Look = Callable[[Tensor, Tensor], Tensor]
"""``(chosen (*batch, L), log_law (m, V)) -> (m, V)``: what each token of a position promises."""

LEAST_LOOK = -50.0
"""Stand-in for ``-inf`` in a look-ahead that is exact (nats): a proposal must cover the model."""

_LOWEST = torch.finfo(torch.float64).min


class SiteRule(ABC):
    """Which positions are revealed next. It sees the state and what is predicted from it alone.

    A rule that looks at the tokens just sampled ("low confidence" remasking) makes a chain whose
    law nobody can write down; there is no way to say it here.

    :cvar reads_law: whether it asks for the prediction.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    reads_law: ClassVar[bool] = False

    @abstractmethod
    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        """Return scores of positions; the highest are revealed first.

        :param tokens: states, int64 ``(*batch, L)``.
        :param log_law: the composed prediction, ``(*batch, L, V)``, or None.
        :param noise: numbers in ``[0, 1)``, ``(*batch, L)``, for rules that draw.
        :returns: ``(*batch, L)``.
        """


@dataclass(frozen=True)
class RandomSites(SiteRule):
    """A uniformly random order, independent of the network."""

    name = "random"
    words = "a uniformly random order"

    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        """Return the noise."""
        return noise


@dataclass(frozen=True)
class LeftToRight(SiteRule):
    """From the first position to the last."""

    name = "left-to-right"
    words = "the order from left to right"

    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        """Return minus the position."""
        place = torch.arange(tokens.shape[-1], dtype=torch.float64, device=tokens.device)
        return -place.expand(tokens.shape)


@dataclass(frozen=True)
class MostConfident(SiteRule):
    """The position whose likeliest token is the likeliest."""

    name = "confidence"
    words = "the order of the largest predicted probability, argmax_l max_v D"
    reads_law = True

    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        """Return the largest log-probability of each position."""
        assert log_law is not None
        return log_law.amax(-1)


@dataclass(frozen=True)
class LeastEntropy(SiteRule):
    """The position whose prediction has the least entropy."""

    name = "entropy"
    words = "the order of the least predicted entropy"
    reads_law = True

    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        """Return minus the entropy of each position."""
        assert log_law is not None
        return torch.special.xlogy(log_law.exp(), log_law.exp()).sum(-1)


SITE_RULES: dict[str, SiteRule] = {
    rule.name: rule for rule in (RandomSites(), LeftToRight(), MostConfident(), LeastEntropy())
}
_SAMPLED = ("sampled-confidence", "low-confidence", "low_confidence", "remask-low-confidence")


def as_site_rule(rule: str | SiteRule) -> SiteRule:
    """Return a site rule from its name."""
    if isinstance(rule, SiteRule):
        return rule
    if rule in _SAMPLED:
        raise CapabilityError(
            f"Corrector: sites={rule!r} ranks positions by the tokens just sampled, which samples "
            "from no law that can be declared or weighted; use 'confidence' (the largest predicted "
            "probability) or another rule that sees the state only."
        )
    if rule not in SITE_RULES:
        raise ValueError(
            f"Corrector: unknown sites={rule!r}; choose one of {', '.join(SITE_RULES)}."
        )
    return SITE_RULES[rule]


class LockstepMover(ExpertMover):
    """Masked experts that reveal the same positions of a particle at the same time.

    :param composition: masked chains with their exponents.
    :param rule: which positions are revealed next.
    :param group_size: reveals per step; None takes as many as keep the number of steps.
    :param options: ``twist`` and ``max_rows`` of :class:`ExpertMover`.
    :raises CapabilityError: if a chain is no plain masked chain.
    """

    def __init__(
        self,
        composition: Composition,
        *,
        rule: SiteRule,
        group_size: int | None = None,
        **options: Any,
    ) -> None:
        group_size, block = _reveals(composition.chains, group_size)
        kernels = [_ordered(chain, group_size, block) for chain in composition.chains]
        super().__init__(composition, kernels, **options)
        self.rule = rule

    @property
    def group_size(self) -> int:
        """Reveals per step."""
        assert isinstance(self.kernel, OrderedKernel)
        return self.kernel.group_size

    @property
    def target_law(self) -> str:
        """The declared law of the path, in words; ``{law}`` stands for the product."""
        sites = "one site" if self.group_size == 1 else f"{self.group_size} sites"
        return (
            "Pr(order) * the product over reveals of {law}, each factor given the tokens revealed "
            f"before, in {self.rule.words}, {sites} per step"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in JSON types."""
        return {"sites": self.rule.name, "group_size": self.group_size}

    def move(
        self, carry: Carry, k: int, generator: Any, look: Look | None = None
    ) -> tuple[Carry, Tensor | float]:
        """Reveal positions; a token's log-weight is ``log sum_v prod_m D_m(v)**b_m``."""
        tokens, fixed = carry["tokens"], self.chain.fixed
        noise = uniforms((2, *tokens.shape), generator=generator, device=tokens.device)
        seen = zip(self.kernels, self.carries(carry), strict=True)
        steps: list[Any] = [kernel.step(own, k, fixed=fixed) for kernel, own in seen]
        if not bool(steps[0].eligible.any()):  # the idle steps of a prompted chain
            return carry, 0.0
        chosen = self._choose(steps, tokens, noise[0])
        log_g = log_product([_rows(s.prediction, chosen) for s in steps], self.exponents)
        ahead = (
            torch.zeros_like(log_g) if look is None else look(chosen, log_g).clamp_min(LEAST_LOOK)
        )
        drawn = draw_categorical(log_g + ahead, noise[1][chosen])
        weight = log_g.new_zeros(len(log_g))
        if look is not None or not self.is_plain:
            taken = ahead.gather(-1, drawn[:, None])[:, 0]
            weight = torch.logsumexp(log_g + ahead, -1) - taken
        log_ratio = weight.new_zeros(tokens.shape).masked_scatter(chosen, weight)
        moved = tokens.masked_scatter(chosen, drawn)
        return {**carry, "tokens": moved}, per_particle(log_ratio.sum(-1))

    def _choose(self, steps: list[RevealStep], tokens: Tensor, noise: Tensor) -> Tensor:
        log_law = None
        if self.rule.reads_law:
            log_law = normalised(log_product([s.log_probs for s in steps], self.exponents))
        scores = self.rule.scores(tokens, log_law, noise).clamp_min(_LOWEST)
        eligible = steps[0].eligible
        ranked = torch.where(eligible, scores, -torch.inf)
        rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return eligible & (rank < steps[0].count)


def _rows(prediction: Prediction, where: Tensor) -> Tensor:
    """Return the predictions of some sites, ``(m, V)``; the head runs at these alone."""
    parts = [log_c for _, log_c in prediction.rows(where)]
    return torch.cat(parts)


def _ordered(chain: ReverseChain, group_size: int, block: int) -> OrderedKernel:
    """Return the kernel that reveals so many positions per step, with the chain's denoiser."""
    process, denoiser = chain.kernel.process, chain.kernel.denoiser
    return OrderedKernel(process, denoiser, length=chain.length, group_size=group_size, block=block)


def _reveals(chains: Sequence[ReverseChain], group_size: int | None) -> tuple[int, int]:
    """Return the reveals per step and the length of a block, which the experts must agree on."""
    found = {_own_reveals(chain) for chain in chains}
    sizes, blocks = ({size for size, _ in found}, {block for _, block in found})
    if len(blocks) > 1 or (group_size is None and len(sizes) > 1):
        raise ValueError(
            f"Corrector: the chains reveal {sorted(sizes)} positions per step in blocks of "
            f"{sorted(blocks)}; build them with one number of steps and one block length, or give "
            "group_size."
        )
    size, block = sizes.pop() if group_size is None else group_size, blocks.pop()
    return min(size, block), block  # no step reveals more than there is


def _own_reveals(chain: ReverseChain) -> tuple[int, int]:
    kernel, length = chain.kernel, chain.length
    if isinstance(kernel, OrderedKernel) and kernel.capability != SAMPLE_ONLY:
        return kernel.group_size, kernel.block
    if is_plain_mixture(kernel) and kernel.process.absorbing:
        free = length if chain.prompt is None else int((chain.prompt < 0).sum(-1).max())
        return max(1, -(-free // kernel.num_steps)), length
    raise CapabilityError(
        f"Corrector: lockstep reveals need a masked chain at kappa=1 whose law is its denoiser's, "
        f"which {kernel!r} is not; use InterpolatingKernel or OrderedKernel (clock='mean'), or "
        "form='path' for other processes."
    )
