"""Who descends from whom: lineages, Eves, and the variance one run can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import networkx as nx


def trace_back(history: list[Tensor], ancestors: Tensor) -> Tensor:
    """Return the paths of the final particles.

    :param history: ``T + 1`` states ``(R, N, *plates, L)``, before any later resampling.
    :param ancestors: int64 ``(T, R, N)``.
    :returns: ``(R, N, *plates, T + 1, L)``, in the type of the history.
    """
    device = ancestors.device
    runs = torch.arange(ancestors.shape[1], device=device)[:, None]
    index = torch.arange(ancestors.shape[2], device=device).expand(ancestors.shape[1:])
    states = [history[-1]]
    for k in range(len(history) - 2, -1, -1):
        index = ancestors[k].gather(1, index)
        states.append(history[k][runs, index])
    return torch.stack(states[::-1], -2)


def eve_indices(ancestors: Tensor) -> Tensor:
    """Return the root ancestor of every final particle, int64 ``(R, N)``.

    :param ancestors: int64 ``(T, R, N)``.
    """
    eve = ancestors[0]
    for parents in ancestors[1:]:
        eve = eve.gather(1, parents)
    return eve


def evidence_variance(eve: Tensor, normalised_weights: Tensor, resampled: Tensor) -> Tensor:
    """Return the single-run estimate of the relative variance of the evidence.

    ``V = 1 - (N / (N - 1))^(n + 1) (1 - s)`` with ``s`` the sum over Eves of the squared weight of
    their descendants and ``n`` resampling steps (Lee and Whiteley 2018, Biometrika 105, Eq. 8).
    Unbiased (times the squared evidence) for multinomial resampling; for systematic resampling it
    is far too small, and negative in most runs that resample at every step. Where
    :func:`degenerate` it carries no information.

    :param eve: root ancestors, int64 ``(R, N)``.
    :param normalised_weights: float64 ``(R, N)``.
    :param resampled: bool ``(R, T)``.
    :returns: float64 ``(R,)``; NaN for a single particle.
    """
    size = eve.shape[1]
    share = torch.zeros_like(normalised_weights).scatter_add_(1, eve, normalised_weights)
    concentration = (share**2).sum(-1)
    if size < 2:
        return torch.full_like(concentration, torch.nan)
    factor = (size / (size - 1)) ** (resampled.sum(-1) + 1).to(torch.float64)
    return 1 - factor * (1 - concentration)


def degenerate(eve: Tensor, normalised_weights: Tensor) -> Tensor:
    """Return the runs with fewer than two effective Eves (dead ones too), bool ``(R,)``.

    :param eve: root ancestors, int64 ``(R, N)``.
    :param normalised_weights: float64 ``(R, N)``.
    """
    share = torch.zeros_like(normalised_weights).scatter_add_(1, eve, normalised_weights)
    concentration = (share**2).sum(-1)
    return ~(concentration * 2 <= 1) | (concentration == 0)


def genealogy_graph(ancestors: Tensor, eve: Tensor, weights: Tensor) -> nx.DiGraph:
    """Return one run's genealogy, edges from parent to child.

    Nodes are ``(step, particle)``; step 0 is the noisiest state. Node attributes: ``eve`` (root
    index), ``survives`` (has a descendant at the end), and ``weight`` on the last step.

    :param ancestors: int64 ``(T, N)``.
    :param eve: int64 ``(N,)``, the root of each final particle.
    :param weights: normalised weights, float64 ``(N,)``.
    """
    import networkx as nx  # here, not above: most runs draw no graph

    steps, size = ancestors.shape
    graph = nx.DiGraph(num_steps=steps, num_particles=size)
    roots = torch.arange(size, device=ancestors.device)
    graph.add_nodes_from(((0, n), {"eve": n, "survives": False}) for n in range(size))
    for k in range(steps):
        parents = ancestors[k].tolist()
        roots = roots[ancestors[k]]
        graph.add_nodes_from(
            ((k + 1, n), {"eve": root, "survives": False}) for n, root in enumerate(roots.tolist())
        )
        graph.add_edges_from(((k, parent), (k + 1, n)) for n, parent in enumerate(parents))
    assert torch.equal(roots, eve)
    _mark_survivors(graph, ancestors)
    for n, weight in enumerate(weights.tolist()):
        graph.nodes[steps, n]["weight"] = weight
    return graph


def _mark_survivors(graph: nx.DiGraph, ancestors: Tensor) -> None:
    alive = set(range(ancestors.shape[1]))
    for k in range(len(ancestors), -1, -1):
        for n in alive:
            graph.nodes[k, n]["survives"] = True
        if k > 0:
            parents = ancestors[k - 1].tolist()
            alive = {parents[n] for n in alive}
