"""A method over bound states, as the SMC loop sees it, and its moves of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.inference.scout import LatentMover
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.programs.sources import Moved, Rng, State
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.weights import Weights


class Engine:
    """A method over bound states, as the SMC loop sees it."""

    def __init__(self, method: Method, run: Bound, store_path: bool) -> None:
        self.method, self.run, self.store_path = method, run, store_path

    def init(self, runs: int, particles: int, generator: Rng) -> State:
        return self.method.begin(self.run, generator)

    def gather(self, carry: State, ancestors: Tensor) -> State:
        return self.run.gather(carry, ancestors)

    def foresee(self, carry: State, k: int, generator: Rng) -> tuple[State, int]:
        return self.run.foresee(carry, k, generator)

    def move(self, carry: State, k: int, generator: Rng) -> Moved:
        return self.method.move(self.run, carry, k, generator)

    def log_twist(self, carry: State, k: int, generator: Rng) -> Tensor | None:
        return self.method.look(self.run, carry, k, generator)

    def close(
        self, carry: State, generator: Any, recorded: Callable[[], dict[str, Tensor]]
    ) -> tuple[State, Tensor]:
        if "log_g" not in carry:  # some methods had to rate the ends before they chose
            carry = self.run.final(carry, self.whole_paths(carry, recorded))
        return carry, self.method.pay(self.run, carry)

    def whole_paths(
        self, carry: State, recorded: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """Return the paths of every site where the program reads them."""
        program = self.run.program
        if not self.store_path or program is None or not program.reads | program.shows:
            return None
        paths = carry.get("paths") or self.run.own_paths(carry, recorded())  # those after moves
        return {name: path.to(torch.int64) for name, path in paths.items()}


class MovingEngine(Engine):
    """An engine that renews latents.

    :param mover: how they are renewed.
    """

    def __init__(self, method: Method, run: Bound, store_path: bool, mover: LatentMover) -> None:
        super().__init__(method, run, store_path)
        self.mover = mover

    def gather(self, carry: State, ancestors: Tensor) -> State:
        self.mover.resampled(ancestors)
        return super().gather(carry, ancestors)

    def foresee(self, carry: State, k: int, generator: Rng) -> tuple[State, int]:
        # Latents are moved at the steps that a scout run has chosen, whatever is revealed there.
        return super().foresee(carry, k, generator)[0], k

    def renew(
        self, carry: State, log_twist: Tensor, k: int, generator: Rng
    ) -> tuple[State, Tensor]:
        return self.mover.renew(self.method, self.run, carry, log_twist, k, generator)

    def finish(self, trace: SMCTrace, resampler: Resampler, ess_threshold: float) -> None:
        """Move the latents of finished particles, of equal weight where these had become unequal.

        The evidence is known by then and stays as it is.

        :param trace: what the run left behind; changed in place.
        :param resampler: how runs are resampled whose ESS is below half of the particles.
        :param ess_threshold: that of the run; 0 never resamples.
        """
        if ess_threshold > 0:
            _resample(self.run, trace, resampler)
        state, weights = trace.carry, trace.weights.normalised
        last, paths = len(trace.ancestors), self.whole_paths(state, trace.paths)
        for mover in self.mover.every:
            if mover.sites.names:
                ahead, log_g = mover.ends(self.run, state, paths), state["log_g"]
                state, _ = mover.moved(self.run, state, log_g, ahead, last, weights, None)
        trace.carry, trace.log_potential = state, state["log_g"]


def _resample(run: Bound, trace: SMCTrace, resampler: Resampler) -> None:
    weights, size = trace.weights, trace.weights.num_particles
    due = weights.alive & (weights.ess < size / 2)
    if not bool(due.any()):
        return
    identity = torch.arange(size, device=due.device).expand(len(due), -1)
    noise = uniforms((len(due), resampler.num_uniforms(size)), device=due.device)
    chosen = torch.where(due[:, None], resampler(noise, weights.log), identity)
    trace.carry = run.gather(trace.carry, chosen)
    if trace.history:
        trace.history[-1] = take_particles(trace.history[-1], chosen)
    trace.ancestors = torch.cat(
        [trace.ancestors[:-1], trace.ancestors[-1:].gather(-1, chosen[None])]
    )
    trace.resampled = torch.cat(
        [trace.resampled[:, :-1], trace.resampled[:, -1:] | due[:, None]], 1
    )
    trace.weights = Weights(torch.where(due[:, None], 0.0, weights.log))
