"""What every composition of chains shares while it is run: experts, look-ahead, costs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.inference._chain_program import TaskEngine
from ppl_diffusion.inference._compositions import Composition
from ppl_diffusion.inference._task import Task
from ppl_diffusion.kernels import FACTORISED, InterpolatingKernel, Kernel
from ppl_diffusion.kernels.path_power import log_product
from ppl_diffusion.processes import log_posterior_mean
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential, per_particle, take_particles
from ppl_diffusion.smc.twists import (
    FILL_UNIFORMS,
    CallableTwist,
    Carry,
    FillTwist,
    Twist,
    log_mean_exp,
)


class ExpertEngine(TaskEngine):
    """Several chains with exponents as one bound model (see :func:`ppl_diffusion.smc.smc_loop`).

    :param task: what was asked for.
    :param composition: the chains with their exponents, and the potential.
    :param kernels: the kernel each expert is run with.
    :param twist: look-ahead, or None.
    :param max_rows: largest number of rows sent to a network at once.
    """

    def __init__(
        self,
        task: Task,
        composition: Composition,
        kernels: Sequence[Kernel],
        *,
        twist: Twist | None,
        max_rows: int | None,
    ) -> None:
        super().__init__(task)
        task.refuse_twist("Corrector")
        self.composition, self.twist = composition, twist
        self.chain, self.exponents = composition.chains[0], composition.exponents
        self._denoisers: dict[int, EvaluatedDenoiser] = {}
        self.kernels = [self._evaluated(kernel, max_rows) for kernel in kernels]
        self.kernel = self.kernels[0]
        potential = composition.potential
        self.potential = None if potential is None else EvaluatedPotential(potential)

    def _evaluated(self, kernel: Kernel, max_rows: int | None) -> Kernel:
        """Put a counter around the denoiser; experts with one network share its answers."""
        key = id(kernel.denoiser)
        if key not in self._denoisers:
            self._denoisers[key] = EvaluatedDenoiser(kernel.denoiser, max_rows=max_rows)
        return kernel.with_denoiser(self._denoisers[key])

    @property
    @abstractmethod
    def target_law(self) -> str:
        """What is sampled, in words; ``{law}`` stands for the product of the experts."""

    @property
    def target(self) -> str:
        """The law of the weighted particles, in words."""
        law, potential = self.target_law.format(law=self.composition.law), self.potential
        tilt = "" if potential is None else f", times G(x0) with log G = {potential.potential.name}"
        changes = "; ".join(c for chain in self.composition.chains for c in chain.kernel.changes)
        under = f", under {changes}" if changes else ""
        ending = "normalised; log_evidence estimates the log of its normalising constant"
        return f"{law}{tilt}{self.task.held}{under}, {ending}"

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return self.kernel.num_steps

    @property
    def times(self) -> Any:
        """The times between the moves, ``(num_steps + 1,)``."""
        return self.kernel.times

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far, over all experts."""
        return sum(denoiser.rows_evaluated for denoiser in self._denoisers.values())

    @property
    def num_potential_calls(self) -> int:
        """Distinct sequences the potential was asked about so far."""
        return 0 if self.potential is None else self.potential.num_calls

    @property
    def is_plain(self) -> bool:
        """Whether this is one chain as it is, which no path factor reweights."""
        return self.exponents == (1.0,)

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the noisiest states, tokens ``(R, N, *plates, L)``."""
        batch = (runs, particles, *self.chain.batch_shape)
        carry: Carry = {"tokens": self._start(batch, generator)}
        if isinstance(self.twist, FillTwist):
            noise = self.twist.init((*batch, self.chain.length), generator)
            carry = carry if noise is None else {**carry, FILL_UNIFORMS: noise}
        return carry

    def _start(self, batch: Sequence[int], generator: torch.Generator | None) -> Tensor:
        chain = self.chain
        carry = self.kernel.init_carry(
            batch, chain.length, prompt=chain.prompt, generator=generator
        )
        tokens: Tensor = carry["tokens"]
        return tokens

    def cavities(self, tokens: Tensor, k: int) -> list[Tensor]:
        """Return each expert's prediction of the clean tokens, ``(*batch, L, V)``.

        :param tokens: states, int64 ``(*batch, L)``.
        :param k: index into the time grid.
        """
        return [kernel.cavity_log_probs({"tokens": tokens}, k) for kernel in self.kernels]

    def posterior_mean(self, tokens: Tensor, k: int) -> Tensor:
        """Return what a look-ahead fills states with: the composed law of the clean tokens.

        :param tokens: states, int64 ``(*batch, L)``.
        :param k: index into the time grid.
        """
        log_c = normalised(log_product(self.cavities(tokens, k), self.exponents))
        alpha = float(self.kernel.alphas[k])
        mean: Tensor = log_posterior_mean(self.kernel.process, tokens, log_c, alpha)
        return mean

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return ``log h_k``, ``(R, N)``: the potential at the end, None where there is none."""
        if self.potential is None:
            return None
        tokens = carry["tokens"]
        if k == self.num_steps:
            return per_particle(self.potential(tokens))
        if self.twist is None:
            return None
        if isinstance(self.twist, CallableTwist):
            return self.twist(carry, k, tuple(tokens.shape[:2]))
        values = self.potential.lookahead(self.fills(carry, k, generator))
        return log_mean_exp(values.flatten(3).sum(-1) if values.ndim > 3 else values, 2)

    def fills(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor:
        """Return completions of the states, int64 ``(R, N, num_fills, *plates, L)``."""
        assert isinstance(self.twist, FillTwist)
        tokens = carry["tokens"]
        noise = self.twist.uniforms(carry.get(FILL_UNIFORMS), tuple(tokens.shape), generator)
        return self.twist.fill(self.posterior_mean(tokens, k), noise)

    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors, ``ancestors`` int64 ``(R, N)``."""
        return {name: take_particles(value, ancestors) for name, value in carry.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in JSON types."""
        return {}


def normalised(log_g: Tensor) -> Tensor:
    """Return rows that sum to one; a row without mass becomes flat, which only a guess may use.

    :param log_g: log-weights, ``(..., n)``.
    """
    total = torch.logsumexp(log_g, -1, keepdim=True)
    empty = total == -torch.inf
    return torch.where(empty, 0.0, log_g - torch.where(empty, 0.0, total)).log_softmax(-1)


def is_plain_mixture(kernel: Kernel) -> bool:
    """Return whether a kernel is the ancestral kernel of its denoiser on a time grid.

    :param kernel: the kernel.
    """
    if not isinstance(kernel, InterpolatingKernel) or kernel.capability != FACTORISED:
        return False
    return kernel.mixes and kernel.markov and kernel.ancestral
