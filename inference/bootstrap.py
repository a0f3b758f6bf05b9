"""Move by the chain, weigh by what completions promise: the filter everything is built on.

Weights are ``log h_k`` of a look-ahead that telescopes away, and at the end the potential itself:
the target is ``p(path) G(x0)`` for every look-ahead. ``twist=None`` is the bootstrap filter proper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import Kernel
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import Method, Needs, held_proposal, register
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.smc.feynman_kac import Proposal
from ppl_diffusion.smc.late import COMPLETED, PENDING, without_completed
from ppl_diffusion.smc.twists import ArgmaxFill, CallableTwist, FillTwist, TwistLike, as_twist


@dataclass(frozen=True)
class LookingAhead(Method):
    """What methods share that move by the chain, or a proposal, and look ahead by a twist.

    :param twist: how states are rated: ``"defensive"``, ``"argmax"``, ``"persistent"``,
        ``"sample"``, a fill twist such as ``PersistentFill(16)``, or a function
        ``(carry, k) -> log h (R, N)`` of the carry of the only chain, such as a trained
        :class:`~ppl_diffusion.inference.LearnedValue`.
    :param proposal: None moves by the chain itself (by its twist, with its clamp); a kernel, or a
        proposal with a density.
    """

    twist: TwistLike = "defensive"
    proposal: Proposal | Kernel | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "twist", as_twist(self.twist))

    @property
    def fill(self) -> FillTwist:
        """The twist, where it completes; without one a first guess is still needed."""
        return self.twist if isinstance(self.twist, FillTwist) else ArgmaxFill()

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the mover of a site by its chain, or the proposal."""
        proposal: Any = self.proposal
        if proposal is None:
            proposal = held_proposal(site)
        elif len(source.chains) > 1:
            raise CapabilityError(
                f"{type(self).__name__}: a proposal moves one chain, and there are several; twist "
                "the sites (ppl_diffusion.handlers.twist), or propose by nothing."
            )
        elif site.twist is not None:
            raise CapabilityError(
                f"{type(self).__name__}: the site {site.name!r} is twisted, and a proposal is "
                "given besides; leave one out."
            )
        events = self.on_events and source.is_free(site)
        return chain_mover(site, self.twist, proposal, max_rows=max_rows, on_events=events)

    @property
    def on_events(self) -> bool:
        """Whether particles may go from reveal to reveal: not where steps of the grid count."""
        return True

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move, with the scores of completions under way where they are late."""
        if not self.fill.late:
            return super().move(run, state, group, generator)
        state, fills = without_completed(state)
        asks, goes_on = self.is_due(run, group + 1), self.is_due(run, group + 2)
        pending = (
            run.submit(run.guess(state, generator) if fills is None else fills) if asks else None
        )
        moved, log_ratio = super().move(run, state, group, generator)
        if asks or goes_on:  # the network is asked about the new states meanwhile
            moved = {**moved, COMPLETED: run.guess(moved, generator)}
        return {**moved, PENDING: pending}, log_ratio

    def is_due(self, run: Bound, group: int) -> bool:
        """Return whether states are looked at, by completions, after so many groups."""
        return 0 < group < len(run.groups)

    def rate(self, run: Bound, state: State, generator: Rng) -> Tensor:
        """Return ``log h`` of states, float64 ``(R, N)``."""
        if self.fill.late:
            return run.defended(state, state[PENDING]())
        if not isinstance(self.twist, CallableTwist):
            return run.look(state, generator)
        name = run.only.name
        carry = state["sites"][name]
        return self.twist(carry, state["done"][name], tuple(carry["tokens"].shape[:2]))

    def rated(self, run: Bound, state: State, group: int, generator: Rng) -> tuple[State, Tensor]:
        """Return states after a group with their ``log h``: the potential itself at the end."""
        if group + 1 < len(run.groups):
            return state, self.rate(run, state, generator)
        ended = run.final(state)
        return ended, ended["log_g"]

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead by completions."""
        return run.ahead(state) if isinstance(self.twist, FillTwist) else None

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen; a twisted site brings its own proposal."""
        own = [type(site.twist).__name__ for site in run.source.chains if site.twist is not None]
        chosen = super().settings(run)
        return {**chosen, "proposal": " + ".join(dict.fromkeys(own))} if own else chosen

    def prepare(self, run: Bound, resampler: Any, ess_threshold: float) -> None:
        """Refuse functions of one chain's state where there are several."""
        if isinstance(self.twist, CallableTwist) and len(run.sites) > 1:
            raise CapabilityError(
                f"{type(self).__name__}: a twist given by a function sees the carry of one chain, "
                "and there are several; look ahead by completions, such as 'persistent'."
            )


@register
@dataclass(frozen=True)
class Bootstrap(LookingAhead):
    """Particles that move by the chain and are weighed by look-aheads.

    :param twist: as in :class:`LookingAhead`; None looks at nothing until the end.
    :param proposal: as in :class:`LookingAhead`.
    :param twist_every: look ahead at every so many steps only.
    :raises ValueError: if that is below one.
    """

    twist_every: int = 1

    name: ClassVar[str] = "smc"
    # Weights come from the program alone, which may read whole paths where they are kept.
    needs: ClassVar[Needs] = Needs(clean_sequences=False)
    replays: ClassVar[bool] = True
    looks_late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.twist_every < 1:
            raise ValueError(f"SMC: twist_every must be >= 1, got {self.twist_every}.")

    @property
    def on_events(self) -> bool:
        """Whether particles may go from reveal to reveal."""
        return self.twist_every == 1

    def is_due(self, run: Bound, group: int) -> bool:
        """Return whether states are looked at after so many groups."""
        return super().is_due(run, group) and self._is_due(group)

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the look-ahead where it is due; late ones begin after the first move."""
        due = self._is_due(group) and (group > 0 or not self.fill.late)
        return self.rate(run, state, generator) if due else None

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead where it was made just now."""
        return super().ahead(run, state, group) if self._is_due(group) else None

    def _is_due(self, group: int) -> bool:
        return self.twist is not None and not group % self.twist_every
