"""Style: statistics of the feature maps of a frozen network, compared with those of one image.

With maps ``F_l (c, hw)`` of layer ``l`` (Gatys et al. 2016; means and deviations as in Huang and
Belongie 2017, arXiv 1703.06868)::

    s_l = F_l F_l^T / hw    ("gram")     or     (mean_hw F_l, sd_hw F_l)    ("moments")
    D(u, r) = mean_l ||s_l(u) - s_l(r)||^2 / ||s_l(r)||^2,      log G(x) = - D(G(C[x]), r) / T

Where things stand is forgotten, what they are made of is kept. The temperature ``T`` is declared:
this is a reward, not the likelihood of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ppl_diffusion.imaging.measurement import Decoder
from ppl_diffusion.potentials.embedded import EmbeddedPotential

Statistics = Literal["moments", "gram"]
Features = Callable[[Tensor], Sequence[Tensor]]
_SMALL = 1e-6  # of a variance: the slope of a root is infinite at zero, where a map is constant


def style_statistics(maps: Sequence[Tensor], kind: Statistics = "moments") -> list[Tensor]:
    """Return the statistics of feature maps, layer by layer, differentiable.

    :param maps: ``(*n, c, h, w)`` each.
    :param kind: ``"moments"`` gives ``(*n, 2c)``, ``"gram"`` ``(*n, c * c)``.
    :raises ValueError: if the kind is unknown.
    """
    if kind not in get_args(Statistics):
        raise ValueError(f"style: statistics are 'moments' or 'gram', got {kind!r}.")
    return [_moments(layer) if kind == "moments" else _gram(layer) for layer in maps]


class StyleReward(EmbeddedPotential):
    """Minus the distance of style to a reference image, over a temperature.

    :param codec: decodes embeddings to images.
    :param features: ``images (*n, C, H, W) -> feature maps (*n, c, h, w)`` of a frozen network,
        such as :meth:`ImageClassifier.features`.
    :param reference: the image whose style is wanted, ``(C, H, W)``.
    :param temperature: distance per nat; the lower, the stronger the tilt.
    :param statistics: ``"moments"`` or ``"gram"``.
    :raises ValueError: if the temperature is not positive, the statistics are unknown, the
        features are no maps, or all those of a layer vanish on the reference.

    Example::

        style = StyleReward(codec, classifier.features, image, temperature=0.05)
        SMC(prior.chain(16), style, method="aps-smc", num_particles=64).run(seed=0)
    """

    def __init__(
        self,
        codec: Decoder,
        features: Features,
        reference: Tensor,
        *,
        temperature: float = 0.1,
        statistics: Statistics = "moments",
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"StyleReward: temperature must be positive, got {temperature}.")
        self.codec, self.features, self.temperature = codec, features, float(temperature)
        self.statistics: Statistics = statistics
        with torch.no_grad():
            maps = features(reference)
            _check_maps(maps, features)
            self._wanted = style_statistics(maps, statistics)
        self._scales = [float(wanted.square().sum()) for wanted in self._wanted]
        if not all(scale > 0 for scale in self._scales):
            raise ValueError(
                "StyleReward: all features of a layer vanish on the reference, which has no style "
                "to compare with; choose another image, or other layers."
            )
        super().__init__(self._log_g, codec.codebook, name=f"style / {temperature:g}")

    def distance(self, images: Tensor) -> Tensor:
        """Return the distance of style of images to the reference, ``(*n,)``, differentiable.

        :param images: ``(*n, C, H, W)`` in [-1, 1].
        """
        found = style_statistics(self.features(images), self.statistics)
        layers = zip(found, self._wanted, self._scales, strict=True)
        return torch.stack([(s - r).square().sum(-1) / scale for s, r, scale in layers]).mean(0)

    def _log_g(self, embeddings: Tensor) -> Tensor:
        images = self.codec.decode_embedded(embeddings)
        return -self.distance(images) / self.temperature


def _check_maps(maps: Any, features: Any) -> None:
    whole = isinstance(maps, list | tuple) and len(maps) > 0
    if whole and all(isinstance(layer, Tensor) and layer.ndim >= 3 for layer in maps):
        return
    name = getattr(features, "__name__", type(features).__name__)
    advice = f"{name}.features" if hasattr(features, "features") else "a function that does"
    raise ValueError(
        f"StyleReward: features must return a list of feature maps, (*n, c, h, w) each, which "
        f"{name} does not; pass {advice}."
    )


def _moments(layer: Tensor) -> Tensor:
    flat = layer.flatten(-2)
    mean = flat.mean(-1)
    variance = (flat - mean[..., None]).square().mean(-1)
    return torch.cat([mean, (variance + _SMALL).sqrt()], -1)


def _gram(layer: Tensor) -> Tensor:
    flat = layer.flatten(-2)
    return (flat @ flat.mT / flat.shape[-1]).flatten(-2)
