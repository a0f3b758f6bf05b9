"""The ways of restoring an image that are compared: same prior, same codec, same measurement.

A restorer takes a :class:`Problem` and a seed, and returns a :class:`Restored`. Nobody but the
ceiling looks at the truth, and nobody but split Gibbs needs the prior of the uniform process::

    restored = restorers(num_samples=16)["g2d2-star"](problem, 0)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.imaging.codec_error import CodecError, MeasuredWithError
from ppl_diffusion.imaging.measurement import Measurement
from ppl_diffusion.inference import (
    G2D2,
    SMC,
    AnchoredPosteriorSampler,
    AnchoredSMC,
    BestOfN,
    Bootstrap,
    ClassifierGuidance,
    Method,
    RelaxedDPS,
    SoftValueGuidance,
    SplitGibbs,
)
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.models import DiffusionProgram
from ppl_diffusion.smc.posterior import ParticlePosterior

GAMMA, ZETA, RESCALED_ZETA = 0.06, 0.3, 6.0
"""Strengths of guidance, chosen on other images than those that are compared: at 1 the evidence is
counted once for each site that a step moves, and at little noise a first step reveals them all."""


LONG = 100
"""Inner iterations of the published settings."""
NUM_DRAWS = 256
"""Draws of an image, where the error of the codec is one more thing that is random."""


@dataclass(frozen=True)
class Restored:
    """What a restorer found, and what it cost.

    :param images: ``(n, C, H, W)``.
    :param weights: of the images, ``(n,)``; they sum to one.
    :param denoiser_rows: states that the prior's network saw.
    :param decoder_forward: points of the embedding space that were decoded.
    :param decoder_backward: points that a gradient was taken at, each direction of a Jacobian being
        one.
    :param seconds: processor time.
    :param tokens: the sequences, int64 ``(n, L)``, or None where there are none.
    :param exact: whether the weights are exact for a declared law.
    :param log_evidence: the estimate, or None.
    :param centre: the mean where it is known better than by the images, ``(C, H, W)``.
    """

    images: Tensor
    weights: Tensor
    denoiser_rows: int
    decoder_forward: int
    decoder_backward: int
    seconds: float
    tokens: Tensor | None = None
    exact: bool = False
    log_evidence: float | None = None
    centre: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The weighted mean image, ``(C, H, W)``."""
        if self.centre is not None:
            return self.centre
        return (self.weights[:, None, None, None] * self.images).sum(0)


class Problem(NamedTuple):
    """An image, how it was measured, and what is known before.

    :param prior_uniform: the prior of the uniform process, for methods that need one.
    :param truth: what was measured, ``(C, H, W)``; read by the ceiling alone.
    """

    prior: DiffusionProgram
    prior_uniform: DiffusionProgram | None
    codec: ImageCodec
    measurement: Measurement
    truth: Tensor


class Restorer(Protocol):
    """A way of restoring an image."""

    def __call__(self, problem: Problem, seed: int) -> Restored: ...


class CountedCodec:
    """A codec that counts what it decodes, and what is differentiated.

    :param codec: the codec.

    :ivar forward: points decoded so far.
    :ivar backward: points that a gradient came back to.
    """

    def __init__(self, codec: ImageCodec) -> None:
        self.codec, self.codebook = codec, codec.codebook
        self.forward = self.backward = 0

    def decode_embedded(self, embeddings: Tensor) -> Tensor:
        """Return the images of embeddings, as the codec does."""
        rows = embeddings[..., 0, 0].numel()
        self.forward += rows
        images = self.codec.decode_embedded(embeddings)
        if images.requires_grad:
            images.register_hook(lambda gradient: self._came_back(rows))
        return images

    def _came_back(self, rows: int) -> None:
        self.backward += rows


@dataclass(frozen=True)
class ByMethod:
    """Restore by a method of inference.

    :param method: the method.
    :param num_samples: particles.
    :param num_steps: steps of the chain.
    :param ordered: reveal a number of tokens per step, not those whose time has come.
    :param uniform: the chain is that of the uniform process.
    :param error: what the codec leaves out, as a part of the model; None takes decoded tokens for
        images.
    """

    method: Method
    num_samples: int
    num_steps: int
    ordered: bool = False
    uniform: bool = False
    error: CodecError | None = None

    def chain(self, prior: DiffusionProgram) -> ReverseChain:
        """Return the chain that particles move by."""
        if not self.ordered:
            return prior.chain(num_steps=self.num_steps)
        size = -(-prior.length // self.num_steps)
        kernel = OrderedKernel(prior.process, prior.denoiser, length=prior.length, group_size=size)
        return prior.around(kernel)

    def __call__(self, problem: Problem, seed: int) -> Restored:
        """Return the particles as images.

        :raises ValueError: if the method needs the prior of the uniform process, and there is none.
        """
        prior, prior_uniform, codec, measurement, _ = problem
        if self.uniform and prior_uniform is None:
            raise ValueError(f"{self.method.name} needs the prior of the uniform process.")
        chain = self.chain(prior_uniform if self.uniform and prior_uniform else prior)
        counted: Any = CountedCodec(codec)
        model = measurement if self.error is None else MeasuredWithError(measurement, self.error)
        started = time.process_time()
        posterior = SMC(
            chain,
            model.potential(counted),
            method=self.method,
            num_particles=self.num_samples,
            store_path=False,
        ).run(seed=seed)
        seconds = time.process_time() - started
        # Directions of a Jacobian pass in batches that no hook sees.
        decoded = int(posterior.settings.get("num_decoded", 0))
        backward = max(counted.backward, decoded if _closed(self.method) else 0)
        restored = _restored(posterior, codec, counted.forward, backward, seconds)
        if isinstance(model, Measurement):
            return restored
        return _with_draws(restored, model, seed)


def _with_draws(restored: Restored, model: MeasuredWithError, seed: int) -> Restored:
    """Return draws of the image with the error of the codec, and the mean of its law."""
    source = torch.Generator().manual_seed(seed)
    rows = restored.weights.double().multinomial(NUM_DRAWS, replacement=True, generator=source)
    images = restored.images
    return replace(
        restored,
        images=model.sample(images[rows], generator=source),
        weights=torch.full((NUM_DRAWS,), 1 / NUM_DRAWS).to(images),
        centre=torch.einsum("n,nchw->chw", restored.weights, model.expected(images)),
        tokens=None if restored.tokens is None else restored.tokens[rows],
    )


def _closed(method: Method) -> bool:
    return getattr(method, "inner", None) in ("cavi", "gauss-newton")


def _restored(
    posterior: ParticlePosterior, codec: ImageCodec, forward: int, backward: int, seconds: float
) -> Restored:
    tokens = posterior.x0[0].to(codec.codebook.device)
    with torch.no_grad():
        images = codec.decode(tokens)
    evidence = float(posterior.log_evidence[0])
    return Restored(
        images=images,
        weights=posterior.log_weights[0].exp().to(images),
        denoiser_rows=posterior.num_evaluations,
        decoder_forward=forward,
        decoder_backward=backward,
        seconds=seconds,
        tokens=tokens,
        exact=posterior.exact,
        log_evidence=evidence if posterior.exact else None,
    )


def pseudo_inverse(problem: Problem, seed: int) -> Restored:
    """Return the operator's own inverse, which knows no prior: one image."""
    started = time.process_time()
    seen = problem.measurement
    image = seen.operator.pseudo_inverse(seen.y)[None]
    return _single(image, time.process_time() - started)


def codec_ceiling(problem: Problem, seed: int) -> Restored:
    """Return the truth as the codec knows it: what no method that writes tokens can beat by far."""
    started = time.process_time()
    tokens = problem.codec.encode(problem.truth[None])
    image = problem.codec.decode(tokens)
    return _single(image, time.process_time() - started, tokens)


def _single(image: Tensor, seconds: float, tokens: Tensor | None = None) -> Restored:
    return Restored(image, torch.ones(1).to(image), 0, 0, 0, seconds, tokens)


def restorers(
    num_samples: int = 16,
    num_steps: int = 8,
    num_iterations: int = 30,
    num_particles: int = 32,
    error: CodecError | None = None,
) -> dict[str, Restorer]:
    """Return every way of restoring by name.

    :param num_samples: samples of methods that nothing weighs.
    :param num_steps: steps of chains; methods whose steps cost next to nothing get twice as many.
    :param num_iterations: inner iterations ``J``; the published preset keeps its own 100.
    :param num_particles: particles of methods that are weighed.
    :param error: adds forms that end in ``+error`` of all but the references, for which what the
        codec leaves out is a part of the model.
    """
    found: dict[str, Restorer] = {
        **_anchored(num_samples, num_steps, num_iterations),
        **_weighed(num_particles, num_steps),
        **_rivals(num_samples, num_steps, num_iterations),
        "prior": ByMethod(BestOfN(keep=num_samples), num_samples, 2 * num_steps),
        "pseudo-inverse": pseudo_inverse,
        "codec-ceiling": codec_ceiling,
    }
    if error is None:
        return found
    with_error = {
        f"{name}+error": replace(restorer, error=error)
        for name, restorer in found.items()
        if isinstance(restorer, ByMethod) and name != "prior"
    }
    return {**found, **with_error}


ABLATIONS: dict[str, dict[str, Any]] = {
    "aps": {},
    "aps order=prior": {"order": "prior"},
    "aps order=random": {"order": "random"},
    "aps quantiser=soft": {"quantiser": "soft"},
    "aps quantiser=gumbel": {"quantiser": "gumbel"},
    "aps quantiser=entropy-mix": {"quantiser": "entropy-mix"},
    "aps kl_weight=0": {"kl_weight": 0.0},
    "aps keep=last": {"keep": "last"},
    "aps token=sample": {"token": "sample"},
}
"""Options of anchored posterior sampling, one changed at a time."""


def _anchored(size: int, steps: int, iterations: int) -> dict[str, Restorer]:
    found: dict[str, Restorer] = {
        "aps-published": ByMethod(
            AnchoredPosteriorSampler(preset="published"), size, steps, ordered=True
        )
    }
    # Of what the published settings owe to their norm.
    squared = AnchoredPosteriorSampler(preset="published", loss="likelihood")
    found["aps-squared"] = ByMethod(squared, size, steps, ordered=True)
    for name, options in ABLATIONS.items():
        method = AnchoredPosteriorSampler(num_iterations=iterations, **options)
        found[name] = ByMethod(method, size, steps, ordered=True)
    # As many gradients as the published settings.
    longer = AnchoredPosteriorSampler(num_iterations=LONG)
    found[f"aps-{LONG}"] = ByMethod(longer, size, steps, ordered=True)
    # No more gradients in all than one restoration by the published settings.
    short = AnchoredPosteriorSampler(num_iterations=iterations)
    few = max(1, LONG // max(1, iterations))
    found["aps-equal"] = ByMethod(short, few, steps, ordered=True)
    found["mean-field"] = ByMethod(
        AnchoredPosteriorSampler(
            inner="gauss-newton", num_iterations=max(1, iterations // 10), token="sample"
        ),
        size,
        steps,
        ordered=True,
    )
    return found


def _weighed(size: int, steps: int) -> dict[str, Restorer]:
    return {
        "aps-smc": ByMethod(AnchoredSMC(), size, steps, ordered=True),
        "aps-smc policy": ByMethod(AnchoredSMC(variant="policy"), size, 2 * steps, ordered=True),
        "relaxed-dps-smc": ByMethod(
            RelaxedDPS(weighted=True, zeta=ZETA), size, 2 * steps, ordered=True
        ),
        "smc": ByMethod(Bootstrap(), size, 2 * steps, ordered=True),
    }


def _rivals(size: int, steps: int, iterations: int) -> dict[str, Restorer]:
    star = G2D2(num_iterations=iterations)
    markov = G2D2(num_iterations=iterations, transition="markov")
    svdd = SoftValueGuidance(num_children=16, alpha=0.0, weighted=False)
    sweeps = SplitGibbs(num_sweeps=10, num_prior_steps=steps, num_moves=100, last_time=1e-3)
    return {
        "g2d2-star": ByMethod(star, size, steps),
        "g2d2-markov": ByMethod(markov, size, steps),
        "split-gibbs": ByMethod(sweeps, size, steps, uniform=True),
        "d-cbg": ByMethod(ClassifierGuidance(gamma=GAMMA), size, 2 * steps),
        "relaxed-dps": ByMethod(RelaxedDPS(rescale=True, zeta=RESCALED_ZETA), size, 2 * steps),
        "svdd-pm": ByMethod(svdd, size, 2 * steps),
    }
