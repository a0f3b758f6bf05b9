"""What a method of inference is: how particles move, how they look ahead, and what pays for it.

A method is a small frozen object whose fields are its options. Particles, runs, resampler, rows and
seed belong to the runner (:class:`ppl_diffusion.inference.SMC`), which calls the hooks below. To
add one, subclass :class:`Method`, override what differs, and register it::

    @register
    @dataclass(frozen=True)
    class Halfway(Method):
        "Look ahead once, in the middle."

        name: ClassVar[str] = "halfway"

        def look(self, run, state, group, generator):
            return run.look(state, generator) if group == len(run.groups) // 2 else None

The command line, ``check``, the documentation and the tests read the registry.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import SAMPLE_ONLY
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import ChainSource, Moved, PotentialLike, Rng, Source, State
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import LOG_BASE, ArgmaxFill, FillTwist


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without; compared with the program once, before anything runs.

    :param density: every chain's kernel must have a density.
    :param own_moves: it moves particles its own way, and has no use for a twisted site.
    :param clean_sequences: densities must read paths through ``chain.x0(path)`` only.
    :param free_chains: no chain may depend on another chain's sequence.
    :param guide: it steers through a codebook: by a ``guide`` of its own, or by the potential of a
        bare chain, an :class:`~ppl_diffusion.potentials.EmbeddedPotential`.
    :param uniform: the noise of every chain must be uniform over the tokens.
    """

    density: bool = False
    own_moves: bool = False
    clean_sequences: bool = True
    free_chains: bool = False
    guide: bool = False
    uniform: bool = False

    @property
    def any_target(self) -> bool:
        """Whether any chain with any potential may do."""
        return not (self.guide or self.uniform)


@dataclass(frozen=True)
class Method(ABC):
    """A way of steering particles; its fields are its options.

    Every hook may ask the ``run`` (:class:`~ppl_diffusion.programs.Bound`) about the particles,
    whose ``state`` it never changes in place, and draws from the ``generator`` (None is the global
    one).

    :cvar name: its name, in the registry and on the command line.
    :cvar exact: whether its weights are exact for the law it declares, as it comes.
    :cvar needs: what it cannot do without.
    :cvar ess_threshold: share of the particles below which it resamples, if nothing else is said.
    :cvar holds_clamps: whether its particles hold clamped tokens; elsewhere a clamp is a hard
        constraint at the end: exact, and costly.
    :cvar normalised: whether its particles have mean weight one before anything tilts them.
    :cvar keeps_paths: whether particles carry whole paths, so that nobody need record them.
    :cvar replays: whether paths may be scored again under other conditions: it moves particles by
        the chain's own law, and remembers nothing but the look-ahead that it carries.
    :cvar looks_late: whether it weighs chains by late completions too, where they are asked for.
    :cvar needs_paths: whether paths are recorded for it even if nobody wants to keep them.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()
    ess_threshold: ClassVar[float] = 0.5
    holds_clamps: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    keeps_paths: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    needs_paths: ClassVar[bool] = False
    looks_late: ClassVar[bool] = False

    def source(self, model: Any, potential: PotentialLike | None) -> Source:
        """Return a bare chain, or a composition, with its potential.

        :param model: the chain.
        :raises CapabilityError: if it is a composition, and the method moves a chain.
        """
        if not isinstance(model, ReverseChain):
            raise CapabilityError(
                f"{type(self).__name__}: it moves one chain, and the target is a composition of "
                "chains; use method='corrector'."
            )
        assert potential is not None
        return ChainSource(model, potential, cache=getattr(self, "cache", True))

    @property
    def fill(self) -> FillTwist:
        """How unfinished sequences are completed; also for the first draw of other latents."""
        return ArgmaxFill()

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return how the particles of a site move: here by its chain, its twist and its clamp.

        :param max_rows: largest number of rows sent to the network at once, None for what suits it.
        """
        proposal = held_proposal(site)
        return chain_mover(site, self.fill, proposal, max_rows=max_rows)

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Return how particles are resampled.

        :param resampler: the scheme asked for.
        :param ess_threshold: the threshold asked for.
        """
        return resampler, ess_threshold

    def prepare(  # noqa: B027 (most methods have nothing to prepare)
        self, run: Bound, resampler: Resampler, ess_threshold: float
    ) -> None:
        """Look at the run before it starts.

        :param resampler: how particles are resampled.
        :param ess_threshold: the threshold asked for.
        """

    def num_steps(self, run: Bound) -> int:
        """Return the number of steps of the engine."""
        return len(run.groups)

    def times(self, run: Bound) -> Tensor:
        """Return the times between the steps, float64 ``(num_steps + 1,)``."""
        return run.times

    def begin(self, run: Bound, generator: Rng) -> State:
        """Return the states at the start."""
        return self.start(run, run.start(generator), generator)

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """Return the states at the start, with slots of the method's own."""
        return state

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Return the states after a group of moves, and the log of what they are weighed by."""
        state, total = run.open(state, group, generator), 0.0
        for item in run.groups[group]:
            moved, ratio = self.step(run, state, item, generator)
            state, total = based(moved, ratio), total + ratio  # type: ignore[assignment]
        return state, total

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Return the states after one move of one site, and ``log K - log M``, ``(R, N)``."""
        return run.step(state, item, generator)

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return ``log h``, finite, ``(R, N)``; None keeps the last one.

        :param group: groups made so far; not called when all are.
        """
        return None

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead that particles carry, as a function of their latents.

        :param group: groups made so far; not called when all are.
        :returns: None where it does not depend on the latents, or was made at another state:
            latents are not moved then.
        """
        return None

    def renewed(self, state: State, log_h: Tensor) -> State:
        """Return states that carry another look-ahead, which replaces what their slots hold.

        :param log_h: the look-ahead after latents were moved, ``(R, N)``.
        """
        return state

    def pay(self, run: Bound, state: State) -> Tensor:
        """Return the log of what finished particles are weighed by in the end, ``(R, N)``.

        :param state: finished states; ``state["log_g"]`` is the potential itself.
        """
        log_g: Tensor = state["log_g"]
        return log_g

    def end(self, run: Bound, trace: SMCTrace) -> SMCTrace:
        """Return what the loop left behind, after whatever is done with finished particles."""
        return trace

    def law(self, run: Bound) -> Law:
        """Return what weighted particles are exact for."""
        return run.source.law

    def num_calls(self, run: Bound) -> int:
        """Return how many sequences were asked about so far."""
        return run.source.num_calls

    def paths(self, run: Bound, state: State) -> dict[str, Tensor] | None:
        """Return whole paths where particles carry them, or None."""
        return None

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Return the result as the method means it."""
        return posterior

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, in JSON types."""
        return {f.name: described(getattr(self, f.name)) for f in fields(self)}

    def require(self, source: Source) -> None:
        """Refuse a source that lacks what the method needs.

        :param source: what is to be sampled.
        :raises CapabilityError: if it does.
        """
        if self.fill.late and not (self.looks_late and isinstance(source, ChainSource)):
            raise CapabilityError(
                f"{type(self).__name__}: late=True is for 'smc' and 'steering' of one chain with a "
                "potential; elsewhere look ahead in time."
            )
        for site in source.chains:
            self._require_movable(site, source)
        if source.program is not None and self.needs.clean_sequences:
            source.program.require_clean_sequences()

    def _require_movable(self, site: ChainSite, source: Source) -> None:
        needs, owner, kernel = self.needs, type(self).__name__, site.chain.kernel
        program = source.program
        if needs.density and kernel.capability == SAMPLE_ONLY:
            raise CapabilityError(
                f"{owner}: a proposal needs a kernel with a density, {type(kernel).__name__} is "
                f"{SAMPLE_ONLY}; use SMC without one."
            )
        if program is None:
            return
        if needs.own_moves and site.twist is not None:
            raise CapabilityError(
                f"{owner} moves particles its own way and has no use for the twist of the program "
                f"{program.name}; take the twist off, or use another method."
            )
        if needs.free_chains and program.above(site.name):
            raise CapabilityError(
                f"{owner}: the chain {site.name!r} of {program.name} depends on the sequence of "
                "another one, which is moved again here; use SMC."
            )


def based(state: State, log_ratio: Tensor | float) -> State:
    """Return states that stand for what they do after a move, so that they can be looked at.

    :param log_ratio: ``log K - log M`` of the move, ``(R, N)`` or a number.
    """
    return {**state, LOG_BASE: state[LOG_BASE] + log_ratio}


def held_proposal(site: ChainSite) -> Any:
    """Return how a site wants to be moved, with clamped tokens held where its kernel can."""
    return site.proposal if can_hold(site) else site.twist


def can_hold(site: ChainSite) -> bool:
    """Return whether clamped tokens can be held: not where they may be masked again on the way."""
    return site.clamp is not None and site.chain.kernel.can_hold


def described(value: Any) -> Any:
    """Return an option in JSON types."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return getattr(value, "name", type(value).__name__)


METHODS: dict[str, type[Method]] = {}
"""Every method by name: the only list there is."""

AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(cls: AnyMethod) -> AnyMethod:
    """Add a method to the registry.

    :param cls: the class, with a ``name``, which can be made without arguments.
    :raises ValueError: if the name is taken by another class.
    """
    known = METHODS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(
            f"the method name {cls.name!r} is taken by {known.__name__}; choose another."
        )
    METHODS[cls.name] = cls
    return cls


def methods() -> dict[str, type[Method]]:
    """Return all registered methods by name."""
    return dict(METHODS)
