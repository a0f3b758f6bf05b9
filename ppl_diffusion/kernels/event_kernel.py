"""A masked chain by its events: a step is a round, in which every row makes its next reveals.

Ancestral sampling of the absorbing process reveals position ``l`` in the step of the grid in which
an independent uniform ``U_l`` falls, and predicts it at the time of that step. Drawn before
anything is predicted, these steps are the whole *when* of a path; what is left is which tokens.
Rows then go on their own clocks, each from one of its non-empty steps to the next, at most
``min(T, L)`` times however fine the grid is, and the path on the grid is read off the clean tokens
and their steps.

Particles that are copied would share what is to come. So the reveals ahead of a copy are drawn
anew: those left are independent uniforms below the noise level it has reached, whatever happened
before (:meth:`EventKernel.redrawn`). With that a round is a step of a Markov chain in the tokens
and the step of the grid that was reached. Particles stand at different steps then, which weights do
not mind: a look-ahead may be any function of what has happened so far, and it telescopes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.prediction import Prediction
from ppl_diffusion.kernels.base import GIVEN, TOKENS, Carry, Kernel, Value
from ppl_diffusion.kernels.completions import Completions, MaskedCompletions
from ppl_diffusion.kernels.event_step import EventStep
from ppl_diffusion.kernels.events import RoundAhead, grid_bins, rounds_ahead
from ppl_diffusion.processes.noise import uniforms

REVEAL, FUTURE = "reveal", "future"
"""Keys of the carry: the step of the grid that reveals each position, and what that means."""


@dataclass(frozen=True)
class Future:
    """What a population knows of its reveals to come.

    It is no array, so that it stays behind when particles are gathered: ``reveal`` is then another
    tensor, and whoever moves them sees that they are copies.

    :param reveal: the entry of the carry that it belongs to.
    :param rounds: the rounds to come; None where nobody has asked.
    :param copied: whether particles were copied since they moved.
    """

    reveal: Tensor
    rounds: tuple[RoundAhead, ...] | None = None
    copied: bool = True

    def after(self) -> Future:
        """Return what is known one round later."""
        return replace(self, rounds=None if self.rounds is None else self.rounds[1:], copied=False)


class EventKernel(Kernel):
    """The rounds of a masked ancestral chain.

    Its carry holds ``"reveal"``, the step of the grid that reveals each position, int64
    ``(*batch, L)``, -1 where a prompt stands.

    :param grid: the kernel on its time grid: ancestral, of the absorbing process
        (:meth:`Kernel.on_events` knows which are).
    :param free: positions that are to be revealed, at most.
    """

    markov = False

    def __init__(self, grid: Kernel, free: int) -> None:
        rounds = max(1, min(grid.num_steps, free))
        super().__init__(grid.process, grid.denoiser, np.linspace(1.0, 0.0, rounds + 1))
        self.grid = grid
        self._asked: tuple[Tensor, Tensor, Prediction] | None = None

    def with_denoiser(self, denoiser: Denoiser) -> EventKernel:
        """Return the same kernel around another denoiser."""
        new = super().with_denoiser(denoiser)
        new.grid, new._asked = self.grid.with_denoiser(denoiser), None
        return new

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return (
            isinstance(other, EventKernel)
            and self.grid.same_as(other.grid)
            and self.num_steps == other.num_steps
        )

    @property
    def has_path_density(self) -> bool:
        """False: given its carry a step has a density, and the carry holds when; ask the grid."""
        return False

    def expected_rounds(self, free: int) -> float:
        """Return how many of the steps of the grid reveal something, on average.

        :param free: positions that are to be revealed.
        """
        share = np.diff(self.grid.alphas)  # of the positions, revealed in each step
        return float((1 - (1 - share) ** free).sum())

    def start_carry(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry of a noisiest state, with the steps that reveal its masks."""
        levels = uniforms(tokens.shape, generator=generator, device=tokens.device)
        steps = grid_bins(levels, self.grid.alphas)
        reveal = torch.where(tokens == self.process.vocab_size, steps, -1)
        carry = super().start_carry(tokens, generator, given=given)
        return {**carry, REVEAL: reveal, FUTURE: Future(reveal)}

    def redrawn(self, carry: Carry, generator: torch.Generator | None) -> Carry:
        """Return a carry whose reveals to come are its own: those of copies are drawn anew."""
        reveal = carry[REVEAL]
        if carry[FUTURE].reveal is reveal:
            return carry
        masked = carry[TOKENS] == self.process.vocab_size
        begun = torch.where(masked, -1, reveal).amax(-1, keepdim=True) + 1
        # alpha grows from step to step, and so does the level below which what is left lies fall.
        below = 1.0 - torch.as_tensor(self.grid.alphas, device=reveal.device)[begun]
        levels = below * uniforms(reveal.shape, generator=generator, device=reveal.device)
        # A product may round up to the level itself, which belongs to the step that is over.
        steps = torch.maximum(grid_bins(levels, self.grid.alphas), begun)
        reveal = torch.where(masked, steps, reveal)
        return {**carry, REVEAL: reveal, FUTURE: Future(reveal)}

    def planned(self, carry: Carry) -> Carry:
        """Return a carry that knows all of its rounds; this reads their sizes back, once."""
        future: Future = carry[FUTURE]
        if future.rounds is not None and future.reveal is carry[REVEAL]:
            return carry
        masked = carry[TOKENS] == self.process.vocab_size
        group = torch.where(masked, carry[REVEAL], -1)
        rounds = rounds_ahead(group.reshape(-1, group.shape[-1]))
        return {**carry, FUTURE: replace(future, reveal=carry[REVEAL], rounds=rounds)}

    def rounds_left(self, carry: Carry) -> int | None:
        """Return how many rounds are to come, None where nobody has planned them."""
        rounds = self._rounds(carry)
        return None if rounds is None else len(rounds)

    @staticmethod
    def _rounds(carry: Carry) -> tuple[RoundAhead, ...] | None:
        future: Future = carry[FUTURE]
        return future.rounds if future.reveal is carry[REVEAL] else None

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> EventStep:
        """Return the distribution of the next state: each row makes the reveals of its next step.

        :param k: the round; rows that are complete by then stay.
        """
        self.check_step(k)
        tokens, rounds = carry[TOKENS], self._rounds(carry)
        if rounds is not None:
            sites = rounds[0].sites if rounds else tokens.new_zeros(0)
        else:
            pending = self._pending(carry)
            sites = (pending == _next(pending, self.grid)[..., None]).flatten().nonzero()[:, 0]
        prediction = self.predict(carry, k)
        return EventStep(tokens, prediction, sites, fixed=fixed, validate_args=False)

    def predict(self, carry: Carry, k: int) -> Prediction:
        """Return the prediction of each row at the time of its next reveals.

        Rows that are complete are not sent to the network, where the rounds are planned: nothing
        is asked about them.
        """
        tokens, rounds = carry[TOKENS], self._rounds(carry)
        asked = self._asked
        if asked is not None and asked[0] is tokens and asked[1] is carry[REVEAL]:
            return asked[2]
        if hasattr(self.denoiser, "all_new"):
            self.denoiser.all_new = rounds is not None and not carry[FUTURE].copied
        rows = rounds[0].rows if rounds else None
        if rows is None:
            prediction = super().predict(carry, k)
        else:
            batch = tokens.shape[:-1]
            some = {name: x.reshape(-1, x.shape[-1])[rows] for name, x in _states(carry)}
            given = carry.get(GIVEN, {})
            flat = {n: x.reshape(-1, *x.shape[len(batch) :])[rows] for n, x in given.items()}
            prediction = super().predict({**carry, **some, GIVEN: flat}, k).placed(rows, batch)
        # A look-ahead asks, and then the move that follows it.
        self._asked = None if torch.is_grad_enabled() else (tokens, carry[REVEAL], prediction)
        return prediction

    def _completions(self, carry: Carry, k: int) -> Completions:
        rounds = self._rounds(carry)
        pending = rounds[0].pending if rounds else None
        return MaskedCompletions(carry[TOKENS], self.predict(carry, k), pending)

    def advance(self, carry: Carry, value: Value, k: int, *, step: object = None) -> Carry:
        """Return the carry after a round."""
        moved = super().advance(carry, value, k)
        return {**moved, FUTURE: carry[FUTURE].after()}

    def prediction_time(self, carry: Carry, k: int) -> float | Tensor:
        """Return the time at which each row predicts its next reveals, ``(*batch,)``."""
        if self.denoiser.time_free:
            return 1.0
        times = torch.as_tensor(self.grid.times, device=carry[TOKENS].device)
        return times[_next(self._pending(carry), self.grid)]

    def path(self, carry: Carry) -> Tensor:
        """Return the path on the grid that ends in complete states, ``(*batch, T + 1, L)``."""
        tokens, reveal = carry[TOKENS], carry[REVEAL]
        size = self.process.vocab_size
        small = torch.uint8 if size < 2**8 else torch.int16 if size < 2**15 else torch.int32
        # Compared in a small type: of all tensors of a run this is the only one with T times L.
        count = self.grid.num_steps
        index = torch.int16 if count < 2**15 else torch.int32
        steps = torch.arange(count + 1, dtype=index, device=tokens.device)[:, None]
        shown = steps > reveal.to(index)[..., None, :]
        return torch.where(shown, tokens.to(small)[..., None, :], size)

    def _pending(self, carry: Carry) -> Tensor:
        """Return the step that reveals each masked position, ``T`` elsewhere."""
        masked = carry[TOKENS] == self.process.vocab_size
        return torch.where(masked, carry[REVEAL], self.grid.num_steps)

    def _revealed(self, tokens: Tensor) -> bool:
        return False  # rounds end when nothing is left, and asking would wait for the device

    def _repr_options(self) -> str:
        return f" rounds of {self.grid.num_steps} steps"


def _states(carry: Carry) -> list[tuple[str, Tensor]]:
    return [(name, carry[name]) for name in (TOKENS, REVEAL)]


def _next(pending: Tensor, grid: Kernel) -> Tensor:
    """Return the step of each row's next reveals, int64 ``(*batch,)``; the last if complete."""
    return pending.amin(-1).clamp_max(grid.num_steps - 1)
