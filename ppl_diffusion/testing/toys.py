"""Tiny chains with exact denoisers, for tests that enumerate everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers import MarkovDenoiser, TableDenoiser
from ppl_diffusion.denoisers.base import Denoiser, Kind, Wrapper
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import (
    Absorbing,
    Interpolating,
    InterpolatingKernel,
    Process,
    Schedule,
    Uniform,
)
from ppl_diffusion.potentials import Potential

PROCESSES = ("absorbing", "uniform", "skewed")
"""Names that :func:`toy_process` knows."""


def toy_process(name: str, vocab_size: int = 3, schedule: Schedule | None = None) -> Process:
    """Return a process by name; ``"skewed"`` has the prior ``(1, 2, ..., V)`` up to scale.

    :param name: one of :data:`PROCESSES`.
    :raises ValueError: if the name is unknown.
    """
    if name == "absorbing":
        return Absorbing(vocab_size, schedule)
    if name == "uniform":
        return Uniform(vocab_size, schedule)
    if name == "skewed":
        total = vocab_size * (vocab_size + 1) / 2
        return Interpolating([(v + 1) / total for v in range(vocab_size)], schedule)
    raise ValueError(f"unknown process {name!r}; choose one of {', '.join(PROCESSES)}.")


def random_joint(vocab_size: int, length: int, *, seed: int = 0, sharpness: float = 1.0) -> Tensor:
    """Return a random law of clean sequences, float64 ``(V,) * L``.

    :param sharpness: standard deviation of its log-probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size**length, generator=generator, dtype=torch.float64)
    return torch.softmax(sharpness * logits, 0).reshape([vocab_size] * length)


def toy_chain(
    process: str | Process = "absorbing",
    *,
    vocab_size: int = 3,
    length: int = 2,
    num_steps: int = 3,
    seed: int = 0,
    sharpness: float = 1.0,
    kind: Kind = "cavity",
    prompt: Tensor | None = None,
    **kernel_options: Any,
) -> ReverseChain:
    """Return a chain whose denoiser is exact for a random joint table.

    :param process: a process, or a name for :func:`toy_process`.
    :param vocab_size: number ``V`` of clean tokens (of a named process).
    :param sharpness: how far the table is from flat.
    :param kind: kind of the denoiser.
    :param prompt: tokens present from the start.
    :param kernel_options: of :class:`~ppl_diffusion.kernels.InterpolatingKernel`.
    """
    process = toy_process(process, vocab_size) if isinstance(process, str) else process
    joint = random_joint(process.vocab_size, length, seed=seed, sharpness=sharpness)
    denoiser = TableDenoiser(joint, process, kind=kind)
    kernel = InterpolatingKernel(process, denoiser, num_steps=num_steps, **kernel_options)
    return ReverseChain(kernel, length, prompt=prompt)


def toy_markov_chain(
    process: str | Process = "absorbing",
    *,
    vocab_size: int = 3,
    length: int = 5,
    num_steps: int = 4,
    seed: int = 0,
) -> ReverseChain:
    """Return a chain whose denoiser is exact for a random Markov chain along positions.

    :param process: a process, or a name for :func:`toy_process`.
    :param vocab_size: number ``V`` of clean tokens (of a named process).
    """
    process = toy_process(process, vocab_size) if isinstance(process, str) else process
    size = process.vocab_size
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size + 1, size, generator=generator, dtype=torch.float64)
    probs = torch.softmax(logits, -1)
    denoiser = MarkovDenoiser(probs[0], probs[1:], process)
    return ReverseChain(InterpolatingKernel(process, denoiser, num_steps=num_steps), length)


def toy_potential(
    vocab_size: int = 3, length: int = 2, *, seed: int = 1, scale: float = 1.0
) -> Potential:
    """Return a random log-potential, one number per clean sequence.

    :param scale: standard deviation of the log-potentials.
    """
    generator = torch.Generator().manual_seed(seed)
    table = scale * torch.randn([vocab_size] * length, generator=generator, dtype=torch.float64)
    return Potential(lambda x0: table[x0.unbind(-1)], name="toy")


class CountingDenoiser(Wrapper):
    """A denoiser that counts its calls and the rows it was asked about.

    :ivar calls: calls so far.
    :ivar rows: rows so far.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls = self.rows = 0
        self.adopt(denoiser, "conditions")

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return the denoiser's log-probabilities, ``(*batch, L, V)``."""
        self.calls += 1
        self.rows += tokens[..., 0].numel()
        return self.denoiser(tokens, t, **given)


def counted(chain: ReverseChain) -> tuple[ReverseChain, CountingDenoiser]:
    """Return the same chain around a counter, and the counter.

    :param chain: the chain (without batch dimensions).
    """
    counter = CountingDenoiser(chain.kernel.denoiser)
    kernel = chain.kernel.with_denoiser(counter)
    return ReverseChain(kernel, chain.length, prompt=chain.prompt, given=chain.given), counter
