"""Networks and exact oracles that predict clean tokens, and their evaluation."""

from ppl_diffusion.denoisers.base import Denoiser as Denoiser
from ppl_diffusion.denoisers.base import Kind as Kind
from ppl_diffusion.denoisers.conditional import Guided as Guided
from ppl_diffusion.denoisers.conditional import Labelled as Labelled
from ppl_diffusion.denoisers.conditional import Paired as Paired
from ppl_diffusion.denoisers.config import TransformerConfig as TransformerConfig
from ppl_diffusion.denoisers.direct import DirectDenoiser as DirectDenoiser
from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser as EvaluatedDenoiser
from ppl_diffusion.denoisers.filters import LettersOnly as LettersOnly
from ppl_diffusion.denoisers.filters import Nucleus as Nucleus
from ppl_diffusion.denoisers.filters import Temperature as Temperature
from ppl_diffusion.denoisers.latent import LatentDenoiser as LatentDenoiser
from ppl_diffusion.denoisers.latent import LatentSpec as LatentSpec
from ppl_diffusion.denoisers.latent_views import AtLatent as AtLatent
from ppl_diffusion.denoisers.latent_views import CodeDenoiser as CodeDenoiser
from ppl_diffusion.denoisers.oracles import MarkovDenoiser as MarkovDenoiser
from ppl_diffusion.denoisers.oracles import TableDenoiser as TableDenoiser
from ppl_diffusion.denoisers.oracles import emission as emission
from ppl_diffusion.denoisers.prediction import Prediction as Prediction
from ppl_diffusion.denoisers.pretrained import MaskedLanguageModel as MaskedLanguageModel
from ppl_diffusion.denoisers.topk import LatentMixture as LatentMixture
from ppl_diffusion.denoisers.topk import dense_latents as dense_latents
from ppl_diffusion.denoisers.topk import top_k_latents as top_k_latents
from ppl_diffusion.denoisers.transformer import Transformer as Transformer
from ppl_diffusion.denoisers.uniform_nelbo import (
    uniform_nelbo_from_hidden as uniform_nelbo_from_hidden,
)
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_terms as uniform_nelbo_terms
