"""Groups of ArviZ data for which a program runs again: log-likelihood, prior, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ppl_diffusion.smc.arviz_layout import Draws, Layout, Variable, make_dataset
from ppl_diffusion.smc.run_statistics import as_array

Groups = dict[str, xr.Dataset]


def extra_groups(
    posterior: Draws,
    draws: Callable[[], Mapping[str, Tensor]],
    runs: NDArray[np.int64],
    *,
    log_likelihood: bool,
    prior: int,
    posterior_predictive: bool,
    seed: int,
) -> Groups:
    """Return the groups that were asked for, and the data where the program is known.

    :param draws: gives the values of all sites, each ``(K, N, ...)``, as in the posterior group.
    :param runs: labels of the ``K`` chains.
    :raises ValueError: if an option has no meaning, or the program is needed and not known, or
        has no data.
    """
    _require_options(log_likelihood, prior, posterior_predictive)
    asked = {
        "log_likelihood": log_likelihood,
        "prior": prior > 0,
        "posterior_predictive": posterior_predictive,
    }
    wanted = [name for name, on in asked.items() if on]
    if not wanted and (posterior.origin is None or not posterior.is_program):
        return {}
    extra = _Extra(posterior, draws, runs, seed, wanted)
    groups = extra.observed()
    if log_likelihood:
        groups |= extra.log_densities()
    if posterior_predictive:
        groups["posterior_predictive"] = extra.predictions()
    return groups | (extra.prior(prior) if prior > 0 else {})


def _require_options(log_likelihood: Any, prior: Any, posterior_predictive: Any) -> None:
    flags = {"log_likelihood": log_likelihood, "posterior_predictive": posterior_predictive}
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"to_arviz: {name} must be True or False, got {value!r}.")
    if not isinstance(prior, Integral) or prior is True or int(prior) < 0:
        raise ValueError(
            f"to_arviz: prior must be a whole number of draws, 0 for none, got {prior!r}."
        )


class _Extra:
    def __init__(
        self,
        posterior: Draws,
        draws: Callable[[], Mapping[str, Tensor]],
        runs: NDArray[np.int64],
        seed: int,
        wanted: list[str],
    ) -> None:
        what = f"to_arviz({wanted[0]}=...)" if wanted else "to_arviz"
        self.origin = posterior.require_origin(what)
        self.layout, self.runs, self.seed = Layout(posterior), runs, seed
        self.draws = draws
        self.data = self.origin.data()
        if not self.data and {"log_likelihood", "posterior_predictive"} & set(wanted):
            raise ValueError(
                f"{what}: the program observes nothing (it is weighed by factors alone), so that "
                "there are no data to rate or to predict."
            )

    def _rows(self) -> dict[str, Tensor]:
        return {name: value.flatten(0, 1) for name, value in self.draws().items()}

    def observed(self) -> Groups:
        variables = {self._name(n): self._variable(n, v, 0) for n, v in self.data.items()}
        return {"observed_data": make_dataset(variables, self.runs)} if variables else {}

    def log_densities(self) -> Groups:
        found = self.origin.pointwise(self._rows())
        named = {
            "log_likelihood": found.data,
            "log_prior": found.latents,
            "log_factors": found.factors,
        }
        return {name: self._per_draw(values) for name, values in named.items() if values}

    def predictions(self) -> xr.Dataset:
        return self._per_draw(self.origin.predict(self._rows(), self.seed))

    def prior(self, num: int) -> Groups:
        """Return draws of the program without its data, one chain of them."""
        sites, data = self.origin.prior(num, self.seed)
        tokens: dict[str, Variable] = {}
        numbers: dict[str, Variable] = {}
        ends = as_array(sites[self.layout.first])[None, ..., -1, :]
        tokens["x0"] = self._named(self.layout.tokens(self.layout.first, ends))
        for name, value in sites.items():
            values = as_array(value)[None]
            if self.layout.is_sequence(name, values):
                tokens[self._name(name)] = self._named(self.layout.tokens(name, values))
            elif not self.layout.is_path(name, values) and not self.layout.is_only_data(name):
                numbers[self._name(name)] = self._named(self.layout.variable(name, values))
        simulated = {self._name(n): self._variable(n, v[None], 2) for n, v in data.items()}
        named = {"prior": numbers, "prior_sequences": tokens, "prior_predictive": simulated}
        labels = self.layout.labels
        return {n: make_dataset(v, np.arange(1), labels) for n, v in named.items() if v}

    def _per_draw(self, values: Mapping[str, Tensor]) -> xr.Dataset:
        chains = len(self.runs)
        shaped = {n: v.reshape(chains, len(v) // chains, *v.shape[1:]) for n, v in values.items()}
        variables = {self._name(n): self._variable(n, v, 2) for n, v in shaped.items()}
        return make_dataset(variables, self.runs, self.layout.labels)

    def _variable(self, site: str, value: Tensor, lead: int) -> Variable:
        variable = self.layout.variable(site, as_array(value), lead)
        return self._named(variable) if lead else variable

    @staticmethod
    def _named(variable: Variable) -> Variable:
        dims, values = variable
        return ("chain", "draw", *dims), values

    def _name(self, site: str) -> str:
        return self.layout.name(site)
