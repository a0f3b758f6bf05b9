"""Which potential of embeddings steers which chain, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials.embedded import EmbeddedPotential
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import ChainSource, Source

Guides = EmbeddedPotential | Mapping[str, EmbeddedPotential] | None


def guides_of(given: Guides, source: Source) -> dict[str, EmbeddedPotential]:
    """Return the guide of each chain that has one.

    :param given: a guide, one for each chain site by name, or None: a bare chain's own potential.
    :raises CapabilityError: if there is none, or it is not clear whose it is.
    :raises ValueError: if one is for no chain site.
    """
    names = [site.name for site in source.chains]
    if given is None and isinstance(source, ChainSource):
        given = source.given if isinstance(source.given, EmbeddedPotential) else None
    if given is None:
        raise CapabilityError(
            "AnchoredSMC: it follows the gradient of a potential of embeddings, and nothing here "
            "is one; pass guide=EmbeddedPotential(log_g, codebook), or a GaussianMeasurement, "
            "which steers and leaves the target alone."
        )
    if isinstance(given, EmbeddedPotential):
        if len(names) > 1:
            raise CapabilityError(
                f"AnchoredSMC: there are the chains {', '.join(names)} and one guide; say whose "
                f"it is: guide={{{names[0]!r}: ...}}."
            )
        return {names[0]: given}
    for name in given:
        if name not in names:
            raise ValueError(
                f"AnchoredSMC: guide has {name!r}, which is no chain site; there is "
                f"{', '.join(names)}."
            )
    return dict(given)


def require_steerable(site: ChainSite, guide: EmbeddedPotential, variant: str) -> None:
    """Refuse a chain that anchors cannot steer, or not in this way.

    :param variant: of :class:`~ppl_diffusion.inference.AnchoredSMC`.
    :raises CapabilityError: if they cannot.
    """
    kernel, size = site.chain.kernel, len(guide.codebook)
    if size != kernel.process.vocab_size:
        raise CapabilityError(
            f"AnchoredSMC: the codebook of the guide has {size} codes, and the chain "
            f"{site.name!r} {kernel.process.vocab_size} tokens; pass the guide of its alphabet."
        )
    ordered = isinstance(kernel, OrderedKernel)
    grid = isinstance(kernel, InterpolatingKernel) and kernel.process.absorbing and kernel.ancestral
    if not (grid or ordered) or kernel.blocks:
        raise CapabilityError(
            "AnchoredSMC: anchors are for masked chains at kappa=1 (InterpolatingKernel, or "
            f"OrderedKernel), which {kernel!r} is not; use method='smc'."
        )
    fitting = ("auto", "policy", "values") if ordered else ("auto", "independent")
    if variant not in fitting:
        raise CapabilityError(
            f"AnchoredSMC: variant={variant!r} is not for a {type(kernel).__name__}; choose "
            f"{' or '.join(map(repr, fitting))}."
        )


def guide_of(owner: str, guide: EmbeddedPotential | None, source: Source) -> EmbeddedPotential:
    """Return what a method steers by: its guide, or the potential of a bare chain.

    It steers the one chain there is, each element of a plate on its own; what is sampled remains
    the program's business.

    :param owner: what errors call the method.
    :param guide: what it was given, or None.
    :param source: what is sampled.
    :raises CapabilityError: if there is none, it has a code for other tokens than those of the
        chain, or there are several chains.
    """
    own = source.given if isinstance(source, ChainSource) and guide is None else guide
    if not isinstance(own, EmbeddedPotential):
        raise CapabilityError(
            f"{owner}: it follows gradients through a codebook; make the potential of the chain an "
            "EmbeddedPotential, or give guide=, one that steers towards what the program asks for."
        )
    if len(source.chains) > 1:
        raise CapabilityError(
            f"{owner}: it restores one chain, and there are {len(source.chains)}; use SMC."
        )
    size, codes = source.chains[0].chain.kernel.process.vocab_size, len(own.codebook)
    if size != codes:
        raise CapabilityError(
            f"{owner}: {own.name} has {codes} codes, and the chain {size} tokens; a guide has one "
            "code for each."
        )
    return own
