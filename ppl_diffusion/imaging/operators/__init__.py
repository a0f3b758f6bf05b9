"""Measurement operators: what a camera does to an image, differentiable and drawn once."""

from ppl_diffusion.imaging.operators.base import Operator as Operator
from ppl_diffusion.imaging.operators.base import make_operator as make_operator
from ppl_diffusion.imaging.operators.base import operators as operators
from ppl_diffusion.imaging.operators.base import register as register
from ppl_diffusion.imaging.operators.blur import GaussianBlur as GaussianBlur
from ppl_diffusion.imaging.operators.blur import MotionBlur as MotionBlur
from ppl_diffusion.imaging.operators.blur import NonlinearBlur as NonlinearBlur
from ppl_diffusion.imaging.operators.inpainting import BoxInpainting as BoxInpainting
from ppl_diffusion.imaging.operators.inpainting import RandomInpainting as RandomInpainting
from ppl_diffusion.imaging.operators.inverses import adjoint as adjoint
from ppl_diffusion.imaging.operators.phase import PhaseRetrieval as PhaseRetrieval
from ppl_diffusion.imaging.operators.range import HighDynamicRange as HighDynamicRange
from ppl_diffusion.imaging.operators.resize import SuperResolution as SuperResolution
