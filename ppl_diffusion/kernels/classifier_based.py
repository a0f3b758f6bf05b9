"""Classifier-based guidance: tilt every site by how likely it makes an observation.

Bayes' rule for one site of a reverse step, all others held where they are (D-CBG, Schiff et al.
2024, arXiv:2412.10193; Nisonoff et al. 2024, arXiv:2406.01572)::

    p_g(z_s = v | z) ~ p(z_s = v | z) P(y | z with site l := v)**g      for every site l

normalised over all states, the mask included. ``P(y | .)`` is read at the time *after* the step.
With ``g = 1``, an ancestral kernel and an exact noisy classifier the result is, for masks, exactly
the kernel of the denoiser that knows ``y``: ``c_v P(y | z with l := v)`` is
``p(x^l = v | z, y) P(y | z)``, and the mask keeps ``P(y | z)``. For other processes that holds for
a single site; a step that moves several counts the evidence for ``y`` once for each, an error of
the order of the step. Psi steps, other ``g`` and real classifiers condition on nothing exactly:
``changes`` says so. As the proposal of the unguided chain the kernel costs variance only.

Exact tilts ask the classifier about every neighbour of a state: up to ``L (S - 1)`` sequences. The
first-order form (a linear expansion in the one-hot encoding, as in Vignac et al. 2022,
arXiv:2209.14734) asks once, and once more for the gradient; it is exact where ``log P`` is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Self, get_args

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Denoiser, move
from ppl_diffusion.denoisers.batching import MANY, row_limit
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.kernels.base import FACTORISED, Carry, Kernel, Value
from ppl_diffusion.kernels.completions import Completions
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.rows import distinct_rows

Mode = Literal["exact", "first-order"]
LogLikelihood = Callable[[Tensor, float], Tensor]
"""``(states, t) -> log P(y | states)``, one number per row; see :class:`ClassifierKernel`."""


class ClassifierKernel(Kernel):
    """A reverse chain under classifier-based guidance.

    ``log_likelihood(states, t)`` returns ``log P(y | z_t)``, ``(rows,)``, for noised states:

    * ``mode="exact"``: ``states`` are ids, int64 ``(rows, L)``, the mask included;
      ``-inf`` (impossible) is allowed.
    * ``mode="first-order"``: ``states`` are one-hot rows, ``(rows, L, S)`` in torch's default float
      type with ``S = process.num_states``, which require a gradient; the result must be finite and
      differentiable.

    The time is that after the step; masks, whose ``P(y | z)`` depends on no time, are read half way
    through it, where a time-conditioned network has seen them as well as tokens. Each distinct
    sequence is asked about once per step (once per block of ``max_rows``), and only
    sites that can move are looked at: the masked ones of an ancestral masked chain.

    A classifier with a method ``parameters()``, as modules have, says what it reads: a remembered
    density of a path is forgotten when one of those tensors moves. For any other function gradients
    are found, but in-place edits of what it reads are invisible to remembered densities.

    :param kernel: the kernel to guide; its step must be a product over sites.
    :param log_likelihood: log-likelihood of the observation given a noised state.
    :param scale: ``g >= 0``; 0 is unguided, 1 Bayes' rule, above 1 overshoots.
    :param mode: whether neighbours are asked about, or estimated from a gradient.
    :param max_rows: largest number of sequences sent to the classifier at once; None for 4096.
    :raises ValueError: if the scale, the mode or ``max_rows`` is not usable.
    :raises CapabilityError: if the kernel's steps are not products over sites.
    """

    def __init__(
        self,
        kernel: Kernel,
        log_likelihood: LogLikelihood,
        *,
        scale: float = 1.0,
        mode: Mode = "exact",
        max_rows: int | None = None,
    ) -> None:
        _check_options(kernel, scale, mode)
        super().__init__(kernel.process, kernel.denoiser, kernel.times)
        self.kernel, self.log_likelihood = kernel, log_likelihood
        self.scale, self.mode = float(scale), mode
        self.max_rows = row_limit(max_rows, "ClassifierKernel: max_rows")
        self.markov = kernel.markov

    @property
    def changes(self) -> tuple[str, ...]:
        """What the guided kernel does to the law, and the tilt unless the scale is 0."""
        own = (
            f"classifier guidance {self.scale:g} ({self.mode}) of every site, which may count the "
            "evidence once for each site that a step moves"
        )
        return (*self.kernel.changes, own) if self.scale else self.kernel.changes

    def with_denoiser(self, denoiser: Denoiser) -> Self:
        """Return the same kernel around another denoiser (for instance a caching wrapper)."""
        return type(self)(
            self.kernel.with_denoiser(denoiser),
            self.log_likelihood,
            scale=self.scale,
            mode=self.mode,
            max_rows=self.max_rows,
        )

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return (
            isinstance(other, ClassifierKernel)
            and self.kernel.same_as(other.kernel)
            and self.log_likelihood is other.log_likelihood
            and (self.scale, self.mode) == (other.scale, other.mode)
        )

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> StateStep:
        """Return the distribution of the next state.

        :raises PotentialError: if the classifier misbehaves or excludes every state of a site.
        """
        tokens = carry["tokens"]
        table = _dense(self.kernel.step(carry, k, fixed=fixed))
        if self.scale:
            states = tokens.expand(table.shape[:-1]).reshape(-1, tokens.shape[-1])
            rows = table.reshape(-1, *table.shape[-2:])
            table = self._tilted(states, rows, k).reshape(table.shape)
        return StateStep(table, tokens=tokens, fixed=fixed)

    def start_carry(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry of the guided kernel."""
        return self.kernel.start_carry(tokens, generator, given=given)

    def advance(
        self, carry: Carry, value: Value, k: int, *, step: TorchDistribution | None = None
    ) -> Carry:
        """Return the carry after the move of step ``k``.

        The step that was taken is not the guided kernel's own, which makes one where it needs it.
        """
        return self.kernel.advance(carry, value, k)

    def cavity_log_probs(self, carry: Carry, k: int) -> Tensor:
        """Return the prediction of the clean tokens, without the tilt."""
        return self.kernel.cavity_log_probs(carry, k)

    def posterior_mean(self, carry: Carry, k: int) -> Tensor:
        """Return ``log p(x0 | x_k)`` per site, without the tilt."""
        return self.kernel.posterior_mean(carry, k)

    def completions(self, carry: Carry, k: int) -> Completions:
        """Return what a look-ahead fills states with, without the tilt."""
        return self.kernel.completions(carry, k)

    def asks_denoiser(self, carry: Carry, k: int) -> bool:
        """Return whether step ``k`` from this carry costs a call of the denoiser."""
        return self.kernel.asks_denoiser(carry, k)

    def check_length(self, length: int) -> None:
        """Refuse a number of positions that the guided kernel cannot run."""
        self.kernel.check_length(length)

    def declared_parameters(self) -> list[Tensor] | None:
        """Return the tensors of both networks, or None where one of them does not name its own.

        A classifier names its tensors by a method ``parameters()``, as modules do.
        """
        inner = self.kernel.declared_parameters()
        own = getattr(self.log_likelihood, "parameters", None)
        return [*inner, *own()] if inner is not None and callable(own) else None

    def to(self, device: torch.device | str) -> Self:
        """Move both networks, in place, where they can be moved."""
        move(self.log_likelihood, device)
        return super().to(device)

    def _tilted(self, tokens: Tensor, table: Tensor, k: int) -> Tensor:
        """Return the tilted table of rows of states, up to a constant per site, ``(B, L, S)``."""
        first, inverse = distinct_rows(tokens)
        movable = _movable(table)
        anywhere = movable.new_zeros((len(first), *movable.shape[1:]), dtype=torch.int64)
        anywhere.index_add_(0, inverse, movable.to(torch.int64))  # prompts may differ between twins
        t = self._reading_time(k)
        ask = self._exact if self.mode == "exact" else self._first_order
        tilt = self.scale * ask(tokens[first], anywhere > 0, t)[inverse]
        # A site that a prompt holds here may move in a twin, which has asked about it.
        return _require_possible(torch.where(movable, table + tilt, table))

    def _reading_time(self, k: int) -> float:
        before, after = self.times[k : k + 2]
        return float((before + after) / 2 if self.process.absorbing else after)

    def _exact(self, tokens: Tensor, wanted: Tensor, t: float) -> Tensor:
        """Return ``log P(y | z with site l := v)`` where wanted, 0 elsewhere, ``(U, L, S)``."""
        here = F.one_hot(tokens, wanted.shape[-1]).to(torch.bool)
        values = torch.zeros(wanted.shape, dtype=torch.float64, device=tokens.device)
        stays = (wanted & here).flatten(1).any(1)
        if bool(stays.any()):  # one answer for every site that keeps its state
            at_home = values.new_zeros(len(tokens))
            at_home[stays] = self._ask(tokens[stays], t)
            values = torch.where(wanted & here, at_home[:, None, None], values)
        for row, site, state in zip(*self._blocks(wanted & ~here), strict=True):
            neighbours = tokens[row].scatter(1, site[:, None], state[:, None])
            first, inverse = distinct_rows(neighbours)
            values[row, site, state] = self._ask(neighbours[first], t)[inverse]
        return values

    def _blocks(self, chosen: Tensor) -> list[tuple[Tensor, ...]]:
        return [index.split(self.max_rows or MANY) for index in chosen.nonzero(as_tuple=True)]

    def _first_order(self, tokens: Tensor, wanted: Tensor, t: float) -> Tensor:
        """Return the linear expansion of ``log P`` about the states, up to a constant per site."""
        moving = wanted.flatten(1).any(1).nonzero()[:, 0]
        values = torch.zeros(wanted.shape, dtype=torch.float64, device=tokens.device)
        for block in moving.split(self.max_rows or MANY):
            values[block] = self._gradient(tokens[block], wanted.shape[-1], t)
        return values

    def _gradient(self, tokens: Tensor, size: int, t: float) -> Tensor:
        recording = torch.is_grad_enabled()
        # SMC runs without gradients; this one is part of the law.
        with torch.inference_mode(False), torch.enable_grad():
            states = F.one_hot(tokens, size).to(torch.get_default_dtype()).requires_grad_()
            values = self._checked(states, t)
            keep = recording and _depends_on_others(values, states)
            gradient = _input_gradient(values, states, keep)
        _require_finite(gradient, "the gradient of log_likelihood", t)
        return gradient.to(torch.float64)

    def _ask(self, states: Tensor, t: float) -> Tensor:
        blocks = states.split(self.max_rows or MANY)
        return torch.cat([self._checked(block, t) for block in blocks])

    def _checked(self, states: Tensor, t: float) -> Tensor:
        values = self.log_likelihood(states, t)
        if not isinstance(values, Tensor) or tuple(values.shape) != (len(states),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise PotentialError(
                f"ClassifierKernel: log_likelihood returned {got} for {len(states)} states, "
                f"expected a tensor of shape ({len(states)},)."
            )
        values = values.to(torch.float64)
        allowed = values if self.mode == "first-order" else values.clamp_min(-1e300)
        _require_finite(allowed, "log_likelihood", t)
        return values

    def _repr_options(self) -> str:
        return f", {self.kernel!r}, scale={self.scale:g}, mode={self.mode}"


def _movable(table: Tensor) -> Tensor:
    """Return which states compete at a site, bool ``(B, L, S)``: none where it cannot move."""
    possible = table > -torch.inf
    return possible & (possible.sum(-1, keepdim=True) > 1)


def _input_gradient(values: Tensor, states: Tensor, keep: bool) -> Tensor:
    """Return the gradient of each value in its own states, differentiable again if ``keep``."""
    gradient: Tensor | None = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(
            values.sum(), states, create_graph=keep, allow_unused=True
        )
    if gradient is None:
        raise PotentialError(
            "ClassifierKernel: log_likelihood has no gradient in its one-hot input; make it "
            "differentiable or use mode='exact'."
        )
    return gradient


def _depends_on_others(values: Tensor, states: Tensor) -> bool:
    """Return whether a tensor other than the states wants a gradient of the values."""
    nodes, seen = [values.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", states)  # of a node where gradients accumulate
        if leaf is not states:
            return True
        nodes += [before for before, _ in node.next_functions]
    return False


def _require_possible(table: Tensor) -> Tensor:
    dead = (table == -torch.inf).all(-1)
    if bool(dead.any()):
        row, site = (int(i) for i in dead.nonzero()[0])
        raise PotentialError(
            f"ClassifierKernel: every state that position {site} of row {row} can take has "
            "likelihood zero; let log_likelihood return a finite floor for guesses."
        )
    return table


def _require_finite(values: Tensor, what: str, t: float) -> None:
    values = values.detach()
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise PotentialError(
            f"ClassifierKernel: {what} is {float(values[where])} at index {where} of its answer "
            f"for time {t:g}; return a finite log-probability (-inf only in mode='exact')."
        )


def _dense(step: TorchDistribution) -> Tensor:
    table: Tensor = step.dense_log_probs()
    return table


def _check_options(kernel: Kernel, scale: float, mode: Mode) -> None:
    if not isinstance(kernel, Kernel) or kernel.capability != FACTORISED:
        raise CapabilityError(
            f"ClassifierKernel: {kernel!r} is no kernel whose steps are products over sites; "
            "guide an InterpolatingKernel."
        )
    if not 0 <= scale < math.inf:
        raise ValueError(f"ClassifierKernel: scale must be finite and >= 0, got {scale}.")
    if mode not in get_args(Mode):
        raise ValueError(f"ClassifierKernel: mode is {mode!r}; choose 'exact' or 'first-order'.")
