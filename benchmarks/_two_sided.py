"""Bounds of ``log Z`` from both sides, for any program whose moves can be held to a path.

A plain run underestimates ``log Z`` on average; a conditional one, around an exact draw of the
target, overestimates it (:mod:`ppl_diffusion.smc.conditional`). Slot 0 is held to its path where
the engine makes its choices, so that it is weighed as any particle is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._cases import Case
from ppl_diffusion.inference import SiteRule
from ppl_diffusion.inference._experts import ExpertEngine
from ppl_diffusion.inference._lockstep import LockstepEngine
from ppl_diffusion.inference.soft_value import SoftValueEngine
from ppl_diffusion.inference.twisted import TwistedEngine
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.smc import EvidenceBounds, Multinomial, smc_loop
from ppl_diffusion.smc.conditional import ConditionalFeynmanKac, ConditionalMultinomial


def two_sided(
    program: Any, case: Case, num_runs: int, generator: torch.Generator
) -> EvidenceBounds | None:
    """Bracket ``log Z`` by as many plain as conditional runs of a program.

    :param program: an inference program with honest weights.
    :param case: the case it was built for.
    :param num_runs: runs of each kind.
    :param generator: source of randomness.
    :returns: the bounds, or None where there are no exact paths or no way to hold to them.
    """
    if case.draw_paths is None or not hasattr(program, "bind") or program.num_particles < 2:
        return None
    task = program.task((), {})
    paths = case.draw_paths(num_runs, generator)
    around = hold(program.bind(task), paths)
    if around is None:
        return None
    sides = ((program.bind(task), Multinomial()), (around, ConditionalMultinomial()))
    with torch.no_grad():
        lower, upper = (
            smc_loop(
                engine,
                engine.num_steps,
                program.num_particles,
                num_runs,
                resampler,
                program.ess_threshold,
                generator,
            ).log_evidence_steps[:, -1]
            for engine, resampler in sides
        )
    return EvidenceBounds(lower, upper)


def hold(engine: Any, paths: Tensor) -> Any | None:
    """Return an engine whose slot 0 follows a path in every run, or None where none is known.

    :param engine: the engine of a program, changed in place.
    :param paths: int64 ``(R, T + 1, L)``.
    """
    if isinstance(engine, ExpertEngine):
        if isinstance(engine, LockstepEngine):
            engine.rule = _Along(paths, engine.kernel.process.vocab_size)
        return _HeldExperts(engine, paths) if engine.exact else None
    if isinstance(engine, TwistedEngine):
        return _HeldTwisted(engine, paths)
    if not hasattr(engine, "bound"):
        return None
    engine.bound = ConditionalFeynmanKac(engine.bound.model, paths, max_rows=None)
    if isinstance(engine, SoftValueEngine):
        _keep_first_child(engine)
    return engine


class _HeldExperts:
    """A corrector whose slot 0 is moved on after every step: its weights do not see the tokens."""

    def __init__(self, engine: ExpertEngine, paths: Tensor) -> None:
        self.engine, self.paths, self.num_steps = engine, paths, engine.num_steps
        self.log_twist, self.gather = engine.log_twist, engine.gather

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        return self._at(self.engine.init(runs, particles, generator), 0)

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        moved, log_ratio = self.engine.move(carry, k, generator)
        return self._at(moved, k + 1), log_ratio

    def _at(self, carry: Carry, k: int) -> Carry:
        return {**carry, "tokens": _held(carry["tokens"], self.paths[:, k])}


class _HeldTwisted:
    """The choices of a twisted engine, slot 0 held to its path.

    :param engine: the engine, whose choices are replaced.
    :param paths: int64 ``(R, T + 1, L)``.
    """

    def __init__(self, engine: TwistedEngine, paths: Tensor) -> None:
        self.paths, self.k, self.num_steps = paths, 0, engine.num_steps
        self.log_twist, self.gather = engine.log_twist, engine.gather
        self._engine_init, self._engine_move = engine.init, engine.move
        self._engine_sites, self._engine_draw = engine._sites, engine._draw
        self._engine_reweighted = engine._reweighted
        vars(engine).update(_sites=self.sites, _draw=self.draw, _reweighted=self.reweighted)

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        carry = self._engine_init(runs, particles, generator)
        return {**carry, "tokens": _held(carry["tokens"], self.paths[:, 0])}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        self.k = k
        return self._engine_move(carry, k, generator)

    def sites(self, step: RevealStep, noise: Tensor) -> tuple[Tensor, Tensor]:
        found, valid = self._engine_sites(step, noise)
        return _held(found, self._site), valid

    def draw(self, log_q: Tensor, noise: Tensor) -> Tensor:
        token = self.paths[:, self.k + 1].gather(1, self._site)
        return _held(self._engine_draw(log_q, noise), token)

    def reweighted(self, step: Any, guess: Tensor) -> HeldMove:
        return HeldMove(self._engine_reweighted(step, guess), self.paths[:, self.k + 1])

    @property
    def _site(self) -> Tensor:
        """The position that the retained path reveals, ``(R, 1)``."""
        changed = self.paths[:, self.k] != self.paths[:, self.k + 1]
        return changed.to(torch.int64).argmax(-1, keepdim=True)


@dataclass(frozen=True)
class HeldMove:
    """A move whose draw has the retained state in slot 0; its density is its own.

    :param inner: the move.
    :param state: the retained states, ``(R, L)``.
    """

    inner: Any
    state: Tensor

    def sample(self, **options: Any) -> Tensor:
        """Draw the other slots."""
        return _held(self.inner.sample(**options), self.state)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the density of the move itself."""
        log_p: Tensor = self.inner.log_prob(value)
        return log_p


def _held(values: Tensor, kept: Tensor) -> Tensor:
    """Return ``values (R, N, ...)`` with ``kept (R, ...)`` in slot 0."""
    return torch.cat([kept[:, None], values[:, 1:]], 1)


class _Along(SiteRule):
    """A random order, but in slot 0 that of the retained path."""

    name = "random"
    words = "a uniformly random order"

    def __init__(self, paths: Tensor, mask: int) -> None:
        self.hidden = (paths == mask).sum(1)  # (R, L): steps a site stays masked

    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        return _held(noise, -self.hidden.to(noise.dtype))


def _keep_first_child(engine: SoftValueEngine) -> None:
    """Make slot 0 choose its first child, the retained one."""
    choose = engine._choose

    def held(log_score: Tensor, generator: torch.Generator | None) -> Tensor:
        chosen = choose(log_score, generator).clone()
        chosen[:, 0] = 0
        return chosen

    vars(engine)["_choose"] = held
