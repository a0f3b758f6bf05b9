"""Chains of the torch side in JAX: shipped priors, and whatever was trained there."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import torch

from ppl_diffusion import denoisers, distributions, kernels
from ppl_diffusion.arrays import Array
from ppl_diffusion.denoisers.oracles import MarkovDenoiser, TableDenoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.denoisers import Denoiser
from ppl_diffusion.numpyro.kernel import InterpolatingKernel
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.transformer import Transformer


def from_torch(chain: distributions.ReverseChain) -> ReverseChain:
    """Return a chain of the torch side as one of this side: the same law, within round-off.

    :param chain: a chain of an :class:`~ppl_diffusion.kernels.InterpolatingKernel` around a
        transformer, a table or a Markov chain.
    :raises CapabilityError: if its kernel or its network has no twin here.

    Example::

        chain = from_torch(ppl_diffusion.models.load("yeast-promoter").chain(num_steps=64))
    """
    kernel = chain.kernel
    if type(kernel) is not kernels.InterpolatingKernel or chain.given:
        raise CapabilityError(
            f"from_torch: {kernel!r} has no twin in JAX; chains of InterpolatingKernel without "
            "conditions have."
        )
    twin = InterpolatingKernel(
        kernel.process, _denoiser(kernel.denoiser), times=kernel.times, kappa=kernel.kappa
    )
    prompt = None if chain.prompt is None else jnp.asarray(chain.prompt.cpu().numpy())
    new = ReverseChain(twin, chain.length, prompt)
    return new.expand(tuple(chain.batch_shape))


@functools.singledispatch
def _denoiser(network: Any) -> Denoiser:
    raise CapabilityError(
        f"from_torch: {type(network).__name__} has no twin in JAX; a Transformer, a TableDenoiser "
        "and a MarkovDenoiser have. A network of your own is any pytree that can be called as "
        "denoiser(tokens, t)."
    )


@_denoiser.register
def _transformer(network: denoisers.Transformer) -> Denoiser:
    weights = {name: _array(value) for name, value in network.state_dict().items()}
    return Transformer(weights, network.config)


@_denoiser.register
def _table(network: TableDenoiser) -> Denoiser:
    return TableDenoiser(_array(network.joint), network.process, kind=network.kind)


@_denoiser.register
def _markov(network: MarkovDenoiser) -> Denoiser:
    arrays = _array(network.initial), _array(network.transition)
    return MarkovDenoiser(*arrays, network.process, kind=network.kind)


def _array(x: torch.Tensor) -> Array:
    return jnp.asarray(x.detach().cpu().numpy())
