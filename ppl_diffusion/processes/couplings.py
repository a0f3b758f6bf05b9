"""Couplings of two marginals of one site: how a noise that only says *where* it is moves back.

A learned forward process (FLDD, arXiv 2605.18204) gives the marginals ``q(z_s | x) = u`` and
``q(z_t | x) = w`` of a site at two times ``s < t``. Its reverse step needs their joint law, of
which any with these marginals will do: row ``k`` of ``P`` is ``q(z_s | z_t = k, x)``, and
``w P = u``. Which one decides how much a factorised reverse chain can learn of it:

* the **maximum** coupling stays where it can, ``P(stay) = 1 - TV(u, w)``::

      P[k, j] = 1[j = k] min(u_k, w_k) / w_k + max(0, w_k - u_k) / w_k m_j
      m_j = max(0, u_j - w_j) / sum_l max(0, u_l - w_l)

  Of masks that is the bridge of absorbing diffusion; of uniform noise it has the marginals of the
  usual process, and another bridge.
* the **independent** one forgets: ``P[k, :] = u``. It is never worse than any other at the last
  step, where ``z_T`` knows nothing of ``x`` (:func:`at_step`).
* **Markov**: Bayes' rule for a given transition ``q(z_t | z_s)``.
* **monotone**: quantiles meet quantiles, for states that have an order.
* **Sinkhorn**: the entropic optimum for a cost of moving, exact in its marginals.

All functions are array-API code in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ppl_diffusion.arrays import Array, array_namespace, device_of, float64_of, to_float64

TINY = 1e-100
"""Below it a probability is none and its row never visited; gradients divide by its square."""


class Coupling(ABC):
    """A joint law of the states of one site at two times, given its marginals."""

    @abstractmethod
    def table(self, u: Array, w: Array) -> Array:
        """Return ``P``: row ``k`` is the law of the earlier state where the later one is ``k``.

        Rows of probability zero are never visited; they are distributions all the same.

        :param u: marginals of the earlier time, ``(..., A)``.
        :param w: marginals of the later, noisier time, ``(..., A)``.
        :returns: float64 ``(..., A, A)``; rows sum to one, and ``w @ P = u``.
        """

    def row(self, u: Array, w: Array, z: Array) -> Array:
        """Return the rows of given states, ``(..., A)``.

        :param z: states at the later time, int64 ``(...)``.
        """
        xp = array_namespace(u)
        states = xp.arange(u.shape[-1], device=device_of(u)) == z[..., None]
        return self.mixed(u, w, xp.astype(states, float64_of(xp)))

    def mixed(self, u: Array, w: Array, weights: Array) -> Array:
        """Return rows mixed by weights of states, ``(..., A)``; one-hot ones pick a row.

        :param weights: of the states at the later time, ``(..., A)``.
        """
        table = self.table(u, w)
        return array_namespace(u).sum(weights[..., None] * table, axis=-2)

    def entropies(self, u: Array, w: Array) -> Array:
        """Return the entropies of the rows, nats, ``(..., A)``."""
        return entropy(self.table(u, w))


@dataclass(frozen=True)
class Maximum(Coupling):
    """Stay wherever both marginals allow it, and otherwise jump to where mass is missing."""

    def table(self, u: Array, w: Array) -> Array:
        """Return ``P``."""
        u, w, eye = _ready(u, w)
        stay, jump = self._moves(u, w)
        return eye * stay[..., None] + (1 - stay)[..., None] * jump[..., None, :]

    def mixed(self, u: Array, w: Array, weights: Array) -> Array:
        """Return mixed rows, without the table of all."""
        u, w, _ = _ready(u, w)
        stay, jump = self._moves(u, w)
        kept = weights * stay
        left = array_namespace(u).sum(weights - kept, axis=-1, keepdims=True)
        return kept + left * jump

    def entropies(self, u: Array, w: Array) -> Array:
        """Return the entropies of the rows: what is left leads to where it cannot stay."""
        u, w, _ = _ready(u, w)
        xp = array_namespace(u)
        stay, jump = self._moves(u, w)
        whether = entropy(xp.stack([stay, 1 - stay], axis=-1))
        return whether + (1 - stay) * entropy(jump)[..., None]

    @staticmethod
    def _moves(u: Array, w: Array) -> tuple[Array, Array]:
        """Return the probability to stay in each state, and where a jump leads."""
        xp = array_namespace(u)
        visited = w > TINY
        stay = xp.where(visited, xp.minimum(u, w) / xp.where(visited, w, xp.ones_like(w)), 0 * w)
        missing = xp.maximum(u - w, xp.zeros_like(u))
        total = xp.sum(missing, axis=-1, keepdims=True)
        moved = total > TINY
        jump = xp.where(moved, missing / xp.where(moved, total, xp.ones_like(total)), u)
        return stay, jump


@dataclass(frozen=True)
class Independent(Coupling):
    """Draw the earlier state anew, whatever the later one is."""

    def table(self, u: Array, w: Array) -> Array:
        """Return ``P``."""
        u, _, eye = _ready(u, w)
        return u[..., None, :] + 0 * eye

    def mixed(self, u: Array, w: Array, weights: Array) -> Array:
        """Return mixed rows: all are ``u``."""
        return _ready(u, w)[0] * array_namespace(u).sum(weights, axis=-1, keepdims=True)

    def entropies(self, u: Array, w: Array) -> Array:
        """Return the entropies of the rows: all are that of ``u``."""
        u, _, _ = _ready(u, w)
        return entropy(u)[..., None] + 0 * u


@dataclass(frozen=True, eq=False)
class Markov(Coupling):
    """Bayes' rule for a forward step that is given: ``P[k, j] = u_j Q[j, k] / w_k``.

    :param transition: ``Q[j, k] = q(z_t = k | z_s = j)``, ``(A, A)`` or ``(..., A, A)``; it leads
        from ``u`` to ``w``, or the coupling has another marginal than ``u``.
    """

    transition: Array

    def table(self, u: Array, w: Array) -> Array:
        """Return ``P``."""
        u, w, eye = _ready(u, w)
        xp = array_namespace(u)
        q = xp.asarray(self.transition, dtype=float64_of(xp), device=device_of(u))
        joint = xp.matrix_transpose(u[..., :, None] * q)
        return _normalised(joint, eye)


@dataclass(frozen=True)
class Monotone(Coupling):
    """Quantile coupling: for states with an order, such as levels of grey."""

    def table(self, u: Array, w: Array) -> Array:
        """Return ``P``."""
        u, w, eye = _ready(u, w)
        xp = array_namespace(u)
        top_u, top_w = xp.cumulative_sum(u, axis=-1), xp.cumulative_sum(w, axis=-1)
        high = xp.minimum(top_w[..., :, None], top_u[..., None, :])
        low = xp.maximum((top_w - w)[..., :, None], (top_u - u)[..., None, :])
        return _normalised(xp.maximum(high - low, xp.zeros_like(high)), eye)


@dataclass(frozen=True, eq=False)
class Sinkhorn(Coupling):
    """The plan of least cost plus entropy, rounded so that its marginals are exact.

    Scaling converges to the marginals and never reaches them; what is missing is added as the
    product of the residuals (Altschuler, Weed and Rigollet 2017, algorithm 2).

    :param cost: of a move from the later state ``k`` to the earlier one ``j``, ``(A, A)``.
    :param epsilon: weight of the entropy, positive; smaller comes nearer to the cheapest plan.
    :param iterations: scalings of rows and columns.
    :raises ValueError: if a number cannot be used.
    """

    cost: Array
    epsilon: float = 0.1
    iterations: int = 50

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0) or self.iterations < 1:
            raise ValueError(
                "Sinkhorn: epsilon must be positive and iterations at least 1, got "
                f"{self.epsilon} and {self.iterations}."
            )

    def table(self, u: Array, w: Array) -> Array:
        """Return ``P``."""
        u, w, eye = _ready(u, w)
        return _normalised(self._plan(u, w), eye)

    def _plan(self, u: Array, w: Array) -> Array:
        xp = array_namespace(u)
        cost = xp.asarray(self.cost, dtype=float64_of(xp), device=device_of(u))
        plan = xp.exp(-(cost - xp.min(cost)) / self.epsilon) + 0 * (u[..., None, :] + w[..., None])
        for _ in range(self.iterations):
            plan = plan * _ratio(w, xp.sum(plan, axis=-1))[..., None]
            plan = plan * _ratio(u, xp.sum(plan, axis=-2))[..., None, :]
        one = xp.ones_like(u)
        plan = plan * xp.minimum(_ratio(w, xp.sum(plan, axis=-1)), one)[..., None]
        plan = plan * xp.minimum(_ratio(u, xp.sum(plan, axis=-2)), one)[..., None, :]
        rows, columns = w - xp.sum(plan, axis=-1), u - xp.sum(plan, axis=-2)
        missing = xp.sum(rows, axis=-1)[..., None]
        scale = xp.where(missing > TINY, missing, xp.ones_like(missing))
        return plan + rows[..., None] * (columns / scale)[..., None, :]


COUPLINGS: dict[str, type[Coupling]] = {
    "maximum": Maximum,
    "independent": Independent,
    "monotone": Monotone,
}
"""Couplings that need nothing but the marginals, by name."""


def at_step(coupling: Coupling, t: int, num_steps: int, prior: Array) -> Coupling:
    """Return the coupling of a step: at the noisiest time it is independent.

    ``z_T`` is independent of ``x``, so that the independent coupling is the best there; of a prior
    that is a point, as a mask is, all couplings are one.

    :param coupling: of the other steps.
    :param t: the later time of the step, 1 to ``num_steps``.
    :param prior: law of ``z_T``, ``(A,)``.
    """
    point = float(np.max(np.asarray(prior))) == 1.0
    return coupling if t < num_steps or point else Independent()


def entropy(p: Array) -> Array:
    """Return the entropy along the last axis, nats; zeros send no NaN backwards.

    :param p: laws, ``(..., A)``.
    """
    xp = array_namespace(p)
    return -xp.sum(p * xp.log(xp.where(p > 0, p, xp.ones_like(p))), axis=-1)


def _ready(u: Array, w: Array) -> tuple[Array, Array, Array]:
    """Return the marginals in float64, of one shape, and the identity beside them."""
    xp = array_namespace(u)
    u, w = xp.broadcast_arrays(to_float64(u), to_float64(w))
    return u, w, xp.eye(u.shape[-1], dtype=u.dtype, device=device_of(u)) + 0 * u[..., None]


def _ratio(wanted: Array, found: Array) -> Array:
    xp = array_namespace(wanted)
    some = found > TINY
    return xp.where(some, wanted / xp.where(some, found, xp.ones_like(found)), 0 * wanted)


def _normalised(joint: Array, eye: Array) -> Array:
    """Return rows as laws; those of no mass stay where they are."""
    xp = array_namespace(joint)
    total = xp.sum(joint, axis=-1, keepdims=True)
    some = total > TINY
    return xp.where(some, joint / xp.where(some, total, xp.ones_like(total)), eye)
