"""Tempering at the level of data: from the chain's own law to the tilted one, path by path.

Whole paths are drawn first; the potential is then switched on by powers ``0 = b_0 < ... < b_S = 1``
(Del Moral, Doucet and Jasra 2006, JRSS-B 68), with targets ``p(path) G(x0)^b``::

    weight by G(x0)^(b_j - b_{j-1}),  resample,  move by kernels that leave p(path) G(x0)^b_j alone

The moves mask again and reveal again (:mod:`ppl_diffusion.smc.rejuvenation`). Powers are chosen by
a pilot run: each is as large as the effective sample size allows, found by bisection (Jasra et al.
2011). The run itself keeps them fixed, which makes its evidence unbiased; powers adapted on the
very particles they weigh would cost a bias of order ``1/N``. Waste-free (Dau and Chopin 2022)
resamples ``N/P`` particles and keeps all ``P`` states of the moves of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference._arguments import require_moves
from ppl_diffusion.inference._chain_program import ChainProgram, TaskEngine
from ppl_diffusion.inference._task import PotentialLike, Task
from ppl_diffusion.smc.engine import Progress, SMCTrace
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential, take_particles
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.rejuvenation import (
    OrderRefresh,
    PathModel,
    PathMove,
    PathState,
    SuffixRefresh,
    WasteFree,
    tilt,
)
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import Carry
from ppl_diffusion.smc.weights import Weights

MAX_STAGES = 200
"""A ladder longer than this means that the potential is too steep for the particles."""
_BISECTIONS = 60


class Tempering(ChainProgram):
    """Posterior sampling by tempered SMC over whole paths.

    :param target: a reverse chain (with a potential), or a Pyro program.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param moves: path moves of one sweep, in order; by default a suffix of half the steps and,
        where the reveals are random and independent of the network, the order.
    :param num_sweeps: sweeps of the moves per stage (not used by waste-free).
    :param powers: the ladder from 0 to 1; None finds it by a pilot run.
    :param waste_free: states ``P`` kept per resampled particle, a divisor of ``N``; None for the
        plain algorithm.
    :param resampler: resampling scheme of the plain algorithm.
    :param ess_threshold: the pilot chooses powers such that the ESS falls to this fraction of the
        particles whose potential is not zero. Every stage is resampled.
    :param store_path: keep whole paths.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(stages done, stages in all)``.
    """

    def __init__(
        self,
        target: ReverseChain | Callable[..., Any],
        potential: PotentialLike | None = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        moves: Sequence[PathMove] | None = None,
        num_sweeps: int = 1,
        powers: Sequence[float] | None = None,
        waste_free: int | None = None,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        scheme = resampler if waste_free is None else WasteFree(waste_free)
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            resampler=scheme,
            ess_threshold=2.0,  # moves are made for equally weighted particles: always resample
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.moves = None if moves is None else require_moves("Tempering", moves)
        self.num_sweeps = num_sweeps
        self.powers = None if powers is None else _check_powers(powers)
        self.waste_free, self.ess_share = waste_free, ess_threshold
        self.resampler.num_uniforms(num_particles)
        if not 0 < ess_threshold < 1 or num_sweeps < 1:
            raise ValueError(
                "Tempering: ess_threshold must lie between 0 and 1 and num_sweeps be >= 1, got "
                f"{ess_threshold} and {num_sweeps}."
            )

    @property
    def record(self) -> None:
        """Nothing: the carry holds whole paths."""
        return None

    def bind(self, task: Task) -> TemperedEngine:
        """Return the engine of one run, with its ladder.

        :param task: chain and potential.
        :raises CapabilityError: if a move is wrong for the chain.
        :raises ValueError: if the pilot finds no ladder.
        """
        engine = TemperedEngine(task, self)
        engine.powers = self.powers or engine.find_powers(self.ess_share)
        return engine

    def finish(self, posterior: ParticlePosterior, trace: SMCTrace) -> ParticlePosterior:
        """Return the particles; the steps are the stages, the times ``1 - b``.

        :param posterior: the weighted particles.
        :param trace: the run behind them.
        """
        if self.waste_free is None:
            return posterior
        # States of one chain are no offspring of resampling.
        unknown = torch.full_like(posterior.log_evidence, torch.nan)
        return replace(posterior, evidence_variance=unknown)

    def settings(self, engine: TemperedEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {
            "method": "tempering",
            "resampler": self.resampler.name,
            "ess_threshold": self.ess_share,
            "moves": [move.name for move in engine.moves],
            "num_sweeps": self.num_sweeps,
            "waste_free": self.waste_free,
            "powers": list(engine.powers),
        }


class TemperedEngine(TaskEngine):
    """Whole paths under growing powers of the potential (see :func:`ppl_diffusion.smc.smc_loop`).

    :param task: the chain and the potential.
    :param options: the inference program.
    """

    def __init__(self, task: Task, options: Tempering) -> None:
        super().__init__(task)
        task.refuse_twist("Tempering")
        self.potential = EvaluatedPotential(task.potential)
        self.model = PathModel(task.chain, self.potential, max_rows=options.max_rows)
        self.options, self.powers = options, [0.0, 1.0]
        self.moves = default_moves(task.chain) if options.moves is None else options.moves
        for move in self.moves:
            move.check(task.chain)
        mask = task.chain.kernel.process.num_states
        self._kind = torch.uint8 if mask <= 256 else torch.int32

    @property
    def num_steps(self) -> int:
        """Stages of the ladder."""
        return len(self.powers) - 1

    @property
    def times(self) -> Tensor:
        """``1 - b`` of the stages."""
        return 1.0 - torch.tensor(self.powers, dtype=torch.float64)

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""
        return self.model.num_evaluations

    @property
    def num_potential_calls(self) -> int:
        """Distinct sequences the potential was asked about so far."""
        return self.potential.num_calls

    def init(self, runs: int, particles: int, generator: Any) -> Carry:
        """Draw whole paths from the chain."""
        path = self.model.chain.sample((runs, particles), generator=generator)
        return self._carry(self.model.state(self.task.started(path)))

    def started(self, carry: Carry) -> Carry:
        """Return the carry as it is: what is drawn at the start is in the paths already."""
        return carry

    def paths(self, trace: SMCTrace) -> Tensor | None:
        """Return the paths of the final particles, where they are wanted."""
        return trace.carry["path"] if self.options.store_path else None

    def move(self, carry: Carry, k: int, generator: Any) -> tuple[Carry, Tensor | float]:
        """Move by kernels that leave the target of stage ``k`` invariant."""
        if k == 0:  # the chain's own law: these are independent draws of it
            return carry, 0.0
        moved = self._chains(carry, self.powers[k], generator)
        # The loop weighs by the tilt of the new state over that of the old; the kernel, reversed
        # under its invariant law, gives the old tilt over the new one at the same power.
        before, after = (tilt(c["log_g"], self.powers[k]) for c in (carry, moved))
        return moved, before - after

    def log_twist(self, carry: Carry, k: int, generator: Any) -> Tensor:
        """Return the log of the potential to the power of stage ``k``."""
        return tilt(carry["log_g"], self.powers[k])

    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors."""
        return {name: take_particles(value, ancestors) for name, value in carry.items()}

    def find_powers(self, share: float) -> list[float]:
        """Return a ladder found by one pilot run of ``N`` particles.

        :param share: effective sample size aimed at, as a share of the particles with ``G > 0``.
        :raises ValueError: if no particle has ``G > 0``, or the ladder does not reach 1.
        """
        size, scheme = self.options.num_particles, self.options.resampler
        powers, carry = [0.0], self.init(1, size, None)
        for _ in range(MAX_STAGES):
            power = next_power(carry["log_g"][0], powers[-1], share)
            weights = Weights(tilt(carry["log_g"], power) - tilt(carry["log_g"], powers[-1]))
            powers.append(power)
            if power == 1.0:
                return powers
            uniforms = torch.rand(1, scheme.num_uniforms(size), dtype=torch.float64)
            carry = self.gather(carry, scheme(uniforms, weights.log))
            carry = self._chains(carry, power, None)
        raise ValueError(
            f"Tempering: {MAX_STAGES} stages reach power {powers[-1]:.3g} only; use more "
            "particles, a lower ess_threshold, or powers of your own."
        )

    def _chains(self, carry: Carry, power: float, generator: Any) -> Carry:
        """Move every particle, or make each resampled one the head of a waste-free chain."""
        state, length = PathState(carry["path"].to(torch.int64), carry["log_g"]), self._length
        if length is None:
            for _ in range(self.options.num_sweeps):
                state = self._sweep(state, power, generator)
            return self._carry(state)
        states = [PathState(state.path[:, ::length], state.log_g[:, ::length])]
        for _ in range(length - 1):
            states.append(self._sweep(states[-1], power, generator))
        path, log_g = (torch.stack(parts, 2).flatten(1, 2) for parts in zip(*states, strict=True))
        return self._carry(PathState(path, log_g))

    @property
    def _length(self) -> int | None:
        return self.options.waste_free

    def _sweep(self, state: PathState, power: float, generator: Any) -> PathState:
        for move in self.moves:
            state, _ = move(self.model, state, beta=power, generator=generator)
        return state

    def _carry(self, state: PathState) -> Carry:
        return {"path": state.path.to(self._kind), "tokens": state.x0, "log_g": state.log_g}


def default_moves(chain: ReverseChain) -> tuple[PathMove, ...]:
    """Return a suffix of half the steps and, where it is right, a new order of reveals.

    :param chain: the chain.
    """
    suffix = SuffixRefresh(max(1, (chain.num_steps + 1) // 2))
    return (OrderRefresh(), suffix) if OrderRefresh.fits(chain) else (suffix,)


def next_power(log_g: Tensor, power: float, share: float) -> float:
    """Return the largest next power at which the effective sample size is what is asked for.

    The step from ``power`` to ``b`` weighs by ``G^(b - power)``, whose effective sample size
    falls as ``b`` grows; bisection finds ``ESS(b) = share * n``, or 1 where it stays above.

    :param log_g: ``log G`` of equally weighted particles, ``(N,)``.
    :param power: the present power.
    :param share: effective sample size aimed at, as a share of the ``n`` particles with ``G > 0``:
        those with ``G = 0`` die at any positive power, however small.
    :raises ValueError: if no particle has ``G > 0``.
    """
    alive = log_g[log_g > -torch.inf]
    if not len(alive):
        raise ValueError(
            f"Tempering: none of {len(log_g)} pilot particles has a positive potential; use more "
            "particles or a method that looks ahead, such as TwistedSampler."
        )

    def enough(b: float) -> bool:
        return float(Weights((b - power) * alive).ess) >= share * len(alive)

    if enough(1.0):
        return 1.0
    low, high = power, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return high if low == power else low


def _check_powers(powers: Sequence[float]) -> list[float]:
    ladder = [float(power) for power in powers]
    if (
        len(ladder) < 2
        or ladder[0] != 0
        or ladder[-1] != 1
        or any(a >= b for a, b in pairwise(ladder))
    ):
        raise ValueError(
            f"Tempering: powers must increase from exactly 0 to exactly 1, got {ladder}."
        )
    return ladder
