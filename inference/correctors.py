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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.bootstrap import LookingAhead
from ppl_diffusion.inference.compositions import CFG as CFG
from ppl_diffusion.inference.compositions import Composition as Composition
from ppl_diffusion.inference.compositions import Power as Power
from ppl_diffusion.inference.compositions import Product as Product
from ppl_diffusion.inference.compositions import Tilt as Tilt
from ppl_diffusion.inference.lockstep import LockstepMover, SiteRule, as_site_rule
from ppl_diffusion.inference.path_power import PathPowerMover, RateMover
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.potentials.base import Potential
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound, Mover
from ppl_diffusion.programs.method import Method, Needs, register
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import (
    ChainSource,
    Changes,
    Moved,
    PotentialLike,
    Rng,
    Source,
    State,
    as_potential,
)
from ppl_diffusion.smc.law import Base, Law
from ppl_diffusion.smc.twists import Defensive, FillTwist, TwistLike

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Form = Literal["auto", "lockstep", "path", "rates"]


@register
@dataclass(frozen=True)
class Corrector(LookingAhead):
    """Sample powers, products and mixtures of chains, weighed for what their steps get wrong.

    The target of :class:`~ppl_diffusion.inference.SMC` is a composition, or (with ``compose``) a
    chain or a program, each of whose chains is then composed.

    :param twist: look-ahead at the potential, see :class:`LookingAhead`. By default
        ``"defensive"``; with ``clamp`` the argmax over a floor of one half.
    :param form: ``"lockstep"`` (masked chains, the default there), ``"path"`` (chains on a time
        grid at ``kappa=1``, the default elsewhere), or ``"rates"``, the published continuous-time
        form, whose result says ``exact=False``. Lockstep reveals replace the moves of a masked
        chain on a time grid, also where all exponents are 1; ``"path"`` keeps its own law.
    :param sites: which positions a lockstep reveals next: ``"random"``, ``"left-to-right"``,
        ``"confidence"``, ``"entropy"`` or a :class:`SiteRule`.
    :param group_size: reveals per lockstep; None keeps that of an ordered chain, and the number of
        steps of a chain on a time grid.
    :param compose: changes a chain, such as ``lambda chain: Power(chain, 2.0)``.
    :param clamp: let the look-ahead choose the tokens of a lockstep: it is asked about every token
        a position may get, at ``V`` sequences per reveal.
    :raises CapabilityError: if the form does not fit the chains, or a site rule ranks positions
        by the tokens just sampled.
    :raises ValueError: on options that mean nothing together.

    Example::

        sharp = SMC(Tilt(Power(chain, 2.0), reward), num_particles=64).run(seed=0)
        sharp.log_evidence  # log sum_x P(x)**2 exp(reward(x)), unbiased before the log
    """

    twist: TwistLike = "auto"
    form: Form = "auto"
    sites: str | SiteRule = "random"
    group_size: int | None = None
    compose: Callable[[ReverseChain], ReverseChain | Composition] | None = None
    clamp: bool = False

    name: ClassVar[str] = "corrector"
    needs: ClassVar[Needs] = Needs(own_moves=True)
    holds_clamps: ClassVar[bool] = False
    normalised: ClassVar[bool] = False  # a power or a product of laws has a mass of its own

    def __post_init__(self) -> None:
        if self.twist == "auto":  # asking about every token of each completion is dear
            object.__setattr__(self, "twist", Defensive(0, 0.5) if self.clamp else Defensive())
        super().__post_init__()
        if self.form not in ("auto", "lockstep", "path", "rates"):
            raise ValueError(
                f"Corrector: form is {self.form!r}; choose 'auto', 'lockstep', 'path' or 'rates'."
            )
        object.__setattr__(self, "sites", as_site_rule(self.sites))
        if self.clamp and not isinstance(self.twist, FillTwist):
            raise ValueError("Corrector: clamp=True needs a twist by completions, e.g. 'argmax'.")
        if self.proposal is not None:
            raise ValueError(
                "Corrector: it moves by its experts and takes no proposal; use method='smc'."
            )

    @classmethod
    def variants(cls, source: Source) -> dict[str, Method]:
        """Return what else ``check`` tries where there is a potential to ask about every token."""
        masked = all(site.chain.kernel.process.absorbing for site in source.chains)
        return {f"{cls.name}-clamped": cls(clamp=True)} if masked and source.law.tilts else {}

    def source(self, model: Any, potential: PotentialLike | None) -> Source:
        """Return the first chain, tilted by the composition's potential and the one given."""
        if isinstance(model, Composition) and self.compose is not None:
            raise ValueError(
                "Corrector: compose changes a chain, but the target is a composition already; "
                "leave it out."
            )
        composed = self._composed(model)
        parts = [composed.potential, None if potential is None else as_potential(potential)]
        known = [part for part in parts if part is not None]
        tilt = known[0] + known[1] if len(known) > 1 else (known or [_NOTHING])[0]
        return ComposedSource(composed, tilt)

    def _composed(self, model: ReverseChain | Composition) -> Composition:
        base = model
        if isinstance(model, ReverseChain) and self.compose is not None:
            base = self.compose(model)
        return base if isinstance(base, Composition) else Composition([(base, 1.0)])

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the experts of a site."""
        if isinstance(source, ComposedSource):
            composed = source.composition
        else:
            composed = self._composed(site.chain)
            if composed.potential is not None:
                raise CapabilityError(
                    "Corrector: compose tilts a chain of a program; write the potential into the "
                    "program with ppl_diffusion.potentials.factor."
                )
        twist = None if source.law.tilts == () else self.twist
        options: dict[str, Any] = {"twist": twist, "max_rows": max_rows}
        rule = self.sites
        assert isinstance(rule, SiteRule)
        if self._form(site.chain) == "lockstep":
            return LockstepMover(composed, rule=rule, group_size=self.group_size, **options)
        if self.clamp or self.group_size is not None or rule.name != "random":
            raise ValueError(
                "Corrector: sites, group_size and clamp belong to lockstep reveals of masked "
                "chains; leave them out, or use form='lockstep'."
            )
        return (RateMover if self.form == "rates" else PathPowerMover)(composed, **options)

    def _form(self, chain: ReverseChain) -> str:
        masked = isinstance(chain.kernel, OrderedKernel) or chain.kernel.process.absorbing
        automatic = "lockstep" if masked else "path"
        return automatic if self.form == "auto" else self.form

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Move by the experts; with ``clamp`` the look-ahead has a say in which token it is."""
        mover: Any = run.movers[item.site]
        if not self.clamp or not run.source.law.tilts or not isinstance(mover, LockstepMover):
            return run.step(state, item, generator)

        def look(chosen: Tensor, log_law: Tensor) -> Tensor:
            return self._children(run, state, item, chosen, log_law, mover.group_size, generator)

        carry, ratio = mover.move(state["sites"][item.site], item.k, generator, look)
        return run.moved(state, item, carry), ratio

    def _children(
        self,
        run: Bound,
        state: State,
        item: Item,
        chosen: Tensor,
        log_law: Tensor,
        group_size: int,
        generator: Rng,
    ) -> Tensor:
        """Return what every token of each chosen position promises, ``(m, V)``."""
        most = int(chosen.sum(-1).max())
        positions = chosen.to(torch.int8).topk(most, -1).indices.sort(-1).values
        size = run.movers[item.site].kernel.process.vocab_size
        tokens = torch.arange(size, device=chosen.device).expand(*positions.shape, size)
        last = item.k + 1 == run.steps[item.site] and group_size == 1
        last = last and run.ends_with(state, item.site)
        valid = chosen.gather(-1, positions)[..., None]
        law = log_law.new_full(tokens.shape, -torch.inf)
        law = law.masked_scatter(valid, log_law.log_softmax(-1))
        # What cannot be drawn, as what only fills sequences up, is not asked about.
        tokens = torch.where(valid & (law == -torch.inf), law.argmax(-1, keepdim=True), tokens)
        changes = Changes(item.site, positions, tokens)
        values = run.source.children(run.guess(state, generator), changes, state, last=last)
        if not last:  # the ends themselves need no defence
            values = run.defended(state, values, law)
        return values[valid[..., 0]]

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the look-ahead, where there is a potential to look at."""
        if self.twist is None or not run.source.law.tilts:
            return None
        return self.rate(run, state, generator)

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead, where there is a potential to look at."""
        return super().ahead(run, state, group) if run.source.law.tilts else None

    def law(self, run: Bound) -> Law:
        """Return the product of experts, tilted."""
        law = run.source.law
        movers: list[Any] = [run.movers[site.name] for site in run.source.chains]
        words = [m.target_law.format(law=m.composition.law) for m in movers]
        product = words[0]
        if len(words) > 1:
            named = zip(run.sites, words, strict=True)
            product = "; times ".join(f"{text} (of {site!r})" for site, text in named)
        exact = all(mover.exact for mover in movers)
        # Lockstep reveals have steps of their own.
        chains = tuple(
            Base(**{**vars(base), "steps": m.kernel.num_steps, "kernel": repr(m.kernel)})
            for base, m in zip(law.chains, movers, strict=True)
        )
        return law.but(product=product, chains=chains, exact=exact)

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, in JSON types."""
        mover: Any = run.movers[run.source.chains[0].name]
        return {
            "form": self._form(run.source.chains[0].chain),
            "exponents": list(mover.exponents),
            **mover.settings,
            "clamp": self.clamp,
            "twist": None if self.twist is None else self.twist.name,  # type: ignore[union-attr]
        }


class ComposedSource(ChainSource):
    """A composition of chains, tilted by a potential.

    :param composition: the chains with their exponents.
    """

    def __init__(self, composition: Composition, potential: PotentialLike) -> None:
        super().__init__(composition.chains[0], potential)
        self.composition = composition

    @property
    def law(self) -> Law:
        """The first chain's, with what changes any of them, and the tilt if there is one."""
        law = super().law
        changes = dict.fromkeys(
            c for chain in self.composition.chains for c in chain.kernel.changes
        )
        others = tuple(Base.of(chain) for chain in self.composition.chains[1:])
        base = Base(**{**vars(law.chains[0]), "changes": tuple(changes)})
        digest = "+".join([base.digest, *(other.digest for other in others)])
        base = Base(**{**vars(base), "digest": digest})
        return law.but(chains=(base,), tilts=() if self.given is _NOTHING else law.tilts)

    def final(self, state: State, paths: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Ask the potential, if there is one."""
        if self.given is not _NOTHING:
            return super().final(state, paths)
        x0 = state["sites"]["x"]["tokens"]
        return x0.new_zeros(x0.shape[:2], dtype=torch.float64), {"x0": x0}


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
    shape = (len(x0), num_orders, chain.length)
    rank = torch.rand(shape, generator=generator, device="cpu").argsort(-1).to(x0.device)
    steps = torch.arange(chain.length + 1, device=x0.device)
    revealed = rank[..., None, :] < steps[:, None]
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
    return torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)


_NOTHING = Potential(_zero, name="0")
"""Stands for no potential."""
