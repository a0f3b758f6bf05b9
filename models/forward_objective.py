"""How noise is learned together with its reverse chain (FLDD, arXiv 2605.18204).

The chain first, which must be able to read the noise it starts with: what noise says that no chain
reads is lost within a few steps. Then soft states, whose gradient has little variance and, while
the temperature is not zero, a bias; then hard ones and the score function, whose gradient is that
of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ppl_diffusion.models.forward_learned import ForwardLearned
from ppl_diffusion.models.forward_marginals import Baseline, relaxed
from ppl_diffusion.models.objectives import Objective
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.processes.base import whole_number

_STANDARD_ERRORS = 6.0
_WINDOW = 200  # steps


class ForwardObjective(Objective):
    """The chain alone, a warm-up with soft states, then unbiased gradients of the bound.

    :param program: a :class:`~ppl_diffusion.models.forward_learned.ForwardLearned`.
    :param lead: share of the steps at the start in which the noise stays as it is.
    :param warmup: share of the steps after those that read soft states.
    :param temperatures: of soft states, from the first step to the last, falling exponentially.
    :param draws: states per sequence afterwards; from two on the others of a sequence are the
        baseline of each, with one a running mean per step of the chain is.
    :param every: the noise learns at every so many steps only, the chain at all of them: noise that
        runs ahead of its chain is learnt for a chain that is not there.
    :param entropy: entropy of the data in nats, where it is known: a bound below it is a mistake.
    :raises ValueError: if the program is another one or a number out of its range.

    :ivar reach: lowest and highest probability that a token is shown as itself at a time between,
        of the last batch: noise that stays at one level was not learned.
    """

    def __init__(
        self,
        program: DiffusionProgram,
        *,
        steps: int,
        lead: float = 0.1,
        warmup: float = 0.2,
        temperatures: tuple[float, float] = (1.0, 0.05),
        draws: int = 2,
        every: int = 1,
        entropy: float | None = None,
    ) -> None:
        super().__init__(program, steps=steps)
        if not isinstance(program, ForwardLearned):
            raise ValueError(
                f"fldd: {program.name!r} has noise that is given; build a ForwardLearned prior, or "
                "train it with the objective nelbo."
            )
        if not (lead >= 0.0 <= warmup and lead + warmup <= 1.0):
            raise ValueError(
                "fldd: lead and warmup are shares of the steps, together at most 1, got "
                f"{lead} and {warmup}."
            )
        both = isinstance(temperatures, Sequence) and len(temperatures) == 2
        if not (both and 0.0 < temperatures[1] <= temperatures[0] < math.inf):
            raise ValueError(
                f"fldd: temperatures must be two positive numbers that fall, got {temperatures}."
            )
        if entropy is not None and not 0.0 <= entropy < math.inf:
            raise ValueError(f"fldd: entropy must be a finite number of nats, got {entropy}.")
        draws, every = whole_number(draws, "fldd: draws"), whole_number(every, "fldd: every")
        self.learned, self.lead, self.soft = program, lead * steps, warmup * steps
        self.temperatures, self.draws, self.every = temperatures, draws, every
        self.entropy = entropy
        self.baseline = Baseline(program.num_steps)
        self.reach: tuple[float, float] = (math.nan, math.nan)
        self._bounds: list[float] = []

    def loss(self, rows: Tensor, step: int, labels: Tensor | None = None) -> Tensor:
        """Return the loss in nats per sequence.

        :raises ValueError: if there are labels, or the bound lies below the entropy of the data.
        """
        program = self.learned
        if labels is not None:
            raise ValueError("fldd: learned noise knows no classes; leave the labels out.")
        t = program.drawn_steps(len(rows)).to(rows.device)
        marginals = program.marginals(rows)
        self._note(marginals, rows)
        beyond = step - self.lead
        if beyond < 0 or step % self.every:
            marginals = marginals.detach()
        if 0 <= beyond < self.soft:
            found = relaxed(
                marginals,
                program.denoiser.from_mixture,
                program.steps_coupling,
                t,
                self._temperature(beyond),
            )
        else:
            base = self.baseline if self.draws == 1 else None
            found = program.estimated(marginals, t, draws=self.draws, baseline=base)
            self.baseline.update(t, found.cost)
            self._check(float(found.bound.mean()))
        return (found.loss + program.look_ahead_loss(found, rows)).mean()

    def notes(self) -> dict[str, float]:
        """Return the reach of the noise."""
        return {"reach_low": self.reach[0], "reach_high": self.reach[1]}

    def _temperature(self, step: float) -> float:
        first, last = self.temperatures
        return first * (last / first) ** (step / self.soft)

    def _note(self, marginals: Tensor, rows: Tensor) -> None:
        inner = marginals[1:-1].detach()
        if inner.numel():
            shown = inner.gather(-1, rows.expand(inner.shape[:-1])[..., None])
            self.reach = float(shown.min()), float(shown.max())

    def _check(self, bound: float) -> None:
        if self.entropy is None:
            return
        self._bounds = [*self._bounds[1 - _WINDOW :], bound]
        count = len(self._bounds)
        mean = sum(self._bounds) / count
        spread = sum((value - mean) ** 2 for value in self._bounds) / max(count - 1, 1)
        if count == _WINDOW and mean + _STANDARD_ERRORS * (spread / count) ** 0.5 < self.entropy:
            raise ValueError(
                f"fldd: the bound of the last {count} steps is {mean:.4g} nats, below the entropy "
                f"of the data, {self.entropy:.4g}: one of the two is wrong."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {"baseline": self.baseline.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the running means of before."""
        super().load_state_dict(state)
        self.baseline.load(state["baseline"])
