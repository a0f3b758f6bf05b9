"""The law of the clean sequence of a reverse chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels.base import ORDERED, SAMPLE_ONLY, Carry, Kernel
from ppl_diffusion.kernels.interpolating import InterpolatingKernel
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.kernels.shapes import check_expand, check_value, enumerated
from ppl_diffusion.kernels.step import MAX_ENUMERATE
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.nelbo import step_kl
from ppl_diffusion.processes.noise import uniforms

MAX_STATES = 4096
"""Largest number of sequences over which the exact marginal is propagated."""


class Chain(Protocol):
    """What the marginal asks of a reverse chain; the chain makes the marginal, so not its class."""

    kernel: Kernel
    length: int
    prompt: Tensor | None
    batch_shape: torch.Size
    event_shape: torch.Size
    given: dict[str, Tensor]

    @property
    def fixed(self) -> Tensor | None: ...
    @property
    def num_steps(self) -> int: ...
    def x0(self, path: Tensor) -> Tensor: ...
    def start(
        self, batch_shape: Sequence[int], generator: torch.Generator | None = ...
    ) -> Carry: ...
    def sample(self, sample_shape: Sequence[int] = ...) -> Tensor: ...
    def expand(self, batch_shape: Sequence[int]) -> Self: ...


class ChainMarginal(TorchDistribution):
    """The ``x0``-marginal of a reverse chain, event shape ``(L,)``.

    Three different quantities have three different names. :meth:`log_prob` is exact and exists
    for tiny chains only; :meth:`log_prob_bound` estimates a lower bound (ELBO); the exponential
    of :meth:`log_prob_estimate` is unbiased for the likelihood. All are of *this* chain, with its
    number of steps, not of an ideal diffusion.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True

    def __init__(self, chain: Chain, *, validate_args: bool | None = None) -> None:
        self.chain = chain
        super().__init__(
            chain.batch_shape, torch.Size((chain.length,)), validate_args=validate_args
        )

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of clean tokens."""
        last = self.chain.kernel.process.vocab_size - 1
        return constraints.independent(constraints.integer_interval(0, last), 1)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw clean sequences.

        :returns: int64 ``(*sample_shape, *batch, L)``.
        """
        return self.chain.x0(self.chain.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-probability, by propagating the law of all states.

        :param value: clean tokens, int64 ``(*sample, *batch, L)``.
        :returns: float64, the broadcast batch shape; ``-inf`` for tokens that are not clean
            (refused as outside the support while arguments are validated).
        :raises IntractableLogProb: if the chain has more than ``MAX_STATES`` sequences.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = check_value(self, value)
        size = self.chain.kernel.process.num_states
        if size**self.chain.length > MAX_STATES:
            raise IntractableLogProb(
                f"the exact marginal would sum over {size}**{self.chain.length} states; use "
                "log_prob_bound (a lower bound) or log_prob_estimate (unbiased likelihood)."
            )
        self._require_markov("log_prob")
        given = self._one_condition()
        if self.chain.prompt is not None and self.chain.prompt.ndim > 1:
            raise IntractableLogProb(
                "log_prob: the exact marginal is computed for one prompt; build a chain for each."
            )
        table = self._state_log_probs(given)
        clean = self._is_clean(value)
        powers = size ** torch.arange(self.chain.length - 1, -1, -1, device=value.device)
        log_p = torch.where(
            clean, table[torch.where(clean, (value * powers).sum(-1), 0)], -torch.inf
        )
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def _one_condition(self) -> dict[str, Tensor]:
        """Return the condition that all chains of the batch share."""
        chain, one = self.chain, {}
        for name, value in chain.given.items():
            rows = (
                value.flatten(0, len(chain.batch_shape) - 1) if chain.batch_shape else value[None]
            )
            one[name] = rows[0]
            if not bool((rows == rows[:1]).all()):
                raise IntractableLogProb(
                    f"log_prob: the exact marginal is computed for one value of {name!r}; build a "
                    "chain for each."
                )
        return one

    def _require_markov(self, what: str) -> None:
        if not self.chain.kernel.markov or self.chain.kernel.capability == SAMPLE_ONLY:
            raise IntractableLogProb(
                f"{what}: a step of {type(self.chain.kernel).__name__} depends on more than the "
                "current tokens, so that only whole paths have a density; estimate with samples."
            )

    def _require_bound(self) -> None:
        # The bound scores single steps by the KL of three-way mixtures.
        if not _has_own_mixture(self.chain.kernel):
            raise IntractableLogProb(
                f"log_prob_bound: the steps of {type(self.chain.kernel).__name__} are not the "
                "mixtures that the bound is made of; use log_prob_estimate or samples."
            )

    def _require_bridge(self) -> None:
        kernel = self.chain.kernel
        if kernel.capability != ORDERED and not _has_own_mixture(kernel):
            raise IntractableLogProb(
                f"log_prob_estimate: there is no bridge for the steps of {type(kernel).__name__}; "
                "use log_prob on a tiny chain, or samples."
            )

    def _state_log_probs(self, given: dict[str, Tensor]) -> Tensor:
        """Return the log-law of the final state over all states, ``(S ** L,)``."""
        chain, kernel = self.chain, self.chain.kernel
        every = torch.arange(kernel.process.num_states, device=kernel.device)
        grid = torch.cartesian_prod(*[every] * chain.length)
        states = grid.reshape(-1, chain.length)
        law = kernel.prior_log_prob(states, chain.prompt).exp()
        for k in range(kernel.num_steps):
            reached = law > 0
            carry = kernel.start_carry(states[reached], given=given)
            step = kernel.step(carry, k, fixed=chain.fixed)
            moves = step.log_prob(states[:, None]).exp()  # (to, from)
            law = moves @ law[reached]
        return torch.log(law)

    def _is_clean(self, value: Tensor) -> Tensor:
        return ((value >= 0) & (value < self.chain.kernel.process.vocab_size)).all(-1)

    def _check_clean(self, value: Tensor) -> Tensor:
        value = check_value(self, value)
        if not bool(self._is_clean(value).all()):
            last = self.chain.kernel.process.vocab_size - 1
            raise ValueError(
                f"ChainMarginal: a value must hold clean token ids, 0..{last}, got "
                f"{int(value.min())}..{int(value.max())}; a mask is no token of x0."
            )
        if not self.chain.given:
            return value
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.expand(*batch, -1)  # one condition per row

    def log_prob_bound(
        self,
        value: Tensor,
        *,
        num_samples: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return an unbiased estimate of a lower bound on ``log_prob`` (the chain's ELBO).

        Each sample noises ``x0`` to one grid point and scores one step exactly; the grid points
        are stratified over the ``T`` steps. The expected value never exceeds ``log_prob``.

        :param value: clean tokens, int64 ``(*batch, L)``.
        :param num_samples: network rows per sequence.
        :returns: nats, float64 ``(*batch,)``.
        :raises ValueError: if a token is not clean (a mask, or out of range).
        """
        return self.bound_samples(value, num_samples=num_samples, generator=generator).mean(0)

    def bound_samples(
        self,
        value: Tensor,
        *,
        num_samples: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the single-step terms whose mean is :meth:`log_prob_bound`.

        Their spread over the first axis gives a (conservative, because stratified) standard error.

        :param value: clean tokens, int64 ``(*batch, L)``.
        :param num_samples: number of terms per sequence.
        :returns: nats, float64 ``(num_samples, *batch)``.
        :raises ValueError: if a token is not clean (a mask, or out of range).
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {num_samples}.")
        self._require_bound()
        value = self._check_clean(value)
        offset = uniforms((), generator=generator, device="cpu")
        strata = torch.arange(num_samples, dtype=torch.float64, device="cpu") + offset
        strata = strata / num_samples
        steps = (strata * self.chain.num_steps).floor().long().clamp_max(self.chain.num_steps - 1)
        shape = (num_samples, *value.shape[:-1])
        terms = torch.empty(shape, dtype=torch.float64, device=value.device)
        for k in steps.unique().tolist():
            chosen = steps == k
            x0 = value.expand(int(chosen.sum()), *value.shape)
            terms[chosen] = -self._step_kl(x0, k, generator) * self.chain.num_steps
        return terms + self.chain.kernel.process.log_length(value)

    def _step_kl(self, x0: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        chain, kernel = self.chain, self.chain.kernel
        assert isinstance(kernel, InterpolatingKernel)
        keep, prior = uniforms((2, *x0.shape), generator=generator, device=x0.device)
        a, b = float(kernel.alphas[k]), float(kernel.alphas[k + 1])
        z = kernel.process.corrupt(x0, a, keep, prior)
        z = z if chain.prompt is None else torch.where(chain.prompt >= 0, x0, z)
        carry = kernel.start_carry(z, given=chain.given)
        with torch.no_grad():
            log_c = kernel.cavity_log_probs(carry, k)
        site = step_kl(kernel.process, x0, z, log_c, a, b, kernel.site_kappa(carry, k))
        if chain.prompt is not None:
            broken = torch.where(x0 == chain.prompt, 0.0, torch.inf).to(site.dtype)
            site = torch.where(chain.prompt >= 0, broken, site)
        return site.sum(-1)

    def log_prob_estimate(
        self,
        value: Tensor,
        *,
        num_particles: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return an estimate whose exponential is unbiased for the likelihood (IWAE).

        Paths are proposed from the bridge to ``x0``: the chain's own kernel with the denoiser
        replaced by the known answer. Its logarithm lies below ``log_prob`` on average.

        :param value: clean tokens, int64 ``(*batch, L)``.
        :param num_particles: number of bridges per sequence (Burda et al. 2016, Eq. 8).
        :returns: nats, float64 ``(*batch,)``.
        :raises ValueError: if a token is not clean (a mask, or out of range).
        """
        if num_particles < 1:
            raise ValueError(f"num_particles must be >= 1, got {num_particles}.")
        self._require_bridge()
        value = self._check_clean(value)
        x0 = value.expand(num_particles, *value.shape)
        log_w = self._bridge_log_weight(x0, generator)
        return torch.logsumexp(log_w, 0) - float(np.log(num_particles))

    def _bridge_log_weight(self, x0: Tensor, generator: torch.Generator | None) -> Tensor:
        chain, kernel = self.chain, self.chain.kernel
        known = torch.nn.functional.one_hot(x0, kernel.process.vocab_size).to(torch.float64).log()
        begun = kernel.process.start_of(x0)
        log_w = torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
        if begun is None:
            carry = chain.start(x0.shape[:-1], generator)
        else:
            carry = kernel.start_carry(begun, generator, given=chain.given)
            log_w = log_w + kernel.prior_log_prob(begun, chain.prompt)
        with torch.no_grad():
            for k in range(kernel.num_steps):
                model = kernel.step(carry, k, fixed=chain.fixed)
                bridge = _bridge(model, known, last=k + 1 == kernel.num_steps)
                tokens = bridge.sample(generator=generator)
                log_w = log_w + model.log_prob(tokens) - bridge.log_prob(tokens)
                carry = kernel.advance(carry, tokens, k, step=model)
        reached = (carry["tokens"] == x0).all(-1)  # a prompt may contradict x0
        return torch.where(reached, log_w, -torch.inf)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all clean sequences, ``(V ** L, *batch, L)``, for tiny chains.

        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        kernel = self.chain.kernel
        size = kernel.process.vocab_size
        return enumerated(self, size, expand, MAX_ENUMERATE, kernel.device)

    def expand(
        self, batch_shape: Sequence[int], _instance: ChainMarginal | None = None
    ) -> ChainMarginal:
        """Return the same law with larger batch dimensions."""
        new = self._get_checked_instance(ChainMarginal, _instance)
        shape = check_expand(self.batch_shape, batch_shape)
        new.chain = self.chain.expand(shape)
        super(ChainMarginal, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


def _has_own_mixture(kernel: Kernel) -> bool:
    """Return whether every step is the three-way mixture of the kernel's own prediction."""
    return isinstance(kernel, InterpolatingKernel) and kernel.mixes and kernel.markov


def _bridge(step: TokenStep | RevealStep, known: Tensor, *, last: bool) -> TokenStep | RevealStep:
    """Return the step with the denoiser replaced by the known answer, where that is enough."""
    if isinstance(step, RevealStep):
        return step.with_log_probs(known)
    log_probs = known
    if not last and step.detours:
        log_probs = torch.logaddexp(known, step.log_probs.to(known.dtype)) - math.log(2.0)
    return step.with_log_probs(log_probs)
