"""Lineages: paths, Eves, the graph, and what one run can tell about its own error."""

import networkx as nx
import pytest
import torch

from ppl_diffusion.smc.genealogy import (
    degenerate,
    eve_indices,
    evidence_variance,
    genealogy_graph,
    trace_back,
)

# Three steps, one run of four particles.
ANCESTORS = torch.tensor([[[0, 1, 2, 3]], [[1, 1, 3, 0]], [[0, 1, 2, 2]]])


def test_eves_by_hand():
    assert eve_indices(ANCESTORS).tolist() == [[1, 1, 3, 3]]


def test_trace_back_by_hand():
    history = [torch.arange(4)[None, :, None] + 10 * k for k in range(4)]
    paths = trace_back(history, ANCESTORS)
    assert paths.shape == (1, 4, 4, 1)
    assert paths[0, :, :, 0].tolist() == [
        [1, 11, 20, 30],
        [1, 11, 21, 31],
        [3, 13, 22, 32],
        [3, 13, 22, 33],
    ]


def test_trace_back_with_plates():
    history = [torch.randint(5, (2, 4, 3, 6)) for _ in range(4)]
    paths = trace_back(history, ANCESTORS.expand(3, 2, 4))
    assert paths.shape == (2, 4, 3, 4, 6)
    assert torch.equal(paths[..., -1, :], history[-1])


def test_variance_of_independent_particles_is_the_sample_variance():
    """No resampling: ``V`` is the usual estimate of the relative variance of a mean."""
    w = torch.rand(5, 16, dtype=torch.float64)
    eve = torch.arange(16).expand(5, -1)
    v = evidence_variance(eve, w / w.sum(-1, keepdim=True), torch.zeros(5, 3, dtype=torch.bool))
    expected = w.var(-1) / 16 / w.mean(-1) ** 2
    torch.testing.assert_close(v, expected)


def test_degenerate_runs():
    w = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    eve = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 2, 3]])
    assert degenerate(eve, w).tolist() == [True, False, True]


def test_single_particle_knows_nothing():
    one = torch.ones(2, 1, dtype=torch.float64)
    v = evidence_variance(torch.zeros(2, 1, dtype=torch.int64), one, torch.zeros(2, 3).bool())
    assert bool(torch.isnan(v).all())


def test_graph_by_hand():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    graph = genealogy_graph(ANCESTORS[:, 0], eve_indices(ANCESTORS)[0], weights)
    assert graph.number_of_nodes() == 16
    assert graph.number_of_edges() == 12
    assert nx.is_directed_acyclic_graph(graph)
    assert list(graph.predecessors((2, 0))) == [(1, 1)]
    assert all(graph.in_degree((k, n)) == 1 for k in (1, 2, 3) for n in range(4))
    alive = {node for node, survives in graph.nodes(data="survives") if survives}
    assert alive == {(0, 1), (0, 3), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2)} | {
        (3, n) for n in range(4)
    }
    assert [graph.nodes[3, n]["eve"] for n in range(4)] == [1, 1, 3, 3]
    assert graph.nodes[3, 3]["weight"] == pytest.approx(0.4)
