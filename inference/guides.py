"""The potential that steers through a codebook, wherever it was given."""

from __future__ import annotations

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.potentials.embedded import EmbeddedPotential
from ppl_diffusion.programs.sources import ChainSource, Source


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
