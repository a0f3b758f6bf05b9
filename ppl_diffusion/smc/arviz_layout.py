"""Names, dimensions and types of sites in ArviZ data, for results of either kind.

A site's dimensions are its plates, by their own names, then its event: ``position`` for the tokens
of a sequence, ``state`` and ``position`` for the path of a chain, ``NAME_dim_0``, ... else.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ppl_diffusion.arrays import json_types
from ppl_diffusion.smc.arviz_missing import missing_elements
from ppl_diffusion.smc.run_statistics import as_array

Variable = tuple[tuple[str, ...], NDArray[Any]]
"""Dimensions and values."""

Labels = dict[str, NDArray[np.int64]]
"""Labels of dimensions."""

Draws = Any
"""A result; naming the class, whose ``to_arviz`` comes here, would close a circle."""

_DIMENSIONS = ("chain", "draw", "particle", "position", "state", "step", "path_move", "token")
_TAKEN = re.compile(
    "|".join([*_DIMENSIONS, "run", "ancestor", r"plate_\d+", r".*_dim_\d+", ".*_position"]),
    re.DOTALL,
)


@dataclass
class SiteTable:
    """The sites of a result under their stored names, each with all of its draws.

    :param numbers: what summaries are made of.
    :param tokens: sequences, whose token ids are labels and no numbers.
    :param paths: whole paths of chains.
    :param labels: labels of dimensions that do not count from zero.
    """

    numbers: dict[str, Variable] = field(default_factory=dict)
    tokens: dict[str, Variable] = field(default_factory=dict)
    paths: dict[str, Variable] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)


def site_table(posterior: Draws) -> SiteTable:
    """Sort the sites of a result by what they are, under names that no dimension has.

    :returns: variables whose dimensions are those after (chain, draw).
    """
    layout = Layout(posterior)
    table = SiteTable(labels=layout.labels)
    table.tokens["x0"] = layout.tokens(layout.first, as_array(posterior.x0))
    if posterior.compact_path is not None:
        table.paths["path"] = layout.path(layout.first, as_array(posterior.compact_path))
    for site, value in posterior.samples.items():
        name, values = layout.names[site], as_array(value)
        if layout.is_path(site, values):
            table.paths[name] = layout.path(site, values)
        elif layout.is_sequence(site, values):
            table.tokens[name] = layout.tokens(site, values)
        elif not layout.is_only_data(site):
            table.numbers[name] = layout.variable(site, values)
    return table


class Layout:
    """How the sites of a result are named and shaped.

    :param posterior: the result.
    """

    def __init__(self, posterior: Draws) -> None:
        self.x0, self.path_shape = as_array(posterior.x0), None
        if posterior.compact_path is not None:
            self.path_shape = tuple(posterior.compact_path.shape[2:])
        self.num_states = getattr(posterior, "num_steps", -2) + 1
        self.chains = {c.site: c for c in posterior.law.chains} if posterior.is_program else {}
        self.first = posterior.law.chains[0].site
        self.known: Mapping[str, tuple[str, ...]] = posterior.plates
        every = {p for plates in self.known.values() for p in plates if p}
        self.names = stored_names(posterior.samples)
        self.missing = missing_elements(posterior.samples, self.known)
        taken = {"x0", *self.names.values(), *_DIMENSIONS}
        self.plate_names = {p: _free(p.replace("/", "."), "_plate", taken) for p in every}

    def variable(self, site: str, values: NDArray[Any], lead: int = 2) -> Variable:
        """Return a site of numbers.

        :param lead: dimensions before its plates.
        """
        name, missing = self.name(site), self.missing.get(site)
        if missing and values.shape[lead : lead + len(missing.batch)] == missing.batch:
            values = missing.only(values, lead)
            return tuple(f"{name}_dim_{i}" for i in range(values.ndim - lead)), storable(values)
        shape = values.shape[lead:]
        plates = self._plates(site, shape)
        inner = tuple(f"{name}_dim_{i}" for i in range(len(shape) - len(plates)))
        return (*plates, *inner), storable(values)

    @property
    def labels(self) -> Labels:
        """Which elements those are that nobody saw, by their dimension."""
        return {f"{self.name(site)}_dim_0": m.index for site, m in self.missing.items()}

    def is_only_data(self, site: str) -> bool:
        """Whether all that a site adds to the draws of what nobody saw are the data."""
        wholes = {missing.whole for missing in self.missing.values()}
        return site in wholes or (site in self.missing and not len(self.missing[site].index))

    def tokens(self, site: str, values: NDArray[Any]) -> Variable:
        """Return a site of sequences."""
        *plates, length = values.shape[2:]
        dims = (*self._around(site, plates), self._position(site, length))
        return dims, narrow(values)

    def path(self, site: str, values: NDArray[Any]) -> Variable:
        """Return the paths of a chain; one that moves at some of the steps has fewer states."""
        *plates, states, length = values.shape[2:]
        state = "state" if states == self._states else f"{self.name(site)}_dim_0"
        return (*self._around(site, plates), state, self._position(site, length)), narrow(values)

    def is_path(self, site: str, values: NDArray[Any]) -> bool:
        """Whether a site holds whole paths: a chain's own site, or one like the path of ``x0``."""
        chain, shape = self.chains.get(site), values.shape[2:]
        if values.dtype.kind not in "iu":
            return False
        if chain is not None and len(shape) == len(chain.plates) + 2:
            return True
        if len(shape) < 2 or (*shape[:-2], shape[-1]) != self.x0.shape[2:]:
            return False
        return values.shape[-2] == self._states or np.array_equal(values[..., -1, :], self.x0)

    def is_sequence(self, site: str, values: NDArray[Any]) -> bool:
        """Whether a site holds clean sequences, by its type and its shape."""
        shapes = [self.x0.shape[2:], *((*c.plates, c.length) for c in self.chains.values())]
        plates = self.known.get(site, ())
        in_plates = len(plates) == values.ndim - 2 and all(plates)  # nothing but plates: numbers
        return values.dtype.kind in "iu" and values.shape[2:] in shapes and not in_plates

    @property
    def _states(self) -> int:
        """How many states the path of ``x0`` has."""
        return self.num_states if self.path_shape is None else self.path_shape[-2]

    def name(self, site: str) -> str:
        """Return the stored name of a site."""
        return self.names.get(site, site.replace("/", "."))

    def _position(self, site: str, length: int) -> str:
        return "position" if length == self.x0.shape[-1] else f"{self.name(site)}_position"

    def _plates(self, site: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the dimensions of the plates of a site of numbers."""
        own = self.known.get(site, ())
        if own and len(own) <= len(shape):
            return self._named(own, f"{self.name(site)}_batch")
        around = self.x0.shape[2:-1]
        if self.known or not around or shape[: len(around)] != around:
            return ()
        return self._around(site, around)

    def _around(self, site: str, sizes: Sequence[int]) -> tuple[str, ...]:
        """Return the dimensions of the plates of sequences: their own, or those of ``x0``."""
        alike = tuple(sizes) == self.x0.shape[2:-1]
        for plates in (self.known.get(site), self.known.get(self.first) if alike else None):
            if plates is not None and len(plates) == len(sizes):
                return self._named(plates, "plate")
        return tuple(f"plate_{i}" for i in range(len(sizes)))

    def _named(self, plates: Sequence[str], other: str) -> tuple[str, ...]:
        return tuple(self.plate_names.get(p, f"{other}_{i}") for i, p in enumerate(plates))


def stored_names(sites: Iterable[str]) -> dict[str, str]:
    """A distinct name for each site that no dimension has and netCDF accepts."""
    names = {site: site for site in sites if "/" not in site and not _TAKEN.fullmatch(site)}
    for site in (site for site in sites if site not in names):
        name = site.replace("/", ".")
        while _TAKEN.fullmatch(name) or name in names.values():
            name += "_site"
        names[site] = name
    return names


def _free(name: str, ending: str, taken: set[str]) -> str:
    while name in taken:
        name += ending
    return name


def storable(values: NDArray[Any]) -> NDArray[Any]:
    """Booleans, which netCDF lacks, as int8; unsigned integers, whose differences wrap, signed."""
    if values.dtype.kind == "b":
        return values.astype(np.int8)
    if values.dtype.kind != "u":
        return values
    bits = min(2 * values.dtype.itemsize, 8)
    return values.astype(np.dtype(f"i{bits}"))


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Token ids in the narrowest of int16 and int32."""
    fits = values.size == 0 or (values.min() >= -(2**15) and values.max() < 2**15)
    return values.astype(np.int16 if fits else np.int32)


def make_dataset(
    variables: Mapping[str, Variable], runs: NDArray[np.int64], known: Labels | None = None
) -> xr.Dataset:
    """Return a dataset in which every dimension has labels; those of chains are run numbers.

    :param known: labels of other dimensions, which count from zero otherwise.
    """
    dataset = xr.Dataset(dict(variables))
    given = {"chain": runs, **(known or {})}
    sizes = {str(dim): size for dim, size in dataset.sizes.items()}
    return dataset.assign_coords({dim: given.get(dim, np.arange(n)) for dim, n in sizes.items()})


def attributes(posterior: Draws, **more: Any) -> dict[str, Any]:
    """What was chosen and what it cost, in types that netCDF can hold.

    Wall time is left out, so that the same seed gives the same file.
    """
    facts = {
        "inference_library": "ppl_diffusion",
        "inference_library_version": version("ppl-diffusion"),
        "target": posterior.target,
        "exact": posterior.exact,
        "num_evaluations": posterior.num_evaluations,
        "num_potential_calls": posterior.num_potential_calls,
        **more,
    }
    return {name: attribute(value) for name, value in {**posterior.settings, **facts}.items()}


def attribute(value: Any) -> str | int | float:
    """An attribute netCDF can hold; what is no number or string becomes its JSON text."""
    plain = json_types(value)
    if isinstance(plain, bool):
        return int(plain)
    return plain if isinstance(plain, str | int | float) else json.dumps(plain)


def make_container(groups: dict[str, xr.Dataset], attrs: dict[str, Any]) -> Any:
    """Return ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x)."""
    arviz = import_arviz()
    if int(arviz.__version__.split(".")[0]) >= 1:
        root = xr.Dataset(attrs=attrs)
        return xr.DataTree.from_dict({"/": root} | {f"/{k}": v for k, v in groups.items()})
    return arviz.InferenceData(attrs=attrs, **groups)


def import_arviz() -> ModuleType:
    """Import ArviZ without its announcement."""
    with warnings.catch_warnings():
        # 0.23 announces the move to 1.x once a day, on import
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return cast(ModuleType, arviz)
