"""Effect handlers: change how chain sites are proposed or conditioned, never by stealth."""

from ppl_diffusion.handlers.clamp import ClampProposal as ClampProposal
from ppl_diffusion.handlers.clamp import clamp as clamp
from ppl_diffusion.handlers.steer import Steering as Steering
from ppl_diffusion.handlers.steer import log_weight as log_weight
from ppl_diffusion.handlers.steer import steer as steer
from ppl_diffusion.handlers.twist import GradientProposal as GradientProposal
from ppl_diffusion.handlers.twist import LogitsProposal as LogitsProposal
from ppl_diffusion.handlers.twist import twist as twist
from ppl_diffusion.handlers.unroll import Unroll as Unroll
from ppl_diffusion.handlers.unroll import unroll as unroll
