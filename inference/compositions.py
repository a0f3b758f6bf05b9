"""Laws made of chains: powers, products, guidance mixtures and tilts, in any combination."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.potentials.base import AbstractPotential, Potential


class Composition:
    """A law made of chains: ``prod_m P_m**b_m G``.

    Equal chains are merged, and those whose exponents cancel are dropped. What any expert excludes
    is excluded, also under a negative exponent.

    :param experts: chains with their exponents.
    :param potential: ``log G``, or None.
    :raises ValueError: if an exponent is not finite, nothing is left, or the chains differ in
        vocabulary, length, prompt or plates.
    """

    def __init__(
        self,
        experts: Sequence[tuple[ReverseChain, float]],
        potential: AbstractPotential | None = None,
    ) -> None:
        merged = _merged(experts)
        if not merged:
            raise ValueError(
                "Composition: the exponents cancel, so that nothing is left of the chains; give "
                "at least one chain an exponent other than 0."
            )
        self.chains = tuple(chain for chain, _ in merged)
        self.exponents = tuple(exponent for _, exponent in merged)
        self.potential = potential
        for chain in self.chains[1:]:
            _require_same_space(self.chains[0], chain)

    @property
    def experts(self) -> tuple[tuple[ReverseChain, float], ...]:
        """The chains with their exponents."""
        return tuple(zip(self.chains, self.exponents, strict=True))

    @property
    def law(self) -> str:
        """The product in words, such as ``p1^2 * p2^-1``."""
        several = len(self.chains) > 1
        names = [f"p{m + 1}" if several else "p" for m in range(len(self.chains))]
        terms = zip(names, self.exponents, strict=True)
        return " * ".join(name if b == 1 else f"{name}^{b:g}" for name, b in terms)

    def __repr__(self) -> str:
        tilt = "" if self.potential is None else f" * exp({self.potential.name})"
        return f"{type(self).__name__}({self.law}{tilt})"


class Power(Composition):
    """The annealed law ``P**beta``.

    :param base: a chain or a composition, whose potential is scaled too.
    :param beta: above 1 sharpens, between 0 and 1 flattens.
    :raises ValueError: if it is negative and the base has a potential.
    """

    def __init__(self, base: ReverseChain | Composition, beta: float) -> None:
        experts, potential = parts_of(base)
        if potential is not None and beta < 0:
            raise ValueError(
                f"Power: beta={beta:g} divides by the potential {potential.name!r}, and 1 / G is "
                "infinite where G = 0; take the power of the chains first, then Tilt."
            )
        tilt = None if potential is None else potential * float(beta)
        super().__init__([(chain, b * float(beta)) for chain, b in experts], tilt)


class Product(Composition):
    """The product ``P_1 P_2 ...``: what all chains like.

    :param bases: chains or compositions.
    :raises ValueError: if there are none.
    """

    def __init__(self, *bases: ReverseChain | Composition) -> None:
        if not bases:
            raise ValueError("Product: there is nothing to multiply; give at least one chain.")
        parts = [parts_of(base) for base in bases]
        potentials = [potential for _, potential in parts if potential is not None]
        tilt = _sum(potentials) if potentials else None
        super().__init__([expert for experts, _ in parts for expert in experts], tilt)


class CFG(Product):
    """Guidance as a law of sequences: ``P_y**weight P_0**(1 - weight)``.

    Classifier-free guidance mixes predictions site by site, which samples from no such law; the
    weights make it one. Between 0 and 1 it is the geometric mean.

    :param conditional: chain (or composition) of ``P_y``.
    :param unconditional: chain (or composition) of ``P_0``.
    :param weight: 0 is unconditional, 1 conditional, above 1 overshoots.
    :raises ValueError: if a law with a potential gets a negative exponent.
    """

    def __init__(
        self,
        conditional: ReverseChain | Composition,
        unconditional: ReverseChain | Composition,
        weight: float,
    ) -> None:
        parts = ((conditional, weight), (unconditional, 1 - weight))
        for base, b in parts:
            potential = parts_of(base)[1]
            if b < 0 and potential is not None:
                raise ValueError(
                    f"CFG: weight={weight:g} divides by the potential {potential.name!r} of a "
                    "Tilt, and 1 / G is infinite where G = 0; mix the chains first, then Tilt."
                )
        super().__init__(*(Power(base, b) for base, b in parts if b != 0))


class Tilt(Composition):
    """A law times ``G``.

    :param base: a chain or a composition.
    :param potential: ``log G``: a potential, or a function ``x0 (*batch, L) -> (*batch,)``.
    """

    def __init__(
        self,
        base: ReverseChain | Composition,
        potential: AbstractPotential | Callable[[Tensor], Tensor],
    ) -> None:
        experts, own = parts_of(base)
        new = potential if isinstance(potential, AbstractPotential) else Potential(potential)
        super().__init__(experts, new if own is None else own + new)


def parts_of(
    base: ReverseChain | Composition,
) -> tuple[Sequence[tuple[ReverseChain, float]], AbstractPotential | None]:
    """Return the experts with their exponents, and the potential, of a chain or a composition."""
    if isinstance(base, Composition):
        return base.experts, base.potential
    if isinstance(base, ReverseChain):
        return [(base, 1.0)], None
    raise TypeError(
        f"a composition is made of ReverseChains and compositions, got {type(base).__name__}."
    )


def _merged(experts: Sequence[tuple[ReverseChain, float]]) -> list[tuple[ReverseChain, float]]:
    merged: list[tuple[ReverseChain, float]] = []
    for chain, exponent in experts:
        if not math.isfinite(exponent):
            raise ValueError(f"Composition: exponents must be finite, got {exponent}.")
        for index, (known, total) in enumerate(merged):
            if _same_chain(known, chain):
                merged[index] = (known, total + exponent)
                break
        else:
            merged.append((chain, float(exponent)))
    return [(chain, exponent) for chain, exponent in merged if abs(exponent) > 1e-12]


def _same_chain(chain: ReverseChain, other: ReverseChain) -> bool:
    return chain is other or (chain.kernel.same_as(other.kernel) and _same_space(chain, other))


def _same_space(chain: ReverseChain, other: ReverseChain) -> bool:
    shapes = (chain.length, chain.batch_shape) == (other.length, other.batch_shape)
    if not shapes or not torch.equal(_prior(chain), _prior(other)):
        return False
    if chain.prompt is None or other.prompt is None:
        return chain.prompt is other.prompt
    return torch.equal(chain.prompt, other.prompt)


def _prior(chain: ReverseChain) -> Tensor:
    return torch.as_tensor(chain.kernel.process.prior, device="cpu")


def _require_same_space(chain: ReverseChain, other: ReverseChain) -> None:
    if not _same_space(chain, other):
        raise ValueError(
            "Composition: the chains must share vocabulary and noise, length, prompt and plates; "
            f"got {chain!r} and {other!r} (to condition one of them, condition its denoiser)."
        )


def _sum(potentials: Sequence[AbstractPotential]) -> AbstractPotential:
    total = potentials[0]
    for potential in potentials[1:]:
        total = total + potential
    return total
