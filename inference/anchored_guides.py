"""Which potential of embeddings steers which chain, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.guides import guide_of
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials.embedded import EmbeddedPotential
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Source

Guides = EmbeddedPotential | Mapping[str, EmbeddedPotential] | None


def guides_of(owner: str, given: Guides, source: Source) -> dict[str, EmbeddedPotential]:
    """Return the guide of each chain that has one.

    :param owner: what errors call the method.
    :param given: a guide, one for each chain site by name, or None: a bare chain's own potential.
    :raises CapabilityError: if there is none, or it is not clear whose it is.
    :raises ValueError: if one is for no chain site.
    """
    names = [site.name for site in source.chains]
    if not isinstance(given, Mapping):
        if given is not None and len(names) > 1:
            raise CapabilityError(
                f"{owner}: there are the chains {', '.join(names)} and one guide; say whose it is: "
                f"guide={{{names[0]!r}: ...}}."
            )
        return {names[0]: guide_of(owner, given, source)}
    for name in given:
        if name not in names:
            raise ValueError(
                f"{owner}: guide has {name!r}, which is no chain site; there is {', '.join(names)}."
            )
    return dict(given)


def require_steerable(owner: str, site: ChainSite, guide: EmbeddedPotential, variant: str) -> None:
    """Refuse a chain that anchors cannot steer, or not in this way.

    :param owner: what errors call the method.
    :param variant: of :class:`~ppl_diffusion.inference.AnchoredSMC`.
    :raises CapabilityError: if they cannot.
    """
    kernel, size = site.chain.kernel, len(guide.codebook)
    if size != kernel.process.vocab_size:
        raise CapabilityError(
            f"{owner}: the codebook of the guide has {size} codes, and the chain {site.name!r} "
            f"{kernel.process.vocab_size} tokens; pass the guide of its alphabet."
        )
    ordered = isinstance(kernel, OrderedKernel)
    grid = isinstance(kernel, InterpolatingKernel) and kernel.process.absorbing and kernel.ancestral
    if not (grid or ordered) or kernel.blocks:
        raise CapabilityError(
            f"{owner}: anchors are for masked chains at kappa=1 (InterpolatingKernel, or "
            f"OrderedKernel), which {kernel!r} is not; use method='smc'."
        )
    fitting = ("auto", "policy", "values") if ordered else ("auto", "independent")
    if variant not in fitting:
        raise CapabilityError(
            f"{owner}: variant={variant!r} is not for a {type(kernel).__name__}; choose "
            f"{' or '.join(map(repr, fitting))}."
        )
