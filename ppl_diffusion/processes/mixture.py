"""The three-way mixture: one site of every reverse or Psi kernel of an interpolating process.

For any prior ``pi``, any denoiser categorical ``c`` and any ``kappa``, a site at ``z`` goes to
``j`` by exactly one of three moves::

    p(j | z) = w_stay 1[j = z] + w_den c_j + w_prior pi_j

With ``a = alpha(t) <= b = alpha(s)``, ``r = a / b`` and ``D = a c_z + (1 - a) pi_z``::

    w_stay  = [kappa r (b c_z + (1 - b) pi_z) + (1 - kappa) b a c_z] / D
    w_den   = pi_z [kappa (1 - r) b + (1 - kappa) b (1 - a)] / D
    w_prior = kappa (1 - r) (1 - b) pi_z / D + (1 - kappa) (1 - b)

``kappa = 1`` is the ancestral kernel (the bridge of D3PM with the denoiser's mean prediction),
smaller values are Psi-posteriors (Sahoo et al. 2026, arXiv:2602.21185). Where ``pi_z = 0`` (a
revealed token of the absorbing process) ``c_z / D`` is cancelled analytically to ``1 / a``.
A density is two gathers of ``c``; the vocabulary is touched only by the "denoiser" move.

``kappa`` may differ from site to site and may be negative while the sum stays a distribution
(:func:`~ppl_diffusion.kernels.kappa_rules.kappa_room`); ``w_stay`` alone may then fall below zero.
All functions are pure array-API code: torch and ``jax.numpy`` arrays give the same numbers.
"""

import math

from array_api_compat import is_torch_array

from ppl_diffusion.arrays import Array, array_namespace, device_of, float64_of, to_float64
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.noise import draw_categorical


def three_way(
    a: Array, b: Array, kappa: Array, c_z: Array, pi_z: Array
) -> tuple[Array, Array, Array]:
    """Return the weights ``(w_stay, w_den, w_prior)`` of the three moves.

    :param a: signal level ``alpha(t)`` of the current state; number or array.
    :param b: signal level ``alpha(s) >= a`` of the next state.
    :param kappa: Psi parameter, 1 for ancestral sampling; number or array.
    :param c_z: denoiser probability of the current state (0 for the mask), any shape.
    :param pi_z: prior probability of the current state, shaped like ``c_z``.
    :returns: three float64 arrays shaped like ``c_z``; they sum to one. At the mask of the
        absorbing process "stay" and "prior" are the same move and are booked as "stay".
    """
    xp = array_namespace(c_z)
    r = _ratio(a, b)
    d = a * c_z + (1 - a) * pi_z
    ok = d > 0
    safe = xp.where(ok, d, xp.ones_like(d))
    # pi_z = 0: the cancelled form; d = 0: a state the process cannot produce stays where it is.
    stay_hidden = (kappa * r * (b * c_z + (1 - b) * pi_z) + (1 - kappa) * b * a * c_z) / safe
    den_hidden = pi_z * (kappa * (1 - r) * b + (1 - kappa) * b * (1 - a)) / safe
    prior_hidden = kappa * (1 - r) * (1 - b) * pi_z / safe + (1 - kappa) * (1 - b)
    frozen = (pi_z <= 0) | ~ok
    zero = xp.zeros_like(stay_hidden)
    w_stay = xp.where(frozen, zero + kappa + (1 - kappa) * b, stay_hidden)
    w_den = xp.where(frozen, zero, den_hidden)
    w_prior = xp.where(frozen, zero + (1 - kappa) * (1 - b), prior_hidden)
    merged = pi_z >= 1
    return xp.where(merged, w_stay + w_prior, w_stay), w_den, xp.where(merged, zero, w_prior)


def _ratio(a: Array, b: Array) -> Array:
    """Return ``a / b`` with ``0 / 0 = 1``: no signal gained means no move."""
    if isinstance(b, int | float):
        return a / b if b > 0 else 1.0
    xp = array_namespace(b)
    positive = b > 0
    return xp.where(positive, a / xp.where(positive, b, xp.ones_like(b)), xp.ones_like(b))


def site_weights(
    process: Process, z: Array, log_c: Array, a: Array, b: Array, kappa: Array
) -> tuple[Array, Array, Array]:
    """Return :func:`three_way` for every site of a state.

    :param z: current states, shape ``(..., L)``.
    :param log_c: cavity log-probabilities, shape ``(..., L, V)``.
    :param a: ``alpha(t)``, broadcastable to ``(..., L)``.
    :param b: ``alpha(s)``.
    :param kappa: Psi parameter, a number or one per site, broadcastable to ``(..., L)``.
    :returns: three float64 arrays shaped like ``z``.
    """
    if process.absorbing:
        return absorbing_weights(process, z, a, b, kappa)
    return three_way(a, b, kappa, gather_clean(log_c, z, process.vocab_size), process.prior_prob(z))


def absorbing_weights(
    process: Process, z: Array, a: Array, b: Array, kappa: Array
) -> tuple[Array, Array, Array]:
    """Return :func:`three_way` for every site of an absorbing process, without its prediction."""
    # A masked site has pi_z = 1 and c_z = 0, a revealed one pi_z = 0 and its c_z cancels: no
    # gather, and where the levels are numbers two cases in all, whatever the number of sites.
    xp = array_namespace(z)
    masked = z == process.vocab_size
    if not all(isinstance(value, int | float) for value in (a, b, kappa)):
        pi_z = xp.astype(masked, float64_of(xp))
        return three_way(a, b, kappa, 1 - pi_z, pi_z)
    pi_z = xp.asarray([0.0, 1.0], dtype=float64_of(xp), device=device_of(z))
    revealed_or_masked = three_way(a, b, kappa, 1 - pi_z, pi_z)
    stay, den, prior = (xp.where(masked, w[1], w[0]) for w in revealed_or_masked)
    return stay, den, prior


def gather_clean(log_c: Array, z: Array, vocab_size: int) -> Array:
    """Return the probability ``c_z``, which is 0 where ``z`` is not a clean token.

    :param log_c: log-probabilities over clean tokens, shape ``(..., V)``.
    :param z: state ids, shape ``(...)``.
    :returns: float64, shape ``(...)``.
    """
    xp = array_namespace(log_c)
    clean = z < vocab_size
    index = xp.where(clean, z, xp.zeros_like(z))
    picked = xp.take_along_axis(log_c, index[..., None], axis=-1)[..., 0]
    return xp.where(clean, xp.exp(to_float64(picked)), xp.zeros_like(to_float64(picked)))


def mixture_log_prob(
    process: Process, z: Array, j: Array, log_c: Array, a: Array, b: Array, kappa: Array = 1.0
) -> Array:
    """Return ``log p(z_s = j | z_t = z)`` per site.

    :param z: current states, shape ``(..., L)``.
    :param j: next states, shape ``(..., L)``.
    :param log_c: cavity log-probabilities, shape ``(..., L, V)``.
    :param a: ``alpha(t)``, broadcastable to ``(..., L)``.
    :param b: ``alpha(s)``.
    :param kappa: Psi parameter.
    :returns: float64, shape ``(..., L)``; exactly ``-inf`` for an impossible transition, with a
        zero gradient there.
    """
    xp = array_namespace(log_c)
    c_j = gather_clean(log_c, j, process.vocab_size)
    w_stay, w_den, w_prior = site_weights(process, z, log_c, a, b, kappa)
    p = (
        xp.where(j == z, w_stay, xp.zeros_like(w_stay))
        + w_den * c_j
        + w_prior * process.prior_prob(j)
    )
    possible = p > 0
    log_p = xp.log(xp.where(possible, p, xp.ones_like(p)))
    return xp.where(possible, log_p, xp.full_like(p, -math.inf))


def mixture_sample(
    process: Process,
    z: Array,
    log_c: Array,
    a: Array,
    b: Array,
    u_move: Array,
    u_token: Array,
    kappa: Array = 1.0,
) -> Array:
    """Draw ``z_s`` given ``z_t = z``: one uniform picks the move, one the token.

    Where a negative ``kappa`` makes ``w_stay`` negative there are no three moves to choose from;
    those sites (of non-absorbing processes only) are drawn from the whole row, at ``O(V)`` each.

    :param z: current states, shape ``(..., L)``.
    :param log_c: cavity log-probabilities, shape ``(..., L, V)``.
    :param a: ``alpha(t)``, broadcastable to ``(..., L)``.
    :param b: ``alpha(s)``.
    :param u_move: uniforms in ``[0, 1)``, shape ``(..., L)``.
    :param u_token: uniforms in ``[0, 1)``, shape ``(..., L)``.
    :param kappa: Psi parameter.
    :returns: next states, shape ``(..., L)``.
    """
    xp = array_namespace(log_c)
    w_stay, w_den, w_prior = site_weights(process, z, log_c, a, b, kappa)
    from_prior = u_move < w_prior
    # "stay" comes last and only where it has mass: round-off must never keep a mask at b = 1.
    stay = (u_move >= w_prior + w_den) & (w_stay > 0)
    kept = xp.where(from_prior, process.draw_prior(u_token), z)
    if process.absorbing or (isinstance(kappa, int | float) and kappa >= 0):
        return _draw_where(~(stay | from_prior), log_c, u_token, kept)
    whole = w_stay < 0
    moved = _draw_where(~(stay | from_prior | whole), log_c, u_token, kept)
    return _draw_whole(process, whole, z, log_c, (w_stay, w_den, w_prior), u_token, moved)


def _draw_where(chosen: Array, log_c: Array, uniforms: Array, otherwise: Array) -> Array:
    """Return tokens drawn from ``log_c`` where chosen, ``otherwise`` elsewhere."""
    if not is_torch_array(chosen):  # JAX needs static shapes
        xp = array_namespace(log_c)
        return xp.where(chosen, draw_categorical(log_c, uniforms), otherwise)
    tokens = otherwise.clone()
    tokens[chosen] = draw_categorical(log_c[chosen], uniforms[chosen])
    return tokens


def _draw_whole(
    process: Process,
    chosen: Array,
    z: Array,
    log_c: Array,
    weights: tuple[Array, Array, Array],
    uniforms: Array,
    otherwise: Array,
) -> Array:
    """Return states drawn from the summed law of a site where chosen, ``otherwise`` elsewhere."""
    if not is_torch_array(chosen):
        log_p = _log_site_law(process, z, log_c, weights)
        return array_namespace(z).where(chosen, draw_categorical(log_p, uniforms), otherwise)
    rows = [w[chosen] for w in weights]
    log_p = _log_site_law(process, z[chosen], log_c[chosen], (rows[0], rows[1], rows[2]))
    states = otherwise.clone()
    states[chosen] = draw_categorical(log_p, uniforms[chosen])
    return states


def _log_site_law(
    process: Process, z: Array, log_c: Array, weights: tuple[Array, Array, Array]
) -> Array:
    """Return the sum of the three moves over all states, ``(..., num_states)``."""
    xp = array_namespace(log_c)
    w_stay, w_den, w_prior = (w[..., None] for w in weights)
    c = xp.exp(to_float64(log_c))
    extra = (*c.shape[:-1], process.num_states - process.vocab_size)
    rest = xp.zeros(extra, dtype=c.dtype, device=device_of(log_c))
    p = w_den * xp.concat([c, rest], axis=-1) + w_prior * process.prior_array(log_c)
    p = p + w_stay * _one_hot(z, process.num_states)
    return xp.where(p > 0, xp.log(xp.where(p > 0, p, xp.ones_like(p))), xp.full_like(p, -math.inf))


def log_posterior_mean(process: Process, z: Array, log_c: Array, a: Array) -> Array:
    """Return ``log p(x0 | z_t = z)`` per site: the bridge taken all the way to ``s = 0``.

    :param z: current states, shape ``(..., L)``.
    :param log_c: cavity log-probabilities, shape ``(..., L, V)``.
    :param a: ``alpha(t)``.
    :returns: float64 log-probabilities, shape ``(..., L, V)``.
    """
    xp = array_namespace(log_c)
    log_c = to_float64(log_c)
    if process.absorbing:  # the mask says nothing about its token, a revealed token everything
        known = xp.where(_is_token(z, process.vocab_size), 0.0, xp.full_like(log_c, -math.inf))
        return xp.where((z == process.vocab_size)[..., None], log_c, known)
    c_z = gather_clean(log_c, z, process.vocab_size)
    w_stay, w_den, _ = three_way(a, 1.0, 1.0, c_z, process.prior_prob(z))
    p = w_den[..., None] * xp.exp(log_c) + w_stay[..., None] * _one_hot(z, process.vocab_size)
    return xp.where(p > 0, xp.log(xp.where(p > 0, p, xp.ones_like(p))), xp.full_like(p, -math.inf))


def posterior_to_cavity(process: Process, z: Array, log_g: Array, a: Array) -> Array:
    """Turn posterior-mean predictions ``p(x | z)`` into cavity ones ``p(x^l | z^{-l})``.

    Only the entry of the current token is rescaled, by ``(1-a) pi_z / (a + (1-a) pi_z)``, the
    inverse of the Bayes update with that site's own evidence. Revealed tokens of the absorbing
    process (``pi_z = 0``) are left alone: no kernel reads them.

    :param z: current states, shape ``(..., L)``.
    :param log_g: posterior log-probabilities, shape ``(..., L, V)``.
    :param a: ``alpha(t)``, a number, also a traced one; 1 (no noise) leaves everything alone.
    :returns: normalised cavity log-probabilities, shape ``(..., L, V)``.
    """
    if process.absorbing or (isinstance(a, int | float) and a >= 1.0):
        return log_g
    xp = array_namespace(log_g)
    pi_z = process.prior_prob(z)
    evidence = (1 - a) * pi_z
    live = evidence > 0
    shift = xp.log(
        xp.where(live, evidence, xp.ones_like(evidence))
        / xp.where(live, a + evidence, xp.ones_like(evidence))
    )
    scaled = to_float64(log_g) + shift[..., None] * _one_hot(z, process.vocab_size)
    return scaled - _logsumexp(scaled)


def _one_hot(z: Array, size: int) -> Array:
    xp = array_namespace(z)
    return xp.astype(_is_token(z, size), float64_of(xp))


def _is_token(z: Array, size: int) -> Array:
    return z[..., None] == array_namespace(z).arange(size, device=device_of(z))


def _logsumexp(x: Array) -> Array:
    xp = array_namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))
