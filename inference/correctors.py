"""Feynman-Kac correctors: samples from powers, products, mixtures and tilts of chains.

To sample from ``prod_m P_m(x)**b_m exp(r(x))`` it is not enough to move by the product of the
chains' steps: every step leaves a normalising constant behind, which is a weight (Skreta et al.
2025, arXiv:2503.02819; discrete chains: arXiv:2601.10403). The published weights are rates in
continuous time. Here a *finite* chain has a declared target and exact weights::

    Gamma(path) = m(x_T)**B  prod_k { prod_m K_m(x_k|x_{k-1})**b_m } q(x_{k-1}|x_k)**(1-B)  G(x0)

with reverse kernels ``K_m``, forward kernels ``q``, the noise law ``m`` and ``B = sum_m b_m``. If
the ``K_m`` are exact its law of ``x0`` is ``prod_m P_m**b_m G`` for any number of steps. For masked
chains the factors of when a position is revealed cancel, and only reveals are booked (lockstep).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference._chain_program import ChainProgram
from ppl_diffusion.inference._compositions import CFG as CFG
from ppl_diffusion.inference._compositions import Composition as Composition
from ppl_diffusion.inference._compositions import Power as Power
from ppl_diffusion.inference._compositions import Product as Product
from ppl_diffusion.inference._compositions import Tilt as Tilt
from ppl_diffusion.inference._experts import ExpertEngine
from ppl_diffusion.inference._lockstep import LockstepEngine, SiteRule, as_site_rule
from ppl_diffusion.inference._path_power import PathPowerEngine, RateEngine
from ppl_diffusion.inference._task import Task, as_task
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.potentials.base import AbstractPotential, Potential
from ppl_diffusion.smc.engine import Progress
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import FillTwist, TwistLike, as_twist

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Method = Literal["auto", "lockstep", "path", "rates"]


class Corrector(ChainProgram):
    """Sample from a composition of chains, with its log normalising constant.

    :param target: a composition, a chain (then give a potential or ``compose``), or a Pyro program
        with chain sites.
    :param potential: ``log G``, on top of what the composition holds.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param method: ``"lockstep"`` (masked chains, the default there), ``"path"`` (chains on a time
        grid at ``kappa=1``, the default elsewhere), or ``"rates"``, the published continuous-time
        form, whose result says ``exact=False``. Lockstep reveals replace the moves of a masked
        chain on a time grid, also where all exponents are 1; ``"path"`` keeps its own law.
    :param sites: which positions a lockstep reveals next: ``"random"``, ``"left-to-right"``,
        ``"confidence"``, ``"entropy"`` or a :class:`SiteRule`.
    :param group_size: reveals per lockstep; None keeps that of an ordered chain, and the number of
        steps of a chain on a time grid.
    :param compose: changes the chain of ``target``, such as ``lambda chain: Power(chain, 2.0)``.
    :param twist: look-ahead at the potential, see :class:`~ppl_diffusion.smc.FeynmanKac`.
    :param clamp: let the look-ahead choose the tokens of a lockstep: it is asked about every token
        a position may get, at ``V`` sequences per reveal.
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to a network at once.
    :param progress: called with ``(steps done, steps in all)``.
    :raises CapabilityError: if the method does not fit the chains, or a site rule ranks positions
        by the tokens just sampled.
    :raises ValueError: on options that mean nothing together.

    Example::

        sharp = Corrector(Tilt(Power(chain, 2.0), reward), num_particles=64).run(seed=0)
        sharp.log_evidence  # log sum_x P(x)**2 exp(reward(x)), unbiased before the log
    """

    def __init__(
        self,
        target: Composition | ReverseChain | Callable[..., Any],
        potential: AbstractPotential | Callable[[Tensor], Tensor] | None = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        method: Method = "auto",
        sites: str | SiteRule = "random",
        group_size: int | None = None,
        compose: Callable[[ReverseChain], ReverseChain | Composition] | None = None,
        twist: TwistLike = "argmax",
        clamp: bool = False,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        if method not in ("auto", "lockstep", "path", "rates"):
            raise ValueError(
                f"Corrector: method is {method!r}; choose 'auto', 'lockstep', 'path' or 'rates'."
            )
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            resampler=resampler,
            ess_threshold=ess_threshold,
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.method, self.rule, self.group_size = method, as_site_rule(sites), group_size
        self.twist, self.clamp, self.compose = as_twist(twist), clamp, compose
        if clamp and not isinstance(self.twist, FillTwist):
            raise ValueError("Corrector: clamp=True needs a twist by completions, e.g. 'argmax'.")
        if compose is not None and isinstance(target, Composition):
            raise ValueError(
                "Corrector: compose changes a chain, but the target is a composition already; "
                "leave it out."
            )

    def task(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
        """Return the chain, and the potential on top of the composition.

        :param args: arguments of the program, where the target is one.
        :param kwargs: keyword arguments of the program.
        """
        target = self.target
        if isinstance(target, Composition):
            if args or kwargs:
                raise TypeError("Corrector.run: a composition takes no arguments of a program.")
            target = target.chains[0]
        composed = isinstance(self.target, Composition) or self.compose is not None
        if isinstance(target, ReverseChain) and self.potential is None and composed:
            return as_task(target, _NOTHING)
        return as_task(target, self.potential, args, kwargs, owner="Corrector")

    def bind(self, task: Task) -> ExpertEngine:
        """Return the engine of one run.

        :param task: the chain, and the potential on top of the composition.
        """
        base = self.target if isinstance(self.target, Composition) else task.chain
        composed = _composed(base if self.compose is None else self.compose(task.chain))
        if task.potential is not _NOTHING:
            composed = Tilt(composed, task.potential)
        options: dict[str, Any] = {"twist": self.twist, "max_rows": self.max_rows}
        if self._method(task.chain) == "lockstep":
            options |= {"rule": self.rule, "group_size": self.group_size, "clamp": self.clamp}
            return LockstepEngine(task, composed, **options)
        if self.clamp or self.group_size is not None or self.rule.name != "random":
            raise ValueError(
                "Corrector: sites, group_size and clamp belong to lockstep reveals of masked "
                "chains; leave them out, or use method='lockstep'."
            )
        engine = RateEngine if self.method == "rates" else PathPowerEngine
        return engine(task, composed, **options)

    def _method(self, chain: ReverseChain) -> str:
        masked = isinstance(chain.kernel, OrderedKernel) or chain.kernel.process.absorbing
        automatic = "lockstep" if masked else "path"
        return automatic if self.method == "auto" else self.method

    def settings(self, engine: ExpertEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {
            "method": "corrector",
            "form": self._method(engine.chain),
            "exponents": list(engine.exponents),
            **engine.settings,
            "twist": None if self.twist is None else self.twist.name,
            "resampler": self.resampler.name,
            "ess_threshold": self.ess_threshold,
        }


def order_inconsistency(
    chain: ReverseChain, x0: Tensor, *, num_orders: int = 16, seed: int | None = None
) -> Tensor:
    """Return how much a masked chain's likelihood of a sequence depends on the order of reveals.

    A lockstep target is an average over orders of ``prod_l D_l(x_l | revealed before)**b``. An
    exact denoiser gives every order the same product, a learned one does not; the standard
    deviation of its log over random orders is the error of the model that no sampler can mend.

    :param chain: a masked chain.
    :param x0: clean sequences, int64 ``(n, L)``.
    :param num_orders: random orders per sequence.
    :param seed: seed of the orders.
    :returns: standard deviations in nats, float64 ``(n,)``.
    :raises CapabilityError: if the process is not absorbing.
    :raises ValueError: if the sequences are not of the chain, or there are fewer than two orders.
    """
    _check_sequences(chain, x0, num_orders)
    kernel = OrderedKernel(chain.kernel.process, chain.kernel.denoiser, length=chain.length)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rank = torch.rand(len(x0), num_orders, chain.length, generator=generator).argsort(-1)
    revealed = rank[..., None, :] < torch.arange(chain.length + 1)[:, None]
    path = torch.where(revealed, x0[:, None, None, :], kernel.process.vocab_size)
    with torch.no_grad():
        return kernel.path_log_prob(path, given=chain.given).std(-1)


def _check_sequences(chain: ReverseChain, x0: Tensor, num_orders: int) -> None:
    size = chain.kernel.process.vocab_size
    fits = x0.dtype in _WHOLE and x0.ndim == 2 and x0.shape[1] == chain.length
    if not fits or bool(((x0 < 0) | (x0 >= size)).any()):
        values = f" with values {x0.min()}..{x0.max()}" if x0.numel() else ""
        raise ValueError(
            f"order_inconsistency: x0 must hold tokens 0..{size - 1}, integers of shape (n, "
            f"{chain.length}), got {x0.dtype} of shape {tuple(x0.shape)}{values}."
        )
    if num_orders < 2:
        raise ValueError(
            f"order_inconsistency: num_orders must be >= 2 to have a spread, got {num_orders}."
        )


def _zero(x0: Tensor) -> Tensor:
    return torch.zeros(x0.shape[:-1], dtype=torch.float64)


_NOTHING = Potential(_zero, name="0")
"""Stands for no potential."""


def _composed(base: ReverseChain | Composition) -> Composition:
    return base if isinstance(base, Composition) else Composition([(base, 1.0)])
