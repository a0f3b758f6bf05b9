"""Latents that particles inherit: drawn once, from their own law, before the sequences move.

A latent whose law does not depend on the sequences is an auxiliary variable of the particle: with
``(x, latents)`` as the particle and ``p(latents)`` as what it starts from, the potential
``G(x0, latents)`` is that of a plain chain on a larger space, and nothing else changes. Nothing
moves such a latent again: resampling thins its values out, and a program with many of them is
better served by particle Gibbs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference._program import Program

if TYPE_CHECKING:
    from ppl_diffusion.inference._program import ProgramRun


class CarriedLatents:
    """Draws of a program's latents, row by row of a growing table.

    :param program: the program.
    :raises CapabilityError: if the law of a latent depends on the sequences.
    """

    def __init__(self, program: Program) -> None:
        if program.redrawn:
            raise CapabilityError(
                f"{program.name}: the law of the latent {program.redrawn[0]!r} depends on the "
                "sequences (or on a latent that does), so that it cannot be drawn before them; use "
                "ppl_diffusion.inference.SMC."
            )
        self.names, self.program_name = tuple(program.carried), program.name
        self._values: dict[str, Tensor] = {}
        self._log_prob = torch.zeros(0, dtype=torch.float64)

    def draw(self, evaluate: Callable[[int], ProgramRun], count: int) -> Tensor:
        """Draw new rows and return their numbers, int64 ``(count,)``.

        :param evaluate: runs the program for so many particles, on any sequences.
        :param count: rows to draw.
        """
        run, start = evaluate(count), len(self._log_prob)
        for name in self.names:
            value = run.value(name)
            assert value is not None  # latents are tensors
            known = self._values.get(name, value[:0])
            self._values[name] = torch.cat([known, value])
        self._log_prob = torch.cat([self._log_prob, run.latent_log_density()])
        return torch.arange(start, start + count)

    def at(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the latents of some rows, each ``(n, *plates, *event)``.

        :param rows: int64 ``(n,)``.
        :raises CapabilityError: if a row was never drawn.
        """
        self._require_drawn(rows)
        return {name: self._values[name][rows] for name in self.names}

    def log_prob(self, rows: Tensor) -> Tensor:
        """Return the log-density of the law rows were drawn from, float64 ``(n,)``.

        :param rows: int64 ``(n,)``.
        """
        return self._log_prob[rows]

    def _require_drawn(self, rows: Tensor) -> None:
        if self.names and len(rows) and int(rows.max()) >= len(self._log_prob):
            raise CapabilityError(
                f"{self.program_name} is asked about sequences without the latents "
                f"({', '.join(self.names)}) that belong to them; run it by a program of "
                "ppl_diffusion.inference."
            )
