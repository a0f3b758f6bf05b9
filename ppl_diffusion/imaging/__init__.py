"""Images as token sequences: codecs, measurement operators, metrics and files."""

from ppl_diffusion.imaging.classifier import ClassifierConfig as ClassifierConfig
from ppl_diffusion.imaging.classifier import ImageClassifier as ImageClassifier
from ppl_diffusion.imaging.codec import CodecConfig as CodecConfig
from ppl_diffusion.imaging.codec import ImageCodec as ImageCodec
from ppl_diffusion.imaging.editing import Block as Block
from ppl_diffusion.imaging.editing import block_prompt as block_prompt
from ppl_diffusion.imaging.editing import outside_pixels as outside_pixels
from ppl_diffusion.imaging.measurement import Measurement as Measurement
from ppl_diffusion.imaging.measurement import measure as measure
from ppl_diffusion.imaging.operators.base import Operator as Operator
from ppl_diffusion.imaging.operators.base import make_operator as make_operator
from ppl_diffusion.imaging.style import StyleReward as StyleReward
from ppl_diffusion.imaging.style import style_statistics as style_statistics
