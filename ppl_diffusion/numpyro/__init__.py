"""The same names for NumPyro: reverse chains as compiled JAX distributions.

::

    import ppl_diffusion.numpyro as ppn

    chain = ppn.ReverseChain(ppn.InterpolatingKernel(process, denoiser, num_steps=64), length=80)

Needs ``pip install 'ppl-diffusion[numpyro]'``. Numbers come from the array-API code that serves
torch, too; 64-bit precision follows JAX's switch (``jax.config.update("jax_enable_x64", True)``).
"""

from importlib.util import find_spec as _find_spec

_missing = [name for name in ("jax", "numpyro", "equinox") if _find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"ppl_diffusion.numpyro needs {', '.join(_missing)}; run "
        "`pip install 'ppl-diffusion[numpyro]'`."
    )

from ppl_diffusion.numpyro.convert import from_torch as from_torch
from ppl_diffusion.numpyro.denoisers import Denoiser as Denoiser
from ppl_diffusion.numpyro.handlers import clamp as clamp
from ppl_diffusion.numpyro.handlers import constant as constant
from ppl_diffusion.numpyro.handlers import steer as steer
from ppl_diffusion.numpyro.handlers import twist as twist
from ppl_diffusion.numpyro.handlers import unroll as unroll
from ppl_diffusion.numpyro.host import OnHost as OnHost
from ppl_diffusion.numpyro.kernel import InterpolatingKernel as InterpolatingKernel
from ppl_diffusion.numpyro.marginal import ChainMarginal as ChainMarginal
from ppl_diffusion.numpyro.particle_gibbs import ParticleGibbs as ParticleGibbs
from ppl_diffusion.numpyro.particle_gibbs import particle_gibbs_fn as particle_gibbs_fn
from ppl_diffusion.numpyro.proposed import ProposedChain as ProposedChain
from ppl_diffusion.numpyro.proposed import Steering as Steering
from ppl_diffusion.numpyro.reverse_chain import ReverseChain as ReverseChain
from ppl_diffusion.numpyro.smc import SMC as SMC
from ppl_diffusion.numpyro.stepwise import ScanPosterior as ScanPosterior
from ppl_diffusion.numpyro.stepwise import smc_scan as smc_scan
from ppl_diffusion.numpyro.token_step import TokenStep as TokenStep
from ppl_diffusion.numpyro.transformer import Transformer as Transformer
