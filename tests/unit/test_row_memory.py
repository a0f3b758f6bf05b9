"""Values by row: found again, whatever came between, and never confused."""

import pytest
import torch

from ppl_diffusion import row_memory
from ppl_diffusion.row_memory import RowMemory
from ppl_diffusion.rows import DistinctRows, hash_rows


def distinct(count, length=5, seed=0, states=9):
    rows = torch.randint(states, (count, length), generator=torch.Generator().manual_seed(seed))
    first, _, hashes = DistinctRows.of(rows)
    return rows[first], hashes


def number(rows):
    return (rows * torch.arange(1, rows.shape[-1] + 1)).sum(-1).double()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_was_added_is_found_and_nothing_else(dtype):
    memory, seen = RowMemory(dtype), set()
    for seed in range(20):
        rows, hashes = distinct(40, length=3, seed=seed)
        values, known = memory.find(rows, hashes)
        assert known.tolist() == [tuple(row) in seen for row in rows.tolist()]
        assert torch.equal(values[known], number(rows[known]))
        assert bool(values[~known].isnan().all())
        memory.add(rows[~known], hashes[~known], number(rows[~known]))
        seen |= set(map(tuple, rows.tolist()))
        assert len(memory) == len(seen)


def test_rows_of_another_length_start_anew():
    memory = RowMemory()
    rows, hashes = distinct(8)
    memory.add(rows, hashes, number(rows))
    others = distinct(8, length=7)
    assert not memory.find(*others)[1].any()
    memory.add(*others, number(others[0]))
    assert memory.find(*others)[1].all()


@pytest.mark.parametrize("bounds", [{"max_rows": 64}, {"max_rows": 10**6, "max_bytes": 64 * 5 * 4}])
def test_the_oldest_are_forgotten(bounds):
    memory, batches = RowMemory(**bounds), [distinct(20, seed=s, states=10**6) for s in range(12)]
    for rows, hashes in batches:
        memory.add(rows, hashes, number(rows))
        assert len(memory) <= 64
        assert memory.find(rows, hashes)[1].all()
    assert memory.find(*batches[-2])[1].all()
    assert not memory.find(*batches[0])[1].any()


def test_more_than_fits_is_kept_in_part():
    memory = RowMemory(max_rows=20)
    rows, hashes = distinct(50, states=10**6)
    memory.add(rows, hashes, number(rows))
    values, known = memory.find(rows, hashes)
    assert int(known.sum()) == len(memory) == 10
    assert torch.equal(values[known], number(rows[known]))


def test_rows_of_one_hash_are_told_apart():
    rows = torch.tensor([[0, 1], [1, 0]])
    same = torch.zeros(1, dtype=torch.int64)
    memory = RowMemory()
    memory.add(rows[:1], same, torch.tensor([1.0]).double())
    assert not memory.find(rows[1:], same)[1].any()
    assert memory.find(rows[:1], same)[0].tolist() == [1.0]
    assert len(hash_rows(rows).unique()) == 2


def test_bounds_leave_room_for_a_large_population():
    assert row_memory.MAX_ROWS >= 2 * 5 * 4096
