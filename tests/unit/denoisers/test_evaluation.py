"""Evaluating distinct rows once: same outputs, fewer rows, honest counters."""

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.denoisers.prediction import prefers_head
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.rows import DistinctRows, RowTable, distinct_rows, hash_rows
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
    for rows in (2.5, "all"):
        with pytest.raises(TypeError, match=f"a whole number or None, got {rows!r}"):
            wrapped(max_rows=rows)


def test_distinct_rows_reconstruct():
    rows = torch.randint(2, (500, 6))
    first, inverse = distinct_rows(rows)
    assert len(first) == len(rows.unique(dim=0))
    assert torch.equal(rows[first][inverse], rows)


def test_hash_collisions_cost_time_not_correctness(monkeypatch):
    """Every row the same hash: answers are unchanged."""
    monkeypatch.setattr("ppl_diffusion.rows.hash_rows", lambda rows: torch.zeros(len(rows)).long())
    rows = torch.randint(3, (50, 4))
    first, inverse = distinct_rows(rows)
    assert torch.equal(rows[first][inverse], rows)
    assert len(first) == len(rows.unique(dim=0))
    table = RowTable.build(rows[first], torch.arange(len(first)).double())
    index = table.find(rows)
    found = index >= 0
    assert torch.equal(table.rows[index[found]], rows[found])


@pytest.mark.parametrize("kinds", [1, 3, 2**40], ids=["one", "three", "none"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 0), (80, 4)], ids=str)
def test_distinct_rows_are_those_of_the_plain_form(monkeypatch, kinds, shape):
    """The first of each kind, in the order of the hashes, however many rows share one of these."""

    def few(rows, plain=hash_rows):
        return plain(rows) % kinds

    monkeypatch.setattr("ppl_diffusion.rows.hash_rows", few)
    rows = torch.randint(3, shape) - 1
    seen: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows.tolist()):
        seen.setdefault(tuple(row), index)
    first, inverse, hashes = DistinctRows.of(rows)
    assert sorted(first.tolist()) == list(seen.values())
    assert [first[i] for i in inverse] == [seen[tuple(row)] for row in rows.tolist()]
    assert torch.equal(hashes, few(rows[first]))
    assert bool((hashes.diff() >= 0).all())
    # What is remembered under known hashes is found, with and without them.
    table = RowTable.build(rows[first], torch.arange(len(first)), hashes)
    for index in (table.find(rows), table.find(rows, few(rows))):
        found = index >= 0
        assert torch.equal(table.rows[index[found]], rows[found])
        assert kinds < 2**40 or bool(found.all())


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


# sparse heads


class Sparse:
    """Two hidden numbers per position, five tokens; counts rows on both sides of the head."""

    vocab_size, kind, hidden_size = 5, "cavity", 2

    def __init__(self, *, time_free=True):
        self.time_free = time_free
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        self.rows = self.head_rows = 0

    def hidden(self, tokens, t):
        self.rows += tokens[..., 0].numel()
        time = torch.as_tensor(0.0 if self.time_free else t, dtype=torch.float64)
        scale = 2 - time.expand(tokens.shape[:-1])
        return self.embedding[tokens.roll(1, -1)] * scale[..., None, None]

    def head(self, rows):
        self.head_rows += rows[..., 0].numel()
        return (rows @ self.weight).log_softmax(-1)

    def __call__(self, tokens, t):
        return self.head(self.hidden(tokens, t))


class TestEvaluatedHead(DenoiserContract):
    def make_process(self):
        return Absorbing(5)

    def make_denoiser(self, process):
        return EvaluatedDenoiser(Sparse(), max_rows=3)


class TestEvaluatedHeadInTime(DenoiserContract):
    def make_process(self):
        return Uniform(5)

    def make_denoiser(self, process):
        return EvaluatedDenoiser(Sparse(time_free=False))


def test_hidden_states_of_distinct_rows_are_evaluated_once():
    network = Sparse()
    denoiser = EvaluatedDenoiser(network)
    assert prefers_head(denoiser)
    tokens = torch.randint(6, (4, 5)).repeat(10, 1)[torch.randperm(40)].reshape(5, 8, 5)
    hidden = denoiser.hidden(tokens, 0.5)
    unique = len(tokens.flatten(0, 1).unique(dim=0))
    assert network.rows == denoiser.rows_evaluated == unique
    assert denoiser.rows_requested == 40
    assert network.head_rows == 0  # the vocabulary waits for who asks
    assert torch.equal(hidden, Sparse().hidden(tokens, 0.5))
    torch.testing.assert_close(denoiser(tokens, 0.5), Sparse()(tokens, 0.5))


@pytest.mark.usefixtures("_no_grad")
@pytest.mark.parametrize("time_free", [True, False])
def test_hidden_states_are_reused(time_free):
    network = Sparse(time_free=time_free)
    denoiser, fresh = EvaluatedDenoiser(network), Sparse(time_free=time_free)
    tokens = torch.cartesian_prod(*[torch.arange(6)] * 3)
    denoiser.hidden(tokens[:100], 0.5)
    torch.testing.assert_close(
        denoiser.hidden(tokens[50:150], 0.5), fresh.hidden(tokens[50:150], 0.5)
    )
    assert network.rows == 150
    here, there = denoiser.hidden(tokens[50:150], 0.2), fresh.hidden(tokens[50:150], 0.2)
    torch.testing.assert_close(here, there)
    assert network.rows == (150 if time_free else 250)
    dense = denoiser(tokens[50:150], 0.2)
    assert network.rows == (150 if time_free else 250)
    torch.testing.assert_close(dense, fresh(tokens[50:150], 0.2))


@pytest.mark.usefixtures("_no_grad")
def test_the_very_same_tensor_is_not_even_compared():
    network = Sparse(time_free=False)
    denoiser = EvaluatedDenoiser(network)
    tokens = torch.randint(6, (7, 3))
    first = denoiser.hidden(tokens, 0.5)
    assert denoiser.hidden(tokens, 0.5) is first
    tokens[:, 0] = (tokens[:, 0] + 1) % 6
    edited = denoiser.hidden(tokens, 0.5)
    torch.testing.assert_close(edited, Sparse(time_free=False).hidden(tokens, 0.5))
    assert not torch.equal(edited, first)


def test_rows_with_times_of_their_own():
    """The same state at another time is another row, and at the same time the same."""
    network = Sparse(time_free=False)
    denoiser = EvaluatedDenoiser(network, max_rows=3)
    tokens, t = torch.zeros(7, 4).long(), torch.linspace(0, 1, 7, dtype=torch.float64)
    out = denoiser(tokens, t)
    assert network.rows == 7 + 4  # it is asked once whether it reads the times of rows
    assert denoiser.num_calls == 3
    for row in range(7):
        alone = Sparse(time_free=False)(tokens[row], float(t[row]))
        torch.testing.assert_close(out[row], alone)
    with torch.no_grad():
        for _ in range(2):
            denoiser(tokens.clone(), t.clone())
    assert network.rows == 2 * 7 + 4  # the second time nothing is new
    still = Sparse()
    assert EvaluatedDenoiser(still)(tokens, t).shape == (7, 4, 5)
    assert still.rows == 1


@pytest.mark.usefixtures("_no_grad")
def test_chains_around_an_evaluated_head():
    """Reveals at times of their own, a head only where somebody asks, and honest counters."""
    network = Sparse(time_free=False)
    denoiser = EvaluatedDenoiser(network)
    kernel = InterpolatingKernel(Absorbing(5), denoiser, num_steps=4)
    chain = ReverseChain(kernel, 6)
    path = chain.sample((20,))
    moved = int((path[:, 1:] != path[:, :-1]).any(-1).sum())
    assert denoiser.rows_requested == moved
    # Rows that were the same at the same time are one; four are asked about the times themselves.
    assert network.rows - 4 == denoiser.rows_evaluated < moved
    bare = ReverseChain(kernel.with_denoiser(Sparse(time_free=False)), 6)
    torch.testing.assert_close(chain.log_prob(path.clone()), bare.log_prob(path.clone()))


def test_small_vocabularies_keep_their_table():
    network = Sparse()
    network.hidden_size = 5
    denoiser = EvaluatedDenoiser(network)
    assert not prefers_head(denoiser)
    assert not hasattr(denoiser, "hidden")
    assert denoiser(torch.zeros(2, 3).long(), 0.5).shape == (2, 3, 5)


def test_rows_of_a_network_that_runs_twice_count_twice():
    network = Sparse()
    network.network_rows = 2
    denoiser = EvaluatedDenoiser(network)
    denoiser(torch.zeros(4, 3).long(), 0.5)
    assert (denoiser.rows_requested, denoiser.rows_evaluated, denoiser.num_calls) == (8, 2, 1)
