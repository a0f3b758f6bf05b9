"""Draws of Markov chains as ArviZ data: chains and draws as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppl_diffusion.smc.arviz_data import History, constant_data, draw_groups, kept_history
from ppl_diffusion.smc.arviz_groups import extra_groups
from ppl_diffusion.smc.arviz_layout import (
    Variable,
    attributes,
    make_container,
    make_dataset,
    site_table,
)
from ppl_diffusion.smc.run_statistics import as_array

# Known by its fields: naming the class, whose ``to_arviz`` this file is, would close a circle.
GibbsPosterior = Any


def chains_to_arviz(
    posterior: GibbsPosterior,
    *,
    history: History = "auto",
    vocabulary: Sequence[str] | None = None,
    tokens: bool = False,
    log_likelihood: bool = False,
    prior: int = 0,
    posterior_predictive: bool = False,
    seed: int = 0,
) -> Any:
    """Convert to ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x).

    Groups and options are those of :func:`~ppl_diffusion.smc.arviz_data.to_arviz`; draws are
    equally weighted, so that there is no group of weights. ``sample_stats`` holds the log-density
    ``lp``, the smallest ESS of each conditional SMC and how much of the path each sweep changed.
    """
    chains, table = np.arange(posterior.num_runs), site_table(posterior)
    extra = extra_groups(
        posterior,
        posterior.program_sites,
        chains,
        log_likelihood=log_likelihood,
        prior=prior,
        posterior_predictive=posterior_predictive,
        seed=seed,
    )
    groups = {
        **draw_groups(table, chains, tokens=tokens),
        "sample_stats": make_dataset(_statistics(posterior), chains),
        **extra,
    }
    if not groups["posterior"].data_vars:  # a bare chain: summaries need a number to look at
        lp = groups["sample_stats"][["lp"]]
        groups["posterior"] = lp.rename(lp="log_potential")
    paths: dict[str, Variable] = {
        name: (("chain", "draw", *dims), values) for name, (dims, values) in table.paths.items()
    }
    if past := kept_history(paths, history) if history else {}:
        groups["smc_history"] = make_dataset(past, chains)
    if vocabulary is not None:
        groups["constant_data"] = constant_data(posterior, vocabulary)
    facts = {"num_divergences": posterior.num_divergences, "step_size": posterior.step_size}
    return make_container(groups, attributes(posterior, seed_of_predictions=seed, **facts))


def _statistics(posterior: GibbsPosterior) -> dict[str, Variable]:
    columns = {
        "lp": posterior.log_density,
        "conditional_log_evidence": posterior.log_evidence,
        "smallest_ess": posterior.ess.amin(-1),
        "path_updated": posterior.updated.to(torch.float64).mean(-1),
    }
    statistics: dict[str, Variable] = {
        name: (("chain", "draw"), as_array(value)) for name, value in columns.items()
    }
    if posterior.accept.shape[-1]:
        statistics["accepted"] = (("chain", "draw", "path_move"), as_array(posterior.accept))
    return statistics
