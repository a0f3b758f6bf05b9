"""Effect handlers: change how chain sites are proposed or conditioned, never by stealth."""

from ppl_diffusion.handlers.clamp import clamp as clamp
from ppl_diffusion.handlers.held import ClampProposal as ClampProposal
from ppl_diffusion.handlers.held import joined as joined
from ppl_diffusion.handlers.proposals import GradientProposal as GradientProposal
from ppl_diffusion.handlers.proposals import LogitsProposal as LogitsProposal
from ppl_diffusion.handlers.proposals import Step as Step
from ppl_diffusion.handlers.proposals import mean_prediction as mean_prediction
from ppl_diffusion.handlers.proposals import tiltable as tiltable
from ppl_diffusion.handlers.proposals import tilted as tilted
from ppl_diffusion.handlers.site import ProposedChain as ProposedChain
from ppl_diffusion.handlers.site import log_weight as log_weight
from ppl_diffusion.handlers.steer import steer as steer
from ppl_diffusion.handlers.steering import Steering as Steering
from ppl_diffusion.handlers.steering import as_steering as as_steering
from ppl_diffusion.handlers.twist import twist as twist
from ppl_diffusion.handlers.unroll import Unroll as Unroll
from ppl_diffusion.handlers.unroll import unroll as unroll
