"""Products of powers of chains on a time grid: the exact path-power form and the rate form.

For chains that redraw tokens (uniform noise and its kin) a step of the path-power target splits
over sites: ``G_l(v) = prod_m K_{m,l}(v|x)**b_m q_l(x_l|v)**(1-B)`` is drawn from, its sum is the
weight. The rate form simulates the limit of many steps by Euler's method, as published; at any
finite number of steps its weights belong to no law that can be declared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.inference.experts import ExpertMover, is_plain_mixture
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.kernels.path_power import (
    jump_rates,
    log_forward_table,
    log_path_factor,
    log_product,
)
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.sources import Rng
from ppl_diffusion.smc.feynman_kac import per_particle


class _GridMover(ExpertMover):
    """Experts on one time grid."""

    def __init__(self, composition: Composition, **options: Any) -> None:
        kernels = [chain.kernel for chain in composition.chains]
        for kernel in kernels:
            if not is_plain_mixture(kernel):
                ordered = isinstance(kernel, OrderedKernel)
                instead = "use form='lockstep'" if ordered else "build the chain with kappa=1"
                raise CapabilityError(
                    f"Corrector: the path-power target needs InterpolatingKernel at kappa=1, got "
                    f"{kernel!r}; {instead}."
                )
            if not np.array_equal(kernel.alphas, kernels[0].alphas):
                raise ValueError(
                    "Corrector: the chains have different time grids or schedules; build them "
                    "with one process and one number of steps."
                )
        super().__init__(composition, kernels, **options)

    @property
    def order(self) -> float:
        """``B``, the sum of the exponents."""
        return sum(self.exponents)

    def _start(self, batch: Sequence[int], generator: Rng, given: Mapping[str, Tensor]) -> Carry:
        """Draw from the tempered prior ``m**B``."""
        shape = (*batch, self.chain.length)
        log_m = self._log_tempered_prior()
        noise = uniforms(shape, generator=generator, device=log_m.device)
        tokens = draw_categorical(log_m.expand(*shape, -1), noise)
        prompt = self.chain.prompt
        tokens = tokens if prompt is None else torch.where(prompt >= 0, prompt, tokens)
        return self.kernel.start_carry(tokens, generator, given=given)

    def _log_tempered_prior(self) -> Tensor:
        prior = torch.as_tensor(self.kernel.process.prior, device=self.kernel.device)
        return log_product([prior.log()], [self.order]) if self.order else _support(prior)

    def _with_prior(self, log_ratio: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Add the log of the sum of ``m**B`` over the noisiest states to the first weight."""
        if k > 0:
            return log_ratio
        mass = torch.logsumexp(self._log_tempered_prior(), -1).expand(tokens.shape)
        fixed = self.chain.fixed
        mass = mass if fixed is None else torch.where(fixed, 0.0, mass)
        return log_ratio + per_particle(mass.sum(-1))

    def _levels(self, k: int) -> tuple[float, float]:
        alphas = self.kernel.alphas
        return float(alphas[k]), float(alphas[k + 1])


class PathPowerMover(_GridMover):
    """The path-power target of a finite chain, exactly (Bayes' rule in every step).

    :param composition: ancestral chains on one time grid with their exponents, and the potential.
    :param options: ``twist`` and ``max_rows`` of :class:`ExpertMover`.
    :raises CapabilityError: if a chain is not an ancestral chain on a time grid.
    :raises ValueError: if the time grids differ.
    """

    @property
    def target_law(self) -> str:
        """The declared law of the path, in words; ``{law}`` stands for the product."""
        return (
            f"m(x_T)^{self.order:g} * the product over {self.kernel.num_steps} steps of {{law}} of "
            f"the reverse kernels times the forward kernel^{1 - self.order:g}"
        )

    def move(self, carry: Carry, k: int, generator: Rng) -> tuple[Carry, Tensor | float]:
        """Draw every site from its factor; the weight is the product of the factors' sums."""
        tokens = carry["tokens"]
        log_g = self._log_factor(carry, k)
        total = torch.logsumexp(log_g, -1)
        noise = uniforms(tokens.shape, generator=generator, device=tokens.device)
        drawn = draw_categorical(log_g, noise)
        # A site that no expert can move is dead: any token will do, and a mask would not.
        drawn = torch.where(total == -torch.inf, 0, drawn)
        moved = {**carry, "tokens": drawn}
        if self.is_plain:
            return moved, 0.0
        return moved, self._with_prior(per_particle(total.sum(-1)), tokens, k)

    def _log_factor(self, carry: Carry, k: int) -> Tensor:
        """Return ``log G`` of every site and state, ``(*batch, L, S)``."""
        fixed, process, tokens = self.chain.fixed, self.kernel.process, carry["tokens"]
        seen = zip(self.kernels, self.carries(carry), strict=True)
        steps: list[Any] = [kernel.step(own, k, fixed=fixed) for kernel, own in seen]
        log_kernels = [step.dense_log_probs() for step in steps]
        log_q = log_forward_table(process, tokens, *self._levels(k))
        if fixed is not None:  # certain to stay, there and back
            log_q = torch.where(fixed[..., None], 0.0, log_q)
        return log_path_factor(log_kernels, self.exponents, log_q)


class RateMover(_GridMover):
    """Discrete Feynman-Kac correctors in continuous time, by Euler steps (compatibility mode).

    Rates and weight rates are taken in the middle of a step. What is still masked at the end is
    revealed at once and weighted as in lockstep.

    :param composition: ancestral chains on one time grid with their exponents, and the potential.
    :param options: ``twist`` and ``max_rows`` of :class:`ExpertMover`.
    :raises CapabilityError: if a chain is not an ancestral chain on a time grid.
    :raises ValueError: if the time grids differ, or the exponents do not add up to more than 0.
    """

    exact = False

    def __init__(self, composition: Composition, **options: Any) -> None:
        super().__init__(composition, **options)
        if self.order <= 0:
            raise ValueError(
                f"Corrector: form='rates' needs exponents with a positive sum, got {self.order}; "
                "use form='path'."
            )

    @property
    def target_law(self) -> str:
        """What is aimed at, in words; ``{law}`` stands for the product."""
        return (
            f"approximately {{law}}: Euler steps of the rate form, whose law and weights are right "
            f"only in the limit of many steps ({self.kernel.num_steps} here)"
        )

    def move(self, carry: Carry, k: int, generator: Rng) -> tuple[Carry, Tensor | float]:
        """Jump at most once per site, and add the weight rate of the step."""
        tokens, process = carry["tokens"], self.kernel.process
        log_c = self.cavities(carry, k)
        start, end = self._levels(k)
        middle = (start + end) / 2
        rates, growth = jump_rates(process, tokens, log_c, self.exponents, middle)
        duration = (end - start) / middle
        free = torch.ones_like(tokens, dtype=torch.bool)
        free = free if self.chain.fixed is None else free & ~self.chain.fixed
        u_jump, u_token = uniforms((2, *tokens.shape), generator=generator, device=tokens.device)
        jumps = free & (u_jump < -torch.expm1(-duration * rates.sum(-1)))
        drawn = draw_categorical(rates.log(), u_token)
        log_ratio = torch.where(free, duration * growth, 0.0)
        if k == self.kernel.num_steps - 1 and process.absorbing:
            left = (tokens == process.vocab_size) & ~jumps
            log_g = log_product(log_c, self.exponents)
            log_ratio = log_ratio + torch.where(left, torch.logsumexp(log_g, -1), 0.0)
            drawn = torch.where(left, draw_categorical(log_g, u_token), drawn)
            jumps = jumps | left
        moved = {**carry, "tokens": torch.where(jumps, drawn, tokens)}
        return moved, self._with_prior(per_particle(log_ratio.sum(-1)), tokens, k)


def _support(prior: Tensor) -> Tensor:
    return torch.where(prior > 0, 0.0, -math.inf).to(torch.float64)
