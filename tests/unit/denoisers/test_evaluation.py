"""Evaluating distinct rows once: same outputs, fewer rows, honest counters."""

import pytest
import torch

from ppl_diffusion._rows import RowTable, distinct_rows, hash_rows
from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.testing import DenoiserContract, counted, toy_markov_chain


class TestEvaluated(DenoiserContract):
    length, tolerance, ignores_own_token = 5, 1e-12, True

    def make_process(self):
        return toy_markov_chain("uniform").kernel.process

    def make_denoiser(self, process):
        return EvaluatedDenoiser(toy_markov_chain(process).kernel.denoiser, max_rows=3)


def wrapped(name="uniform", **options):
    counter = counted(toy_markov_chain(name))[1]
    return EvaluatedDenoiser(counter, **options), counter


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


def test_distinct_rows_are_evaluated_once():
    denoiser, counter = wrapped()
    tokens = torch.randint(3, (4, 5)).repeat(10, 1)[torch.randperm(40)].reshape(5, 8, 5)
    torch.testing.assert_close(denoiser(tokens, 0.5), counter.denoiser(tokens, 0.5))
    unique = len(tokens.flatten(0, 1).unique(dim=0))
    assert counter.rows == denoiser.rows_evaluated == unique
    assert denoiser.rows_requested == 40
    assert f"{unique} of 40 rows" in repr(denoiser)


@pytest.mark.usefixtures("_no_grad")
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_reuse_at_the_same_time_and_for_masks_at_any(name):
    denoiser, counter = wrapped(name)
    tokens = torch.randint(3, (6, 5))
    first = denoiser(tokens, 0.5)
    rows = counter.rows
    assert torch.equal(denoiser(tokens.flip(0), 0.5), first.flip(0))
    assert counter.rows == rows
    torch.testing.assert_close(denoiser(tokens, 0.3), counter.denoiser(tokens, 0.3))
    assert counter.rows == (rows if name == "absorbing" else 2 * rows)


@pytest.mark.usefixtures("_no_grad")
def test_only_new_rows_are_evaluated():
    denoiser, counter = wrapped()
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 5)
    denoiser(tokens[:20], 0.5)
    out = denoiser(tokens[10:40], 0.5)
    assert counter.rows == 40
    torch.testing.assert_close(out, counter.denoiser(tokens[10:40], 0.5))
    denoiser(tokens[:10], 0.5)  # only the last call is remembered
    assert counter.rows == 50


@pytest.mark.usefixtures("_no_grad")
def test_another_length_is_not_confused():
    denoiser, _ = wrapped()
    assert denoiser(torch.zeros(2, 5).long(), 0.5).shape == (2, 5, 3)
    assert denoiser(torch.zeros(2, 4).long(), 0.5).shape == (2, 4, 3)


def test_nothing_is_reused_while_gradients_are_recorded():
    denoiser, counter = wrapped()
    tokens = torch.zeros(3, 5).long()
    denoiser(tokens, 0.5)
    denoiser(tokens, 0.5)
    assert counter.rows == 2


def test_edits_in_inference_mode_are_seen():
    denoiser, counter = wrapped()
    with torch.inference_mode():
        tokens = torch.zeros(3, 5).long()
        denoiser(tokens, 0.5)
        tokens[:, 0] = 1
        torch.testing.assert_close(denoiser(tokens, 0.5), counter.denoiser(tokens, 0.5))
    assert counter.rows == 2


@pytest.mark.usefixtures("_no_grad")
def test_reuse_can_be_switched_off():
    denoiser, counter = wrapped(reuse=False)
    tokens = torch.zeros(3, 5).long()
    denoiser(tokens, 0.5)
    denoiser(tokens, 0.5)
    assert counter.rows == 2


@pytest.mark.parametrize("max_rows", [1, 7, None])
def test_chunks(max_rows):
    denoiser, counter = wrapped(max_rows=max_rows)
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 3 + [torch.zeros(1).long()] * 2)
    torch.testing.assert_close(denoiser(tokens, 0.5), counter.denoiser(tokens, 0.5))
    assert denoiser.num_calls == (1 if max_rows is None else -(-27 // max_rows))


def test_bad_chunk():
    with pytest.raises(ValueError, match="max_rows must be >= 1 or None, got 0"):
        wrapped(max_rows=0)


def test_distinct_rows_reconstruct():
    rows = torch.randint(2, (500, 6))
    first, inverse = distinct_rows(rows)
    assert len(first) == len(rows.unique(dim=0))
    assert torch.equal(rows[first][inverse], rows)


def test_hash_collisions_cost_time_not_correctness(monkeypatch):
    """Every row the same hash: answers are unchanged."""
    monkeypatch.setattr("ppl_diffusion._rows.hash_rows", lambda rows: torch.zeros(len(rows)).long())
    rows = torch.randint(3, (50, 4))
    first, inverse = distinct_rows(rows)
    assert torch.equal(rows[first][inverse], rows)
    assert len(first) == len(rows.unique(dim=0))
    table = RowTable.build(rows[first], torch.arange(len(first)).double())
    index = table.find(rows)
    found = index >= 0
    assert torch.equal(table.rows[index[found]], rows[found])


def test_row_table():
    rows = torch.tensor([[0, 1], [2, 2], [1, 0]])
    table = RowTable.build(rows, torch.tensor([10.0, 20.0, 30.0]))
    index = table.find(torch.tensor([[2, 2], [1, 1], [1, 0]]))
    assert index[1] == -1
    assert table.values[index[[0, 2]]].tolist() == [20.0, 30.0]
    empty = RowTable.build(torch.zeros(0, 2).long(), torch.zeros(0))
    assert empty.find(rows).tolist() == [-1, -1, -1]


def test_hashes_of_small_differences_differ():
    rows = torch.cartesian_prod(*[torch.arange(4)] * 6)
    assert len(hash_rows(rows).unique()) == len(rows)
