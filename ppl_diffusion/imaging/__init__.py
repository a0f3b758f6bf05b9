"""Images as token sequences: codecs, measurement operators, metrics and files."""

from ppl_diffusion.imaging.classifier import ClassifierConfig as ClassifierConfig
from ppl_diffusion.imaging.classifier import ImageClassifier as ImageClassifier
from ppl_diffusion.imaging.codec import CodecConfig as CodecConfig
from ppl_diffusion.imaging.codec import ImageCodec as ImageCodec
