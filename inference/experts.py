"""Several chains with exponents as the mover of one site: experts, completions, costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.kernels import FACTORISED, InterpolatingKernel, Kernel
from ppl_diffusion.kernels.base import GIVEN, Carry
from ppl_diffusion.kernels.completions import TableCompletions
from ppl_diffusion.kernels.path_power import log_product
from ppl_diffusion.processes.mixture import log_posterior_mean
from ppl_diffusion.programs.sources import Rng
from ppl_diffusion.smc.twists import FILL_UNIFORMS, FillTwist, Twist


class ExpertMover(ABC):
    """The experts of one chain site, as what moves its particles.

    :param composition: the chains with their exponents.
    :param kernels: the kernel each expert is run with.
    :param twist: look-ahead, whose noise travels with the particles, or None.
    :param max_rows: largest number of rows sent to a network at once, None for what suits it.
    """

    exact = True

    def __init__(
        self,
        composition: Composition,
        kernels: Sequence[Kernel],
        *,
        twist: Twist | None,
        max_rows: int | None,
    ) -> None:
        self.composition, self.twist = composition, twist
        self.chain, self.exponents = composition.chains[0], composition.exponents
        self._denoisers: dict[int, EvaluatedDenoiser] = {}
        self.kernels = [self._evaluated(kernel, max_rows) for kernel in kernels]

    def _evaluated(self, kernel: Kernel, max_rows: int | None) -> Kernel:
        """Put a counter around the denoiser; experts with one network share its answers."""
        key = id(kernel.denoiser)
        if key not in self._denoisers:
            self._denoisers[key] = EvaluatedDenoiser(kernel.denoiser, max_rows=max_rows)
        return kernel.with_denoiser(self._denoisers[key])

    @property
    def kernel(self) -> Kernel:
        """The kernel of the first expert, whose steps are counted."""
        return self.kernels[0]

    @property
    @abstractmethod
    def target_law(self) -> str:
        """What is sampled, in words; ``{law}`` stands for the product of the experts."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in JSON types."""
        return {}

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far, over all experts."""
        return sum(denoiser.rows_evaluated for denoiser in self._denoisers.values())

    @property
    def is_plain(self) -> bool:
        """Whether this is one chain as it is, which no path factor reweights."""
        return self.exponents == (1.0,)

    def init(
        self, runs: int, particles: int, generator: Rng, given: Mapping[str, Tensor] | None = None
    ) -> Carry:
        """Return the noisiest states, tokens ``(R, N, *plates, L)``."""
        batch = (runs, particles, *self.chain.batch_shape)
        given = self.chain.given if given is None else given
        carry = self._start(batch, generator, given)
        if isinstance(self.twist, FillTwist):
            noise = self.twist.init((*batch, self.chain.length), generator)
            carry = carry if noise is None else {**carry, FILL_UNIFORMS: noise}
        return carry

    def _start(self, batch: Sequence[int], generator: Rng, given: Mapping[str, Tensor]) -> Carry:
        chain = self.chain
        return self.kernel.init_carry(
            batch, chain.length, prompt=chain.prompt, generator=generator, given=given
        )

    @abstractmethod
    def move(self, carry: Carry, k: int, generator: Any) -> tuple[Carry, Tensor | float]:
        """Return the carry after step ``k`` and the log of what it is weighed by, ``(R, N)``."""

    def carries(self, carry: Carry) -> list[Carry]:
        """Return what each expert sees of a carry: the tokens, and the conditions it reads."""
        given, found = carry.get(GIVEN) or {}, []
        for kernel in self.kernels:
            own: Carry = {"tokens": carry["tokens"]}
            if kernel.conditions:
                own[GIVEN] = {name: given[name] for name in kernel.conditions}
            found.append(own)
        return found

    def cavities(self, carry: Carry, k: int) -> list[Tensor]:
        """Return each expert's prediction of the clean tokens, ``(*batch, L, V)``."""
        seen = zip(self.kernels, self.carries(carry), strict=True)
        return [kernel.cavity_log_probs(own, k) for kernel, own in seen]

    def posterior_mean(self, carry: Carry, k: int) -> Tensor:
        """Return what a look-ahead fills states with: the composed law of the clean tokens."""
        log_c = normalised(log_product(self.cavities(carry, k), self.exponents))
        alpha = float(self.kernel.alphas[k])
        mean: Tensor = log_posterior_mean(self.kernel.process, carry["tokens"], log_c, alpha)
        return mean

    def fills(self, twist: FillTwist, carry: Carry, k: int, generator: Any) -> Tensor:
        """Return completions of the states, int64 ``(R, N, F, *plates, L)``."""
        shape = tuple(carry["tokens"].shape)
        noise = twist.uniforms(carry.get(FILL_UNIFORMS), shape, generator)
        noise = None if noise is None else noise.to(carry["tokens"].device)
        return twist.fill(TableCompletions(self.posterior_mean(carry, k)), noise)


def normalised(log_g: Tensor) -> Tensor:
    """Return rows that sum to one; a row without mass becomes flat, which only a guess may use."""
    total = torch.logsumexp(log_g, -1, keepdim=True)
    empty = total == -torch.inf
    return torch.where(empty, 0.0, log_g - torch.where(empty, 0.0, total)).log_softmax(-1)


def is_plain_mixture(kernel: Kernel) -> bool:
    """Return whether a kernel is the ancestral kernel of its denoiser on a time grid."""
    if not isinstance(kernel, InterpolatingKernel) or kernel.capability != FACTORISED:
        return False
    return kernel.mixes and kernel.markov and kernel.ancestral
