"""The geometric mixture of a conditional and an unconditional prediction."""

import math

from ppl_diffusion.arrays import Array, array_namespace, to_float64


def guided_log_probs(log_conditional: Array, log_unconditional: Array, weight: float) -> Array:
    """Return ``log p_w`` with ``p_w ~ p_y**w p_0**(1 - w)``, normalised over the last axis.

    What either law excludes is excluded, whatever the weight: ``0**w`` is taken as 0 for negative
    ``w`` too, so the supports are intersected. The ends are exact: at ``w = 1`` the conditional
    rows come back as they are, at ``w = 0`` the unconditional ones.

    :param log_conditional: log-probabilities ``log p_y``, ``(..., n)``; NaN stays NaN.
    :param log_unconditional: log-probabilities ``log p_0``, same shape.
    :param weight: ``w``, any finite number.
    :returns: float64 ``(..., n)``; all ``-inf`` where the two laws have nothing in common.
    """
    xp = array_namespace(log_conditional)
    log_y, log_0 = to_float64(log_conditional), to_float64(log_unconditional)
    if weight in (0, 1):
        return log_y if weight == 1 else log_0
    excluded = (log_y == -math.inf) | (log_0 == -math.inf)
    zero = xp.zeros_like(log_y)
    mixed = weight * xp.where(excluded, zero, log_y) + (1 - weight) * xp.where(
        excluded, zero, log_0
    )
    mixed = xp.where(excluded, xp.full_like(zero, -math.inf), mixed)
    top = xp.max(mixed, axis=-1, keepdims=True)
    mixed = mixed - xp.where(top == -math.inf, xp.zeros_like(top), top)
    total = xp.sum(xp.exp(mixed), axis=-1, keepdims=True)
    return mixed - xp.log(xp.where(total == 0, xp.ones_like(total), total))
