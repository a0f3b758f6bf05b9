"""Steps of masked chains whose selection and tokens follow a guide, as distributions.

What is revealed next, and as what, may follow anything that is known before the draw. Where both
have a density, the step is a proposal like any other, and weights pay for it. With ``M`` the masked
sites, ``c`` a token law and scores ``a``::

    independent   prod_{i in M} [ rho_i if i stays, (1 - rho_i) c_i(v_i) if it opens ]
    policy        PL(S; exp a) prod_{i in S} c_i(v_i),                |S| = n
    values        v_i ~ c_i on all of M;  then pick by pick
                  u_i = (1 - delta) conf_i(v_i) / sum_rem conf + delta / |rem|

The third draws values first and chooses by them, as MaskGIT decoders do; tokens that are not chosen
are forgotten. Given them its density is known, and that is all a weight needs: the forgotten tokens
have law ``c`` in the extended target too, and cancel. The *order ratio* does not::

    log w = sum_{i in S} log d_i(v_i) / c_i(v_i)  +  sum_picks log (1 / |rem|) / u
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction, as_prediction
from ppl_diffusion.kernels import RevealStep
from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.processes.noise import draw_categorical, uniforms

MOST_IN_A_SUBSET = 12
"""Reveals of one step whose orders are summed over: their subsets are listed."""


class IndependentStep(StepDistribution):
    """Masked sites open each by itself, with probabilities of their own; event shape ``(L,)``.

    :param tokens: current states, int64 ``(*batch, L)``; the mask has id ``V``.
    :param log_probs: log-probabilities of the tokens of sites that open, ``(*batch, L, V)``.
    :param stay: probability that a masked site stays masked, ``(*batch, L)``.
    :param fixed: bool ``(*batch, L)`` or None: positions that keep their token.
    """

    def __init__(
        self,
        tokens: Tensor,
        log_probs: Tensor | Prediction,
        stay: Tensor,
        *,
        fixed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch = torch.broadcast_shapes(tokens.shape[:-1], log_probs.shape[:-2], stay.shape[:-1])
        length, size = tokens.shape[-1], log_probs.shape[-1]
        self.num_states = size + 1
        self.tokens = tokens.expand(*batch, length)
        self.prediction = as_prediction(log_probs).expand(batch)
        self.stay = stay.expand(*batch, length)
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)

    @property
    def log_probs(self) -> Tensor:
        """The law of the tokens as a table, ``(*batch, L, V)``."""
        return self.prediction.dense()

    def with_log_probs(self, log_probs: Tensor) -> IndependentStep:
        """Return the same step with another law of the tokens.

        :param log_probs: log-probabilities, ``(*batch, L, V)``.
        """
        return IndependentStep(
            self.tokens, log_probs, self.stay, fixed=self.fixed, validate_args=False
        )

    def _site_log_probs(self, tokens: Tensor, value: Tensor) -> Tensor:
        mask = self.num_states - 1
        masked, opened = tokens == mask, (tokens == mask) & (value != mask)
        token = _log_taken(self.prediction.expand(value.shape[:-1]), value, opened)
        moved = torch.where(opened, torch.log1p(-self.stay) + token, self.stay.log())
        kept = torch.where(value == tokens, 0.0, -torch.inf).to(moved.dtype)
        return torch.where(masked, moved, kept)

    def draw(self, u_move: Tensor, u_token: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into next states; the same uniforms give the same states."""
        tokens = self.tokens.expand_as(u_move)
        opened = (tokens == self.num_states - 1) & (u_move >= self.stay)
        if self.fixed is not None:
            opened = opened & ~self.fixed
        return self.prediction.expand(tokens.shape[:-1]).draw(u_token, opened, tokens)


class PolicyStep(StepDistribution):
    """Reveal ``count`` sites that a policy chooses before their tokens are drawn.

    The sites are the first of a Plackett-Luce order with weights ``exp(scores)``; the density of
    the states sums over the orders in which they may have been picked.

    :param tokens: current states, int64 ``(*batch, L)``; the mask has id ``V``.
    :param log_probs: log-probabilities of the tokens, ``(*batch, L, V)``.
    :param eligible: bool ``(*batch, L)``: masked positions that may be revealed.
    :param scores: finite, ``(*batch, L)``.
    :param count: how many are revealed; all that are eligible where these are fewer.
    """

    fixed = None

    def __init__(
        self,
        tokens: Tensor,
        log_probs: Tensor | Prediction,
        eligible: Tensor,
        scores: Tensor,
        count: int,
        *,
        validate_args: bool | None = None,
    ) -> None:
        batch = torch.broadcast_shapes(tokens.shape[:-1], log_probs.shape[:-2], scores.shape[:-1])
        length, size = tokens.shape[-1], log_probs.shape[-1]
        self.num_states, self.count = size + 1, count
        self.tokens = tokens.expand(*batch, length)
        self.prediction = as_prediction(log_probs).expand(batch)
        self.eligible = (eligible & (tokens == size)).expand(*batch, length)
        self.scores = scores.expand(*batch, length)
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)

    @property
    def log_probs(self) -> Tensor:
        """The law of the tokens as a table, ``(*batch, L, V)``."""
        return self.prediction.dense()

    def with_log_probs(self, log_probs: Tensor) -> PolicyStep:
        """Return the same step with another law of the tokens.

        :param log_probs: log-probabilities, ``(*batch, L, V)``.
        """
        return PolicyStep(
            self.tokens, log_probs, self.eligible, self.scores, self.count, validate_args=False
        )

    def _score(self, tokens: Tensor, value: Tensor) -> Tensor:
        size = self.num_states - 1
        changed = value != tokens
        legal = (~changed | (self.eligible & (value >= 0) & (value < size))).all(-1)
        legal = legal & (changed.sum(-1) == self.eligible.sum(-1).clamp_max(self.count))
        where = changed & legal[..., None]
        token = _log_taken(self.prediction.expand(value.shape[:-1]), value, where)
        scores, eligible = self.scores.expand(value.shape), self.eligible.expand(value.shape)
        log_p = token.sum(-1) + log_subset_prob(scores, eligible, where, self.count)
        return torch.where(legal, log_p, -torch.inf)

    def draw(self, u_order: Tensor, u_token: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into next states; the same uniforms give the same states."""
        tokens = self.tokens.expand_as(u_order)
        # The largest perturbed scores are a Plackett-Luce order.
        noise = u_order.clamp_min(torch.finfo(u_order.dtype).tiny)
        keys = torch.where(self.eligible, self.scores - (-noise.log()).log(), -torch.inf)
        rank = keys.argsort(-1, descending=True).argsort(-1)
        chosen = (self.eligible & (rank < self.count)).expand_as(tokens)
        return self.prediction.expand(tokens.shape[:-1]).draw(u_token, chosen, tokens)


def log_subset_prob(scores: Tensor, eligible: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Return the log-probability that ``chosen`` come first in a Plackett-Luce order, in any order.

    :param scores: log-weights, float64 ``(*batch, L)``.
    :param eligible: who takes part, bool ``(*batch, L)``.
    :param chosen: a subset of them, bool ``(*batch, L)``, at most ``count`` in each row.
    :returns: float64 ``(*batch,)``.
    :raises ValueError: if there are too many to go through their subsets.
    """
    scores, eligible, chosen = torch.broadcast_tensors(scores, eligible, chosen)
    count = min(count, scores.shape[-1])
    if count > MOST_IN_A_SUBSET:
        raise ValueError(
            f"PolicyStep: the density of {count} reveals in one step sums over the subsets of "
            f"them; reveal at most {MOST_IN_A_SUBSET}, or draw values before the selection."
        )
    top = torch.where(eligible, scores, -torch.inf).amax(-1, keepdim=True)
    log_w = torch.where(eligible, scores - torch.where(top.isfinite(), top, 0.0), -torch.inf)
    first = torch.where(chosen, 0, 1).argsort(dim=-1, stable=True)[..., :count]
    known = chosen.gather(-1, first)
    picked = torch.where(known, log_w.gather(-1, first), -torch.inf)
    outside = torch.logsumexp(torch.where(chosen, -torch.inf, log_w), -1)
    found = [torch.zeros_like(outside)]  # of subsets as binary numbers, that none is picked first
    for subset in range(1, 2**count):
        ways = []
        for j in (j for j in range(count) if subset >> j & 1):
            left = [i for i in range(count) if not (subset ^ (1 << j)) >> i & 1]
            rest = torch.logaddexp(outside, torch.logsumexp(picked[..., left], -1))
            # Who is not among the chosen of a row is nowhere read: see the subset taken below.
            way = found[subset ^ (1 << j)] + picked[..., j] - rest
            ways.append(torch.where(known[..., j], way, -torch.inf))
        found.append(torch.logsumexp(torch.stack(ways, -1), -1))
    whole = 2 ** chosen.sum(-1) - 1
    return torch.stack(found, -1).gather(-1, whole[..., None])[..., 0]


class Picked(NamedTuple):
    """Sites that were picked by values drawn for all of them.

    :param value: next states, int64 ``(*batch, L)``.
    :param log_tokens: what the tokens are weighed by under the model, ``(*batch,)``.
    :param log_order: what the picks are weighed by under uniform ones, ``(*batch,)``.
    """

    value: Tensor
    log_tokens: Tensor
    log_order: Tensor


def values_move(
    step: RevealStep,
    log_c: Tensor,
    log_conf: Tensor,
    delta: float,
    generator: torch.Generator | None = None,
) -> Picked:
    """Draw a token for every eligible site, then pick sites by them, one after another.

    :param step: the step of the chain, which reveals sites in uniformly random order.
    :param log_c: law of the tokens, ``(*batch, L, V)``.
    :param log_conf: log of what a site with each token is picked in proportion to, same shape.
    :param delta: share of picks that are uniform, in ``[0, 1]``.
    """
    tokens, eligible = step.tokens, step.eligible
    noise = uniforms((2, *tokens.shape), generator=generator, device=tokens.device)
    drawn: Tensor = draw_categorical(log_c, noise[0])
    conf = log_conf.gather(-1, drawn[..., None])[..., 0]
    log_u = pick_law(conf, eligible, delta)
    left, log_order = eligible, torch.zeros(tokens.shape[:-1], dtype=torch.float64)
    log_order = log_order.to(tokens.device)
    for j in range(min(step.count, tokens.shape[-1])):
        some = left.any(-1, keepdim=True)
        site: Tensor = draw_categorical(torch.where(some, log_u, 0.0), noise[1][..., j])
        site = site[..., None]
        flat = -left.sum(-1).clamp_min(1).to(torch.float64).log()
        ratio = flat - log_u.gather(-1, site)[..., 0]
        log_order = log_order + torch.where(some[..., 0], ratio, 0.0)
        left = left & ~(torch.zeros_like(left).scatter(-1, site, True) & some)
        log_u = pick_law(conf, left, delta)
    chosen = eligible & ~left
    value = torch.where(chosen, drawn, tokens)
    index = drawn[..., None]
    ratio = (step.log_probs.gather(-1, index) - log_c.gather(-1, index))[..., 0]
    return Picked(value, torch.where(chosen, ratio, 0.0).sum(-1), log_order)


def pick_law(conf: Tensor, left: Tensor, delta: float) -> Tensor:
    """Return the log-probability of each site to be picked next, ``-inf`` where none is left.

    :param conf: log-weights, ``(*batch, L)``.
    :param left: sites that may be picked, bool ``(*batch, L)``.
    :param delta: share of picks that are uniform.
    """
    own = torch.log_softmax(torch.where(left, conf.to(torch.float64), -torch.inf), -1)
    flat = -left.sum(-1, keepdim=True).clamp_min(1).to(torch.float64).log()
    if 0 < delta < 1:
        own = torch.logaddexp(math.log1p(-delta) + own, math.log(delta) + flat)
    return torch.where(left, flat if delta == 1 else own, -torch.inf)


def _log_taken(prediction: Prediction, value: Tensor, where: Tensor) -> Tensor:
    """Return log-probabilities of tokens at some sites, float64; zero elsewhere."""
    size = prediction.shape[-1]
    c = prediction.probabilities(value.clamp(0, size - 1)[..., None], where)[..., 0]
    possible = c > 0
    site = torch.where(possible, torch.where(possible, c, 1.0).log(), -torch.inf)
    return torch.where(where, site, 0.0)
