"""What weighted particles and draws of Markov chains share: ``R`` runs of ``N`` draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ppl_diffusion.kernels.blocks import widened
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior_files import read_posterior, write_posterior
from ppl_diffusion.smc.resampling import Stratified

if TYPE_CHECKING:
    from ppl_diffusion.smc.origin import Origin
    from ppl_diffusion.smc.verdict import Verdict

KINDS: dict[str, type[Draws]] = {}
"""Every kind of result that files may hold."""


class Draws(ABC):
    """A result: draws with weights, the law they are for, and the way to files and to ArviZ.

    Subclasses are frozen dataclasses whose fields are all that is saved.

    :cvar kind: what a file calls it.
    """

    x0: Tensor
    law: Law
    samples: Mapping[str, Tensor]
    compact_path: Tensor | None
    settings: Mapping[str, Any]
    is_program: bool
    plates: Mapping[str, tuple[str, ...]]
    origin: Origin | None
    kind: str

    def __init_subclass__(cls, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        KINDS[kind], cls.kind = cls, kind

    @property
    def exact(self) -> bool:
        """Whether the draws are exact for :attr:`law`."""
        return self.law.exact

    @property
    def target(self) -> str:
        """The law in words."""
        return str(self.law)

    @property
    def num_runs(self) -> int:
        """Number ``R`` of independent runs, or of Markov chains."""
        return self.x0.shape[0]

    @property
    def num_draws(self) -> int:
        """Number ``N`` of particles per run, or of draws per chain."""
        return self.x0.shape[1]

    @property
    def path(self) -> Tensor | None:
        """Whole paths, int64 ``(R, N, *plates, T + 1, L)``, or None if they were not stored."""
        return None if self.compact_path is None else widened(self.compact_path)

    @property
    @abstractmethod
    def alive(self) -> Tensor:
        """Runs with any draw of positive weight, bool ``(R,)``."""

    @property
    def weights(self) -> Tensor:
        """Weights that sum to one in each living run, float64 ``(R, N)``; zero in a dead one."""
        return self.own_log_weights().exp()

    @property
    @abstractmethod
    def warnings(self) -> list[Verdict]:
        """What is wrong with this result, a sentence each, the worst first; empty if nothing is."""

    @property
    @abstractmethod
    def pooled_log_weights(self) -> Tensor:
        """Log-weights over all runs, ``(R, N)``; their exponentials sum to one."""

    @abstractmethod
    def own_log_weights(self) -> Tensor:
        """Return log-weights ``(R, N)`` that sum to one in each living run.

        :raises ParticleCollapse: if no run is alive.
        """

    def to(self, device: str | torch.device) -> Self:
        """Return the same result with its arrays on a device.

        :param device: the device.
        """
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        samples = {name: value.to(device) for name, value in self.samples.items()}
        return replace(self, samples=samples, **moved)  # type: ignore[type-var]

    def expectation(self, fn: Callable[[Any], Tensor]) -> Tensor:
        """Return the self-normalised weighted mean of a function, one value per run.

        :param fn: of ``x0 (R, N, *plates, L)`` for a bare chain, of the dict of site values (each
            ``(R, N, ...)``, with ``x0`` added) for a program; returns ``(R, N, ...)``.
        :returns: float64 ``(R, ...)``; NaN in a dead run, which knows nothing.
        :raises ParticleCollapse: if no run is alive.
        :raises ValueError: if the function does not return one value per draw.
        """
        log_weights = self.own_log_weights()
        draws = self._sites() if self.is_program else self.x0
        values = torch.as_tensor(fn(draws), device=log_weights.device)
        if values.shape[:2] != log_weights.shape:
            raise ValueError(
                f"expectation: the function returned shape {tuple(values.shape)}, expected it to "
                f"start with (runs, draws) = {tuple(log_weights.shape)}."
            )
        inner = [1] * (values.ndim - 2)
        weights = log_weights.exp().reshape(*log_weights.shape, *inner)
        # A zero weight must silence an infinite or NaN value of a particle that does not exist.
        terms = torch.where(weights > 0, weights * values.to(torch.float64), 0.0)
        return torch.where(self.alive.reshape(-1, *inner), terms.sum(1), torch.nan)

    def resample(
        self, num: int, *, generator: torch.Generator | None = None, pooled: bool = True
    ) -> dict[str, Tensor]:
        """Draw equally weighted draws (stratified); never one of weight zero.

        :param num: number of draws (of draws per run if not pooled).
        :param pooled: draw from all runs, each in proportion to its evidence; otherwise from each
            run separately, leaving dead runs out.
        :returns: site values ``(num, ...)`` if pooled, else ``(alive runs, num, ...)``, with
            ``"x0"`` and the flat indices ``"index"`` into ``(R * N)`` added; a site of the program
            that bears one of these names keeps it.
        :raises ParticleCollapse: if no run is alive.
        :raises ValueError: if ``num`` is no whole number above zero.
        """
        if not isinstance(num, Integral) or num is True or num < 1:
            raise ValueError(f"resample: num must be a whole number >= 1, got {num!r}.")
        log_weights = self.own_log_weights()
        if pooled:
            index = _draw_indices(self.pooled_log_weights.reshape(1, -1), num, generator)[0]
        else:
            rows = torch.nonzero(self.alive)[:, 0]
            within = _draw_indices(log_weights[rows], num, generator)
            index = within + rows[:, None] * self.num_draws
        drawn = {name: value.flatten(0, 1)[index] for name, value in self._sites().items()}
        return {"index": index, **drawn}

    def _sites(self) -> dict[str, Tensor]:
        return {"x0": self.x0, **self.samples}

    def program_sites(self) -> dict[str, Tensor]:
        """Return what a program needs to run again on the draws, each ``(R, N, ...)``."""
        first = self.law.chains[0].site
        if first in self.samples:
            return dict(self.samples)
        return {first: self.x0 if self.path is None else self.path, **self.samples}

    @abstractmethod
    def to_arviz(self, **options: Any) -> Any:
        """Return ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x)."""

    def with_origin(self, origin: Origin) -> Self:
        """Return the same result with the program that it came from.

        :param origin: the program.
        """
        return replace(self, origin=origin, plates=origin.plates)  # type: ignore[type-var]

    def require_origin(self, what: str) -> Origin:
        """Return the program that the draws came from.

        :param what: what it is needed for, in the error.
        :raises ValueError: if it is not known.
        """
        if not self.is_program:
            raise ValueError(
                f"{what}: this is the result of a bare chain with a potential, which has no "
                "observed site, no latents and no program to run again; write a program."
            )
        if self.origin is None:
            raise ValueError(
                f"{what}: the program has to run again, and files do not keep it; say which it "
                "was: posterior = ppd.inference.attach(posterior, program, *its_arguments)."
            )
        return self.origin

    def save(self, directory: str | Path) -> Path:
        """Write ``particles.safetensors`` and ``particles.json``; loading returns the same bits.

        Everything but the program itself is kept, raw log-weights and ancestry included.

        :param directory: created if needed.
        :returns: the directory.
        :raises NotADirectoryError: if there is a file of that name.
        """
        return write_posterior(self, Path(directory), self.kind)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; ``Draws.load`` reads either kind.

        :raises FileNotFoundError: if it holds no posterior.
        :raises ValueError: if a file is damaged, of another format, or of another kind of result.
        """
        kinds = {kind: known for kind, known in KINDS.items() if issubclass(known, cls)}
        known, contents = read_posterior(Path(directory), kinds, KINDS)
        posterior: Self = known(**contents)
        return posterior

    def __getstate__(self) -> dict[str, Any]:
        # A program may hold what cannot be pickled; like a file, a pickle does without.
        return {**self.__dict__, "origin": None}


def _draw_indices(log_weights: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``num`` stratified indices per row, then shuffle them."""
    uniforms = torch.rand(len(log_weights), num, dtype=torch.float64, generator=generator)
    index = Stratified().draw(uniforms, log_weights)
    order = torch.rand(index.shape, generator=generator).argsort(-1)
    return index.gather(-1, order)
