"""A particle posterior as ArviZ data: one adapter for ArviZ 0.23 and 1.x.

A *chain* is an independent SMC run, a *draw* a particle, a *step* a reverse step. Groups:

===============  =====================  ==================================================
group            dims                   variables
===============  =====================  ==================================================
posterior        chain, draw, ...       ``x0`` and every site of the program
sample_stats     chain, draw            log_weight, log_potential, root_ancestor,
                                        particle, is_valid
smc              chain, step            ess, log_evidence, log_evidence_increment,
                                        resampled, n_unique, n_root_ancestors
smc              chain                  total_log_evidence, evidence_variance, khat, died_at
smc_history      chain, step, draw      ancestor; stored paths as (chain, draw, state, position)
constant_data    token                  token_id, labelled by the vocabulary
===============  =====================  ==================================================

Datasets are built by hand rather than by ``from_dict``: it stamps the time of day on every group,
and its 1.x form cannot hold a group without draws. Nothing has dtype ``object``, so everything
can be saved as netCDF.
"""

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ppl_diffusion.arrays import json_types
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.resampling import Stratified
from ppl_diffusion.smc.run_statistics import as_array, count_distinct, lineage_roots

HISTORY_LIMIT = 64 * 2**20
"""Largest history variable, in bytes, that ``history="auto"`` keeps."""

# Known by its fields: naming the class, whose ``to_arviz`` this file is, would close a circle.
ParticlePosterior = Any

Variable = tuple[tuple[str, ...], NDArray[Any]]

_TAKEN = re.compile(r"chain|draw|run|position|state|step|ancestor|plate_\d+|.*_dim_\d+", re.DOTALL)


def to_arviz(
    posterior: ParticlePosterior,
    *,
    weights: Literal["resample", "store"] = "resample",
    history: Literal["auto"] | bool = "auto",
    vocabulary: Sequence[str] | None = None,
    seed: int = 0,
) -> Any:
    """Convert to ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x).

    ArviZ summaries and plots ignore weights, so by default each run is resampled (stratified) to
    ``N`` equally weighted draws; ``sample_stats.particle`` says which particle a draw came from.
    Across-draw ``rhat`` and ``ess`` of such draws are meaningless, because particles of one run
    share ancestors; compare *chains* (runs). A dead run (evidence zero) cannot be resampled and
    is left out of ``posterior`` and ``sample_stats``; chain labels, and the ``run`` coordinate,
    keep the run numbers. The ``smc`` groups are the same in both modes and index raw particles.
    Wall time is left out, so that the same seed gives the same file.

    A site called like a dimension (``chain``, ``draw``, ``run``, ``step``, ``state``,
    ``position``, ``plate_0``, ``x_dim_0``) or ``ancestor`` is stored with ``_site`` added to its
    name; the ``/`` of ``pyro.poutine.scope``, which netCDF refuses, becomes a ``.``.

    :param weights: ``"resample"`` for equally weighted draws, or ``"store"`` for the particles
        themselves, whose weights are then in ``sample_stats.log_weight``.
    :param history: keep ancestry and stored paths; ``"auto"`` drops any over
        :data:`HISTORY_LIMIT` bytes.
    :param vocabulary: one string per clean token id, kept as the ``token`` coordinate.
    :raises ParticleCollapse: if draws are asked for and every run is dead.
    :raises ValueError: if ``weights`` is unknown or the vocabulary is shorter than the token ids.
    """
    runs, index = _draw_index(posterior, weights, seed)
    draws = _draws(posterior, runs, index)
    groups = {
        "posterior": draws,
        "sample_stats": _sample_stats(posterior, runs, index, weights),
        "smc": _smc(posterior),
    }
    if past := _history(posterior, history):
        groups["smc_history"] = make_dataset(past, np.arange(posterior.num_runs))
    if vocabulary is not None:
        groups["constant_data"] = _constant_data(posterior, vocabulary)
    return make_container(groups, _attributes(posterior, weights, seed))


def _draw_index(
    posterior: ParticlePosterior, weights: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs kept ``(K,)`` and the particle behind each of their draws ``(K, N)``."""
    if weights not in ("resample", "store"):
        raise ValueError(f'weights is {weights!r}: pass "resample" or "store"')
    log_weights = as_array(posterior.log_weights)
    runs, particles = log_weights.shape
    if weights == "store":
        return np.arange(runs), np.tile(np.arange(particles), (runs, 1))
    alive = np.flatnonzero(np.isfinite(log_weights).any(-1))
    if not len(alive):
        raise ParticleCollapse(
            f"all {runs} runs are dead (evidence zero), so there is nothing to draw: pass "
            'weights="store" to look at the particles, or run with more of them'
        )
    uniforms = np.random.default_rng(seed).random((runs, particles))
    return alive, Stratified().draw(uniforms[alive], log_weights[alive])


def _draws(
    posterior: ParticlePosterior, runs: NDArray[np.int64], index: NDArray[np.int64]
) -> xr.Dataset:
    sites = {"x0": _with_dims("x0", posterior.x0, posterior)}
    sites |= {k: v for k, v in _sites(posterior).items() if not _is_path(v[1], posterior)}
    variables = {
        name: (("chain", "draw", *dims), storable(_pick(values, runs, index), dims))
        for name, (dims, values) in sites.items()
    }
    dataset = make_dataset(variables, runs)
    return dataset.assign_coords(position=np.arange(posterior.x0.shape[-1]))


def _sample_stats(
    posterior: ParticlePosterior,
    runs: NDArray[np.int64],
    index: NDArray[np.int64],
    weights: str,
) -> xr.Dataset:
    log_weight = _pick(as_array(posterior.log_weights), runs, index)
    if weights == "resample":
        log_weight = np.full_like(log_weight, -np.log(log_weight.shape[-1]))
    log_potential = _pick(as_array(posterior.log_potential), runs, index)
    columns = {
        "log_weight": log_weight,
        "log_potential": log_potential,
        "root_ancestor": _pick(as_array(posterior.eve), runs, index).astype(np.int32),
        "particle": index.astype(np.int32),
        "is_valid": (log_potential > -np.inf).astype(np.int8),
    }
    return make_dataset({k: (("chain", "draw"), v) for k, v in columns.items()}, runs)


def _smc(posterior: ParticlePosterior) -> xr.Dataset:
    log_evidence = as_array(posterior.log_evidence_steps)
    ancestors = as_array(posterior.ancestors)
    with np.errstate(invalid="ignore"):  # -inf minus -inf after a run has died
        increment = np.diff(log_evidence, axis=1, prepend=0.0)
    by_step = {
        "ess": as_array(posterior.ess),
        "log_evidence": log_evidence,
        "log_evidence_increment": increment,
        "resampled": as_array(posterior.resampled).astype(np.int8),
        "n_unique": count_distinct(ancestors).T.astype(np.int32),
        "n_root_ancestors": count_distinct(lineage_roots(ancestors)[1:]).T.astype(np.int32),
    }
    by_run = {
        "total_log_evidence": as_array(posterior.log_evidence),
        "evidence_variance": as_array(posterior.evidence_variance),
        "khat": khat(posterior.log_weights),
        "died_at": as_array(posterior.died_at).astype(np.int32),
    }
    variables: dict[str, Variable] = {k: (("chain", "step"), v) for k, v in by_step.items()}
    variables |= {k: (("chain",), v) for k, v in by_run.items()}
    dataset = make_dataset(variables, np.arange(posterior.num_runs))
    return dataset.assign_coords(
        step=np.arange(posterior.num_steps), time=("step", as_array(posterior.times)[1:])
    )


def _history(posterior: ParticlePosterior, history: Literal["auto"] | bool) -> dict[str, Variable]:
    if history is False:
        return {}
    ancestors = np.moveaxis(as_array(posterior.ancestors), 0, 1).astype(np.int32)
    past: dict[str, Variable] = {"ancestor": (("chain", "step", "draw"), ancestors)}
    sites = {k: v for k, v in _sites(posterior).items() if _is_path(v[1], posterior)}
    if posterior.path is not None:
        sites = {"path": _with_dims("path", posterior.path, posterior)} | sites
    for name, (dims, values) in sites.items():
        past[name] = (("chain", "draw", *dims), storable(values, dims))
    keep_all = history is True
    return {k: v for k, v in past.items() if keep_all or v[1].nbytes <= HISTORY_LIMIT}


def _constant_data(posterior: ParticlePosterior, vocabulary: Sequence[str]) -> xr.Dataset:
    largest = int(as_array(posterior.x0).max())
    if largest >= len(vocabulary):
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} strings but x0 holds token id {largest}: pass "
            "one string per clean token, in id order"
        )
    tokens = np.array(list(vocabulary), dtype=np.str_)
    ids = np.arange(len(tokens), dtype=np.int32)
    return xr.Dataset({"token_id": (("token",), ids)}, coords={"token": tokens})


def _sites(posterior: ParticlePosterior) -> dict[str, Variable]:
    """Every site of the program under its stored name, with its dims after (chain, draw)."""
    names = stored_names(posterior.samples)
    return {
        names[site]: _with_dims(names[site], values, posterior)
        for site, values in posterior.samples.items()
    }


def stored_names(sites: Iterable[str]) -> dict[str, str]:
    """A distinct name for each site that no dimension has and netCDF accepts."""
    names = {site: site for site in sites if "/" not in site and not _TAKEN.fullmatch(site)}
    for site in (site for site in sites if site not in names):
        name = site.replace("/", ".")
        while _TAKEN.fullmatch(name) or name in names.values():
            name += "_site"
        names[site] = name
    return names


def _with_dims(name: str, site: Any, posterior: ParticlePosterior) -> Variable:
    values = as_array(site)
    return _site_dims(name, values, posterior), values


def _site_dims(name: str, values: NDArray[Any], posterior: ParticlePosterior) -> tuple[str, ...]:
    """Dims after (chain, draw): plates first, then position for tokens, state for paths."""
    *plates, length = posterior.x0.shape[2:]
    plate_dims = tuple(f"plate_{i}" for i in range(len(plates)))
    shape = values.shape[2:]
    if values.dtype.kind in "iu" and shape == (*plates, length):
        return (*plate_dims, "position")
    if values.dtype.kind in "iu" and shape == (*plates, posterior.num_steps + 1, length):
        return (*plate_dims, "state", "position")
    if _is_path(values, posterior):  # a chain that moves at some of the steps has fewer states
        return (*plate_dims, f"{name}_dim_0", "position")
    shared = plate_dims if shape[: len(plates)] == tuple(plates) else ()
    return shared + tuple(f"{name}_dim_{i}" for i in range(len(shape) - len(shared)))


def _is_path(values: NDArray[Any], posterior: ParticlePosterior) -> bool:
    """Whether a site holds whole paths like that of ``x0``, which end in clean sequences."""
    x0 = as_array(posterior.x0)
    states = {posterior.num_steps + 1}
    for site in map(as_array, posterior.samples.values()):
        if site.shape[:-2] == x0.shape[:-1] and np.array_equal(site[..., -1, :], x0):
            states.add(site.shape[-2])
    return (
        values.dtype.kind in "iu"
        and values.ndim == x0.ndim + 1
        and (*values.shape[:-2], values.shape[-1]) == x0.shape
        and values.shape[-2] in states
    )


def storable(values: NDArray[Any], dims: tuple[str, ...]) -> NDArray[Any]:
    """Tokens as the narrowest of uint16 and int32; booleans, which netCDF lacks, as int8."""
    if values.dtype.kind == "b":
        return values.astype(np.int8)
    if "position" in dims:
        narrow = values.size == 0 or (values.min() >= 0 and values.max() < 2**16)
        return values.astype(np.uint16 if narrow else np.int32)
    return values


def _pick(values: NDArray[Any], runs: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[Any]:
    """``values[run, index[run]]`` for ``(R, N, ...)`` values."""
    return values[runs[:, None], index]


def make_dataset(variables: dict[str, Variable], runs: NDArray[np.int64]) -> xr.Dataset:
    dataset = xr.Dataset(variables)
    if "draw" in dataset.sizes:
        dataset = dataset.assign_coords(draw=np.arange(dataset.sizes["draw"]))
    return dataset.assign_coords(chain=runs, run=("chain", runs))


def _attributes(posterior: ParticlePosterior, weights: str, seed: int) -> dict[str, Any]:
    facts = {
        "inference_library": "ppl_diffusion",
        "inference_library_version": version("ppl-diffusion"),
        "target": posterior.target,
        "exact": posterior.exact,
        "num_particles": posterior.num_particles,
        "num_runs": posterior.num_runs,
        "num_steps": posterior.num_steps,
        "num_evaluations": posterior.num_evaluations,
        "num_potential_calls": posterior.num_potential_calls,
        "weights": weights,
        "resample_seed": seed,
    }
    return {name: attribute(value) for name, value in {**posterior.settings, **facts}.items()}


def attribute(value: Any) -> str | int | float:
    """An attribute netCDF can hold; what is no number or string becomes its JSON text."""
    plain = json_types(value)
    if isinstance(plain, bool):
        return int(plain)
    return plain if isinstance(plain, str | int | float) else json.dumps(plain)


def make_container(groups: dict[str, xr.Dataset], attributes: dict[str, Any]) -> Any:
    arviz = _import_arviz()
    if int(arviz.__version__.split(".")[0]) >= 1:
        root = xr.Dataset(attrs=attributes)
        return xr.DataTree.from_dict({"/": root} | {f"/{k}": v for k, v in groups.items()})
    return arviz.InferenceData(attrs=attributes, **groups)


def _import_arviz() -> ModuleType:
    with warnings.catch_warnings():
        # 0.23 announces the move to 1.x once a day, on import
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return cast(ModuleType, arviz)
