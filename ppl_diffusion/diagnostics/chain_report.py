"""One page about draws of Markov chains: how well they mix, and at what cost."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ppl_diffusion.diagnostics.claims import number_or_none
from ppl_diffusion.smc.arviz_layout import Variable, import_arviz, make_dataset, site_table
from ppl_diffusion.smc.run_statistics import as_array

if TYPE_CHECKING:
    from ppl_diffusion.smc import GibbsPosterior


def chain_summary(posterior: "GibbsPosterior") -> dict[str, Any]:
    """Figures that say how far to trust chains; all JSON types.

    ``rhat`` is the largest and ``ess_bulk`` the least over the log-density and all numbers that the
    program draws (Vehtari et al. 2021); ``rhat_of`` and ``ess_bulk_of`` say of what. Sequences are
    left out: their token ids are no numbers. ``least_update_rate`` is the share of sweeps that
    changed the state of the path that changed least.

    :param posterior: ``C`` chains of ``S`` draws.
    :returns: a flat dict. What does not exist is None, never NaN.
    """
    arviz, numbers = import_arviz(), _numbers(posterior)
    with warnings.catch_warnings():
        # ArviZ says that one chain, or too few draws, have no such figure; here that is None.
        warnings.simplefilter("ignore")
        rhat, ess = arviz.rhat(numbers), arviz.ess(numbers)
    return {
        "target": posterior.target,
        "exact": posterior.exact,
        "num_runs": posterior.num_runs,
        "num_draws": posterior.num_draws,
        **_worst("rhat", {n: as_array(v.values).max() for n, v in rhat.data_vars.items()}, 1),
        **_worst("ess_bulk", {n: as_array(v.values).min() for n, v in ess.data_vars.items()}, -1),
        "least_update_rate": float(posterior.update_rate[:-1].min()),
        "num_divergences": posterior.num_divergences,
        "step_size": number_or_none(posterior.step_size),
        "num_evaluations": posterior.num_evaluations,
        "num_potential_calls": posterior.num_potential_calls,
        "seconds": number_or_none(posterior.seconds),
        "warnings": list(map(str, getattr(posterior, "warnings", ()))),
    }


def _numbers(posterior: "GibbsPosterior") -> xr.Dataset:
    sites: dict[str, Variable] = {
        name: (("chain", "draw", *dims), values)
        for name, (dims, values) in site_table(posterior).numbers.items()
    }
    density = as_array(posterior.log_density)
    sites["log_density"] = (("chain", "draw"), density)
    return make_dataset(sites, np.arange(posterior.num_runs))


def _worst(figure: str, values: dict[Any, NDArray[Any]], sign: int) -> dict[str, Any]:
    """Return the worst of some figures and what it belongs to; none where none is a number."""
    known = {str(name): float(value) for name, value in values.items() if np.isfinite(value)}
    if not known:
        return {figure: None, f"{figure}_of": None}
    name = max(known, key=lambda n: sign * known[n])
    return {figure: known[name], f"{figure}_of": name}
