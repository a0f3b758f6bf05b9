"""Discrete diffusion models as distributions of a probabilistic program.

``import ppl_diffusion as ppd`` gives the rooms of the house (``ppd.models``, ``ppd.inference``,
``ppd.handlers``, ...), each imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ppl_diffusion.errors import CapabilityError as CapabilityError
from ppl_diffusion.errors import IntractableLogProb as IntractableLogProb
from ppl_diffusion.errors import ParticleCollapse as ParticleCollapse
from ppl_diffusion.errors import PotentialError as PotentialError

__version__ = "0.1.0"

__all__ = [
    "CapabilityError",
    "IntractableLogProb",
    "ParticleCollapse",
    "PotentialError",
    "denoisers",
    "design",
    "designs",
    "diagnostics",
    "distributions",
    "handlers",
    "imaging",
    "inference",
    "kernels",
    "models",
    "potentials",
    "processes",
    "programs",
    "smc",
    "testing",
    "tokenisers",
]

if TYPE_CHECKING:
    import ppl_diffusion.inference as inference
    import ppl_diffusion.models as models
    from ppl_diffusion import denoisers as denoisers
    from ppl_diffusion import designs as designs
    from ppl_diffusion import diagnostics as diagnostics
    from ppl_diffusion import distributions as distributions
    from ppl_diffusion import handlers as handlers
    from ppl_diffusion import imaging as imaging
    from ppl_diffusion import kernels as kernels
    from ppl_diffusion import potentials as potentials
    from ppl_diffusion import processes as processes
    from ppl_diffusion import programs as programs
    from ppl_diffusion import smc as smc
    from ppl_diffusion import testing as testing
    from ppl_diffusion import tokenisers as tokenisers
    from ppl_diffusion.designs.api import design as design


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "design":
        return import_module(f"{__name__}.designs.api").design
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
