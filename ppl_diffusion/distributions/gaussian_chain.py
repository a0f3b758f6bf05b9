"""The reverse chain of a continuous latent, as a Pyro distribution with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.denoisers.latent import LatentDenoiser
from ppl_diffusion.denoisers.latent_views import prior_rows
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.kernels.latent_kernel import checked_clean
from ppl_diffusion.kernels.latent_solvers import Ancestral, LatentSolver
from ppl_diffusion.kernels.shapes import check_expand
from ppl_diffusion.processes.base import whole_number
from ppl_diffusion.processes.gaussian import Gaussian


class GaussianChain(TorchDistribution):
    """The law of a continuous latent on its way from noise, event shape ``(T + 1, N, d)``.

    The first phase of a sequential path: no token is there yet. Row 0 is the noise and the last row
    the finished latent, :meth:`latent`. ``log_prob`` is exact and differentiable, and ``rsample``
    carries gradients, so that it can be a latent site of any program: conditioned, given to NUTS,
    moved by the latent moves of SMC.

    A solver without noise has no density: its chain is a function of the noise alone, which can be
    sampled, and scored nowhere but in :meth:`noise`.

    :param process: noise of the latent.
    :param denoiser: predictor of tokens and a continuous latent.
    :param length: number ``L`` of tokens.
    :param num_steps: number ``T`` of steps, of equal size in level, or the levels from 1 to 0.
    :param solver: how the latent moves; DDPM's own steps by default.
    :param prompt: int64 ``(L,)``, tokens that are known, -1 elsewhere.
    :raises CapabilityError: if the latent is discrete.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_rsample = True
    support = constraints.independent(constraints.real, 3)

    def __init__(
        self,
        process: Gaussian,
        denoiser: LatentDenoiser,
        length: int,
        num_steps: int | Sequence[float],
        *,
        solver: LatentSolver | None = None,
        prompt: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if denoiser.latent.dim is None:
            raise CapabilityError(
                "GaussianChain: the latent has codes; use a ReverseChain over a CodeDenoiser."
            )
        self.process, self.denoiser, self.solver = process, denoiser, solver or Ancestral()
        self.levels = _levels(num_steps)
        size = denoiser.vocab_size
        known = torch.full((length,), -1) if prompt is None else torch.as_tensor(prompt)
        self.tokens = torch.where(known >= 0, known, size)
        event = torch.Size((len(self.levels), *denoiser.latent.event_shape))
        super().__init__(torch.Size(), event, validate_args=validate_args)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps."""
        return len(self.levels) - 1

    def latent(self, path: Tensor) -> Tensor:
        """Return the finished latent of a path, ``(*batch, N, d)``."""
        return path[..., -1, :, :]

    def noise(self) -> TorchDistribution:
        """Return the law of row 0, standard normal of event shape ``(N, d)``."""
        zeros = torch.zeros(self.event_shape[1:], dtype=torch.float64, device=self.tokens.device)
        return Normal(zeros, 1.0).expand((*self.batch_shape, *zeros.shape)).to_event(2)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Return the path of a solver without noise, as a function of where it starts.

        :param noise: ``(*batch, N, d)``.
        :raises CapabilityError: if its steps are random.
        """
        if self.solver.stochastic:
            raise CapabilityError(
                f"from_noise: the steps of {self.solver!r} are random; use sample, or a solver "
                "without noise such as DDIM()."
            )
        return self._follow(noise)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw paths, with ``T`` network calls and gradients.

        :returns: float64 ``(*sample_shape, *batch, T + 1, N, d)``.
        """
        return self._follow(self.noise().sample(torch.Size(sample_shape)))

    def _follow(self, start: Tensor) -> Tensor:
        states, history = [start], self.solver.start(start)
        for u, s in pairwise(self.levels):
            law, clean = self._law(states[-1], u, s, history)
            history = self.solver.remember(self.process, states[-1], clean, u, history)
            states.append(law.rsample())
        return torch.stack(states, -3)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-density of paths, float64, with ``T`` network calls.

        :param value: ``(*sample, *batch, T + 1, N, d)``.
        :raises IntractableLogProb: if the solver has no noise.
        """
        if not self.solver.stochastic:
            raise IntractableLogProb(
                f"log_prob: the steps of {self.solver!r} have no noise and no density; sample the "
                "site chain.noise() and take chain.from_noise of it."
            )
        if self._validate_args:
            self._validate_sample(value)
        states = value.unbind(-3)
        log_p = self.noise().log_prob(states[0])
        history = self.solver.start(states[0])
        steps = zip(pairwise(states), pairwise(self.levels), strict=True)
        for (y, y_next), (u, s) in steps:
            law, clean = self._law(y, u, s, history)
            log_p = log_p + law.log_prob(y_next)
            history = self.solver.remember(self.process, y, clean, u, history)
        return log_p

    def _law(self, latent: Tensor, u: float, s: float, history: Any) -> tuple[Any, Tensor]:
        told = self.solver.label(u)
        rows = prior_rows(self.denoiser, self.tokens, latent, told)
        predicted = self.denoiser.latent_head(rows).to(latent.dtype)
        owner = type(self.denoiser).__name__
        clean = checked_clean(predicted, self.denoiser.latent, latent.shape[:-2], owner)
        law = self.solver.law(self.process, latent, clean, u, s, history)
        assert isinstance(law, Delta) or law.has_rsample
        return law, clean

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GaussianChain:
        """Return the same chain with larger batch dimensions (independent copies)."""
        new = self._get_checked_instance(GaussianChain, _instance)
        shape = check_expand(self.batch_shape, batch_shape)
        for name in ("process", "denoiser", "solver", "levels", "tokens"):
            setattr(new, name, getattr(self, name))
        super(GaussianChain, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"GaussianChain({self.process!r}, {self.solver!r}, {shapes})"


def _levels(num_steps: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(num_steps, Sequence):
        levels = tuple(float(u) for u in num_steps)
        falls = all(a > b for a, b in pairwise(levels))
        if len(levels) < 2 or levels[0] != 1.0 or levels[-1] != 0.0 or not falls:
            raise ValueError("GaussianChain: levels must decrease from exactly 1 to exactly 0.")
        return levels
    steps = whole_number(num_steps, "GaussianChain: num_steps")
    return tuple((steps - n) / steps for n in range(steps + 1))
