"""What a result may ask the program that it came from; programs themselves live a floor above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ppl_diffusion.smc.law import Law

Sites = Mapping[str, Tensor]
"""Values of sites by name, each ``(B, ...)``."""


class Scored(NamedTuple):
    """A program run again on finished draws.

    :param log_density: of everything but the chains, float64 ``(B,)``.
    :param values: all latent and deterministic sites but the chains.
    :param conditions: what the chains were given, by chain and name.
    """

    log_density: Tensor
    values: dict[str, Tensor]
    conditions: dict[str, Tensor]


class Pointwise(NamedTuple):
    """Log-densities element by element, ``(B, *elements)`` each, unscaled.

    :param data: observed sites, without the elements that nobody saw.
    :param latents: latents that are no chains.
    :param factors: factors.
    """

    data: dict[str, Tensor]
    latents: dict[str, Tensor]
    factors: dict[str, Tensor]


class Origin(Protocol):
    """A program at its arguments, run again on finished draws."""

    @property
    def name(self) -> str:
        """What the program is called."""

    @property
    def law(self) -> Law:
        """The law of its posterior."""

    @property
    def plates(self) -> Mapping[str, tuple[str, ...]]:
        """The plates of each site, left to right."""

    @property
    def num_calls(self) -> int:
        """Rows that it was evaluated for so far."""

    def at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Origin:
        """Return the same program at other arguments."""

    def score(self, sites: Sites) -> Scored:
        """Return its log-density and values on draws."""

    def pointwise(self, sites: Sites) -> Pointwise:
        """Return its log-densities on draws, element by element."""

    def data(self) -> dict[str, Tensor]:
        """Return what it observed."""

    def predict(self, sites: Sites, seed: int) -> dict[str, Tensor]:
        """Return new data for each draw."""

    def prior(self, num: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return draws of all sites before any data were seen, and data for each of them."""
