"""Anchored posterior sampling as a proposal: an optimiser's moves with a sampler's weights.

At every step an inner loop climbs the likelihood from the denoiser's table; sites are selected and
tokens drawn by what it found (:mod:`~ppl_diffusion.inference.anchored_guidance`), and the weight
says how often the model would have done so::

    W_k = [ K(z_k | z_{k-1}) / Q(z_k | z_{k-1}, omega_k) ] psi(z_k) / psi(z_{k-1}),     psi_T = G

``omega`` is the randomness of the inner loop, of one law in target and proposal. However few its
iterations, and whatever its loss, weighted particles are exact; a bad inner loop costs variance.
*What* they are exact for depends on who selects:

``independent``
    each site opens with odds of its own: the law of the chain on its time grid, ``p_T g``.
``policy``
    sites are chosen before their tokens are drawn, in the target too: ``p_u g``. With one reveal
    per step and a denoiser whose conditionals belong to one joint law, ``p_u`` is that law for
    every policy; with a learned one it depends on the policy, hence on the data.
``values``
    tokens first, then sites by their tokens, as such decoders do: the uniformly random order of the
    chain, ``p_unif g``, paid pick by pick.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.anchored_guidance import (
    Guidance,
    Guided,
    TiltedTokens,
    guided_step,
    require_maskable,
)
from ppl_diffusion.inference.anchored_guides import guides_of, require_steerable
from ppl_diffusion.inference.anchored_remasking import Score
from ppl_diffusion.inference.anchored_steps import PolicyStep, values_move
from ppl_diffusion.inference.anchored_twist import carried_lookahead
from ppl_diffusion.inference.arguments import require_moves
from ppl_diffusion.inference.families import best_end
from ppl_diffusion.inference.path_moves import checked_moves
from ppl_diffusion.inference.quantised_expectation import QuantisedExpectation
from ppl_diffusion.inference.remask_moves import Remask, by_default, swept
from ppl_diffusion.kernels import OrderedKernel, RevealStep
from ppl_diffusion.kernels.base import GIVEN, Carry
from ppl_diffusion.potentials.embedded import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import (
    Method,
    Needs,
    can_hold,
    described,
    held_proposal,
    register,
)
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.feynman_kac import draw_step, per_particle
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.path_state import PathMove
from ppl_diffusion.smc.rejuvenation import OrderRefresh
from ppl_diffusion.smc.twists import CallableTwist, Defensive, FillTwist, TwistLike, as_twist

MEAN_FIELD = QuantisedExpectation(quantiser="soft", kl_weight=1.0)
Variant = Literal["auto", "independent", "policy", "values"]
MOVES = "anchored/moves"
LOGITS = "anchored/logits"
"""Where the inner loop of each particle ended, by site, for a warm start."""

CONSISTENT = (
    "which leaves the law alone where all conditionals of the denoiser belong to one joint law and "
    "the chain has that law: one site per step"
)
P_U = (
    "p_u reveals sites in the order of a policy that follows the guide; it is the law of the "
    "denoiser for every policy where one site is revealed per step and all its conditionals belong "
    "to one joint law, and depends on the data through the policy elsewhere"
)


@register
@dataclass(frozen=True)
class AnchoredSMC(Method):
    """Move by anchored posterior sampling, and pay for it.

    :param variant: who selects what is revealed: ``"independent"`` (chains on a time grid),
        ``"policy"`` or ``"values"`` (chains that reveal a number of sites); ``"auto"`` is the first
        or the last of them.
    :param twist: how particles look ahead: ``"moments"`` (the default for a
        :class:`~ppl_diffusion.potentials.GaussianMeasurement`), or whatever other methods take
        (``"defensive"``, the default elsewhere).
    :param guide: the potential whose gradient is followed, or one for each chain site by name. A
        bare chain's own potential by default. It steers and looks ahead; the target is whatever the
        potential, or the program, says.
    :param expectation: the inner loop: by default mean-field Bayes by gradients (``"soft"``,
        ``kl_weight=1``), as proposals need the spread of the posterior, which tables that end at
        anchors do not have.
    :param lam: share of the anchor among the tokens proposed.
    :param eps: share of the denoiser's own tokens; positive.
    :param temperature: of the tilted table; above one is flatter.
    :param tau: temperature of the selection; infinity does not select.
    :param delta: share of uniform picks of ``"values"``.
    :param score: how sure guidance is of a site: ``"max"``, ``"anchor"`` or ``"neg-entropy"``.
    :param floor: share of the mean over the population in ``"moments"``, see
        :func:`~ppl_diffusion.smc.twists.floored`.
    :param num_children: ends drawn for each particle at the last step, of which one is kept by what
        it is worth, and paid for: an end costs one look at the potential.
    :param num_sweeps: sweeps of path moves of the finished sequences; their weights stay.
    :param moves: the moves of a sweep, in order; by default a new order of reveals (not under a
        policy) and :class:`~ppl_diffusion.inference.Remask`.
    :raises ValueError: if a number or a name is not usable.

    Example::

        likelihood = measurement.potential(codec)
        posterior = SMC(chain, likelihood, method=AnchoredSMC(), num_particles=32).run(seed=0)
    """

    variant: Variant = "auto"
    twist: TwistLike | Literal["moments"] = "auto"
    guide: EmbeddedPotential | Mapping[str, EmbeddedPotential] | None = None
    expectation: QuantisedExpectation = MEAN_FIELD
    lam: float = 0.3
    eps: float = 0.2
    temperature: float = 1.0
    tau: float = 1.0
    delta: float = 0.3
    score: Score = "max"
    floor: float = 0.2
    num_children: int = 8
    num_sweeps: int = 0
    moves: Sequence[PathMove] | None = None

    name: ClassVar[str] = "aps-smc"
    needs: ClassVar[Needs] = Needs(density=True, own_moves=True, guide=True)

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(
                f"AnchoredSMC: unknown variant {self.variant!r}; choose one of "
                f"{', '.join(get_args(Variant))}."
            )
        if not (self.tau > 0 and 0 <= self.delta <= 1 and 0 <= self.floor < 1):
            raise ValueError(
                "AnchoredSMC: tau must be positive, delta lie in [0, 1] and floor in [0, 1), got "
                f"{self.tau}, {self.delta} and {self.floor}."
            )
        self._tokens()  # refuses its own numbers
        if self.num_sweeps < 0 or self.num_children < 1:
            raise ValueError(
                "AnchoredSMC: num_sweeps must be >= 0 and num_children >= 1, got "
                f"{self.num_sweeps} and {self.num_children}."
            )
        if self.moves is not None and not self.num_sweeps:
            raise ValueError("AnchoredSMC: moves are made in sweeps; give num_sweeps as well.")
        if self.moves is not None:
            moves = require_moves("AnchoredSMC", self.moves, exact=False)
            object.__setattr__(self, "moves", moves)
        if self.num_sweeps:
            object.__setattr__(self, "needs_paths", True)
            object.__setattr__(self, "needs", replace(self.needs, free_chains=True))
        if self.twist not in ("auto", "moments"):
            object.__setattr__(self, "twist", as_twist(self.twist))  # type: ignore[arg-type]

    def _tokens(self) -> TiltedTokens:
        return TiltedTokens(self.lam, self.eps, self.temperature)

    # What is chosen once per run.

    @property
    def fill(self) -> FillTwist:
        """The completions, where it looks ahead by any; else the floor of the look-ahead."""
        return self.twist if isinstance(self.twist, FillTwist) else Defensive(0, self.floor)

    def require(self, source: Source) -> None:
        """Refuse targets without a guide, and chains that it cannot steer."""
        super().require(source)
        owner, guides = type(self).__name__, self.guides(source)
        for site in source.chains:
            if site.name in guides:
                require_steerable(owner, site, guides[site.name], self.variant)

    def guides(self, source: Source) -> dict[str, EmbeddedPotential]:
        """Return the guide of each chain that has one."""
        return guides_of(type(self).__name__, self.guide, source)

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the site's own chain behind a counter; guided moves are made here."""
        proposal = None if site.name in self.guides(source) else held_proposal(site)
        return chain_mover(site, self._fill_of(source), proposal, max_rows=max_rows)

    def _fill_of(self, source: Source) -> FillTwist:
        completes = self.twist == "auto" and not self._by_moments(source)
        return Defensive() if completes else self.fill

    def _by_moments(self, source: Source) -> bool:
        guides = self.guides(source).values()
        closed = all(isinstance(guide, GaussianMeasurement) for guide in guides)
        if self.twist == "moments" and not closed:
            raise CapabilityError(
                "AnchoredSMC: twist='moments' integrates a Gaussian in closed form, and the guide "
                "is no GaussianMeasurement; look ahead by completions, twist='defensive'."
            )
        return closed and self.twist in ("auto", "moments")

    def prepare(self, run: Bound, resampler: Any, ess_threshold: float) -> None:
        """Choose the guidance of each site, and how to look ahead."""
        guides, tokens = self.guides(run.source), self._tokens()
        guided = {
            name: Guidance(guide, self.expectation, tokens, self.score)
            for name, guide in guides.items()
        }
        by_moments = self._by_moments(run.source)
        if isinstance(self.twist, CallableTwist) and len(run.sites) > 1:
            raise CapabilityError(
                "AnchoredSMC: a twist given by a function sees the carry of one chain, and there "
                "are several; look ahead by completions, such as 'defensive'."
            )
        run.fill = self._fill_of(run.source)
        chains = {name: run.sites[name].chain for name in guided if self.num_sweeps}
        moves = {name: self._moves_of(chain, guided[name]) for name, chain in chains.items()}
        begun = sum(guide.num_embedded for guide in _distinct(guides))
        run.notes |= {"guided": guided, "moments": by_moments, "embedded": begun, MOVES: moves}

    # Moving.

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move, at last to one of several ends."""
        if group + 1 < len(run.groups) or self.num_children == 1:
            return super().move(run, state, group, generator)
        end = partial(self._end, run, group, generator)
        return best_end(run, state, self.num_children, end, generator)

    def _end(self, run: Bound, group: int, generator: Rng, state: State) -> Moved:
        return super().move(run, state, group, generator)

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Move one site by its guide, and return ``log K - log Q``, ``(R, N)``."""
        guidance = run.notes["guided"].get(item.site)
        if guidance is None:
            return run.step(state, item, generator)
        site, kernel = run.sites[item.site], run.movers[item.site].kernel
        carry = state["sites"][item.site]
        step: Any = kernel.step(carry, item.k, fixed=site.chain.fixed)
        require_maskable(step)
        if not _can_move(step):
            still = kernel.advance(carry, step.tokens, item.k, step=step)
            return run.moved(state, item, still), 0.0
        held = site.clamp(step, carry, item.k) if site.clamp and can_hold(site) else step
        guided = self._guided(guidance, state, item.site, held, carry, generator)
        value, log_ratio = self._move(step, guided, generator)
        moved = run.moved(state, item, kernel.advance(carry, value, item.k, step=step))
        if self.expectation.warm_start < 1:
            moved = {**moved, LOGITS: {**moved.get(LOGITS, {}), item.site: guided.logits}}
        return moved, per_particle(log_ratio)

    def _guided(
        self, guidance: Guidance, state: State, site: str, step: Any, carry: Carry, generator: Rng
    ) -> Guided:
        previous = state.get(LOGITS, {}).get(site)
        return guidance(
            step.tokens, step.log_probs, carry.get(GIVEN), previous=previous, generator=generator
        )

    def _move(self, step: Any, guided: Guided, generator: Rng) -> tuple[Tensor, Tensor]:
        """Return next states, and the log of the model's step over the proposal."""
        if isinstance(step, RevealStep) and self.variant != "policy":
            conf = guided.log_c / self.tau
            picked = values_move(step, guided.log_c, conf, self.delta, generator)
            return picked.value, picked.log_tokens + picked.log_order
        proposal = guided_step(step, guided, self.tau)
        value = draw_step(proposal, generator)
        assert isinstance(value, Tensor)
        # The policy selects in the target, too: only tokens are paid for.
        policy = isinstance(proposal, PolicyStep)
        model = proposal.with_log_probs(step.log_probs) if policy else step
        return value, model.log_prob(value) - proposal.log_prob(value)

    # Looking ahead.

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the look-ahead of states."""
        if run.notes["moments"]:
            return run.defended(state, self._moments(run, state))
        if self.twist is None:
            return None
        if isinstance(self.twist, CallableTwist):
            name = run.only.name
            carry = state["sites"][name]
            return self.twist(carry, state["done"][name], tuple(carry["tokens"].shape[:2]))
        return run.look(state, generator)

    def _moments(self, run: Bound, state: State) -> Tensor:
        total = run.zeros
        for name, guidance in run.notes["guided"].items():
            carry = state["sites"].get(name)
            if carry is not None:
                kernel, k = run.movers[name].kernel, state["done"][name]
                clamp = run.sites[name].clamp
                log_psi = carried_lookahead(guidance.guide, kernel, carry, k, clamp)
                total = total + per_particle(log_psi)
        return total

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead by completions; the others know nothing of latents."""
        return run.ahead(state) if not run.notes["moments"] and self._completes else None

    @property
    def _completes(self) -> bool:
        return isinstance(self.twist, FillTwist) or self.twist == "auto"

    # Moving what is finished.

    def _moves_of(self, chain: ReverseChain, guidance: Guidance) -> tuple[PathMove, ...]:
        policy = self.variant == "policy"
        default = (Remask(),) if policy else (OrderRefresh(), Remask())
        moves = default if self.moves is None else self.moves
        if policy and not all(isinstance(move, Remask) for move in moves):
            raise CapabilityError(
                "AnchoredSMC: under variant='policy' the order of reveals is no longer that of the "
                "chain, which other path moves leave alone; move by Remask()."
            )
        return checked_moves([by_default(move, guidance) for move in moves], chain)

    def end(self, run: Bound, trace: SMCTrace) -> SMCTrace:
        """Move finished sequences by kernels that leave their law alone; weights stay."""
        moves: dict[str, tuple[PathMove, ...]] = run.notes[MOVES]
        return swept(run, trace, moves, self.num_sweeps) if moves else trace

    def paths(self, run: Bound, state: State) -> dict[str, Tensor] | None:
        """Return the paths after moves."""
        return state.get("paths")

    # What is said about it.

    def law(self, run: Bound) -> Law:
        """Return the law of the chain; of a policy, that of its own order."""
        law = run.source.law
        if self.variant == "policy":
            law = law.but(product="p_u(path)", why=P_U)
        every = [move for moves in run.notes[MOVES].values() for move in moves]
        unpaid = next((move.name for move in every if not move.exact), None)
        if unpaid is None:
            return law
        words = f"moved {self.num_sweeps} times by {unpaid!r}, {CONSISTENT}"
        return law.but(exact=False, why=f"{law.why}; {words}" if law.why else words)

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, in JSON types, and what the guide was asked."""
        chosen = {site.name: self._variant_of(site) for site in run.source.chains}
        guided = {n: v for n, v in chosen.items() if n in run.notes["guided"]}
        asked = sum(g.num_embedded for g in _distinct(self.guides(run.source)))
        own = "moments" if run.notes["moments"] else described(self.twist)
        return {
            **super().settings(run),
            "variant": " + ".join(dict.fromkeys(guided.values())),
            "twist": own if own != "auto" else run.fill.name,
            "expectation": {k: described(v) for k, v in vars(self.expectation).items()},
            "guide": {name: guide.name for name, guide in self.guides(run.source).items()},
            "num_embedded": asked - run.notes["embedded"],
        }

    def _variant_of(self, site: ChainSite) -> str:
        if self.variant != "auto":
            return self.variant
        return "values" if isinstance(site.chain.kernel, OrderedKernel) else "independent"


def _can_move(step: Any) -> bool:
    """Return whether a step may reveal anything."""
    if isinstance(step, RevealStep):
        return step.count > 0 and bool(step.eligible.any())
    masked = step.tokens == step.num_states - 1
    return step.alpha_s > step.alpha_t and bool(masked.any())


def _distinct(guides: Mapping[str, EmbeddedPotential]) -> Iterator[EmbeddedPotential]:
    yield from {id(guide): guide for guide in guides.values()}.values()
