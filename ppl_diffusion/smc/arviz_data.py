"""A particle posterior as ArviZ data: one adapter for ArviZ 0.23 and 1.x.

A *chain* is an independent SMC run, a *draw* a particle, a *step* a reverse step. Groups:

====================  =====================  ==================================================
group                 dims                   variables
====================  =====================  ==================================================
posterior             chain, draw, ...       every site of the program but its sequences and
                                             paths; ``log_potential`` where there is none
sequences             chain, draw, ...       ``x0`` and other clean sequences
sample_stats          chain, draw            log_weight, log_potential, root_ancestor,
                                             particle, is_valid
weighted_data         chain, particle, ...   the particles themselves, with log_weight,
                                             log_potential, root_ancestor (beside resampled
                                             draws only)
smc                   chain, step            time, ess, log_evidence, log_evidence_increment,
                                             resampled, n_unique, n_root_ancestors, log_mass
smc                   chain                  total_log_evidence, evidence_variance, khat, died_at
smc_history           chain, step, draw      ancestor; stored paths: chain, draw, state, position
observed_data         plates                 what the program observed, where it is known
constant_data         token                  token_id, labelled by the vocabulary
log_likelihood        chain, draw, plates    on request: each observed element, unscaled
log_prior             chain, draw, plates    with it: latents
log_factors           chain, draw, plates    with it: factors, by their names
posterior_predictive  chain, draw, plates    on request: new data for each draw
prior                 chain, draw, ...       on request: draws without data (``prior_sequences``)
prior_predictive      chain, draw, plates    with it: data for these
====================  =====================  ==================================================

Datasets are built by hand rather than by ``from_dict``: it stamps the time of day on every group,
and its 1.x form cannot hold a group without draws. Nothing has dtype ``object``, so everything
can be saved as netCDF; every dimension has labels, so everything becomes a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.smc.arviz_groups import extra_groups
from ppl_diffusion.smc.arviz_layout import (
    SiteTable,
    Variable,
    attributes,
    make_container,
    make_dataset,
    site_table,
)
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.resampling import Stratified
from ppl_diffusion.smc.run_statistics import as_array, count_distinct, lineage_roots

HISTORY_LIMIT = 64 * 2**20
"""Largest history variable, in bytes, that ``history="auto"`` keeps."""

# Known by its fields: naming the class, whose ``to_arviz`` this file is, would close a circle.
ParticlePosterior = Any
Index = NDArray[np.int64]
History = Literal["auto"] | bool


def to_arviz(
    posterior: ParticlePosterior,
    *,
    weights: Literal["resample", "store"] = "resample",
    history: History = "auto",
    vocabulary: Sequence[str] | None = None,
    tokens: bool = False,
    log_likelihood: bool = False,
    prior: int = 0,
    posterior_predictive: bool = False,
    seed: int = 0,
) -> Any:
    """Convert to ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x).

    ArviZ summaries and plots ignore weights, so by default each run is resampled (stratified) to
    ``N`` equally weighted draws; ``sample_stats.particle`` says which particle a draw came from,
    and the group ``weighted_data`` holds the particles with their weights. Across-draw ``rhat`` and
    ``ess`` of such draws are meaningless, because particles of one run share ancestors; compare
    *chains* (runs). A dead run (evidence zero) cannot be resampled and is left out of
    ``posterior`` and ``sample_stats``; chain labels keep the run numbers. The ``smc`` groups are
    the same in both modes and index raw particles. Wall time is left out, so that the same seed
    gives the same file.

    Means of token ids mean nothing, so sequences have a group of their own, ``sequences``, which
    summaries and plots of the posterior leave alone.

    A site called like a dimension (``chain``, ``draw``, ``particle``, ``run``, ``step``, ``state``,
    ``position``, ``plate_0``, ``x_dim_0``) or ``ancestor`` is stored with ``_site`` added to its
    name, a plate called like one or like a site with ``_plate``; the ``/`` of
    ``pyro.poutine.scope``, which netCDF refuses, becomes a ``.``.

    :param weights: ``"resample"`` for equally weighted draws, or ``"store"`` for the particles
        themselves, whose weights are then in ``sample_stats.log_weight``; not with
        ``log_likelihood`` or ``posterior_predictive``, unless they are equal.
    :param history: keep ancestry and stored paths; ``"auto"`` drops any over
        :data:`HISTORY_LIMIT` bytes.
    :param vocabulary: one string per clean token id, kept as the ``token`` coordinate.
    :param tokens: keep sequences in the ``posterior`` group, too, as numbers.
    :param log_likelihood: add ``log_likelihood``, ``log_prior`` and ``log_factors``, for which the
        program runs once more on the draws.
    :param prior: number of draws without data to add, which ask the network; 0 for none.
    :param posterior_predictive: add new data for each draw.
    :param seed: seed of the draws, the prior and the predictions.
    :raises ParticleCollapse: if draws are asked for and every run is dead.
    :raises ValueError: if an option is unknown, the vocabulary is shorter than the token ids,
        particles of unequal weights are to be stored beside groups that ArviZ reads as equal
        draws, or the program has to run again and is not known, or observes nothing.
    """
    _require_known(weights)
    if weights == "store" and (log_likelihood or posterior_predictive):
        _require_equal_weights(posterior)
    runs, index = _draw_index(posterior, weights, seed)
    table = site_table(posterior)
    extra = extra_groups(
        posterior,
        lambda: _picked_sites(posterior, runs, index),
        runs,
        log_likelihood=log_likelihood,
        prior=prior,
        posterior_predictive=posterior_predictive,
        seed=seed,
    )
    groups = {
        **draw_groups(_picked(table, runs, index), runs, tokens=tokens),
        "sample_stats": _sample_stats(posterior, runs, index, weights),
        "smc": _smc(posterior),
        **extra,
    }
    if not groups["posterior"].data_vars:  # a bare chain: summaries need a number to look at
        groups["posterior"] = groups["sample_stats"][["log_potential"]]
    if weights == "resample":
        groups["weighted_data"] = _weighted(posterior, table)
    if past := _history(posterior, table, history):
        groups["smc_history"] = make_dataset(past, np.arange(posterior.num_runs))
    if vocabulary is not None:
        groups["constant_data"] = constant_data(posterior, vocabulary)
    return make_container(groups, _attributes(posterior, weights, seed))


def draw_groups(table: SiteTable, runs: Index, *, tokens: bool) -> dict[str, xr.Dataset]:
    """Return the groups ``posterior`` and ``sequences``.

    :param table: variables whose values are draws of ``K`` chains.
    :param runs: labels of the chains.
    :param tokens: keep sequences in the posterior, too.
    """
    numbers = table.numbers | (table.tokens if tokens else {})
    groups = {"posterior": numbers, "sequences": table.tokens}
    return {n: make_dataset(_by("draw", part), runs, table.labels) for n, part in groups.items()}


def _by(draw: str, part: dict[str, Variable]) -> dict[str, Variable]:
    return {name: (("chain", draw, *dims), values) for name, (dims, values) in part.items()}


def _require_known(weights: str) -> None:
    if weights not in ("resample", "store"):
        raise ValueError(f'weights is {weights!r}: pass "resample" or "store"')


def _require_equal_weights(posterior: ParticlePosterior) -> None:
    """Refuse what ``arviz.loo`` and checks of predictions would take for equal draws."""
    log_weights = as_array(posterior.log_weights)
    if not np.allclose(log_weights, -np.log(log_weights.shape[-1])):
        raise ValueError(
            'to_arviz: ArviZ counts draws alike, which particles under weights="store" are not, so '
            "their log_likelihood and posterior_predictive would mislead it; leave out "
            'weights="store"'
        )


def _draw_index(posterior: ParticlePosterior, weights: str, seed: int) -> tuple[Index, Index]:
    """Runs kept ``(K,)`` and the particle behind each of their draws ``(K, N)``."""
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


def _picked(table: SiteTable, runs: Index, index: Index) -> SiteTable:
    def pick(part: dict[str, Variable]) -> dict[str, Variable]:
        return {name: (dims, _pick(values, runs, index)) for name, (dims, values) in part.items()}

    return SiteTable(pick(table.numbers), pick(table.tokens), labels=table.labels)


def _picked_sites(
    posterior: ParticlePosterior, runs: Index, index: Index
) -> dict[str, torch.Tensor]:
    """Return the values of all sites that a program would need to run again."""
    rows, columns = torch.as_tensor(runs)[:, None], torch.as_tensor(index)
    return {name: value[rows, columns] for name, value in posterior.program_sites().items()}


def _sample_stats(
    posterior: ParticlePosterior, runs: Index, index: Index, weights: str
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


def _weighted(posterior: ParticlePosterior, table: SiteTable) -> xr.Dataset:
    """Return the particles themselves, whose weights are lost to resampled draws.

    ArviZ makes tables of all groups that are not called data; a column for each particle is none.
    """
    columns = {
        "log_weight": as_array(posterior.log_weights),
        "log_potential": as_array(posterior.log_potential),
        "root_ancestor": as_array(posterior.eve).astype(np.int32),
    }
    # Of what a site would take the name, the name of the column is the one that is documented.
    sites = _by("particle", {**table.numbers, **table.tokens})
    known: dict[str, Variable] = {k: (("chain", "particle"), v) for k, v in columns.items()}
    return make_dataset(sites | known, np.arange(posterior.num_runs), table.labels)


def _smc(posterior: ParticlePosterior) -> xr.Dataset:
    log_evidence = as_array(posterior.log_evidence_steps)
    ancestors = as_array(posterior.ancestors)
    with np.errstate(invalid="ignore"):  # -inf minus -inf after a run has died
        increment = np.diff(log_evidence, axis=1, prepend=0.0)
    by_step = {
        "time": np.broadcast_to(as_array(posterior.times)[1:], log_evidence.shape),
        "ess": as_array(posterior.ess),
        "log_evidence": log_evidence,
        "log_evidence_increment": increment,
        "resampled": as_array(posterior.resampled).astype(np.int8),
        "n_unique": count_distinct(ancestors).T.astype(np.int32),
        "n_root_ancestors": count_distinct(lineage_roots(ancestors)[1:]).T.astype(np.int32),
    }
    if posterior.log_mass is not None:
        by_step["log_mass"] = as_array(posterior.log_mass)
    by_run = {
        "total_log_evidence": as_array(posterior.log_evidence),
        "evidence_variance": as_array(posterior.evidence_variance),
        "khat": khat(posterior.log_weights),
        "died_at": as_array(posterior.died_at).astype(np.int32),
    }
    variables: dict[str, Variable] = {k: (("chain", "step"), v) for k, v in by_step.items()}
    variables |= {k: (("chain",), v) for k, v in by_run.items()}
    return make_dataset(variables, np.arange(posterior.num_runs))


def _history(
    posterior: ParticlePosterior, table: SiteTable, history: History
) -> dict[str, Variable]:
    if history is False:
        return {}
    ancestors = np.moveaxis(as_array(posterior.ancestors), 0, 1).astype(np.int32)
    past: dict[str, Variable] = {"ancestor": (("chain", "step", "draw"), ancestors)}
    return kept_history(past | _by("draw", table.paths), history)


def kept_history(past: dict[str, Variable], history: History) -> dict[str, Variable]:
    """Return what is not too large.

    :param past: variables.
    :param history: ``True`` keeps all, ``"auto"`` drops any over :data:`HISTORY_LIMIT` bytes.
    """
    keep_all = history is True
    return {k: v for k, v in past.items() if keep_all or v[1].nbytes <= HISTORY_LIMIT}


def constant_data(posterior: Any, vocabulary: Sequence[str]) -> xr.Dataset:
    """Return the labels of token ids.

    :raises ValueError: if there are too few.
    """
    largest = int(as_array(posterior.x0).max())
    if largest >= len(vocabulary):
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} strings but x0 holds token id {largest}: pass "
            "one string per clean token, in id order"
        )
    names = np.array(list(vocabulary), dtype=np.str_)
    ids = np.arange(len(names), dtype=np.int32)
    return xr.Dataset({"token_id": (("token",), ids)}, coords={"token": names})


def _pick(values: NDArray[Any], runs: Index, index: Index) -> NDArray[Any]:
    """``values[run, index[run]]`` for ``(R, N, ...)`` values."""
    return values[runs[:, None], index]


def _attributes(posterior: ParticlePosterior, weights: str, seed: int) -> dict[str, Any]:
    return attributes(
        posterior,
        num_particles=posterior.num_particles,
        num_runs=posterior.num_runs,
        num_steps=posterior.num_steps,
        weights=weights,
        resample_seed=seed,
    )
