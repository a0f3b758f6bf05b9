"""Model programs: priors over sequences as Pyro programs, with shipped weights."""

from ppl_diffusion.models.library import available as available
from ppl_diffusion.models.library import load as load
from ppl_diffusion.models.library import names as names
from ppl_diffusion.models.library import read_card as read_card
from ppl_diffusion.models.masked import MaskedDiffusion as MaskedDiffusion
from ppl_diffusion.models.oracles import Oracle as Oracle
from ppl_diffusion.models.oracles import list_oracles as list_oracles
from ppl_diffusion.models.oracles import load_oracle as load_oracle
from ppl_diffusion.models.program import DiffusionProgram as DiffusionProgram
from ppl_diffusion.models.samplers import SAMPLERS as SAMPLERS
from ppl_diffusion.models.samplers import SamplerSettings as SamplerSettings
from ppl_diffusion.models.samplers import make_chain as make_chain
from ppl_diffusion.models.uniform import UniformDiffusion as UniformDiffusion
