"""Split Gibbs: a sequence under the prior and a copy under the data, tied ever more closely.

The joint law of a sequence ``x`` and its copy ``w`` at noise ``1 - alpha`` is (Chu et al. 2025,
arXiv:2503.01161)::

    p(x) q(w | x) G(w),     q(w | x) = prod_i [(1 - beta) 1[w_i = x_i]
                                               + beta / (K - 1) 1[w_i != x_i]]

with ``beta = (1 - 1 / K) (1 - alpha)``, the uniform forward process at the time that has this
signal. One step of the engine is one sweep at one time of a decreasing grid:

1. *prior*: ``x ~ p(x) q(w | x)``, the reverse chain run from ``w`` at that time to 0;
2. *likelihood*: ``w ~ G(w) q(w | x)``, Metropolis steps that set one site to any token::

       log accept = log G(w') - log G(w) + (ham(w', x) - ham(w, x)) log(beta / ((K - 1) (1 - beta)))

The factor ``1 / (K - 1)`` belongs there: without it, as in the published code, the two conditionals
belong to no joint law unless ``K = 2``, and what remains does not vanish with the noise.

Each sweep leaves the joint law of *its* time alone, whose marginals tend to the posterior as the
noise vanishes; by then the copies hardly move. A run of finitely many sweeps ends somewhere in
between, for which nothing pays: equal weights, no evidence, no declared law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.biased import Unpaid
from ppl_diffusion.inference.renoising import is_on_grid
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.kernels.base import TOKENS, Carry, Kernel
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.programs.bound import Bound, Mover
from ppl_diffusion.programs.method import Needs, register
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.smc.feynman_kac import per_particle

LOG_G = "split/log_g"


@register
@dataclass(frozen=True)
class SplitGibbs(Unpaid):
    """A sequence under the prior and a copy under the data, drawn in turn as the noise falls.

    The chain's own grid is not used: sweeps have times of their own. For chains of the uniform
    process, whose noise can bring any token anywhere.

    :param num_sweeps: sweeps ``J``, one per step of the engine.
    :param num_prior_steps: steps of the reverse chain in each sweep.
    :param num_moves: Metropolis steps of the copy in each sweep.
    :param last_time: time of the last sweep; times fall linearly from 1.
    :param output: ``"copy"`` returns ``w``, which has seen the data last, ``"sequence"`` ``x``,
        which is a draw of the reverse chain.
    :raises ValueError: if a number or a name is not usable.

    Example::

        method = SplitGibbs(num_sweeps=50, num_moves=2000)
        likelihood = measurement.potential(codec)
        posterior = SMC(uniform_chain, likelihood, method=method, num_particles=16).run(seed=0)
    """

    num_sweeps: int = 50
    num_prior_steps: int = 32
    num_moves: int = 200
    last_time: float = 1e-5
    output: Literal["copy", "sequence"] = "copy"

    name: ClassVar[str] = "split-gibbs"
    needs: ClassVar[Needs] = Needs(own_moves=True, uniform=True)
    holds_clamps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for what in ("num_sweeps", "num_prior_steps", "num_moves"):
            if getattr(self, what) < 1:
                raise ValueError(f"SplitGibbs: {what} must be >= 1, got {getattr(self, what)}.")
        if not 0 < self.last_time <= 1:
            raise ValueError(
                f"SplitGibbs: last_time must lie above 0 and not above 1, got {self.last_time}."
            )
        if self.output not in ("copy", "sequence"):
            raise ValueError(f"SplitGibbs: output is {self.output!r}; choose 'copy' or 'sequence'.")

    def require(self, source: Source) -> None:
        """Refuse chains whose noise is not uniform, several chains, and clamps."""
        for site in source.chains:
            require_uniform(site.chain.kernel)
        super().require(source)
        if len(source.chains) > 1:
            raise CapabilityError(
                f"SplitGibbs: it makes a copy of one chain, and there are {len(source.chains)}; "
                "use SMC."
            )
        if site.clamp is not None:
            raise CapabilityError(
                f"SplitGibbs: the site {site.name!r} is clamped, and copies are moved everywhere; "
                "give the tokens as the prompt of the chain, or use another method."
            )

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the mover of the chain on the grid of the sweeps."""
        chain = site.chain
        times = np.append(np.linspace(1.0, self.last_time, self.num_sweeps), 0.0)
        kernel = on_grid(chain.kernel, times)
        swept = ReverseChain(kernel, chain.length, prompt=chain.prompt, given=chain.given)
        return super().mover(replace(site, chain=swept.expand(chain.batch_shape)), source, max_rows)

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Draw the sequence given its copy, and move the copy given the sequence."""
        kernel = run.movers[item.site].kernel
        carry = state["sites"][item.site]
        copy = state.get("split/copy", carry[TOKENS])
        x = self._prior_step(run, item, kernel, carry, copy, generator)
        last = item.k + 1 == kernel.num_steps
        if not (last and self.output == "sequence"):
            copy = self._likelihood_step(run, state, item, copy, x, generator)
        shown = x if self.output == "sequence" else copy
        moved = run.moved(state, item, kernel.advance(carry, shown, item.k))
        return {**moved, "split/copy": copy}, 0.0

    def _prior_step(
        self, run: Bound, item: Item, kernel: Kernel, carry: Carry, copy: Tensor, generator: Rng
    ) -> Tensor:
        """Return ``x ~ p(x) q(w | x)``, by the reverse chain from the copy on."""
        start = float(kernel.times[item.k])
        inner = np.linspace(start, 0.0, self.num_prior_steps + 1)
        below = on_grid(kernel, np.insert(inner, 0, 1.0))
        fixed, state = run.sites[item.site].chain.fixed, {**carry, TOKENS: copy}
        for k in range(1, below.num_steps):  # the first step leads to where the copy is
            step = below.step(state, k, fixed=fixed)
            state = below.advance(state, step.sample(generator=generator), k)
        clean: Tensor = state[TOKENS]
        return clean

    def _likelihood_step(
        self, run: Bound, state: State, item: Item, copy: Tensor, x: Tensor, generator: Rng
    ) -> Tensor:
        """Return the copy after Metropolis steps that leave ``G(w) q(w | x)`` alone."""
        kernel = run.movers[item.site].kernel
        size, fixed = kernel.process.vocab_size, run.sites[item.site].chain.fixed
        odds = mismatch_log_odds(float(kernel.alphas[item.k]), size)
        shape, length = copy.shape[:2], copy[0, 0].numel()
        pinned = None if fixed is None else fixed.expand(copy.shape).flatten(2)
        current, target = copy.flatten(2), x.flatten(2)
        log_g = self._log_g(run, state, item, copy)
        for _ in range(self.num_moves):
            u = uniforms((3, *shape), generator=generator, device=copy.device)
            where = (u[0] * length).to(torch.int64)[..., None]
            value = (u[1] * size).to(torch.int64)[..., None]
            proposed = current.scatter(-1, where, value)
            new = self._log_g(run, state, item, proposed.reshape(copy.shape))
            apart = (value != target.gather(-1, where)).to(torch.float64)
            apart = apart - (current != target).to(torch.float64).gather(-1, where)
            accepted = u[2].log() < log_accept(log_g, new, apart[..., 0], odds)
            if pinned is not None:
                accepted = accepted & ~pinned.gather(-1, where)[..., 0]
            current = torch.where(accepted[..., None], proposed, current)
            log_g = torch.where(accepted, new, log_g)
        return current.reshape(copy.shape)

    @staticmethod
    def _log_g(run: Bound, state: State, item: Item, tokens: Tensor) -> Tensor:
        """Return what the target makes of clean sequences, float64 ``(R, N)``."""
        values = run.source.look({item.site: tokens[:, :, None]}, state, last=True)
        return per_particle(values[:, :, 0])

    def why(self, run: Bound) -> str:
        """Return why the particles have no declared law."""
        return (
            f"no declared law: {self.num_sweeps} sweeps of split Gibbs with the noise falling to "
            f"time {self.last_time:g}, each of them exact for the joint law of a sequence and its "
            "noisy copy but for the steps of the reverse chain, and too few to forget the last "
            "noise; equal weights"
        )


def mismatch_log_odds(alpha: float, size: int) -> float:
    """Return ``log(beta / ((K - 1) (1 - beta)))``: what a site of the copy pays for differing.

    :param alpha: signal of the copy.
    :param size: number ``K`` of tokens.
    """
    beta = (1 - 1 / size) * (1 - alpha)
    if beta == 0:
        return -math.inf
    return math.log(beta) - math.log(size - 1) - math.log1p(-beta)


def log_accept(old: Tensor, new: Tensor, apart: Tensor, odds: float) -> Tensor:
    """Return the log of the Metropolis ratio of a symmetric proposal.

    A copy that the data forbid moves as if they said nothing, until it meets one that they allow.

    :param old: ``log G`` of the copy.
    :param new: ``log G`` of the proposal.
    :param apart: by how many more sites it differs from the sequence, -1, 0 or 1.
    :param odds: :func:`mismatch_log_odds`.
    """
    forbidden = old == -torch.inf
    gain = torch.where(forbidden, torch.where(new == -torch.inf, 0.0, torch.inf), new - old)
    # No noise at all: -inf times no change is no change.
    return gain + torch.where(apart == 0, 0.0, apart * odds)


def on_grid(kernel: Kernel, times: np.ndarray) -> InterpolatingKernel:
    """Return the ancestral chain of a process and its denoiser on another grid of times."""
    return InterpolatingKernel(kernel.process, kernel.denoiser, times=times)


def require_uniform(kernel: Kernel) -> None:
    """Refuse kernels that are not reverse chains of the uniform process.

    :raises CapabilityError: if this one is not.
    """
    if not _is_uniform(kernel.process):
        raise CapabilityError(
            f"SplitGibbs: a copy differs from its sequence by uniform noise, and the chain is one "
            f"of {kernel.process!r}; take a prior of the Uniform process, or another method."
        )
    if not is_on_grid(kernel):
        raise CapabilityError(
            f"SplitGibbs: sweeps run the chain on grids of their own, which {kernel!r} cannot be "
            "put on; use InterpolatingKernel."
        )


def _is_uniform(process: Process) -> bool:
    same = np.allclose(process.prior, 1 / process.vocab_size, rtol=0, atol=1e-12)
    return process.num_states == process.vocab_size and bool(same)
