"""The numbers behind every plot, as plain numpy arrays."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.smc.gibbs_posterior import require_particles
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.run_statistics import (
    as_array,
    count_distinct,
    lineage_roots,
    pooled_log_evidence,
)

if TYPE_CHECKING:
    from ppl_diffusion.smc import Draws

PlotData = dict[str, NDArray[Any]]


def plot_ess_data(posterior: ParticlePosterior) -> PlotData:
    """Numbers of :func:`plot_ess`.

    :returns: ``step`` ``(T,)`` from 1; ``ess_fraction`` ``(R, T)``, effective sample size over
        ``N``; ``resampled`` ``(R, T)`` bool; ``threshold`` ``()``, NaN if the run had none.
    :raises CapabilityError: for draws of Markov chains.
    """
    require_particles(posterior, "plot_ess")
    threshold = posterior.settings.get("ess_threshold")
    return {
        "step": np.arange(1, posterior.num_steps + 1),
        "ess_fraction": as_array(posterior.ess) / posterior.num_particles,
        "resampled": as_array(posterior.resampled).astype(bool),
        "threshold": np.array(np.nan if threshold is None else threshold, dtype=np.float64),
    }


def plot_evidence_data(posterior: ParticlePosterior) -> PlotData:
    """Numbers of :func:`plot_evidence`, in nats.

    :returns: ``step`` ``(T,)`` from 1; ``log_evidence`` ``(R, T)`` running estimates; ``pooled``
        ``(T,)``, log of their mean over runs (dead runs as 0); ``interval`` ``(2,)``, nominal
        95 % of the final one, NaN where runs give none.
    :raises CapabilityError: for draws of Markov chains.
    """
    require_particles(posterior, "plot_evidence")
    steps = as_array(posterior.log_evidence_steps)
    found = posterior.evidence
    interval = found.interval if found is not None and found.interval is not None else (np.nan,) * 2
    return {
        "step": np.arange(1, posterior.num_steps + 1),
        "log_evidence": steps,
        "pooled": pooled_log_evidence(steps),
        "interval": np.array(interval, dtype=np.float64),
    }


def plot_weights_data(posterior: ParticlePosterior) -> PlotData:
    """Numbers of :func:`plot_weights`.

    :returns: ``log10_scaled`` ``(M,)``, ``log10(N W)`` of every particle of positive weight, and
        its ``run`` ``(M,)``; ``num_zero`` ``()``, how many have weight zero; ``top`` ``(N,)`` from
        1; ``cumulative`` ``(R, N)``, the weight of each run's ``top`` heaviest particles (NaN for a
        dead run); ``khat`` ``(R,)`` of each run and ``khat_pooled`` ``()`` of all particles
        together, NaN where there is none.
    :raises CapabilityError: for draws of Markov chains.
    """
    require_particles(posterior, "plot_weights")
    log_weights = as_array(posterior.log_weights)
    positive = np.isfinite(log_weights)
    heaviest = -np.sort(-np.exp(log_weights), axis=-1)
    alive = positive.any(-1, keepdims=True)
    return {
        "log10_scaled": (log_weights[positive] + np.log(posterior.num_particles)) / np.log(10),
        "run": np.nonzero(positive)[0],
        "num_zero": np.array((~positive).sum()),
        "top": np.arange(1, posterior.num_particles + 1),
        "cumulative": np.where(alive, heaviest.cumsum(-1), np.nan),
        "khat": khat(log_weights),
        "khat_pooled": khat(_pooled(posterior).reshape(1, -1))[0],
    }


def _pooled(posterior: ParticlePosterior) -> NDArray[np.float64]:
    """Log-weights over all runs ``(R, N)``; all ``-inf`` where no run lives."""
    if not bool(posterior.alive.any()):
        return np.full(tuple(posterior.log_weights.shape), -np.inf)
    return as_array(posterior.pooled_log_weights)


def plot_ancestry_data(posterior: ParticlePosterior, *, run: int = 0) -> PlotData:
    """Numbers of :func:`plot_ancestry` for one run.

    Population 0 is the initial noise, population ``k`` follows the ``k``-th reverse step.

    :param run: which run.
    :returns: ``parents`` ``(T, N)``, index in population ``k - 1`` of the parent of each
        particle of population ``k``; ``root`` ``(T + 1, N)``, its ancestor in population 0;
        ``survives`` ``(T + 1, N)`` bool, whether it has a descendant at the end; ``num_roots``
        ``(T + 1,)``, distinct roots of a population; ``weight`` ``(N,)``, final weight by root;
        ``rank`` ``(T + 1, N)``, where to draw a particle so that no two lineages cross.
    :raises CapabilityError: for draws of Markov chains.
    :raises IndexError: if there is no such run.
    """
    require_particles(posterior, "plot_ancestry")
    if not 0 <= run < posterior.num_runs:
        raise IndexError(
            f"run {run} does not exist: choose one of 0..{posterior.num_runs - 1} of this posterior"
        )
    parents = as_array(posterior.ancestors)[:, run]
    root = lineage_roots(parents[:, None])[:, 0]
    weights = np.exp(as_array(posterior.log_weights)[run])
    return {
        "parents": parents,
        "root": root,
        "survives": mark_lineages(parents, np.arange(len(weights))),
        "num_roots": count_distinct(root),
        "weight": np.bincount(root[-1], weights=weights, minlength=len(weights)),
        "rank": _rank(parents),
    }


def mark_lineages(parents: NDArray[np.int64], final: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark every particle ``(T + 1, N)`` that some of the ``final`` particles descend from."""
    marked = np.zeros((len(parents) + 1, parents.shape[1]), dtype=bool)
    marked[-1, final] = True
    for k in range(len(parents) - 1, -1, -1):
        marked[k, parents[k][marked[k + 1]]] = True
    return marked


def _rank(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order each population by the rank of its parents."""
    rank = [np.arange(parents.shape[1])]
    for parent in parents:
        order = np.argsort(rank[-1][parent], kind="stable")
        rank.append(np.argsort(order))
    return np.stack(rank)


def plot_token_entropy_data(posterior: "Draws", *, num_tokens: int | None = None) -> PlotData:
    """Numbers of :func:`plot_token_entropy`, in bits.

    All runs are pooled, each in proportion to its evidence (chains alike). Plates are laid one
    after another along the positions.

    :param num_tokens: size of the alphabet without the mask; found in the tokens if None.
    :returns: ``position`` ``(P,)`` from 0; ``entropy`` ``(P,)`` of the weighted ``x0``;
        ``num_tokens`` ``()``, whose ``log2`` no entropy exceeds; and, where the path was stored,
        ``entropy_steps`` ``(T + 1, P)``, the entropy at each time of the lineages that survive,
        under their final weights, among those that are no mask, ``revealed`` ``(T + 1, P)``, the
        weight of these, and ``times`` ``(T + 1,)``, which chains do not keep.
    :raises ParticleCollapse: if every run is dead.
    """
    weights = np.exp(as_array(posterior.pooled_log_weights)).reshape(-1)
    tokens = as_array(posterior.x0).reshape(len(weights), -1)
    frames = None
    if posterior.path is not None:
        path = np.moveaxis(as_array(posterior.path), -2, 0)
        frames = path.reshape(len(path), len(weights), -1)
    known = _alphabet(tokens, frames) if num_tokens is None else num_tokens
    data: PlotData = {
        "position": np.arange(tokens.shape[1]),
        "entropy": _entropy(tokens, weights, known)[0],
        "num_tokens": np.array(known),
    }
    if frames is not None:
        if isinstance(posterior, ParticlePosterior):
            data["times"] = as_array(posterior.times)
        each = [_entropy(frame, weights, known) for frame in frames]
        data["entropy_steps"], data["revealed"] = map(np.stack, zip(*each, strict=True))
    return data


def _alphabet(tokens: NDArray[np.int64], frames: NDArray[np.int64] | None) -> int:
    """Size of the alphabet as far as tokens show it: the mask, where there is one, comes next."""
    seen = int(tokens.max()) + 1
    if frames is None:
        return seen
    highest = int(frames[0].max())
    masked = highest >= seen and float((frames[0] == highest).mean()) > 0.5
    return highest if masked else max(seen, int(frames.max()) + 1)


def _entropy(
    tokens: NDArray[np.int64], weights: NDArray[np.float64], num_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entropy in bits of each column of ``(M, P)`` tokens among those that are no mask.

    :returns: entropy, 0 where all is masked, and the weight that is not, each ``(P,)``.
    """
    kinds, index = np.unique(tokens, return_inverse=True)
    index = index.reshape(tokens.shape) + np.arange(tokens.shape[1]) * len(kinds)
    mass = np.bincount(
        index.reshape(-1),
        weights=np.repeat(weights, tokens.shape[1]),
        minlength=len(kinds) * tokens.shape[1],
    )
    mass = mass.reshape(tokens.shape[1], len(kinds))[:, kinds < num_tokens]
    revealed = mass.sum(-1)
    share = np.minimum(mass / np.where(revealed > 0, revealed, 1.0)[:, None], 1.0)
    return (share * np.log2(1 / np.where(share > 0, share, 1.0))).sum(-1), revealed
