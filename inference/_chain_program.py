"""What all programs over one chain share: a task, a search, and one run of the engine.

A program says how particles move and look ahead (:class:`TaskEngine`) and what was chosen; the
rest, from reading the target to the posterior, happens here once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference._arguments import require_counts
from ppl_diffusion.inference._lookahead import UncachedPotential
from ppl_diffusion.inference._task import PotentialLike, Task, as_task, seeded
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.smc.engine import Progress, SMCTrace, smc_loop
from ppl_diffusion.smc.feynman_kac import FeynmanKac
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler, as_resampler

Target = ReverseChain | Callable[..., Any]


class TaskEngine(ABC):
    """A task during one run of :func:`~ppl_diffusion.smc.smc_loop`.

    :param task: chain and potential.

    :cvar exact: whether the weights are exact for :attr:`target`.
    """

    exact = True

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def num_steps(self) -> int:
        """Moves of the particles."""
        return self.task.chain.num_steps

    @property
    def times(self) -> Any:
        """The times between the moves, ``(num_steps + 1,)``."""
        return self.task.chain.kernel.times

    @property
    def target(self) -> str:
        """The law of the weighted particles, in words."""
        return self.task.target

    @property
    @abstractmethod
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""

    @property
    @abstractmethod
    def num_potential_calls(self) -> int:
        """Sequences the potential was asked about so far."""

    @abstractmethod
    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the states at the start, tokens ``(R, N, *plates, L)``."""

    def started(self, carry: Carry) -> Carry:
        """Return the carry of the start, each particle with its own draw of other latents.

        :param carry: what :meth:`init` returned.
        """
        return {**carry, "tokens": self.task.started(carry["tokens"])}

    @abstractmethod
    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Return the carry after step ``k`` and ``log p / q`` of the move, ``(R, N)``."""

    @abstractmethod
    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return ``log h_k``, ``(R, N)``, the potential itself at the end; None leaves it."""

    @abstractmethod
    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors, int64 ``(R, N)``."""

    def log_potential(self, trace: SMCTrace) -> Tensor:
        """Return ``log G(x0)`` of the final particles, ``(R, N)``."""
        return trace.log_potential

    def paths(self, trace: SMCTrace) -> Tensor | None:
        """Return the paths of the final particles where the carry holds them, or None."""
        return None


class _Started:
    """An engine whose particles have all of the program with them from the start."""

    def __init__(self, engine: TaskEngine) -> None:
        self.engine = engine
        self.move, self.log_twist, self.gather = engine.move, engine.log_twist, engine.gather

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        return self.engine.started(self.engine.init(runs, particles, generator))


class BoundEngine(TaskEngine):
    """A task moved and weighed by a bound Feynman-Kac model.

    :param task: chain and potential.
    :param model: the model.
    :param max_rows: largest number of rows sent to the network at once.
    :param cache: ask the potential once per distinct sequence.
    """

    def __init__(
        self, task: Task, model: FeynmanKac, *, max_rows: int | None, cache: bool = True
    ) -> None:
        super().__init__(task)
        self.bound = model.bind(max_rows=max_rows)
        if not cache:
            self.bound.potential = UncachedPotential(task.potential)

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""
        return self.bound.num_evaluations

    @property
    def num_potential_calls(self) -> int:
        """Sequences the potential was asked about so far."""
        return self.bound.num_potential_calls

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the noisiest states."""
        return self.bound.init(runs, particles, generator)

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Move by the chain, or the proposal."""
        return self.bound.move(carry, k, generator)

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return the look-ahead, the potential at the end."""
        return self.bound.log_twist(carry, k, generator)

    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors."""
        return self.bound.gather(carry, ancestors)


class ChainProgram(ABC):
    """An inference program over one chain and one potential.

    :param target: a reverse chain, or a Pyro program, whose density may read its paths through
        ``chain.x0(path)`` only.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(steps done, steps in all)``.
    """

    def __init__(
        self,
        target: Any,
        potential: PotentialLike | None,
        *,
        num_particles: int,
        num_runs: int,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        require_counts(type(self).__name__, num_particles, num_runs)
        self.target, self.potential = target, potential
        self.num_particles, self.num_runs = num_particles, num_runs
        self.resampler, self.ess_threshold = as_resampler(resampler), ess_threshold
        self.store_path, self.max_rows, self.progress = store_path, max_rows, progress

    @abstractmethod
    def bind(self, task: Task) -> TaskEngine:
        """Return the engine of one run.

        :param task: chain and potential.
        """

    @abstractmethod
    def settings(self, engine: Any) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> ParticlePosterior:
        """Sample the target.

        :param args: arguments of the program.
        :param seed: seed of this run; the global random state is left alone if it is given.
        :param kwargs: keyword arguments of the program.
        :returns: the particles; :attr:`~ppl_diffusion.smc.ParticlePosterior.target` says what
            their weights mean, ``exact`` whether they are exact for it.
        :raises CapabilityError: if the chain, or the program, is not what the method needs.
        :raises PotentialError: if the potential returns NaN, ``+inf`` or a wrong shape.
        """
        started = time.perf_counter()
        with torch.no_grad(), seeded(seed):
            task = self.task(args, kwargs)
            engine = self.bind(task)
            trace = smc_loop(
                _Started(engine),
                engine.num_steps,
                self.num_particles,
                self.num_runs,
                self.resampler,
                self.ess_threshold,
                None,
                record=self.record,
                progress=self.progress,
            )
            posterior = task.posterior(
                replace(trace, log_potential=engine.log_potential(trace)),
                path=engine.paths(trace),
                num_evaluations=engine.num_evaluations,
                num_potential_calls=engine.num_potential_calls,
                settings={**self.settings(engine), "num_steps": engine.num_steps, "seed": seed},
                seconds=time.perf_counter() - started,
                target=engine.target,
                exact=engine.exact,
            )
        posterior = replace(posterior, times=torch.as_tensor(engine.times))
        finished = self.finish(posterior, trace)
        return replace(finished, target=task.named(finished.target))

    @property
    def record(self) -> str | None:
        """The entry of the carry whose history is kept, or None."""
        return "tokens" if self.store_path else None

    def task(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
        """Return what is to be sampled.

        :param args: arguments of the program.
        :param kwargs: keyword arguments of the program.
        """
        particles = self.num_runs * self.num_particles
        # Twice: a pilot run may start as many again.
        return as_task(
            self.target,
            self.potential,
            args,
            kwargs,
            max_particles=2 * particles,
            owner=type(self).__name__,
        )

    def finish(self, posterior: ParticlePosterior, trace: SMCTrace) -> ParticlePosterior:
        """Return the result as the method means it.

        :param posterior: the weighted particles.
        :param trace: the run behind them.
        """
        return posterior
