"""Model programs: priors over sequences as Pyro programs, with shipped weights.

What needs a network is imported when it is first used, so that a list of what is shipped is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ppl_diffusion.models.cards import available as available
from ppl_diffusion.models.cards import codecs as codecs
from ppl_diffusion.models.cards import list_classifiers as list_classifiers
from ppl_diffusion.models.cards import list_oracles as list_oracles
from ppl_diffusion.models.cards import list_text_classifiers as list_text_classifiers
from ppl_diffusion.models.cards import names as names
from ppl_diffusion.models.cards import read_card as read_card

if TYPE_CHECKING:
    from ppl_diffusion.models.forward_learned import ForwardLearned as ForwardLearned
    from ppl_diffusion.models.forward_learned import UniformForwardLearned as UniformForwardLearned
    from ppl_diffusion.models.image_files import load_classifier as load_classifier
    from ppl_diffusion.models.image_files import load_codec as load_codec
    from ppl_diffusion.models.image_files import load_codec_error as load_codec_error
    from ppl_diffusion.models.latent import LatentDiffusion as LatentDiffusion
    from ppl_diffusion.models.library import load as load
    from ppl_diffusion.models.masked import MaskedDiffusion as MaskedDiffusion
    from ppl_diffusion.models.oracles import Oracle as Oracle
    from ppl_diffusion.models.oracles import load_oracle as load_oracle
    from ppl_diffusion.models.own_training import train as train
    from ppl_diffusion.models.program import DiffusionProgram as DiffusionProgram
    from ppl_diffusion.models.samplers import SAMPLERS as SAMPLERS
    from ppl_diffusion.models.samplers import SamplerSettings as SamplerSettings
    from ppl_diffusion.models.samplers import make_chain as make_chain
    from ppl_diffusion.models.text_reward import TextClassifier as TextClassifier
    from ppl_diffusion.models.text_reward import load_text_classifier as load_text_classifier
    from ppl_diffusion.models.uniform import UniformDiffusion as UniformDiffusion

_HOMES = {
    "DiffusionProgram": "program",
    "ForwardLearned": "forward_learned",
    "LatentDiffusion": "latent",
    "MaskedDiffusion": "masked",
    "Oracle": "oracles",
    "SAMPLERS": "samplers",
    "SamplerSettings": "samplers",
    "TextClassifier": "text_reward",
    "UniformDiffusion": "uniform",
    "UniformForwardLearned": "forward_learned",
    "load": "library",
    "load_classifier": "image_files",
    "load_codec": "image_files",
    "load_codec_error": "image_files",
    "load_oracle": "oracles",
    "load_text_classifier": "text_reward",
    "make_chain": "samplers",
    "train": "own_training",
}

__all__ = [
    *_HOMES,
    "available",
    "codecs",
    "list_classifiers",
    "list_oracles",
    "list_text_classifiers",
    "names",
    "read_card",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
