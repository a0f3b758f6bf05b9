"""What a posterior may be said to estimate."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior

SEARCHES = ("best-of-n", "beam")


def estimates_evidence(posterior: "ParticlePosterior") -> bool:
    """Return whether ``log_evidence`` estimates a normalising constant.

    Searches, and guidance that nothing pays for, sample no law that has one; their
    ``log_evidence`` is NaN.

    :param posterior: the result of a particle run.
    """
    settings = posterior.settings
    return settings.get("method") not in SEARCHES and settings.get("weighted") is not False
