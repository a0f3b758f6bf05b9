"""Rules about Markov chains: whether they agree, how much they know, and whether paths move.

Split R-hat and bulk ESS of rank-normalised draws are those of Vehtari, Gelman, Simpson, Carpenter
and Bürkner (2021, Bayesian Analysis 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.ops.stats import effective_sample_size, gelman_rubin
from torch import Tensor

from ppl_diffusion.smc import question_rules
from ppl_diffusion.smc.latent_rules import continuous
from ppl_diffusion.smc.verdict import Verdict, by_level

RHAT, ESS, FROZEN = 1.01, 100.0, 0.05
LOG_DENSITY = "log_density"
_FEWEST = 4
"""Draws per chain that can be split and have a variance."""

# Known by its fields: naming the class, whose ``warnings`` come from here, would close a circle.
GibbsPosterior = Any


def judge_chains(posterior: GibbsPosterior) -> list[Verdict]:
    """Return what is wrong with draws of Markov chains, the worst first; empty if nothing is.

    :param posterior: the result.
    """
    rules: tuple[Callable[[GibbsPosterior], Verdict | None], ...] = (
        divergences,
        rhat,
        bulk_ess,
        frozen,
        question_rules.reward,
        question_rules.steps,
    )
    found = (rule(posterior) for rule in rules)
    return by_level(verdict for verdict in found if verdict is not None)


def divergences(posterior: GibbsPosterior) -> Verdict | None:
    """Judge whether NUTS lost its way."""
    count = posterior.num_divergences
    if not count:
        return None
    return Verdict(
        f"{count} divergent transitions after warm-up (limit 0): parts of what latents may be are "
        "not reached; use another parametrisation, or nuts={'target_accept_prob': 0.95}.",
        kind="divergences",
        level="weak",
        where="latents",
        value=count,
        limit=0,
    )


def rhat(posterior: GibbsPosterior) -> Verdict | None:
    """Judge whether the chains agree."""
    found = {name: split_rhat(draws) for name, draws in _numbers(posterior)}
    return _outside(
        found,
        lambda value: value - RHAT,
        "{:.2f}",
        "R-hat of {name} is {value} (limit {limit:g}){others}: chains, or the halves of one, "
        "do not agree; draw more (num_samples, num_warmup).",
        kind="rhat",
        limit=RHAT,
    )


def bulk_ess(posterior: GibbsPosterior) -> Verdict | None:
    """Judge how many independent draws the chains are worth."""
    found = {name: split_ess(draws) for name, draws in _numbers(posterior)}
    return _outside(
        found,
        lambda value: ESS - value,
        "{:.0f}",
        "bulk effective sample size of {name} is {value} (limit {limit:g}){others}: means "
        "have large errors; draw more (num_samples).",
        kind="ess",
        limit=ESS,
    )


def frozen(posterior: GibbsPosterior) -> Verdict | None:
    """Judge whether continuous latents, and the noisiest states of the paths, ever change."""
    return _frozen_latent(posterior) or _frozen_path(posterior)


def _frozen_latent(posterior: GibbsPosterior) -> Verdict | None:
    for name, values in continuous(posterior):
        still = (values == values[:, :1]).flatten(1).all(1)
        # One value in all chains is an atom: they began at different ones.
        atom = len(still) > 1 and bool((values == values[0, 0]).all())
        if atom or values.shape[1] < 2 or not still.any():
            continue
        count = int(still.sum())
        return Verdict(
            f"latent {name!r} never changed in {count} of {len(still)} chains (limit 0): nothing "
            "is known of it; use another parametrisation, longer warm-up (num_warmup), or SMC.",
            kind="frozen",
            level="broken",
            where=name,
            value=count,
            limit=0,
        )
    return None


def _frozen_path(posterior: GibbsPosterior) -> Verdict | None:
    step = _first_revealed(posterior)
    if step is None:
        return None
    rate = float(posterior.update_rate[step])
    if rate >= FROZEN:
        return None
    return Verdict(
        f"what is revealed at step {step} changed in {rate:.1%} of sweeps (limit {FROZEN:.0%}): "
        "lineages meet before they get there; use more particles, or moves that mask again.",
        kind="frozen",
        level="weak",
        where=f"step {step}",
        value=rate,
        limit=FROZEN,
    )


def split_rhat(draws: Tensor) -> float:
    """Return the larger R-hat of ranks and of folded ranks, NaN where draws are constant.

    :param draws: ``(C, S)``.
    """
    if draws.shape[1] < _FEWEST:
        return math.nan
    folded = (draws - draws.median()).abs()
    return max(float(gelman_rubin(_ranked_halves(x))) for x in (draws, folded))


def split_ess(draws: Tensor) -> float:
    """Return the bulk effective sample size, at most the number of draws; NaN where constant.

    :param draws: ``(C, S)``.
    """
    if draws.shape[1] < _FEWEST:
        return float(draws.numel())
    return float(effective_sample_size(_ranked_halves(draws)).clamp_max(draws.numel()))


def _ranked_halves(draws: Tensor) -> Tensor:
    """Return normal scores of the ranks of all draws, every chain cut in two."""
    _, place, ties = draws.unique(return_inverse=True, return_counts=True)
    ranks = (ties.cumsum(0) - (ties - 1) / 2)[place].double()  # ties share their mean rank
    scores = torch.special.ndtri((ranks - 0.375) / (draws.numel() + 0.25))
    half = draws.shape[1] // 2
    return torch.cat([scores[:, :half], scores[:, -half:]])


def _numbers(posterior: GibbsPosterior) -> Iterable[tuple[str, Tensor]]:
    """Yield every number that varies, of the latents and the log-density, ``(C, S)`` each."""
    found = _all_numbers(posterior)
    yield from ((name, draws) for name, draws in found if bool((draws != draws[0, 0]).any()))


def _all_numbers(posterior: GibbsPosterior) -> Iterable[tuple[str, Tensor]]:
    yield LOG_DENSITY, posterior.log_density
    for name in posterior.law.latents:
        values = posterior.samples.get(name)
        if values is None:
            continue
        flat = values.double().reshape(*values.shape[:2], -1)
        labels = [name] if flat.shape[-1] == 1 else [f"{name}[{i}]" for i in range(flat.shape[-1])]
        yield from zip(labels, flat.unbind(-1), strict=True)


def _outside(
    found: dict[str, float],
    excess: Callable[[float], float],
    digits: str,
    text: str,
    *,
    kind: str,
    limit: float,
) -> Verdict | None:
    # What is not known is no pass.
    over = {n: math.inf if math.isnan(value) else excess(value) for n, value in found.items()}
    bad = {name: found[name] for name in found if over[name] > 0}
    if not bad:
        return None
    worst = max(bad, key=lambda name: over[name])
    value = "not known" if math.isnan(bad[worst]) else digits.format(bad[worst])
    others = f" and of {len(bad) - 1} of {len(found) - 1} others" if len(bad) > 1 else ""
    return Verdict(
        text.format(name=worst, value=value, limit=limit, others=others),
        kind=kind,
        level="weak",
        where=worst,
        value=bad[worst],
        limit=limit,
    )


def _first_revealed(posterior: GibbsPosterior) -> int | None:
    """Return the first state that shows something in at least half of the draws."""
    path, base = posterior.compact_path, posterior.law.chains[0]
    if not base.masked:
        return 0
    if path is None:
        return None
    shown = (path != path[..., :1, :]).any(-1)  # (C, S, *plates, T + 1)
    shown = shown.flatten(2, -2).any(2) if shown.ndim > 3 else shown
    often = (shown.double().mean((0, 1)) >= 0.5).nonzero()
    return int(often[0]) if len(often) else None
