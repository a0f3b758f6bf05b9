"""What scores say about designs, and about the prior for comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_diffusion.designs.program import Target
from ppl_diffusion.designs.ranking import Designs
from ppl_diffusion.designs.scores import Columns

BOUND_SAMPLES = 16
"""Noise levels per sequence for the prior bound."""


def scores(
    target: Target, tokens: Tensor, generator: torch.Generator, *, prior: bool = False
) -> Columns:
    """Score sequences: how natural the prior finds them, their GC, and what rewards and judges say.

    :param prior: whether they are samples of the prior, which slow scores are not asked about.
    """
    tokens = tokens.to(target.prior.device)
    if target.prior.fixed_steps is None:
        law = target.chain.marginal()
        terms = law.bound_samples(tokens, num_samples=BOUND_SAMPLES, generator=generator).double()
    else:  # only what the noise was learned with bounds its chain
        terms = -target.prior.bound_terms(tokens, num_times=BOUND_SAMPLES, generator=generator)
    columns = {
        "log_prob_bound": terms.mean(0),
        "log_prob_bound_sd": terms.std(0) / math.sqrt(BOUND_SAMPLES),
    }
    if (share := target.alphabet.gc_share(tokens)) is not None:
        columns["gc"] = share
    for score in target.scores:
        if not (prior and score.spec.slow):
            columns |= score.columns(tokens)
    return {name: values.cpu() for name, values in columns.items()}


def compare(designs: Designs, columns: Columns, prior: Columns) -> dict[str, dict[str, float]]:
    """Set the weighted designs against plain prior samples.

    :returns: for each score the weighted mean of the designs with its standard error over runs
        (NaN for one run), and mean, standard deviation and 95th percentile of the prior samples,
        NaN where these were not asked about.
    """
    return {
        name: {
            "designs_mean": float(designs.weight @ values),
            "designs_standard_error": standard_error(
                designs.run_weight @ values, designs.run_share
            ),
            **_of_prior(prior.get(name)),
        }
        for name, values in columns.items()
        if not name.endswith("_sd")
    }


def _of_prior(values: Tensor | None) -> dict[str, float]:
    values = torch.full((2,), math.nan) if values is None else values
    return {
        "prior_mean": float(values.mean()),
        "prior_sd": float(values.std()),
        "prior_95th_percentile": float(values.quantile(0.95)),
    }


def standard_error(values: Tensor, share: Tensor | None = None) -> float:
    """Standard error of a mean over runs; NaN for a single run.

    :param share: how much of the mean is each run's; by default all count alike. A run that is
        nearly all of it is one run, however many others there are.
    """
    if len(values) < 2:
        return math.nan
    share = torch.full_like(values, 1 / len(values)) if share is None else share
    return float(values.std() * share.norm())
