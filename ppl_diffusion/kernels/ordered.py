"""Masked chains that reveal so many positions per step: first hitting, parallel, block by block.

The order in which positions are revealed is random, uniform and independent of the network; these
kernels count reveals instead of time. One position per step is first-hitting sampling (Zheng et
al. 2024, arXiv:2409.02908): the limit of ancestral sampling for infinitely many steps, and with the
exact denoiser the data law itself. Several per step are drawn in parallel from one prediction: an
approximation whose law this is the exact density of. Blocks finished from left to right are
semi-autoregressive decoding (Arriola et al. 2025, arXiv:2503.09573).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace, to_float64
from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.denoisers.prediction import Prediction
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.kernels.base import GIVEN, ORDERED, SAMPLE_ONLY, Carry, Kernel, SampledPath
from ppl_diffusion.kernels.events import reveal_ranks
from ppl_diffusion.kernels.masked_paths import (
    draw_path,
    flat_given,
    flat_paths,
    read_reveals,
    reveal_log_prob,
)
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.processes.base import Process, whole_number
from ppl_diffusion.processes.noise import uniforms

LEVELS = "levels"
"""Name of the carry entry with the noise level at which each position is revealed."""


class OrderedKernel(Kernel):
    """A masked chain with a fixed number of reveals per step.

    ``num_steps`` is ``length`` over the group size, rounded up in every block. Positions of a
    prompt are never revealed, so a prompted chain has idle steps, which cost nothing.

    :param process: an absorbing process.
    :param group_size: reveals per step; 1 is first hitting.
    :param block: positions per block, finished from left to right; None for one block.
    :param clock: at which time a denoiser that is not time-free predicts: ``"mean"``, where
        the next reveal out of ``n`` masks is expected, ``1 - alpha = n / (L + 1)`` (exact density;
        a prompt counts as revealed), or ``"sampled"``, the times of the
        reveals themselves, drawn anew in every chain (the exact limit of ancestral sampling, but
        the density of the tokens alone is an intractable integral: ``SAMPLE_ONLY``). They are the
        same chain if the denoiser is time-free.
    :raises CapabilityError: if the process is not absorbing.
    :raises ValueError: if a number or the clock is not usable.
    """

    capability = ORDERED
    can_hold = True

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        length: int,
        group_size: int = 1,
        block: int | None = None,
        clock: Literal["mean", "sampled"] = "mean",
    ) -> None:
        owner = type(self).__name__
        if not process.absorbing:
            raise CapabilityError(
                f"{owner}: only an absorbing process reveals positions one by one, which "
                f"{process!r} does not; take a masked prior, or another sampler."
            )
        if clock not in ("mean", "sampled"):
            raise ValueError(f"{owner}: clock must be 'mean' or 'sampled', got {clock!r}.")
        self.length = whole_number(length, f"{owner}: length")
        self.group_size = whole_number(group_size, f"{owner}: group_size")
        self.block = self.length if block is None else whole_number(block, f"{owner}: block")
        self.clock = clock
        starts = range(0, self.length, self.block)
        sizes = [min(self.block, self.length - start) for start in starts]
        groups = [-(-size // self.group_size) for size in sizes]
        self._block_of_step = np.repeat(np.arange(len(groups)), groups)
        self._first_step = np.concatenate([[0], np.cumsum(groups)[:-1]])
        later = _mean_times(process, self._masked_before()[1:], self.length)
        super().__init__(process, denoiser, np.concatenate([[1.0], later, [0.0]]))
        self._declare()

    def with_denoiser(self, denoiser: Denoiser) -> Self:
        """Return the same kernel around another denoiser, whose use of the time may differ."""
        new = super().with_denoiser(denoiser)
        new._declare()
        return new

    def _declare(self) -> None:
        self.capability = SAMPLE_ONLY if self._timed else ORDERED
        self.markov = not self._timed

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return self is other or (
            type(self) is type(other)
            and isinstance(other, OrderedKernel)
            and self.process is other.process
            and self.denoiser is other.denoiser
            and (self.length, self.group_size, self.block, self.clock)
            == (other.length, other.group_size, other.block, other.clock)
        )

    def start_carry(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry of a noisiest state; with a sampled clock it holds the reveal times."""
        self.check_length(tokens.shape[-1])
        carry = super().start_carry(tokens, generator, given=given)
        if self._timed:
            carry[LEVELS] = uniforms(tokens.shape, generator=generator, device=tokens.device)
        return carry

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> RevealStep:
        """Return the distribution of the next state."""
        self.check_step(k)
        tokens, order = carry["tokens"], carry.get(LEVELS)
        self.check_length(tokens.shape[-1])
        eligible = self._eligible(tokens, k)
        if not bool(eligible.any()):
            prediction: Tensor | Prediction = self._flat(tokens)
        elif order is None:
            prediction = self.predict(carry, k)
        else:
            prediction = self._predict_at_levels(carry, eligible)
        return RevealStep(
            tokens,
            prediction,
            eligible,
            self.group_size,
            order=order,
            fixed=fixed,
            validate_args=False,
        )

    def _predict_at_levels(self, carry: Carry, eligible: Tensor) -> Tensor:
        """Predict at each row's own next reveal."""
        tokens, level = carry["tokens"], torch.where(eligible, carry[LEVELS], 0.0).amax(-1)
        time = torch.as_tensor(self.process.schedule.time_from_log1m(level.log()))
        log_c = self.denoiser(tokens, time, **carry.get(GIVEN, {}))
        return clean_log_probs(log_c, tokens.shape, self.process.vocab_size)

    def prediction_time(self, carry: Carry, k: int) -> float | Tensor:
        """Return the time at which a state is predicted: one per row if their masks differ."""
        if self.denoiser.time_free:
            return float(self.times[k])
        masks = (carry["tokens"] == self.process.vocab_size).sum(-1)
        times: Tensor = _mean_times(self.process, masks, self.length)
        same = masks.numel() > 0 and bool((masks == masks.flatten()[0]).all())
        return float(times.flatten()[0]) if same else times

    def asks_denoiser(self, carry: Carry, k: int) -> bool:
        """Return whether step ``k`` from this carry costs a network call."""
        return bool(self._eligible(carry["tokens"], k).any())

    def sample_path(
        self,
        batch_shape: Sequence[int],
        length: int,
        *,
        prompt: Tensor | None = None,
        generator: torch.Generator | None = None,
        given: Mapping[str, Tensor] | None = None,
        probe: bool = False,
    ) -> SampledPath:
        """Draw whole paths from one sorted list of reveals per row."""
        shape = (*batch_shape, length)
        start = self._noisiest(shape, prompt, generator)
        levels, tokens = uniforms((2, *shape), generator=generator, device=self.device)
        step_of = self._steps_of(levels, start)
        time = self._times_of(levels, step_of)
        drawn = draw_path(self, start, step_of, time, tokens, given=given, probe=probe)
        if self.capability == SAMPLE_ONLY:
            return SampledPath(drawn.path, None, drawn.hidden_gradient)
        shown = self.process.shown(start, prompt)
        log_p = drawn.log_c + self._log_prob_of_order(shown, start.device)
        log_p = log_p + self._log_length(start, prompt)
        return SampledPath(drawn.path, log_p, drawn.hidden_gradient)

    def path_log_prob(
        self,
        path: Tensor,
        *,
        prompt: Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Score whole paths by their reveals.

        :raises IntractableLogProb: if the times of the reveals are latent (``clock="sampled"``
            with a denoiser that uses the time).
        """
        if self.capability == SAMPLE_ONLY:
            raise IntractableLogProb(
                f"{type(self).__name__}: with clock='sampled' and a denoiser that uses the time, "
                "the density of a path is an integral over reveal times; use clock='mean'."
            )
        self.check_length(path.shape[-1])
        rows, prompts = flat_paths(path, prompt)
        shown = self.process.shown(rows[:, 0], prompts)
        found = read_reveals(rows, self.process.vocab_size, shown)
        found = found._replace(valid=found.valid & self._legal_order(found.step_of, shown))
        flat = flat_given(self, given, path.shape[:-2])
        log_p = reveal_log_prob(self, rows, found, self.time_of_step, flat)
        log_p = log_p + self._log_prob_of_order(shown, path.device)
        return (log_p + self._log_length(rows[:, 0], prompts)).reshape(path.shape[:-2])

    @property
    def _timed(self) -> bool:
        return self.clock == "sampled" and not self.denoiser.time_free

    def _block_of_site(self, device: torch.device) -> Tensor:
        return torch.arange(self.length, device=device) // self.block

    @property
    def changes(self) -> tuple[str, ...]:
        """Reveals in groups or blocks, besides what the denoiser changes."""
        groups = f"{self.group_size} positions revealed from one prediction"
        blocks = f"blocks of {self.block} positions from left to right"
        own = ((groups, self.group_size > 1), (blocks, self.block < self.length))
        return (*super().changes, *(phrase for phrase, applies in own if applies))

    def check_length(self, length: int) -> None:
        """Refuse a length that the kernel was not built for."""
        if length != self.length:
            raise ValueError(
                f"{type(self).__name__}: built for {self.length} positions, got {length}; build "
                f"the kernel with length={length}."
            )

    def _masked_before(self) -> np.ndarray:
        """Return how many positions are masked before each step of an unprompted chain."""
        size = np.minimum(self.block, self.length - self._block_of_step * self.block)
        done = (np.arange(len(size)) - self._first_step[self._block_of_step]) * self.group_size
        later = np.maximum(self.length - (self._block_of_step + 1) * self.block, 0)
        masked: np.ndarray = size - done + later
        return masked

    def _eligible(self, tokens: Tensor, k: int) -> Tensor:
        inside = self._block_of_site(tokens.device) == int(self._block_of_step[k])
        return (tokens == self.process.vocab_size) & inside

    def _steps_of(self, levels: Tensor, start: Tensor) -> Tensor:
        """Return the step that reveals each position, -1 for the prompt."""
        free, block = start == self.process.vocab_size, self._block_of_site(start.device)
        flat = [x.reshape(-1, self.length) for x in (levels, free)]
        rank = reveal_ranks(flat[0], flat[1], block)
        before = flat[1].cumsum(-1) - flat[1].to(torch.int64)
        earlier = before[:, block * self.block]  # free positions of lower blocks
        first = torch.as_tensor(self._first_step, device=start.device)[block]
        step = first + (rank - earlier) // self.group_size
        return torch.where(flat[1], step, -1).reshape(start.shape)

    def _times_of(self, levels: Tensor, step_of: Tensor) -> Tensor:
        if self._timed:  # a group is predicted at the latest of these, that of its first reveal
            return torch.as_tensor(self.process.schedule.time_from_log1m(levels.log()))
        revealed = step_of.new_zeros(*step_of.shape[:-1], self.num_steps)
        revealed.scatter_add_(-1, step_of.clamp_min(0), (step_of >= 0).to(torch.int64))
        masks = revealed.flip(-1).cumsum(-1).flip(-1)  # before each step
        times: Tensor = _mean_times(
            self.process, masks.gather(-1, step_of.clamp_min(0)), self.length
        )
        return times

    def time_of_step(self, step_of: Tensor, step: Tensor) -> Tensor:
        """Return the time of a step of a path whose reveals are known, float64 ``(M,)``."""
        masks = (step_of >= step[:, None]).sum(-1)
        times: Tensor = _mean_times(self.process, masks, self.length)
        return times

    def _group_sizes(self, prompt: Tensor | None, device: torch.device) -> Tensor:
        """Return the free positions before, and the reveals in, each step: ``(2, *batch, T)``."""
        prompt = torch.full((self.length,), -1, device=device) if prompt is None else prompt
        free = (prompt < 0).to(torch.int64)
        per_block = free.new_zeros(*free.shape[:-1], len(self._first_step))
        per_block.index_add_(-1, self._block_of_site(device), free)
        block = torch.as_tensor(self._block_of_step, device=device)
        index = torch.arange(self.num_steps, device=device)
        index = index - torch.as_tensor(self._first_step, device=device)[block]
        left = (per_block[..., block] - index * self.group_size).clamp_min(0)
        return torch.stack([left, left.clamp_max(self.group_size)])

    def _log_prob_of_order(self, prompt: Tensor | None, device: torch.device) -> Tensor:
        n, m = self._group_sizes(prompt, device).to(torch.float64)
        subsets = torch.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma(n - m + 1)
        return -subsets.sum(-1)

    def _legal_order(self, step_of: Tensor, prompt: Tensor | None) -> Tensor:
        """Return whether every step reveals as many positions of its block as it must."""
        device = step_of.device
        wanted = self._group_sizes(prompt, device)[1]  # (T,) or (B, T)
        steps = torch.arange(self.num_steps, device=device)
        counts = (step_of[:, None] == steps[:, None]).sum(-1)
        block = torch.as_tensor(self._block_of_step, device=device)[step_of.clamp_min(0)]
        inside = block == self._block_of_site(device)
        return (counts == wanted).all(-1) & (inside | (step_of < 0)).all(-1)

    def _repr_options(self) -> str:
        block = "" if self.block == self.length else f", block={self.block}"
        return f", group_size={self.group_size}{block}"


def first_hitting(
    process: Process,
    denoiser: Denoiser,
    *,
    length: int,
    clock: Literal["mean", "sampled"] = "mean",
) -> OrderedKernel:
    """Return the chain that reveals one uniformly chosen position per step.

    :param process: an absorbing process.
    :param clock: see :class:`OrderedKernel`.
    """
    return OrderedKernel(process, denoiser, length=length, clock=clock)


def _mean_times(process: Process, masks: Array, length: int) -> Array:
    """Return the time at which the next of ``n`` masks is expected to be revealed, float64."""
    level = array_namespace(masks).log(to_float64(masks) / (length + 1))
    return to_float64(process.schedule.time_from_log1m(level))
