"""A network that costs next to nothing, with a stopwatch: what remains is the engine."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel


class TrivialDenoiser:
    """The same logits at every position of every row.

    :param vocab_size: number of clean tokens ``V``.

    :ivar seconds: process time spent inside it.
    :ivar rows: rows it saw.
    """

    kind: Kind = "cavity"
    time_free = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        ranks = torch.arange(vocab_size, dtype=torch.float32)
        self.logits = torch.log_softmax(-((ranks + 1.0).log()), -1)
        self.seconds, self.rows = 0.0, 0

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return the logits, float32 ``(*batch, L, V)``."""
        started = time.process_time()
        output = self.logits.to(tokens.device).expand(*tokens.shape, -1)
        self.rows += tokens[..., 0].numel()
        self.seconds += time.process_time() - started
        return output


def trivial_chain(
    length: int, num_steps: int, vocab_size: int
) -> tuple[ReverseChain, TrivialDenoiser]:
    """Return a masked chain around a network that costs nothing, and that network.

    :param length: positions ``L``.
    :param num_steps: steps ``T``.
    :param vocab_size: number of clean tokens ``V``.
    """
    network = TrivialDenoiser(vocab_size)
    kernel = InterpolatingKernel(Absorbing(vocab_size), network, num_steps=num_steps)
    return ReverseChain(kernel, length), network


def share_of_first(x0: Tensor) -> Tensor:
    """Return a log-potential that costs nothing: four times the share of token 0, ``(*batch,)``."""
    return (x0 == 0).sum(-1) * (4.0 / x0.shape[-1])
