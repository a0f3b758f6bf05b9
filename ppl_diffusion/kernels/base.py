"""What every reverse kernel is: a process, a denoiser, a time grid, and a law for each step."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser, move
from ppl_diffusion.denoisers.checks import (
    check_denoiser,
    clean_log_probs,
    require_columns,
    require_rows,
)
from ppl_diffusion.denoisers.prediction import (
    DensePrediction,
    HeadPrediction,
    Prediction,
    prefers_head,
)
from ppl_diffusion.kernels.blocks import (
    TOKENS,
    BlockSpec,
    Value,
    flattened,
    split,
    tokens_of,
    width,
)
from ppl_diffusion.kernels.completions import (
    BridgedCompletions,
    Completions,
    MaskedCompletions,
    TableCompletions,
)
from ppl_diffusion.kernels.start_step import StartStep
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.base import Process, whole_number
from ppl_diffusion.processes.mixture import log_posterior_mean, posterior_to_cavity
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.processes.padded import Padded

FACTORISED = "FACTORISED"
"""Capability of a kernel whose step has an exact density, a product over positions."""

ORDERED = "ORDERED"
"""Capability of a kernel that draws *which* positions move, with an exact density."""

SAMPLE_ONLY = "SAMPLE_ONLY"
"""Capability of a kernel that can be sampled but has no tractable density."""

GIVEN = "given"
"""Key of the carry: what the chain is conditioned on, a dict of tensors ``(*batch, *event)``."""

Carry = dict[str, Any]


class SampledPath(NamedTuple):
    """A path that was drawn in one go.

    :param path: int64 ``(*batch, T + 1, L)``.
    :param log_prob: its log-probability, float64 ``(*batch,)``, or None where it has no density.
    :param hidden_gradient: whether the prediction depended on a tensor that wants a gradient.
    """

    path: Tensor
    log_prob: Tensor | None
    hidden_gradient: bool = False


class Kernel(ABC):
    """A reverse chain, one step at a time.

    Step ``k`` goes from ``times[k]`` to ``times[k + 1]``; ``times`` runs from 1 (noise) to 0.
    The carry is a dict of arrays, batch dimensions first: ``carry["tokens"]`` holds the states,
    int64 ``(*batch, L)``, ``carry["given"]`` the conditions of a denoiser that reads some. It is
    made by :meth:`start_carry` alone, and whatever it remembers is gathered with its particle.

    :param denoiser: predictor of clean tokens; its ``kind`` decides whether its output is
        converted to the cavity distribution a kernel needs.
    :param times: ``T + 1`` decreasing times from 1 to 0.

    :ivar capability: :data:`FACTORISED`, :data:`ORDERED` or :data:`SAMPLE_ONLY`.
    :ivar markov: whether a step's law depends on the tokens alone (and on conditions); if not, the
        carry holds more, and only a whole path has a density.
    :ivar blocks: what a step draws beside the tokens, by name. Its ``sample`` then returns a dict
        with ``"tokens"`` and the blocks, its ``log_prob`` takes that dict and is their joint
        density; a kernel with blocks is not Markov, as its carry remembers them.
    """

    capability: str = FACTORISED
    markov: bool = True
    blocks: Mapping[str, BlockSpec] = MappingProxyType({})

    def __init__(self, process: Process, denoiser: Denoiser, times: np.ndarray) -> None:
        check_denoiser(process, denoiser)
        self.process = process
        self.denoiser = denoiser
        self.times = times
        self.alphas = np.asarray(process.schedule.alpha(times), dtype=np.float64)

    def with_denoiser(self, denoiser: Denoiser) -> Self:
        """Return the same kernel around another denoiser (for instance a caching wrapper).

        :raises CapabilityError: if it does not fit the process.
        """
        check_denoiser(self.process, denoiser)
        new = copy.copy(self)
        new.denoiser = denoiser
        return new

    @abstractmethod
    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""

    @abstractmethod
    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> TorchDistribution:
        """Return the distribution of the next state, event shape ``(L,)``.

        :param k: step index, 0 (noisiest) to ``num_steps - 1``.
        :param fixed: bool ``(*batch, L)``, positions that stay with probability one and do not
            enter the density (a prompt).
        :raises ValueError: if ``k`` is no step of the grid, or the denoiser misbehaves.
        """

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives, hence where chains begin; the CPU if it does not say."""
        parameters = getattr(self.denoiser, "parameters", tuple)
        first = next(iter(parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def to(self, device: torch.device | str) -> Self:
        """Move the networks, in place as modules do, where they can be moved."""
        move(self.denoiser, device)
        return self

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return len(self.times) - 1

    @property
    def has_path_density(self) -> bool:
        """Whether paths, of the tokens and all blocks, have a density."""
        return self.capability != SAMPLE_ONLY

    def width(self, length: int) -> int:
        """Return the number ``W`` of entries of a flat state, ``L`` where there are no blocks.

        :param length: number ``L`` of tokens.
        """
        return width(self.blocks, length)

    def flat(self, value: Value) -> Tensor:
        """Return tokens and blocks side by side, ``(*batch, W)``; tokens alone as they are.

        :param value: what a step drew, or a carry, which holds it.
        """
        return flattened(value, self.blocks)

    def split(self, flat: Tensor) -> Value:
        """Return a flat state as steps draw it: states, or a dict of blocks.

        :param flat: ``(*batch, W)``.
        """
        beside = sum(spec.size for spec in self.blocks.values())
        return split(flat, self.blocks, flat.shape[-1] - beside)

    @property
    def can_hold(self) -> bool:
        """Whether known tokens of the clean sequence stay once they are there (a clamp)."""
        return self.capability == ORDERED

    @property
    def parts(self) -> bool:
        """Whether copies of a particle part again: not where their steps are not random."""
        return True

    @property
    def claim(self) -> str:
        """The capability and the blocks, for messages."""
        return (
            f"{self.capability} with {', '.join(self.blocks)}" if self.blocks else self.capability
        )

    @property
    def conditions(self) -> Mapping[str, int]:
        """What the law depends on besides the states: names, and their numbers of event dims."""
        return getattr(self.denoiser, "conditions", {})

    @property
    def changes(self) -> tuple[str, ...]:
        """What makes the law another one than that of the denoiser's own chain, in phrases."""
        return tuple(getattr(self.denoiser, "changes", ()))

    def init_carry(
        self,
        batch_shape: Sequence[int],
        length: int,
        *,
        prompt: Tensor | None = None,
        generator: torch.Generator | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Draw the noisiest state from the prior of the process, and return its carry.

        :param prompt: int64, broadcastable to ``(*batch_shape, L)``: tokens that are present from
            the start, -1 elsewhere.
        """
        tokens = self._noisiest((*batch_shape, length), prompt, generator)
        return self.start_carry(tokens, generator, given=given)

    def _noisiest(
        self, shape: Sequence[int], prompt: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.process.start_is_random:
            noise = uniforms(shape, generator=generator, device=self.device)
        else:
            noise = torch.zeros(shape, dtype=torch.float64, device=self.device)
        tokens: Tensor = self.process.draw_start(noise, prompt)
        return tokens

    def start_carry(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry that belongs to a noisiest state: the one place where carries are made.

        :param tokens: int64 ``(*batch, L)``.
        :param generator: source of randomness of a kernel that remembers more than tokens.
        :param given: values of :attr:`conditions`, each broadcastable to ``(*batch, *event)``.
        """
        if not given:
            return {"tokens": tokens}
        return {"tokens": tokens, GIVEN: self.expand_given(given, tokens.shape[:-1])}

    def resume(self, value: Value, given: Mapping[str, Tensor] | None = None) -> Carry:
        """Return the carry of a noisiest state that is known, blocks included.

        :param value: int64 ``(*batch, L)``, or the blocks.
        :param given: values of :attr:`conditions`, each broadcastable to ``(*batch, *event)``.
        """
        carry = self.start_carry(tokens_of(value), given=given)
        return carry if isinstance(value, Tensor) else {**carry, **value}

    def expand_given(
        self, given: Mapping[str, Tensor] | None, batch_shape: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return conditions expanded to a batch.

        :param given: values of :attr:`conditions`, or None.
        """
        return {
            name: value.expand((*batch_shape, *value.shape[value.ndim - self.conditions[name] :]))
            for name, value in (given or {}).items()
        }

    def prior_step(
        self, batch_shape: Sequence[int], length: int, *, prompt: Tensor | None = None
    ) -> TokenStep | StartStep:
        """Return the law of the noisiest state as a step distribution."""
        if isinstance(self.process, Padded):
            return StartStep.of(self.process, (*batch_shape, length), prompt, self.device)
        size = self.process.vocab_size
        none = torch.full((length,), -1, device=self.device)
        start = (none if prompt is None else prompt).clamp_min(0)
        flat = torch.full((*batch_shape, length, size), -float(np.log(size)), device=self.device)
        fixed = None if prompt is None else prompt >= 0
        # At alpha = 0 and kappa = 0 the only move of the mixture is a draw from the prior.
        return TokenStep(self.process, start, flat, 0.0, 0.0, 0.0, fixed=fixed, validate_args=False)

    def prior_blocks(
        self, batch_shape: Sequence[int], length: int, *, prompt: Tensor | None = None
    ) -> dict[str, TorchDistribution]:
        """Return the laws of what is random in the noisiest state, block by block."""
        return {TOKENS: self.prior_step(batch_shape, length, prompt=prompt)}

    def moved(self, k: int) -> set[str]:
        """Return the names of the blocks that step ``k`` can change, ``"tokens"`` among them."""
        return {TOKENS, *self.blocks}

    def prior_log_prob(self, value: Value, prompt: Tensor | None = None) -> Tensor:
        """Return the log-probability of a noisiest state.

        :param value: int64 ``(*batch, L)``, or the blocks; those that are not there are taken to be
            where :meth:`start_carry` puts them.
        :param prompt: as in :meth:`init_carry`; prompt positions are certain.
        :returns: float64 ``(*batch,)``.
        """
        tokens = tokens_of(value)
        total: Tensor = self.process.log_start(tokens, prompt)
        return total if isinstance(value, Tensor) else total + self._blocks_log_prob(value)

    def _log_length(self, start: Tensor, prompt: Tensor | None) -> Tensor | float:
        """Return what a path whose reveals are scored has left: the law of its length."""
        if self.process.padding is None:
            return 0.0
        log_p: Tensor = self.process.log_start(start, prompt)
        return log_p

    def _blocks_log_prob(self, value: Mapping[str, Tensor]) -> Tensor:
        """Return the log-density of the noisiest blocks; here they begin in one place."""
        start = self.start_carry(value[TOKENS])
        same = [
            (value[name] == start[name]).reshape(*value[TOKENS].shape[:-1], -1).all(-1)
            for name in self.blocks
        ]
        return torch.where(torch.stack(same).all(0), 0.0, -torch.inf).to(torch.float64)

    def sample_path(
        self,
        batch_shape: Sequence[int],
        length: int,
        *,
        prompt: Tensor | None = None,
        generator: torch.Generator | None = None,
        given: Mapping[str, Tensor] | None = None,
        probe: bool = False,
    ) -> SampledPath | None:
        """Draw whole paths in a cheaper way than step by step, where the kernel knows one.

        :param probe: find out whether the prediction carries a gradient.
        :returns: paths with the law of the steps, or None: take the steps.
        """
        return None

    def path_log_prob(
        self,
        path: Tensor,
        *,
        prompt: Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Score whole paths in a cheaper way than step by step, where the kernel knows one.

        :param path: int64 ``(*batch, T + 1, L)``.
        :returns: float64 ``(*batch,)``, or None: score the steps.
        """
        return None

    def on_events(self, free: int) -> Kernel | None:
        """Return the kernel that goes from reveal to reveal with the law of the steps, or None.

        :param free: positions that are to be revealed, at most.
        """
        return None

    def advance(
        self, carry: Carry, value: Value, k: int, *, step: TorchDistribution | None = None
    ) -> Carry:
        """Return the carry after the move of step ``k``; the given carry is left alone.

        :param value: what the step drew: the states, int64 ``(*batch, L)``, or the blocks.
        :param step: this kernel's step that was taken, where the caller has it: kernels that
            remember predictions then need no second network call.
        """
        return {**carry, **(value if isinstance(value, Mapping) else {TOKENS: value})}

    def cavity_log_probs(self, carry: Carry, k: int) -> Tensor:
        """Return the denoiser's cavity log-probabilities at grid point ``k``.

        No network call is made where nothing can depend on it: a fully revealed masked state.

        :param carry: the carry, whose conditions the denoiser is given.
        :returns: float64 ``(*batch, L, V)``, normalised to round-off.
        :raises TypeError: if the output is no tensor.
        :raises ValueError: if the output has the wrong shape, is NaN or is not normalised.
        """
        tokens = carry["tokens"]
        if self._revealed(tokens):
            return self._flat(tokens)
        log_c = self.denoiser(tokens, self.prediction_time(carry, k), **carry.get(GIVEN, {}))
        log_c = clean_log_probs(log_c, tokens.shape, self.process.vocab_size)
        if self.denoiser.kind == "posterior":
            log_c = posterior_to_cavity(self.process, tokens, log_c, float(self.alphas[k]))
        return log_c

    def predict(self, carry: Carry, k: int) -> Prediction:
        """Return the cavity prediction at grid point ``k``, as hidden states if those are less.

        What the network returned is kept as it is: rows are normalised, and checked as by
        :meth:`cavity_log_probs`, where they are asked for. A row that nobody uses is not checked.
        """
        if type(self).cavity_log_probs is not Kernel.cavity_log_probs:
            return DensePrediction(self.cavity_log_probs(carry, k))
        return self._predict(carry, k)

    def _predict(self, carry: Carry, k: int) -> Prediction:
        tokens, size = carry["tokens"], self.process.vocab_size
        bridge = self.process.absorbing or self.denoiser.kind == "cavity"
        if not bridge or self._revealed(tokens):
            return DensePrediction(self.cavity_log_probs(carry, k))
        t, given = self.prediction_time(carry, k), carry.get(GIVEN, {})
        if not prefers_head(self.denoiser):
            log_c = self.denoiser(tokens, t, **given)
            require_columns(log_c, tokens.shape, size)
            return DensePrediction(log_c, raw=True, vocab_size=size)
        hidden = self.denoiser.hidden(tokens, t, **given)  # type: ignore[attr-defined]
        require_rows(hidden, tokens, size)
        head = self.denoiser.head  # type: ignore[attr-defined]
        return HeadPrediction(hidden, head, size, raw=True)

    def completions(self, carry: Carry, k: int) -> Completions:
        """Return what a look-ahead fills unfinished states with.

        Their law is :meth:`posterior_mean`, of which no table is made unless a kernel has its own.
        """
        if type(self).posterior_mean is not Kernel.posterior_mean:
            return TableCompletions(self.posterior_mean(carry, k))
        return self._completions(carry, k)

    def _completions(self, carry: Carry, k: int) -> Completions:
        tokens, prediction = carry["tokens"], self.predict(carry, k)
        if self.process.absorbing:
            return MaskedCompletions(tokens, prediction)
        return BridgedCompletions(self.process, tokens, prediction, float(self.alphas[k]))

    def guess(self, carry: Carry, k: int) -> dict[str, Tensor]:
        """Return what a look-ahead takes the finished blocks to be; here what they are.

        :returns: every block, ``(*batch, *event)``.
        """
        return {name: carry[name] for name in self.blocks}

    def prediction_time(self, carry: Carry, k: int) -> float | Tensor:
        """Return the time at which step ``k`` asks the denoiser, a number or one per row."""
        return float(self.times[k])

    def check_length(self, length: int) -> None:
        """Refuse a number of positions that the kernel cannot run; here any from one will do.

        :raises ValueError: if the kernel was built for another one.
        """
        whole_number(length, f"{type(self).__name__}: length")

    def declared_parameters(self) -> list[Tensor] | None:
        """Return the tensors that the law reads, or None where that is not known.

        They are those of the denoiser's ``parameters()``; a kernel that reads more overrides this.
        """
        parameters = getattr(self.denoiser, "parameters", None)
        return list(parameters()) if callable(parameters) else None

    def posterior_mean(self, carry: Carry, k: int) -> Tensor:
        """Return ``log p(x0 | x_k)`` per site, what a look-ahead fills unfinished states with.

        :returns: float64 ``(*batch, L, V)``.
        """
        log_c = self.cavity_log_probs(carry, k)
        return log_posterior_mean(self.process, carry["tokens"], log_c, float(self.alphas[k]))

    def asks_denoiser(self, carry: Carry, k: int) -> bool:
        """Return whether step ``k`` from this carry costs a network call."""
        return not self._revealed(carry["tokens"])

    def check_step(self, k: int) -> None:
        """:raises ValueError: if the chain has no step ``k``."""
        if not 0 <= k < self.num_steps:
            raise ValueError(f"step index k must lie in 0..{self.num_steps - 1}, got {k}.")

    def _revealed(self, tokens: Tensor) -> bool:
        return self.process.absorbing and not bool(torch.any(tokens == self.process.vocab_size))

    def _flat(self, tokens: Tensor) -> Tensor:
        size = self.process.vocab_size
        level = torch.full((), -np.log(size), dtype=torch.float64, device=tokens.device)
        return level.expand(*tokens.shape, size)

    def __repr__(self) -> str:
        shape = f"num_steps={self.num_steps}{self._repr_options()}, {self.capability}"
        return f"{type(self).__name__}({self.process!r}, {shape})"

    def _repr_options(self) -> str:
        return ""


def time_grid(num_steps: int | None, times: Any, owner: str) -> np.ndarray:
    """Return a decreasing grid from exactly 1 to exactly 0, float64 ``(T + 1,)``.

    :param num_steps: number ``T`` of equal steps.
    :param times: or the grid itself.
    :raises ValueError: if neither or both are given, or the grid is not usable.
    """
    if (num_steps is None) == (times is None):
        raise ValueError(f"{owner}: give exactly one of num_steps and times.")
    if times is None:
        count = whole_number(num_steps, f"{owner}: num_steps")
        return np.linspace(1.0, 0.0, count + 1)
    grid = np.asarray(times, dtype=np.float64).copy()  # np.array of a tensor warns
    if grid.ndim != 1 or grid.size < 2 or not np.all(np.isfinite(grid)):
        raise ValueError(f"{owner}: times must be a vector of at least two finite times.")
    if grid[0] != 1.0 or grid[-1] != 0.0 or np.any(np.diff(grid) > 0):
        raise ValueError(f"{owner}: times must decrease from exactly 1 (noise) to 0.")
    return grid


def check_given(kernel: Kernel, given: Mapping[str, Tensor], owner: str) -> None:
    """Refuse conditions that are not those that a kernel reads.

    :raises ValueError: if one is missing, unknown, or has too few dimensions.
    """
    wanted = kernel.conditions
    for name in given.keys() - wanted.keys():
        raise ValueError(
            f"{owner}: given has {name!r}, which {type(kernel.denoiser).__name__} does not read; "
            f"it reads {sorted(wanted) or 'no conditions'}."
        )
    for name in wanted.keys() - given.keys():
        raise ValueError(
            f"{owner}: {type(kernel.denoiser).__name__} reads the condition {name!r}, which is "
            f"missing; pass given={{{name!r}: ...}}."
        )
    for name, value in given.items():
        if value.ndim < wanted[name]:
            raise ValueError(
                f"{owner}: the condition {name!r} has {wanted[name]} event dimensions after those "
                f"of the batch, got shape {tuple(value.shape)}."
            )
