"""Bounds of ``log Z`` from both sides, for any method whose moves can be held to a path.

A plain run underestimates ``log Z`` on average; a conditional one, around an exact draw of the
target, overestimates it (:mod:`ppl_diffusion.smc.conditional`). Slot 0 is held to its path where
the method makes its choices, so that it is weighed as any particle is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._cases import Case
from ppl_diffusion.inference import SMC, Method, SiteRule, SoftValueGuidance, TwistedSampler
from ppl_diffusion.inference.experts import ExpertMover
from ppl_diffusion.inference.lockstep import LockstepMover
from ppl_diffusion.kernels import RevealStep
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.programs import Item
from ppl_diffusion.smc import EvidenceBounds, Multinomial
from ppl_diffusion.smc.conditional import ConditionalFeynmanKac, ConditionalMultinomial


def two_sided(
    program: SMC, case: Case, num_runs: int, generator: torch.Generator
) -> EvidenceBounds | None:
    """Bracket ``log Z`` by as many plain as conditional runs of a method with honest weights.

    :param program: the runner.
    :param case: the case it was built for.
    :param num_runs: runs of each kind.
    :param generator: source of randomness.
    :returns: the bounds, or None where there are no exact paths or no way to hold to them.
    """
    if case.draw_paths is None or program.num_particles < 2 or not _can_hold(program.method):
        return None
    around = hold(program.method, case.draw_paths(num_runs, generator))
    sides = ((program.method, Multinomial()), (around, ConditionalMultinomial()))
    with _global(generator):
        lower, upper = (
            SMC(
                program.model,
                program.potential,
                method=method,
                num_particles=program.num_particles,
                num_runs=num_runs,
                resampler=resampler,
                ess_threshold=program.asked,
                store_path=False,
                max_rows=None,
            )
            .run()
            .log_evidence
            for method, resampler in sides
        )
    return EvidenceBounds(lower, upper)


@contextlib.contextmanager
def _global(generator: torch.Generator) -> Iterator[None]:
    """Let a generator stand in for the global one, which runs without a seed draw from."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())


def _can_hold(method: Method) -> bool:
    """Return whether slot 0 can follow a path: not where whole paths, or no declared law, move."""
    return not method.keeps_paths and getattr(method, "form", None) != "rates"


def hold(method: Method, paths: Tensor) -> Method:
    """Return a method whose slot 0 follows a path in every run.

    :param method: the method.
    :param paths: int64 ``(R, T + 1, L)``.
    """
    choices: dict[str, Any] = {"mover": _held_mover(method.mover, paths)}
    if isinstance(method, SoftValueGuidance):
        choices["_choose"] = _first_child(method._choose)
    if isinstance(method, TwistedSampler):
        own = _TwistedChoices(method, paths)
        choices |= {
            "_positions": own.positions,
            "_draw": own.draw,
            "_reweighted": own.reweighted,
        }
    held = copy.copy(method)
    vars(held).update(choices)
    return held


def _held_mover(make: Callable[..., Any], paths: Tensor) -> Callable[..., Any]:
    def mover(*about: Any) -> Any:
        own = make(*about)
        if isinstance(own, ExpertMover):
            return _HeldExperts(own, paths)
        return ConditionalFeynmanKac(own.model, paths, max_rows=None)

    return mover


def _first_child(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make slot 0 choose its first child, the retained one."""

    def held(*about: Any) -> Tensor:
        chosen = choose(*about).clone()
        chosen[:, 0] = 0
        return chosen

    return held


class _HeldExperts:
    """A corrector whose slot 0 is moved on after every step: its weights do not see the tokens."""

    def __init__(self, mover: ExpertMover, paths: Tensor) -> None:
        self.mover, self.paths = mover, paths
        if isinstance(mover, LockstepMover):
            mover.rule = _Along(paths, mover.kernel.process.vocab_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mover, name)

    def init(self, *about: Any) -> Carry:
        return self._at(self.mover.init(*about), 0)

    def move(self, carry: Carry, k: int, generator: Any) -> tuple[Carry, Tensor | float]:
        moved, log_ratio = self.mover.move(carry, k, generator)
        return self._at(moved, k + 1), log_ratio

    def _at(self, carry: Carry, k: int) -> Carry:
        return {**carry, "tokens": _held(carry["tokens"], self.paths[:, k])}


@dataclass(frozen=True)
class _TwistedChoices:
    """The choices of a twisted sampler, slot 0 held to its path.

    :param method: the sampler.
    :param paths: int64 ``(R, T + 1, L)``.
    """

    method: TwistedSampler
    paths: Tensor

    def positions(self, item: Item, step: RevealStep, noise: Tensor) -> tuple[Tensor, Tensor]:
        found, valid = self.method._positions(item, step, noise)
        return _held(found, self._site(item)), valid

    def draw(self, item: Item, log_q: Tensor, noise: Tensor) -> Tensor:
        token = self.paths[:, item.k + 1].gather(1, self._site(item))
        return _held(self.method._draw(item, log_q, noise), token)

    def reweighted(self, run: Any, state: Any, item: Item, *about: Any) -> HeldMove:
        moves = self.method._reweighted(run, state, item, *about)
        return HeldMove(moves, self.paths[:, item.k + 1])

    def _site(self, item: Item) -> Tensor:
        """Return the position that the retained path reveals, ``(R, 1)``."""
        changed = self.paths[:, item.k] != self.paths[:, item.k + 1]
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


class _Along(SiteRule):
    """A random order, but in slot 0 that of the retained path."""

    name = "random"
    words = "a uniformly random order"

    def __init__(self, paths: Tensor, mask: int) -> None:
        self.hidden = (paths == mask).sum(1)  # (R, L): steps a site stays masked

    def scores(self, tokens: Tensor, log_law: Tensor | None, noise: Tensor) -> Tensor:
        return _held(noise, -self.hidden.to(noise.dtype))


def _held(values: Tensor, kept: Tensor) -> Tensor:
    """Return ``values (R, N, ...)`` with ``kept (R, ...)`` in slot 0."""
    return torch.cat([kept[:, None], values[:, 1:]], 1)
