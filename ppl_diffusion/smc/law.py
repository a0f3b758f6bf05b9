"""What a result is exact for, as data: chains, tilts, what is held, what changes it.

Two methods with one law are equal, which is what comparing their evidences takes; the sentence that
people read is made here and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.kernels.base import SAMPLE_ONLY

NO_EVIDENCE = (
    "log_evidence is NaN (-inf in a run without any candidate of G > 0): there is none to estimate"
)
_PARAMETERS_READ = 32
"""Numbers of every parameter that the digest of a network looks at."""


@dataclass(frozen=True)
class Base:
    """One reverse chain of a law.

    :param kernel: what moves it, in the kernel's own words.
    :param plates: sizes of the plates it is in.
    :param given: names of the conditions that its law depends on.
    :param changes: what makes it another law than that of its network's own chain.
    :param clamped: clamped positions, over all plates.
    :param prompted: prompted positions, over all plates.
    :param digest: of the network, the clamped and prompted tokens, and conditions that are fixed.
    :param has_density: whether its steps have a density, by which anyone could check them.
    :param masked: positions of a sequence that start masked and are free, on average over plates.
    """

    site: str
    kernel: str
    steps: int
    length: int
    plates: tuple[int, ...] = ()
    given: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    clamped: int = 0
    prompted: int = 0
    digest: str = ""
    has_density: bool = True
    masked: float = 0.0

    @classmethod
    def of(
        cls,
        chain: ReverseChain,
        site: str = "x",
        clamp: tuple[Tensor, Tensor] | None = None,
        *,
        drawn: bool = False,
    ) -> Base:
        """Return what a chain adds to a law.

        :param clamp: clamped tokens and where they are, both ``(L,)``, or None.
        :param drawn: whether the conditions are drawn with the chain, so that no value is part of
            the law.
        """
        shape = (*chain.batch_shape, chain.length)
        tokens, mask = (None, None) if clamp is None else clamp
        held = [part for part in (tokens, mask, chain.prompt) if part is not None]
        held += [] if drawn else list(chain.given.values())
        clamped = 0 if mask is None else int(mask.expand(shape).sum())
        prompted = 0 if chain.fixed is None else int(chain.fixed.expand(shape).sum())
        free = chain.length - (clamped + prompted) / chain.batch_shape.numel()
        return cls(
            site=site,
            kernel=repr(chain.kernel),
            steps=chain.num_steps,
            length=chain.length,
            plates=tuple(chain.batch_shape),
            given=tuple(chain.given),
            changes=chain.kernel.changes,
            clamped=clamped,
            prompted=prompted,
            digest=digest([*(chain.kernel.declared_parameters() or []), *held]),
            has_density=chain.kernel.capability != SAMPLE_ONLY,
            masked=free if chain.kernel.process.absorbing else 0.0,
        )

    @property
    def reveals(self) -> float:
        """Positions that a masked chain reveals per step, on average; 0 for other chains."""
        return self.masked / self.steps

    @property
    def held(self) -> list[str]:
        """The held positions, in phrases."""
        size = torch.Size((*self.plates, self.length)).numel()
        counts = {"clamped": self.clamped, "prompted": self.prompted}
        return [f"{what} at {n} of {size} positions" for what, n in counts.items() if n]


@dataclass(frozen=True)
class Tilt:
    """A factor that a law is multiplied by.

    :param of: the name of ``log G``: a potential, or a program.
    :param factor: how ``G`` enters.
    :param digest: of what a program or a potential observes; functions are known by their names
        alone.
    """

    of: str
    factor: str = "G(x0)"
    digest: str = ""

    @classmethod
    def by(cls, potential: Any) -> Tilt:
        """Return the factor that a potential is, known by its name and its data."""
        return cls(potential.name, digest=digest(list(getattr(potential, "law_data", ()))))


@dataclass(frozen=True)
class Law:
    """What a result is exact for, or only aims at.

    :param latents: other latents that particles hold.
    :param product: the chains' part of the density; ``"p(path)"`` is their own.
    :param exact: whether weighted particles are exact for it.
    :param why: why they are not, or what is special about it; words that belong to the law.
    :param has_evidence: whether the result estimates its normalising constant.
    """

    chains: tuple[Base, ...]
    tilts: tuple[Tilt, ...] = ()
    latents: tuple[str, ...] = ()
    product: str = "p(path)"
    exact: bool = True
    why: str = ""
    has_evidence: bool = True

    @classmethod
    def tilted(
        cls, chains: Iterable[Base], tilts: Iterable[Tilt], latents: Iterable[str] = ()
    ) -> Law:
        """Return ``p(path) G(x0)``, exact where every chain's steps have a density.

        :param latents: other latents.
        """
        chains = tuple(chains)
        unknown = [base.site for base in chains if not base.has_density]
        # Its weights may well be right, but nothing can hold its draws to what it promises.
        why = (
            f"the steps of {', '.join(unknown)} have no density ({SAMPLE_ONLY})" if unknown else ""
        )
        return cls(chains, tuple(tilts), tuple(latents), exact=not unknown, why=why)

    def but(self, **changes: Any) -> Law:
        """Return the law with some fields changed."""
        return replace(self, **changes)

    @property
    def base(self) -> tuple[Any, ...]:
        """What two laws must share for their evidences to be compared on one axis."""
        return self.chains, self.tilts, self.latents, self.product

    def to_json(self) -> dict[str, Any]:
        """Return the law in JSON types; :meth:`from_json` gives back an equal one."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Law:
        """Return the law that :meth:`to_json` wrote.

        :raises TypeError: if fields are missing or unknown.
        """
        given = dict(data)
        chains = [Base(**_tuples(chain)) for chain in given.pop("chains")]
        tilts = [Tilt(**tilt) for tilt in given.pop("tilts", ())]
        return cls(chains=tuple(chains), tilts=tuple(tilts), **_tuples(given))

    def __str__(self) -> str:
        held = "".join(f", {words}" for words in self._held)
        if not (self.has_evidence or self.exact):
            where = f"; the chain is{held.removeprefix(',')}" if held else ""
            return f"{self.why}; {NO_EVIDENCE}{where}"
        tilt = "".join(f" * {factor}" for factor in dict.fromkeys(t.factor for t in self.tilts))
        names = " + ".join(t.of for t in self.tilts)
        given = f", with log G = {names}" if names else ""
        latents = f", together with the latents {', '.join(self.latents)}" if self.latents else ""
        why = f": {self.why}" if self.why else ""
        estimated = "; log_evidence estimates the log of its normalising constant"
        evidence = estimated if self.has_evidence else ""
        return (
            f"{'' if self.exact else 'approximately '}{self.product}{tilt} of {self._chains}"
            f"{latents}{held}{self._under}, normalised{given}{why}{evidence}"
        )

    @property
    def _held(self) -> list[str]:
        return self.chains[0].held if len(self.chains) == 1 else []

    @property
    def _under(self) -> str:
        changes = self.chains[0].changes if len(self.chains) == 1 else ()
        return f" under {'; '.join(changes)}" if changes else ""

    @property
    def _chains(self) -> str:
        if len(self.chains) == 1:
            (chain,) = self.chains
            given = f", given {', '.join(chain.given)}" if chain.given else ""
            return f"the {chain.steps}-step reverse chain{given}"
        return "the reverse chains " + ", ".join(map(_described, self.chains))


def _described(chain: Base) -> str:
    given = [f"given {', '.join(chain.given)}"] if chain.given else []
    facts = [f"{chain.steps} steps", *given, *chain.held, *chain.changes]
    return f"{chain.site!r} ({', '.join(facts)})"


def digest(tensors: list[Tensor]) -> str:
    """Return a short fingerprint of shapes and some of the numbers: cheap, and enough to differ."""
    known = hashlib.sha1(usedforsecurity=False)
    for tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _PARAMETERS_READ)][:_PARAMETERS_READ]
        known.update(f"{tuple(tensor.shape)} {some.double().tolist()}".encode())
    return known.hexdigest()[:12] if tensors else ""


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data in which lists, which JSON has, are tuples, which can be compared and hashed."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in data.items()}
