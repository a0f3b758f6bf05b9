"""A reverse chain whose network gives the law of the next state itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.checks import clean_log_probs, log_total, require_tensor
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import GIVEN, TOKENS, Carry, Kernel, time_grid
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.processes.base import Process


class DirectKernel(Kernel):
    """A factorised chain of a fixed number of steps, each a categorical that a network returns.

    Of learned noise (FLDD, arXiv 2605.18204) that is the only reverse chain there is: how a state
    came to be depends on all of the clean sequence, so that no prediction of single tokens can be
    put through a bridge. The number of steps is the one that the network was trained with.

    Beside the law the network predicts the clean tokens. The chain does not read that; look-aheads
    do, and any prediction leaves the evidence of a particle method unbiased.

    Tokens that are known are no states that stay, as a site may be hidden in the state of another
    token: a prompt is refused, and observed tokens are a likelihood of the clean sequence.

    :param process: whose prior the chain starts from, and whose states it has.
    :param denoiser: both, ``(*batch, L, S + V)``, see
        :class:`~ppl_diffusion.denoisers.DirectDenoiser`; asked at the times ``1, (T - 1) / T ..
        1 / T``.
    :param num_steps: number ``T`` of steps.
    :raises CapabilityError: if the denoiser has other columns or another vocabulary, or sequences
        have several lengths.
    :raises ValueError: if there is no step.
    """

    def __init__(self, process: Process, denoiser: Denoiser, num_steps: int) -> None:
        super().__init__(process, denoiser, time_grid(num_steps, None, type(self).__name__))
        columns, wanted = getattr(denoiser, "output_size", None), _columns(process)
        if columns != wanted:
            raise CapabilityError(
                f"DirectKernel: the denoiser must return the law of {process.num_states} states "
                f"and a prediction of {process.vocab_size} tokens side by side, output_size = "
                f"{wanted}, but has {columns or 'no output_size'}; see DirectDenoiser."
            )
        if process.padding is not None:
            raise CapabilityError("DirectKernel: all sequences must have one length.")

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return self is other or (
            type(self) is type(other)
            and isinstance(other, DirectKernel)
            and self.process is other.process
            and self.denoiser is other.denoiser
            and self.num_steps == other.num_steps
        )

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> StateStep:
        """Return the distribution of the next state, see :class:`DirectKernel`.

        :raises CapabilityError: if positions are to stay as they are.
        :raises ValueError: if the network returns another shape, or no distribution.
        """
        self.check_step(k)
        if fixed is not None and bool(fixed.any()):
            raise _no_prompt()
        log_v = self._asked(carry, k)[..., : self.process.num_states].to(torch.float64)
        log_v = log_v - log_total(log_v)
        if k == self.num_steps - 1 and self.process.num_states > self.process.vocab_size:
            # What is drawn last is a sequence, whatever the network leaves to the mask.
            none = torch.full_like(log_v[..., self.process.vocab_size :], -torch.inf)
            log_v = torch.cat([log_v[..., : self.process.vocab_size], none], -1)
        return StateStep(log_v, tokens=carry[TOKENS], validate_args=False)

    def _noisiest(
        self, shape: Sequence[int], prompt: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        if prompt is not None and bool((prompt >= 0).any()):
            raise _no_prompt()
        return super()._noisiest(shape, None, generator)

    def _asked(self, carry: Carry, k: int) -> Tensor:
        tokens = carry[TOKENS]
        output = self.denoiser(tokens, self.prediction_time(carry, k), **carry.get(GIVEN, {}))
        expected = (*tokens.shape, _columns(self.process))
        require_tensor(output, expected)
        if output.shape != expected:
            raise ValueError(
                f"the denoiser returned shape {tuple(output.shape)}, expected {expected}."
            )
        return output

    def cavity_log_probs(self, carry: Carry, k: int) -> Tensor:
        """:raises CapabilityError: always: the chain has no prediction that a bridge could take."""
        raise CapabilityError(
            "a DirectKernel draws the next state itself and has no prediction of clean tokens that "
            "a bridge could take; use a method that needs samples and densities alone, such as smc."
        )

    def posterior_mean(self, carry: Carry, k: int) -> Tensor:
        """Return what the look-ahead predicts, float64 ``(*batch, L, V)``."""
        log_x0 = self._asked(carry, k)[..., self.process.num_states :]
        return clean_log_probs(log_x0, carry[TOKENS].shape, self.process.vocab_size)

    def asks_denoiser(self, carry: Carry, k: int) -> bool:
        """Return that every step costs a network call: a state without masks moves too."""
        return True


def _columns(process: Process) -> int:
    return process.num_states + process.vocab_size


def _no_prompt() -> CapabilityError:
    return CapabilityError(
        "DirectKernel: a known token does not stay in a chain of learned noise, whose states may "
        "hide it as another one; give it as a likelihood of the clean sequence instead."
    )
